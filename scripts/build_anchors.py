r"""Make the anchor set that a prompt pair is trained on (section 3.2 of the paper).

Sample the responses of a model to the package's instructions, under the safe, the opposite and no system prompt, and
split them into D_HR, D_HA and D_S; the demo model (SmolLM2-135M-Instruct), then a model and instructions of your own:

    python scripts/build_anchors.py --model_name_or_path smollm2 --output_file anchors.jsonl
    python scripts/build_anchors.py --model_name_or_path org/model --dtype bfloat16 --batch_size 128 \
        --instructions harmful.jsonl near_miss.jsonl everyday.jsonl --output_file anchors.jsonl

An interrupted run goes on where it stopped if the same command is given again. The file holds harmful responses of
the model: keep it to yourself.

Instructions for another domain or language, from any model behind an OpenAI-compatible endpoint:

    export OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none
    python scripts/build_anchors.py --generate 200 --kind harmful --generator org/generator --language German \
        --output_file harmful.jsonl
    python scripts/build_anchors.py --generate 100 --kind near-miss --generator org/generator --topic banking \
        --existing harmful.jsonl --output_file near_miss.jsonl

`acd-logits anchors` is the same command, installed.
"""

import sys

from acd_logits.cli import anchors, run_script

if __name__ == "__main__":
    sys.exit(run_script(anchors, __doc__))
