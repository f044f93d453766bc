#!/usr/bin/env bash
# Measure the demo model and its pair on 50 harmful requests and 50 that only sound harmful (about ten minutes on two cores).
# Further arguments are added to the command. A short trial goes into a folder of its own, because all answers in a folder
# have one length limit: examples/evaluate.sh --output_dir trial --limit 2 --max_new_tokens 8
set -euo pipefail
acd-logits evaluate --output_dir results --max_new_tokens 64 --batch_size 50 "$@"
