"""One call of the model's forward under ACD: what may be in it, and what is."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

CACHE_NAMES = ("past_key_values", "cache_params")

# What a paired forward may carry besides non-tensors; any other tensor would need a meaning in the other stream
_PAIRABLE = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "logits_to_keep", *CACHE_NAMES}


class PairedCall(dict[str, Any]):
    """Keyword arguments of a paired forward. Torch hands this very object to the forward hook.

    Args:
        call: the arguments of the call of B rows.
        cache: the `PairedCache` that pairs it.
        name: the argument that carries the cache.
        new: visible tokens of the call.
    """

    def __init__(self, call: dict[str, Any], cache: Any, name: str, new: int) -> None:
        super().__init__(call)
        self.cache, self.name, self.new = cache, name, new

    def static(self) -> dict[str, Any]:
        """The same call with the mask over all slots of a static cache, whose shape stays the same at every token."""
        model = self.cache.streams.model
        x = self["input_ids"] if self.get("input_ids") is not None else self["inputs_embeds"]
        make_masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        mask = make_masks(
            config=model.config,
            inputs_embeds=torch.empty(*x.shape[:2], 0, dtype=model.dtype, device=x.device),
            attention_mask=self["attention_mask"],
            past_key_values=self[self.name],
            position_ids=self.get("position_ids"),
        )
        return dict(self) | {"attention_mask": mask}


def check_pairable(call: dict[str, Any]) -> None:
    """Raise ValueError for an input that has no meaning in the second stream."""
    for key, value in call.items():
        if key not in _PAIRABLE and _holds_tensor(value):
            raise ValueError(f"ACD cannot pair the model input {key!r}: leave it out.")
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
        raise ValueError("ACD needs a 2-dimensional attention_mask of shape [batch, tokens].")
    if positions is not None and positions.ndim != 2:
        raise ValueError("ACD supports one position per token, not position_ids with several axes (multimodal RoPE).")


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return isinstance(value, torch.Tensor)
    return any(_holds_tensor(item) for item in value)
