"""One soft prompt: the tensor it must be, and as a stock peft adapter on disk.

Embeddings are a prompt-tuning adapter. Keys and values are a cartridge, whose tensor `[n, layers * 2 * token_dim]` is
ours with its last dimensions as one. peft's own use of a cartridge differs from ours in two ways: the whole input sees
the prompt, and stands n positions further away from it, since peft counts the prompt's slots as positions 0 to n - 1.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

import torch
from peft import CartridgeConfig, PromptTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftConfig

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHT = "prompt_embeddings"  # peft's name for the tensor of a prompt-tuning adapter
# By the kind of prompts: peft's name for the method, and the word for it
_METHODS = {"embedding": ("PROMPT_TUNING", "prompt-tuning"), "key_value": ("CARTRIDGE", "cartridge")}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch stores float8 but cannot compute in it


def prompt_sizes(prompt: torch.Tensor) -> dict[str, int]:
    """What a soft prompt's shape says of its model; the names tell the two kinds of prompts apart."""
    if prompt.ndim == 2:
        return {"hidden_size": prompt.shape[1]}
    return {"num_layers": prompt.shape[1], "num_key_value_heads": prompt.shape[3], "head_dim": prompt.shape[4]}


def checked_prompt(name: str, prompt: torch.Tensor) -> torch.Tensor:
    """A copy of a soft prompt.

    Args:
        name: the stream.
        prompt: embeddings `[n, hidden_size]`, or keys and values `[n, layers, 2, kv_heads, head_dim]`.

    Raises:
        ValueError: it is no such float tensor, or not finite.
    """
    _check_shape(name, prompt, (2, 5))
    layers = prompt.isfinite().transpose(0, 1).flatten(1).all(1)
    if not layers.all():
        place = f" in layer {int(layers.long().argmin())}" if prompt.ndim == 5 else ""
        raise ValueError(
            f"the {name} prompt holds NaN or infinite values{place}: its training diverged, train it again."
        )
    return prompt.detach().clone()  # later changes to the caller's tensor are not ours


def _check_shape(name: str, prompt: torch.Tensor, dims: tuple[int, ...]) -> None:
    plain = isinstance(prompt, torch.Tensor) and prompt.layout == torch.strided and not prompt.is_meta
    shaped = plain and prompt.ndim in dims and 0 not in prompt.shape[1:] and (prompt.ndim == 2 or prompt.shape[2] == 2)
    if not shaped or prompt.dtype not in _DTYPES:
        got = type(prompt).__name__
        if isinstance(prompt, torch.Tensor):
            got = f"{list(prompt.shape)} of {prompt.dtype} ({prompt.layout}, {prompt.device})"
        other = ", or [num_virtual_tokens, layers, 2, kv_heads, head_dim]" if 5 in dims else ""
        raise ValueError(
            f"the {name} prompt must be a float tensor [num_virtual_tokens, hidden_size]{other} (float16, bfloat16, "
            f"float32 or float64), got {got}."
        )


def load_adapter(folder: Path, prompt_type: str = "embedding") -> torch.Tensor:
    """Read a soft prompt.

    Args:
        folder: the stream's folder.
        prompt_type: the kind of prompts that it must be of.

    Returns:
        Embeddings `[n, hidden_size]`, or keys and values `[n, layers, 2, kv_heads, head_dim]`.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: a file holds something else.
    """
    config_file, weights = (folder / name for name in ADAPTER_FILES)
    if not weights.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise OSError(f"{pickled} is pickled, which can run code when loaded: save the adapter as safetensors.")
        raise OSError(f"the pair has no {folder.name}/{weights.name} (weights are read from safetensors only).")
    if not config_file.is_file():
        raise OSError(f"the pair has no {folder.name}/{config_file.name}.")
    config = read_json(config_file)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{config_file} names no peft_type: save the adapter with peft again.")
    method, word = _METHODS[prompt_type]
    if config["peft_type"] != method:
        kind = " ".join(config["peft_type"].split())
        raise ValueError(f"{config_file} is a {kind} adapter, not a {word} one.")
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{weights} is damaged ({error}): download or save the pair again.") from None
    if set(tensors) != {_WEIGHT}:
        raise ValueError(f"{weights} holds {sorted(tensors)}, expected one tensor {_WEIGHT!r}.")
    try:
        flat = tensors[_WEIGHT]
        _check_shape(folder.name, flat, (2,))
        prompt = checked_prompt(folder.name, _unflatten(flat, config) if prompt_type == "key_value" else flat)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    length = config.get("num_virtual_tokens")
    if type(length) is not int or length != len(prompt) or not length:
        raise ValueError(
            f"{weights} holds {len(prompt)} virtual tokens, its adapter_config.json says {reprlib.repr(length)}."
        )
    return prompt


def _unflatten(flat: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Keys and values as they lie in a cartridge, `[n, layers * 2 * token_dim]`."""
    sizes = [config.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")]
    layers, heads, dim = (size if type(size) is int and size > 0 else 0 for size in sizes)
    if not layers or not heads or dim % heads or flat.shape[1] != layers * 2 * dim:
        raise ValueError(
            f"its tensor is {list(flat.shape)}, and its adapter_config.json says num_layers, num_attention_heads and "
            f"token_dim {', '.join(map(reprlib.repr, sizes))}, which do not make {flat.shape[1]}."
        )
    return flat.view(len(flat), layers, 2, heads, dim // heads)


def save_adapter(folder: Path, prompt: torch.Tensor, base_model_name: str | None) -> None:
    """Write a soft prompt, of embeddings or of keys and values.

    Raises:
        ValueError: it is the null prompt, which peft has no adapter for.
    """
    if not len(prompt):
        raise ValueError(f"the {folder.name} prompt is the null prompt, which peft has no adapter for.")
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": len(prompt),
        "num_transformer_submodules": 1,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
    }
    if prompt.ndim == 2:
        # The model's shape is left open, as in a config before get_peft_model: peft fills it from the base model
        config: PeftConfig = PromptTuningConfig(token_dim=prompt.shape[1], **common)
    else:
        layers, _, heads, head_dim = prompt.shape[1:]
        config = CartridgeConfig(
            num_layers=layers, num_attention_heads=heads, token_dim=heads * head_dim, num_frozen_tokens=0, **common
        )
    config.save_pretrained(str(folder))
    save_file({_WEIGHT: prompt.flatten(1).contiguous().cpu()}, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
