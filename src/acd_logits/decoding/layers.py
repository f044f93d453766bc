"""The layers of a key-value cache: what ACD puts into one, and what it asks of a model's own."""

from __future__ import annotations

import copy
import itertools
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
    from collections.abc import Callable

    from transformers import PreTrainedModel

SPARE = 4 << 20  # bytes of spare room that a layer's keys are given without further ado, and its values

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
    _least = _limit = 0
    _buffers: KeyValues | None = None  # keys and values, with room behind
    _written: torch.Tensor | None = None  # the keys as this layer left them in there
    _between: tuple[KeyValues, int] | None = None  # see `put_between`

    def expect(self, least: int, limit: int) -> None:
        """Make ready for a call that fills `least` slots in any case, and never more than `limit`."""
        self._least, self._limit = least, limit
        if self._buffers is not None and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            self._buffers = None  # nothing may be written into them any more

    def put_between(self, key_values: KeyValues, tokens: int) -> None:
        """Let the next update put these, each `[1, heads, n, head_dim]`, in front of its last `tokens` tokens."""
        self._between = key_values, tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValues:
        """Append `[rows, heads, tokens, head_dim]` keys and values; return all.

        Raises:
            ValueError: the cache, or what is put in between, has other sizes.
        """
        if self._between is not None:
            between, tokens = self._between
            self._between = None
            key_states, value_states = (
                _join(new, put, tokens) for new, put in zip((key_states, value_states), between, strict=True)
            )
        if torch.compiler.is_compiling():  # which would compile again for every new buffer
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), key_states.shape[-2]
        if start and len(self.keys) != len(key_states):  # one row would be copied to all by broadcasting
            raise ValueError(
                f"this cache holds {len(self.keys)} rows, but the model was called with {len(key_states)}."
            )
        buffers = self._buffers
        # Keys that were replaced from outside move into new buffers
        if buffers is None or self.keys is not self._written or start + new > buffers[0].shape[-2]:
            buffers = self._room((key_states, value_states), len(key_states), start + new)
            if start:
                buffers[0].narrow(-2, 0, start).copy_(self.keys)
                buffers[1].narrow(-2, 0, start).copy_(self.values)
        buffers[0].narrow(-2, start, new).copy_(key_states)
        buffers[1].narrow(-2, start, new).copy_(value_states)
        return self._show(buffers, start + new)

    def move(self, rows: int, length: int, write: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        """Go on with `rows` rows of `length` slots in new buffers: `write(old, new)` fills keys, then values."""
        if not self.get_seq_length():
            return
        buffers = self._room((self.keys, self.values), rows, length)
        write(self.keys, buffers[0].narrow(-2, 0, length))
        write(self.values, buffers[1].narrow(-2, 0, length))
        self._show(buffers, length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select rows, and leave room behind them."""
        if self.get_seq_length():
            rows = beam_idx.to(self.device)
            self.move(len(rows), self.get_seq_length(), lambda old, new: torch.index_select(old, 0, rows, out=new))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; their room stays."""
        in_place = self.keys is self._written
        super().crop(tokens_to_remove)
        if in_place:
            self._written = self.keys

    def _room(self, like: KeyValues, rows: int, length: int) -> KeyValues:
        """Buffers of so many rows with `length` slots, and room behind.

        Room for all that the call can fill, where it is small; or else for a quarter more than there is, so that many
        tokens share the cost of the next copy.
        """
        _, heads, _, head_dim = like[0].shape
        least = max(length, self._least)
        spare = max(least // 4, SPARE // (rows * heads * head_dim * like[0].element_size()))
        slots = max(length, min(least + spare, self._limit))
        keys, values = (kv.new_empty(rows, kv.shape[1], slots, kv.shape[-1]) for kv in like)
        return keys, values

    def _show(self, buffers: KeyValues, length: int) -> KeyValues:
        self._buffers = buffers
        self.keys = self._written = buffers[0].narrow(-2, 0, length)
        self.values = buffers[1].narrow(-2, 0, length)
        return self.keys, self.values


def _join(new: torch.Tensor, between: torch.Tensor, tokens: int) -> torch.Tensor:
    """New keys or values, with others in front of the last `tokens`."""
    if new.shape[1::2] != between.shape[1::2]:
        raise ValueError(
            f"the model keeps keys and values of {new.shape[1]} heads of size {new.shape[3]}, the prompt pair has "
            f"{between.shape[1]} heads of size {between.shape[3]}: use a pair made for this model."
        )
    front, back = new.split([new.shape[-2] - tokens, tokens], dim=-2)
    return torch.cat([front, between.to(new).expand(len(new), -1, -1, -1), back], dim=-2)


def keep_rows(layer: Any, rows: int) -> None:
    """Keep the first rows of a layer of the model's own, at addresses that CUDA graphs may rely on as before."""
    before = _tensors(layer)
    layer.reorder_cache(torch.arange(rows, device=getattr(layer, "device", None)))
    for old, new in zip(before, _tensors(layer), strict=True):
        if hasattr(old, "_dynamo_static_input_type"):
            torch._dynamo.mark_static_address(new)


def _tensors(layer: Any) -> list[Any]:
    """Keys, values and recurrent states."""
    states = (getattr(layer, name, {}).values() for name in ("conv_states", "recurrent_states"))
    return [getattr(layer, "keys", None), getattr(layer, "values", None), *itertools.chain(*states)]


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
