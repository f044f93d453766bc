"""What an ACD model refuses when vLLM starts, before any weight is loaded.

These checks read vLLM's configuration; `attention` checks the layers of the built model, and `models` the tensors.
"""

from __future__ import annotations

from typing import Any

from .. import __version__
from .exported import ExportedPair


def config_hook(base: Any) -> Any:
    """The class vLLM calls when it checks the configuration of `ACD<Arch>`.

    Args:
        base: the class it calls for `<Arch>`, which goes first.
    """

    class ACDConfig(base):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            base.verify_and_update_config(vllm_config)
            check_config(vllm_config)
            # A compiled model is kept on disk under a hash of the configuration, this entry included
            if isinstance(vllm_config.additional_config, dict):
                kind = vllm_config.model_config.hf_config.acd["prompt_type"]
                vllm_config.additional_config["acd_logits"] = f"{__version__} {kind}"

    return ACDConfig


def check_config(vllm_config: Any) -> None:
    """Refuse a configuration under which the contrast would be wrong or missing.

    Raises:
        ValueError: with one sentence.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if ExportedPair.of(model) is None:
        raise ValueError(f"{model.architecture} is no architecture of acd-logits: export the model again.")
    refused = {
        "pooling (--runner pooling)": model.runner_type != "generate",
        "multimodal models": model.is_multimodal_model,
        "encoder-decoder models": model.is_encoder_decoder,
        "diffusion models": model.is_diffusion,
        "multi-head latent attention (MLA)": model.use_mla,
        "Mamba and linear attention": model.is_hybrid or model.is_attention_free or model.has_inner_state,
        "models that read token ids besides embedding them": model.requires_raw_input_tokens,
        "several positions per token (multimodal RoPE)": model.uses_mrope,
        "prompt embeddings (--enable-prompt-embeds)": model.enable_prompt_embeds,
        "LoRA adapters": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV connectors": vllm_config.kv_transfer_config is not None or vllm_config.ec_transfer_config is not None,
        "KV cache offloading": vllm_config.cache_config.kv_offloading_size is not None,
        "KV sharing in the prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "expert parallelism": parallel.enable_expert_parallel or parallel.enable_eplb,
        "context parallelism": parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
        "micro-batches (--enable-dbo)": parallel.use_ubatching,
        # It would compile around the plugin; vLLM's own mode compiles the stock model inside
        "compilation mode 1 (STOCK_TORCH_COMPILE)": vllm_config.compilation_config.mode == 1,
        "returned experts": vllm_config.aux_output_config.enable_return_routed_experts,
    }
    for what, present in refused.items():
        if present:
            raise ValueError(f"ACD on vLLM does not support {what}.")
