r"""Train a prompt pair for a model: the Safeguarding Prompt, the Adversarial Prompt and their contrast, all together.

The demo model (SmolLM2-135M-Instruct), on the responses that build_anchors.py sampled from it:

    python scripts/train.py --train_file anchors.jsonl --output_dir my-pair

Another model, in bfloat16, with the paper's prompts and losses (each prompt by its own loss, no contrast), logged to
TensorBoard. Its anchors are its own responses:

    python scripts/train.py --train_file llama-anchors.jsonl --output_dir llama-pair \
        --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct --dtype bfloat16 \
        --prompt_type embedding --contrast_weight 0 --first_token_weight 0 --retain ce --ln_weight 1 --lr_weight 1 \
        --max_response_tokens 64 --max_refusal_tokens 64 --report_to tensorboard

Two GPUs, half of the batch on each:

    accelerate launch --num_processes 2 scripts/train.py --train_file anchors.jsonl --output_dir my-pair-2 \
        --per_device_train_batch_size 16

A run that was stopped goes on when the same command is given again. `acd-logits train` is the same command, installed.
"""

import sys

from acd_logits.cli import run_script, train

if __name__ == "__main__":
    sys.exit(run_script(train, __doc__))
