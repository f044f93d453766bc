"""The layers of a key-value cache: what ACD puts into one, and what it asks of a model's own."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from ..pairs.key_values import KeyValues, cache_layers, has_plain_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 64  # spare slots that a cache is given at most, each time it is copied

SLIPPED = (
    "this cache belongs to ACD, but the model's forward ran without its hooks, so no contrast was applied: "
    "call the model itself (not its submodules), with its ACDLogitsProcessor still attached."
)


class GrowingLayer(DynamicLayer):
    """A dynamic cache layer that writes new tokens into spare room, where the stock one copies itself at every token.

    Under ACD a cache holds twice the rows, and the soft prompts in front: for SmolLM2 at batch 8 on two cores, the
    copies took 8 of 89 ms per token.
    """

    keys: torch.Tensor
    values: torch.Tensor
    limit = 0  # slots that are expected at most: no spare room behind them
    _buffers: KeyValues | None = None  # keys and values, with room behind
    _written: torch.Tensor | None = None  # the keys as `update` left them

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValues:
        """Append `[rows, heads, tokens, head_dim]` keys and values; return all."""
        if torch.compiler.is_compiling():  # which would compile again for every new buffer
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        if start and len(self.keys) != len(key_states):  # one row would be copied to all by broadcasting
            raise ValueError(
                f"this cache holds {len(self.keys)} rows, but the model was called with {len(key_states)}."
            )
        stop = start + key_states.shape[-2]
        # Cropped or reordered keys are tensors of their own, and move into new buffers
        if self._buffers is None or self.keys is not self._written or stop > self._buffers[0].shape[-2]:
            room = max(stop, min(stop + SPARE, self.limit))
            self._buffers = (
                _buffer(self.keys, key_states, start, room),
                _buffer(self.values, value_states, start, room),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        self.keys, self.values = self._buffers[0][..., :stop, :], self._buffers[1][..., :stop, :]
        self._written = self.keys
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select rows. The buffers held all of them, and are given back before the next update."""
        super().reorder_cache(beam_idx)
        self._buffers = self._written = None


def _buffer(old: torch.Tensor, new: torch.Tensor, start: int, room: int) -> torch.Tensor:
    """Room for `room` tokens, with the `start` tokens of `old` in place."""
    rows, heads, _, head_dim = new.shape
    buffer = new.new_empty(rows, heads, room, head_dim)
    if start:
        buffer[..., :start, :] = old
    return buffer


class TakenLayer(CacheLayerMixin):
    """A layer of the user's cache, once ACD keeps both streams of it elsewhere: no plain forward may go on from it."""

    is_croppable = True

    def __init__(self, paired: Any) -> None:
        super().__init__()
        self.paired = paired  # the `PairedCache`

    def get_seq_length(self) -> int:
        """Number of visible tokens held."""
        return 0 if self.paired.interrupted else self.paired.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the visible tokens."""
        return self.paired.get_mask_sizes(query_length, 0)

    def get_max_length(self) -> int:
        """It has no maximum."""
        return -1

    def lazy_initialization(self, *args: Any) -> None:
        """Raise: a plain forward writes here.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(SLIPPED)

    update = lazy_initialization

    def _mark_changed(self, *args: Any) -> None:
        self.paired.interrupted = True

    # What the two streams would have to follow; the next call under ACD refuses the cache
    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = _mark_changed


def take(cache: Cache, paired: Any) -> None:
    """Leave the user's cache as a handle on `paired`, which holds its layers from now on."""
    cache.layers = [TakenLayer(paired) for _ in range(paired.streams.num_layers)]


def roomier(cache: Cache, width: int, config: Any) -> Cache:
    """The cache to use inside for one `generate` made or was given: a static one gets `width` more slots."""
    lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    if not isinstance(cache, StaticCache) or not lengths:
        return copy.copy(cache)
    inner = StaticCache(config=config, max_cache_len=max(lengths) + width, offloading=cache.offloading)
    for old, new in zip(cache.layers, inner.layers, strict=True):
        if isinstance(old, StaticLayer) and old.is_initialized:  # ahead of a compiled prefill
            new.lazy_initialization(*(torch.cat([kv[..., :0, :]] * 2) for kv in (old.keys, old.values)))
    return inner


def is_empty(layer: Any) -> bool:
    """Whether a cache layer, of attention or of a recurrent state, holds nothing."""
    if any(getattr(layer, "has_previous_state", {}).values()):
        return False
    length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    return int(length) == 0


def reuses_prefix(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix can be computed once and stand in front of any row, padding in between."""
    # Under frequencies that change, the keys of a prefix depend on the length of the text behind it
    return has_plain_keys(model) and not changes_frequencies(model)


def changes_frequencies(model: PreTrainedModel) -> bool:
    """Whether rotary frequencies depend on the length of the text, and keys with them."""
    return bool(changes_from(model))


def changes_from(model: PreTrainedModel) -> dict[str, int]:
    """The text length behind which rotary frequencies change, by the type of the embeddings that do so."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    # One dict, or one for each kind of layer
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {
        kind["rope_type"]: int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    }


def reach(model: PreTrainedModel) -> float:
    """How many tokens behind a soft prompt its influence ends; infinite unless every layer has a sliding window.

    A layer of window w carries it w - 1 tokens further, so n layers carry it n * (w - 1) tokens.
    """
    layers = cache_layers(model)
    if not layers or not all(type(layer) is DynamicSlidingWindowLayer for layer in layers):
        return math.inf
    return sum(layer.sliding_window - 1 for layer in layers)
