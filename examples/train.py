r"""Train a prompt pair for the demo model: make the anchor data, then train both prompts.

python examples/train.py

This takes more than an hour on two cores. A trial run, which shows that everything works and trains nothing useful:

python examples/train.py --folder trial --instructions_per_kind 4 --max_new_tokens 4 --max_steps 1 \
    --num_virtual_tokens 4

The trial has a folder of its own, because a folder continues with its own settings only. A run that was stopped
continues if it is started again. The anchor data hold harmful responses: keep them to yourself.
"""

import argparse
from pathlib import Path

from acd_logits import load_demo_model
from acd_logits.anchors import SamplingSettings, build_anchors, load_instructions
from acd_logits.training import OPOArguments, OPOTrainingArguments, load_model, prepare, train_pair

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--folder", type=Path, default=Path("my-pair"))
parser.add_argument("--instructions_per_kind", type=int, help="default: all")
parser.add_argument("--max_new_tokens", type=int, default=24)
parser.add_argument("--max_steps", type=int, default=-1, help="default: as many as three epochs have")
parser.add_argument("--num_virtual_tokens", type=int, help="default: 64")
args = parser.parse_args()

# The anchor data: the model's own responses, sorted into refusals, harmful answers and safe answers
anchors_file = args.folder / "anchors.jsonl"
if not anchors_file.exists():
    model, tokenizer = load_demo_model()
    by_kind = {}
    for instruction in load_instructions():
        by_kind.setdefault(instruction["kind"], []).append(instruction)
    build_anchors(
        model,
        tokenizer,
        anchors_file,
        instructions=[row for rows in by_kind.values() for row in rows[: args.instructions_per_kind]],
        # SmolLM2 ignores its system prompt: one response per instruction is enough, and the likeliest one
        settings=SamplingSettings(
            system_prompts=("null",), batch_size=64, max_new_tokens=args.max_new_tokens, temperature=0.0
        ),
        own_refusals=False,
        answer_safe=True,
    )

# Both prompts, and their contrast
options = OPOArguments(
    train_file=str(anchors_file),
    num_virtual_tokens=args.num_virtual_tokens,
    held_out_fraction=0 if args.instructions_per_kind else 0.15,
)
arguments = OPOTrainingArguments(output_dir=str(args.folder), max_steps=args.max_steps, report_to="none")
run = prepare(options, arguments)
pair = train_pair(load_model(run), run)
print(f"{args.folder}: {pair}")
