r"""Turn a pair's contrast into one prompt that stock peft runs in a single stream.

The demo model's pair, on the prompts of the anchor set that build_anchors.py sampled:

    python scripts/distil.py --pair smollm2-135m-instruct --train_file anchors.jsonl --output_dir distilled

A tenth of the prompts, with the pair's likeliest tokens, by total variation:

    python scripts/distil.py --pair my-pair --train_file anchors.jsonl --output_dir distilled \
        --max_prompts 500 --temperature 0 --divergence total_variation

A run that was stopped goes on when the same command is given again. `acd-logits distil` is the same command,
installed.
"""

import sys

from acd_logits.cli import distil, run_script

if __name__ == "__main__":
    sys.exit(run_script(distil, __doc__))
