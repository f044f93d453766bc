"""The paired forward: both streams of ACD in one forward pass of 2B rows.

`generate()` works on B rows and never learns that there are two streams. Three pieces make that so:

1. `PairedCache` stands in for the cache `generate` made. It shows the B rows and the tokens the user sees, and holds
   the 2B rows [SP; x] and [AP; x] inside, in the order S rows, A rows. Every operation `generate` has on a cache
   (reorder, crop, repeat, select) is translated. All state of a call lives in it, so there are no globals and no
   thread-locals, and one processor serves several threads.
2. A forward pre-hook on the model (`attach.py`) turns a call that carries a `PairedCache` into a call of 2B rows over
   the inner cache, and a forward hook hands back the S rows, keeping the A rows' logits for the processor. A call
   without a `PairedCache` passes through untouched. Hooks, rather than a new `forward`, leave the model's signature,
   accelerate's device hooks and a compiled forward as they are.
3. `PairedStreams` (`streams.py`) holds what outlives a call: the two soft prompts and their keys and values.

Every forward whose logits choose a token owes a contrast (`owed.py`): what comes next raises unless the processor has
asked for it.

Where the soft prompts stand in a row, merged with its x or reused by all rows, is the subject of `layout.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from ..pairs.key_values import cache_layers
from .call import PairedCall, check_pairable
from .layers import SLIPPED, GrowingLayer, TakenLayer, keep_rows
from .layout import TAKE_ADDITIVE, aligned, hide, paired_mask, paired_pattern, place_prompts
from .owed import Owed

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.utils import ModelOutput

    from .streams import PairedStreams

_LONG = 6400  # a prefill of at least sqrt(_LONG * W) tokens is long


class PairedCache(Cache):
    """The cache of one `generate` call (or of several turns) under ACD: B rows outside, 2B rows inside.

    Args:
        streams: the soft prompts and the model they belong to.
        inner: the empty cache to fill, or `None` for `use_cache=False`, where every forward starts from nothing.
    """

    is_compileable = False  # generate would make masks of B rows; what it compiles is the call inside

    def __init__(self, streams: PairedStreams, inner: Cache | None) -> None:
        self.streams = streams
        self.inner = inner
        self.reuses = bool(
            inner is not None
            and streams.reusable
            and all(type(layer) in (DynamicLayer, StaticLayer) for layer in inner.layers)
        )
        self.grows = self.reuses and isinstance(inner, DynamicCache) and not inner.offloading
        self.seen = self.prompt_length = self.max_length = 0
        self.reset()

    def begin_call(
        self, prompt_length: int, max_length: int, offset: int, horizon: int | None, prompt_mask: torch.Tensor | None
    ) -> None:
        """Set what belongs to one `generate` call.

        Args:
            prompt_length: visible tokens the prefill ends with, earlier turns included.
            max_length: visible tokens the call ends with at the latest.
            offset: visible tokens that are not in generate's `input_ids` (a prompt given as embeddings, say).
            horizon: contrast the first `horizon` new tokens only; `None` for all.
            prompt_mask: `[B, prompt_length]` attention mask, or `None` where nothing is padded.
        """
        if self.alone:
            raise ValueError(
                "this cache went past the horizon of an earlier call and holds the safeguarding stream only: "
                "start the conversation again without past_key_values."
            )
        self.prompt_length, self.max_length, self.offset, self.horizon = prompt_length, max_length, offset, horizon
        self._limit_layers()
        self._pattern: torch.Tensor | None = None  # see `_make_pattern`
        # [B]: left padding of x
        self.pads: torch.Tensor | None = None if prompt_mask is None else (prompt_mask.cumsum(-1) == 0).sum(-1)
        self.longest_pad = 0 if self.pads is None else int(self.pads.max())
        self.owed = Owed(prompt_length, offset)

    def is_intact(self) -> bool:
        """Whether the inner cache holds what this object knows of: no crop, reset or exception came in between."""
        if self.interrupted or self.inner is None:
            return not self.interrupted
        attention = [layer for layer in self.inner.layers if isinstance(layer, DynamicLayer | StaticLayer)]
        if not self.seen:  # no soft prompts either
            return not any(int(layer.get_seq_length()) for layer in attention)
        rows, length = self._size()  # a quantised layer may hold no keys as they are
        filled = [layer for layer in attention if layer.is_initialized]  # not those of cross-attention
        return all(int(layer.get_seq_length()) == length and len(layer.keys) in (rows, 0) for layer in filled)

    # ----- what generate sees -----

    @property
    def layers(self) -> list[Any]:
        """The inner cache's layers (2B rows)."""
        return self.inner.layers if self.inner is not None else []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of visible tokens held."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the visible tokens."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything held."""
        self.alone = False  # True once the adversarial rows are dropped
        self.restart()
        self.begin_call(0, 0, 0, None, None)

    def restart(self) -> None:
        """Forget the tokens held, to run the same call's text once more from its first token."""
        if self.inner is not None and self.grows:
            self.inner.layers = [GrowingLayer() for _ in range(self.streams.num_layers)]
            self._limit_layers()
        elif isinstance(self.inner, DynamicCache) and self.seen:
            self.inner.layers = cache_layers(self.streams.model)
        elif self.inner is not None and self.inner.layers:
            self.inner.reset()
        self.rows = 0
        self.seen = 0
        self.interrupted = False  # True while a forward runs, and for ever if it raised

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the rows that live on in beam search, `[B]`."""
        self._for_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))
        if self.inner is not None:
            self.inner.reorder_cache(self._both(beam_idx))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` visible tokens (a value of 0 or less, as in transformers).

        Raises:
            ValueError: for a positive number, or where another row's padding would be cropped.
        """
        tokens_to_remove = int(tokens_to_remove)  # older transformers pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens, got {tokens_to_remove}.")
        if tokens_to_remove and not self.reuses and 0 < self.seen + tokens_to_remove < self.longest_pad:
            raise ValueError(
                f"a padded prompt of {self.longest_pad} padding tokens cannot be cropped to "
                f"{self.seen + tokens_to_remove} tokens: start again without past_key_values."
            )
        self.owed.drop()
        if self.inner is not None:
            self.inner.crop(tokens_to_remove)
            self.seen += tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._for_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))
        self.rows, self._pattern = self.rows * repeats, None
        if self.inner is not None:
            self.inner.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows only."""
        both = self._both(indices)
        self._for_rows(lambda rows: rows[indices.to(rows.device)])
        self.rows, self._pattern = len(both) * self.rows // self._size()[0], None
        if self.inner is not None:
            self.inner.batch_select_indices(both)

    def _for_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection of visible rows to what is kept of each."""
        self.pads = None if self.pads is None else select(self.pads)
        self.owed.select(select)

    def activate_past_recording(self) -> None:
        """Keep states that a later `crop` may need; generate calls it where it drafts candidates."""
        if self.inner is not None:
            self.inner.activate_past_recording()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a forward that writes here has slipped past the hooks.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(SLIPPED)

    update_conv_state = update_recurrent_state = update_indexer = has_previous_state = update

    # ----- the paired forward -----

    def pair(self, call: dict[str, Any], name: str) -> PairedCall:
        """The call of 2B rows for a call of B rows.

        Args:
            call: keyword arguments of the model's forward.
            name: the argument that carries this cache.

        Raises:
            ValueError: for an input that has no meaning in the second stream.
        """
        key, seen, positions = self._start(call)
        x, new = call[key], call[key].shape[1]
        merges = self._merges(seen, new)
        if not seen and not merges:
            self._write_prompts(x.device)

        paired = PairedCall(call, cache=self, name=name, new=new)
        paired.update({"return_dict": True, name: self.inner})
        steps = bool(seen) and new == 1 and self.grows and self.streams.attention in TAKE_ADDITIVE
        make_mask = self._step_mask if steps else self._mask
        paired["attention_mask"] = make_mask(call.get("attention_mask"), seen + new, x.device)
        if name == "cache_params" and seen:
            paired["attention_mask"] = None  # a recurrent state has no slots left to mask
        positions = self._join([positions + length for length in self._lengths()])
        if merges:  # some of these slots hold soft prompt: the whole call goes through embeddings
            embeds, positions = self._merge_prompts(call, positions, seen, seen + new)
            paired["input_ids"], paired["inputs_embeds"] = None, embeds
            kept = call.get("logits_to_keep")
            if isinstance(kept, torch.Tensor) and not seen:
                paired["logits_to_keep"] = torch.where(kept < 0, kept, kept + self.streams.width)
        else:
            paired[key] = self._each(x)
        if self.streams.takes_positions:
            paired["position_ids"] = positions
        return paired

    def _start(self, call: dict[str, Any]) -> tuple[str, int, torch.Tensor]:
        """Check a forward of B rows and make ready for it.

        Returns:
            The argument that carries x, how many visible tokens are held, and the position ids of x, `[B, tokens]`.
        """
        check_pairable(call)
        self.owed.check()
        key = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
        rows, new = call[key].shape[:2]
        if self.rows and self.inner is not None and rows != self.rows:
            raise ValueError(f"this cache holds {self.rows} rows, but the model was called with {rows}.")
        self.rows = rows
        self.interrupted = True  # from here on, until `_finish`, this object and the inner cache change
        self._drop_adversarial_rows(call)
        seen = self.seen if self.inner is not None else 0
        positions, mask = call.get("position_ids"), call.get("attention_mask")
        if positions is None and mask is not None:  # as generate counts them
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen : seen + new]
        elif positions is None:
            positions = torch.arange(seen, seen + new, device=call[key].device)[None]
        return key, seen, positions.expand(rows, new)

    def _finish(self, call: PairedCall, kept: int, adversarial: torch.Tensor | None) -> None:
        """Note a forward with logits of its `kept` last positions, the adversarial ones `[B, kept, vocab]`."""
        if self.inner is not None:
            self.seen += call.new
            self._check_filled()
        self.owed.note(self.seen if self.inner is not None else call.new, kept, adversarial)
        self.interrupted = False

    def _check_filled(self) -> None:
        layers = (layer for layer in self.layers if isinstance(layer, DynamicLayer))
        first = next(layers, None)
        if first is not None and first.get_seq_length() != self._slots_for(self.seen):
            raise RuntimeError(
                f"the forward of {type(self.streams.model).__name__} did not fill the cache it was given: it keeps "
                "its state elsewhere, which ACD cannot follow, or gradient checkpointing turns the cache off, which "
                "model.eval() before generate() mends."
            )

    def split(self, output: ModelOutput, call: PairedCall) -> ModelOutput:
        """Hand back the S rows of an output of 2B rows, and keep the A rows' logits."""
        both = output.logits[:, -call.new :]
        for key, value in output.items():
            output[key] = self._visible(value, call.new)
        output["logits"] = both[: self.rows]
        if self.inner is not None:
            output[call.name] = self
        self._finish(call, both.shape[1], None if self.alone else both[self.rows :])
        return output

    def must_restart(self, length: int) -> bool:
        """Whether a text of `length` visible tokens has other rotary frequencies than the keys held."""
        limit, width = self.streams.switches_at, self.streams.width
        return limit is not None and self.seen > 0 and self.seen + width <= limit < length + width

    # ----- rows, slots, masks -----

    def _size(self) -> tuple[int, int]:
        """Rows and slots of the inner cache."""
        return len(self._lengths()) * self.rows, self._slots_for(self.seen)

    def _slots_for(self, visible: int) -> int:
        """Slots of the inner cache that hold so many visible tokens."""
        return self.streams.width + visible

    def _limit_layers(self) -> None:
        """Let the layers grow to what this call can fill; its last token never enters them."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.expect(self._slots_for(self.prompt_length), self._slots_for(self.max_length - 1))

    def _lengths(self) -> tuple[int, ...]:
        return self.streams.lengths[:1] if self.alone else self.streams.lengths

    def _fill_slots(self) -> bool:
        """Whether every stream's soft prompt fills all W slots."""
        return all(n == self.streams.width for n in self._lengths())

    def _each(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat `[B, ...]` for every stream that still runs."""
        return self._join([tensor] * len(self._lengths()))

    def _join(self, streams: list[torch.Tensor]) -> torch.Tensor:
        """One tensor of all inner rows from one of each stream's."""
        return torch.cat(streams) if len(streams) > 1 else streams[0]

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        """Inner rows of the given visible rows (indices, or a mask)."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        return rows if self.alone else torch.cat([rows, rows + self.rows])

    def _soft_end(self, device: torch.device) -> torch.Tensor | int:
        """Slot behind each visible row's soft prompt, which moves right over x's left padding; `[B, 1]` or one."""
        if self.reuses or self.pads is None:
            return self.streams.width
        return self.pads.to(device)[:, None] + self.streams.width

    def _mask(self, visible: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor | None:
        """Attention mask `[rows, W + length]` over soft prompts and visible tokens; `None` where all is visible."""
        width = self.streams.width
        # Without a cache as well as a mask, transformers takes positions with a gap for several texts in one row
        if visible is None and self.inner is not None and self._fill_slots():
            return None
        if visible is None:
            visible = torch.ones(self.rows, length, dtype=torch.bool, device=device)
        mask = paired_mask(visible, self._lengths(), width, self._soft_end(device))
        if isinstance(self.inner, StaticCache) and not self.streams.takes_positions:
            # Bloom builds its ALiBi distances, and with them the key length, from the mask
            mask = torch.nn.functional.pad(mask, (0, max(0, self.inner.get_max_length() - width - length)))
        return mask

    def _step_mask(self, visible: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor | None:
        """What the last of `length` visible tokens sees, `[rows, 1, 1, W + length]`; `None` where that is all."""
        if visible is None and self._fill_slots():
            return None
        slots = self.streams.width + length
        dtype = next(layer.keys.dtype for layer in self.layers if layer.is_initialized)  # not those of cross-attention
        mask = self._pattern_for(slots, dtype, device)
        if visible is not None:
            mask = mask[:, : aligned(slots)].clone()
            x = mask.unflatten(0, (-1, self.rows))[..., self.streams.width : slots]
            hide(x, visible == 0)
        return mask[:, None, None, :slots]

    def _pattern_for(self, slots: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What is hidden from each stream whatever is padded, over at least so many slots; made once per call."""
        if self._pattern is None or self._pattern.shape[-1] < slots:
            room = max(slots, self._slots_for(self.max_length - 1))
            self._pattern = self._make_pattern(room, dtype, device)
        return self._pattern

    def _make_pattern(self, slots: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Additive mask `[rows, slots]`."""
        pattern = paired_pattern(self._lengths(), self.streams.width, slots, dtype, device)
        return pattern.repeat_interleave(self.rows, 0)

    def _merges(self, seen: int, new: int) -> bool:
        """Whether soft prompts run within a forward of `new` tokens behind `seen`, instead of being stored already."""
        if seen:
            return not self.reuses and seen < self.longest_pad
        if not self.reuses:
            return True
        if self.rows == 1 and not self.streams.frozen:
            return True
        # Behind stored keys sdpa takes a mask, and computes the half of the square that it skips without one: in a
        # long forward that costs more than the soft prompts
        unmasked = not self.longest_pad and self._fill_slots()
        return unmasked and self.streams.attention == "sdpa" and new**2 >= _LONG * self.streams.width

    def _write_prompts(self, device: torch.device) -> None:
        """Fill the W prompt slots of every row from the stored keys and values (reused layout)."""
        assert self.inner is not None
        for index, layer in enumerate(self.streams.key_values(device)):
            if layer is not None and layer[0].shape[-2]:
                streams = (kv[: len(self._lengths())] for kv in layer)
                self.inner.update(*(kv.repeat_interleave(self.rows, 0) for kv in streams), index)

    def _merge_prompts(
        self, call: dict[str, Any], positions: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and positions with the soft prompts in their slots (merged layout).

        Covers slots `W + start` to `W + stop`, and the first W slots too where `start` is 0.
        """
        width, end = self.streams.width, self._soft_end(positions.device)
        x = call.get("inputs_embeds")
        if x is None:
            x = self.streams.model.get_input_embeddings()(call["input_ids"])
        lead = 0 if start else width
        embeds = torch.nn.functional.pad(self._each(x), (0, 0, lead, 0))
        positions = torch.nn.functional.pad(positions, (lead, 0))
        prompts = self.streams.prompts[: len(self._lengths())]
        reach = lead + min(stop, self.longest_pad) - start  # no soft prompt stands behind the longest padding
        place_prompts(embeds, positions, prompts, width + start - lead, end, reach)
        return embeds, positions

    def _drop_adversarial_rows(self, call: dict[str, Any]) -> None:
        """Past the horizon, go on with the S rows alone, at plain cost."""
        if self.horizon is None or self.alone:
            return
        if self.inner is None:
            new_tokens = call["input_ids"].shape[1] - self.prompt_length
        else:
            new_tokens = self.seen + 1 - self.prompt_length
        if new_tokens >= self.horizon:
            self.alone, self._pattern = True, None
            self._limit_layers()
            for layer in self.layers:
                self._keep_safeguarding(layer)

    def _keep_safeguarding(self, layer: Any) -> None:
        """Drop what belongs to the adversarial stream from a layer of the inner cache."""
        if isinstance(layer, GrowingLayer):
            layer.move(self.rows, self._slots_for(self.seen), lambda old, new: new.copy_(old[: self.rows]))
        else:
            keep_rows(layer, self.rows)

    def _visible(self, value: Any, new: int) -> Any:
        """S rows and visible tokens of an output: hidden states `[rows, slots, h]`, attentions `[rows, h, q, k]`."""
        if isinstance(value, tuple):
            return tuple(self._visible(item, new) for item in value)
        if not isinstance(value, torch.Tensor) or value.shape[0] != len(self._lengths()) * self.rows:
            return value
        value = value[: self.rows]
        if value.ndim == 4:
            visible = self.seen + new if self.inner is not None else new
            soft = value.shape[-1] - visible  # keys of soft prompts, some or all of which a window has lost
            return value[:, :, -new:, min(max(soft, 0), self.streams.width) :]
        return value[:, -new:] if value.ndim == 3 else value


def known_cache(cache: Any) -> PairedCache | None:
    """The `PairedCache` itself, or the one that an earlier call has put behind a cache of the user's."""
    layer = next(iter(getattr(cache, "layers", ())), None)
    return cache if isinstance(cache, PairedCache) else layer.paired if isinstance(layer, TakenLayer) else None
