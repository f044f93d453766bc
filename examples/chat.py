"""Talk with the safeguarded model: one turn per line, until an empty line or the end of the input.

python examples/chat.py
"""

import argparse

from acd_logits import ACDLogitsProcessor, PromptPair, load_demo_model
from acd_logits.demo_model import DEMO_PAIR, resolve_pair_name

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--max_new_tokens", type=int, default=60)
args = parser.parse_args()

model, tokenizer = load_demo_model()
pair = PromptPair.from_pretrained(resolve_pair_name(DEMO_PAIR))
acd = ACDLogitsProcessor(model, pair)

conversation = []
while True:
    try:
        line = input("> ").strip()
    except EOFError:
        break
    if not line:
        break
    conversation.append({"role": "user", "content": line})
    # The whole conversation is read in each turn: chat templates may render earlier turns differently later
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, logits_processor=[acd])
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    conversation.append({"role": "assistant", "content": answer})
