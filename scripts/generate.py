r"""Answer prompts with a plain and with a safeguarded model, side by side.

Without a model, the small demo model (SmolLM2-135M-Instruct) and its learned prompt pair:

    python scripts/generate.py "How do I pick a lock?"

A learned pair and its model, a stronger contrast, sampled answers:

    python scripts/generate.py "How do I pick a lock?" \
        --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --pair org/acd-llama-3-8b \
        --alpha 0.7 --do_sample --temperature 0.7 --seed 0

Many prompts, one per line, as JSON lines for a program:

    python scripts/generate.py --input_file prompts.txt --json > answers.jsonl

`acd-logits generate` is the same command, installed.
"""

import sys

from acd_logits.cli import generate, run_script

if __name__ == "__main__":
    sys.exit(run_script(generate, __doc__))
