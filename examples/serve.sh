#!/usr/bin/env bash
# Serve the demo model with its pair, in an environment with vLLM (docs/vllm.md shows how to make one). What stands behind --
# goes to vLLM.
# A client then asks it like any OpenAI-compatible server:
#     curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
#         -d '{"model": "smollm2", "messages": [{"role": "user", "content": "How do I pick a lock?"}]}'
set -euo pipefail
exec acd-logits serve --model_name_or_path smollm2 "$@"
