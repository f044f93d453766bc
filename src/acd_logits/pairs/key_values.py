"""Keys and values of soft prompts: which models have plain ones, and how embeddings become them.

Key-value prompts are such keys and values, learned or computed once: `[n, layers, 2, kv_heads, head_dim]`, keys (after
rotation at the positions -n to -1) before values. They need a shared instruction, see `decoding/shared.py`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KeyValues = tuple[torch.Tensor, torch.Tensor]


def cache_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of a dynamic cache of the model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True)).layers


def has_plain_keys(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all keys by their positions, wherever they stand in the cache."""
    return (
        "position_ids" in inspect.signature(model.forward).parameters
        and all(type(layer) is DynamicLayer for layer in cache_layers(model))
        # Models off transformers' standard masks may measure distances in slots
        and bool(getattr(model, "_supports_attention_backend", False))
    )


def check_shareable(model: PreTrainedModel, key_value: bool = False) -> None:
    """Raise ValueError for a model whose keys depend on more than the token and its position.

    Args:
        model: the model.
        key_value: whether it is to run key-value prompts, which need keys and values of one size in every layer.
    """
    needs, stands, cure = "share_instruction_kv needs", "share_instruction_kv puts the soft prompts", "leave it out"
    if key_value:
        needs, stands, cure = "key-value prompts need", "key-value prompts stand", "use embedding prompts"
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    if not rotary or not has_plain_keys(model):
        raise ValueError(f"{name} has no rotary embeddings over full attention, which {needs}: {cure}.")
    if key_value and not _has_like_layers(config):
        raise ValueError(f"{name} has no keys and values of one size in every layer, which {needs}: {cure}.")
    if "llama_4_scaling_beta" in config.rope_parameters:
        raise ValueError(
            f"{name} scales its queries by the logarithm of the position, and {stands} at negative positions: {cure}."
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{needs} a mask of its own, which {config._attn_implementation} attention does not "
            "take: load the model with attn_implementation='sdpa'."
        )


def _has_like_layers(config: PretrainedConfig) -> bool:
    latent = getattr(config, "kv_lora_rank", None)  # keys and values differ in size
    return not latent and not getattr(config, "cross_attention_layers", None)


def key_value_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Number of layers, of key-value heads and size of a head; empty for a model that `check_shareable` refuses."""
    config = config.get_text_config(decoder=True)
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int) or not _has_like_layers(config):
        return {}
    return {
        "num_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or queries,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // queries,
    }


def prompt_key_values(model: PreTrainedModel, prompts: torch.Tensor, start: int = 0) -> list[KeyValues | None]:
    """What a model computes for soft prompts that stand alone.

    Args:
        model: the model.
        prompts: embeddings, `[rows, n, hidden_size]`, where the model takes its input.
        start: position of their first token.

    Returns:
        Keys and values per layer, each `[rows, kv_heads, n, head_dim]`. A layer that keeps none (cross-attention,
        without an image) has `None`.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    rows, length = prompts.shape[:2]
    # A null prompt has no keys: run one token for their shape and crop it off again
    token = model.get_input_embeddings()(torch.zeros(rows, 1, dtype=torch.long, device=prompts.device))
    embeds = prompts.to(token, copy=True) if length else token  # a model may write into what it is given
    parameters = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    if "position_ids" in parameters:
        options["position_ids"] = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **options)
    if not length:
        cache.crop(-1)
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]


@torch.no_grad()
def embeddings_to_key_values(model: PreTrainedModel, prompt: torch.Tensor, start: int | None = None) -> torch.Tensor:
    """The key-value prompt that decodes as an embedding prompt does with a shared instruction.

    Args:
        model: the model.
        prompt: embeddings, `[n, hidden_size]`.
        start: position of their first token; default: -n, as for a shared instruction. 0 is where peft has it.

    Returns:
        Keys and values, `[n, layers, 2, kv_heads, head_dim]`, in the model's dtype and on the prompt's device.

    Raises:
        ValueError: the model has no plain keys and values.
    """
    check_shareable(model, key_value=True)
    layers = prompt_key_values(model, prompt[None], -len(prompt) if start is None else start)
    stacked = [torch.stack([kv[0].to(prompt.device) for kv in layer]) for layer in layers if layer is not None]
    return torch.stack(stacked).permute(3, 0, 1, 2, 4).contiguous()
