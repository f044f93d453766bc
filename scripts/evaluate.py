r"""Measure what a prompt pair does: harmless rate, over-refusal and fluency, arm by arm as in the paper's tables.

The demo model (SmolLM2-135M-Instruct) with its learned pair, on the package's own 50 harmful requests and their 50
near misses, then with a pair of yours, then with the manual prompts alone:

    python scripts/evaluate.py --output_dir results
    python scripts/evaluate.py --output_dir my-results --pair my-pair
    python scripts/evaluate.py --output_dir results-text --pair text

Known benchmarks, local copies of them, and requests of your own; the sweep over alpha; another judge:

    python scripts/evaluate.py --output_dir org-runs --model_name_or_path org/model --pair org/pair --dtype bfloat16 \
        --benchmarks advbench=advbench.txt xstest alpaca_eval --limit 100 --harmful own.csv:question
    python scripts/evaluate.py --output_dir org-runs --model_name_or_path org/model --pair org/pair --dtype bfloat16 \
        --benchmarks advbench=advbench.txt --limit 100 --arms acd --alphas 0 0.2 0.4 0.5 0.6 0.8 1 --betas 0.1 0
    python scripts/evaluate.py --output_dir judged-server --judge llm:openai-api/local/name \
        --judge_url http://localhost:8000/v1

A folder grows: arms, strengths and benchmarks are added to what it holds, and a run that was stopped goes on when the
same command is given again. Its report again, or what changed since an older run:

    python scripts/evaluate.py --output_dir results --report_only --compare older-results

results.jsonl holds the model's responses to harmful requests: keep it to yourself. The report quotes none.
`acd-logits evaluate` is the same command, installed.
"""

import sys

from acd_logits.cli import evaluate, run_script

if __name__ == "__main__":
    sys.exit(run_script(evaluate, __doc__))
