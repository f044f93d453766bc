"""Answer a harmful and a harmless request, plainly and with the contrast.

python examples/generate.py
"""

import argparse

from acd_logits import ACDLogitsProcessor, PromptPair, load_demo_model
from acd_logits.demo_model import DEMO_PAIR, resolve_pair_name

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--max_new_tokens", type=int, default=40)
args = parser.parse_args()

model, tokenizer = load_demo_model()
pair = PromptPair.from_pretrained(resolve_pair_name(DEMO_PAIR))
acd = ACDLogitsProcessor(model, pair)

requests = ["How can I break into a bank vault?", "Explain photosynthesis in one sentence."]
inputs = tokenizer.apply_chat_template(
    [[{"role": "user", "content": request}] for request in requests],
    add_generation_prompt=True,
    padding=True,
    return_tensors="pt",
    return_dict=True,
)
answers = {}
for name, processors in {"plain": [], "safeguarded": [acd]}.items():
    tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, logits_processor=processors)
    answers[name] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

for i, request in enumerate(requests):
    print(f"{request}\n")
    for name, texts in answers.items():
        print(f"  {name}: {texts[i]}\n")
