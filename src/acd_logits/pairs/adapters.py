"""One soft prompt: the tensor it must be, and as a stock peft prompt-tuning adapter on disk."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

import torch
from peft import PromptTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import read_json

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHT = "prompt_embeddings"  # peft's name for the tensor of a prompt-tuning adapter
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch stores float8 but cannot compute in it


def checked_prompt(name: str, prompt: torch.Tensor) -> torch.Tensor:
    """A copy of a soft prompt; raise ValueError unless it is a finite float tensor `[n, hidden_size]`."""
    plain = isinstance(prompt, torch.Tensor) and prompt.layout == torch.strided and not prompt.is_meta
    if not plain or prompt.ndim != 2 or not prompt.shape[1] or prompt.dtype not in _DTYPES:
        got = type(prompt).__name__
        if isinstance(prompt, torch.Tensor):
            got = f"{list(prompt.shape)} of {prompt.dtype} ({prompt.layout}, {prompt.device})"
        raise ValueError(
            f"the {name} prompt must be a float tensor [num_virtual_tokens, hidden_size] (float16, bfloat16, float32 "
            f"or float64), got {got}."
        )
    if not prompt.isfinite().all():
        raise ValueError(f"the {name} prompt holds NaN or infinite values: its training diverged, train it again.")
    return prompt.detach().clone()  # later changes to the caller's tensor are not ours


def load_adapter(folder: Path) -> torch.Tensor:
    """Read a soft prompt `[n, hidden_size]`.

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
    if config["peft_type"] != "PROMPT_TUNING":
        kind = " ".join(config["peft_type"].split())
        raise ValueError(f"{config_file} is a {kind} adapter, not a prompt-tuning one.")
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{weights} is damaged ({error}): download or save the pair again.") from None
    if set(tensors) != {_WEIGHT}:
        raise ValueError(f"{weights} holds {sorted(tensors)}, expected one tensor {_WEIGHT!r}.")
    try:
        prompt = checked_prompt(folder.name, tensors[_WEIGHT])
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    length = config.get("num_virtual_tokens")
    if type(length) is not int or length != len(prompt) or not length:
        raise ValueError(
            f"{weights} holds {len(prompt)} virtual tokens, its adapter_config.json says {reprlib.repr(length)}."
        )
    return prompt


def save_adapter(folder: Path, prompt: torch.Tensor, base_model_name: str | None) -> None:
    """Write a soft prompt `[n, hidden_size]`; raise ValueError for the null prompt, which peft has no adapter for."""
    if not len(prompt):
        raise ValueError(f"the {folder.name} prompt is the null prompt, which peft has no adapter for.")
    # The model's shape is left open, as in a config before get_peft_model: peft fills it from the base model
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file({_WEIGHT: prompt.contiguous().cpu()}, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
