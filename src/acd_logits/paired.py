"""The paired forward: both streams of ACD in one forward pass of 2B rows.

`generate()` works on B rows and never learns that there are two streams. Three pieces make that so:

1. `PairedCache` stands in for the cache `generate` made. It shows the B rows and the tokens the user sees, and holds
   the 2B rows [SP; x] and [AP; x] inside, in the order S rows, A rows. Every operation `generate` has on a cache
   (reorder, crop, repeat, select) is translated. All state of a call lives in it, so there are no globals and no
   thread-locals, and one processor serves several threads.
2. A forward pre-hook on the model turns a call that carries a `PairedCache` into a call of 2B rows over the inner
   cache, and a forward hook hands back the S rows, keeping the A rows' logits for the processor. A call without a
   `PairedCache` passes through untouched. Hooks, rather than a new `forward`, leave the model's signature,
   accelerate's device hooks and a compiled forward as they are.
3. `PairedStreams` holds what outlives a call: the two soft prompts and their keys and values.

Where the soft prompts sit. With W = max(n_s, n_a), the prompts occupy W slots, and x sits behind them:

    merged:   [pad | soft | x]       the row's left padding moves in front of the soft prompt
    reused:   [pad | soft | pad | x]  the W prompt slots are written from stored keys and values; x's padding stays put

Merged is exact for every architecture: nothing stands between the soft prompt and x, so sliding windows, ALiBi
distances and recurrent states come out as if the row were alone. Reused skips computing the soft prompts, which is
most of the prefill, and is exact where a masked slot in between changes nothing: full attention over standard masks,
with positions given by `position_ids`. `reuses_prefix` decides. A long x that needs no mask is merged all the same
under sdpa, which saves more without a mask than stored soft prompts do (`PairedCache._merges`).

In both layouts the visible token j has slot W + j, and a row's soft prompt ends where its first real token begins
(merged) or at slot W (reused). `PairedCache._shift` is that one difference: how far the soft prompt moves to the right
over x's left padding.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.masking_utils import create_masks_for_generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

KeyValues = tuple[torch.Tensor, torch.Tensor]

_LONG = 6400  # a prefill is long from the square root of this times W on

_SPARE = 64  # spare slots that a cache is given at most, each time it is copied

CACHE_NAMES = ("past_key_values", "cache_params")

# What a paired forward may carry besides non-tensors; any other tensor would need a meaning in the other stream
_PAIRABLE = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "logits_to_keep", *CACHE_NAMES}


class PairedStreams:
    """The two soft prompts on one model, and their keys and values, computed once for all calls that reuse them.

    Args:
        model: the decoder-only model both streams run on.
        safeguarding: SP, `[n_s, hidden_size]`.
        adversarial: AP, `[n_a, hidden_size]`.
    """

    def __init__(self, model: PreTrainedModel, safeguarding: torch.Tensor, adversarial: torch.Tensor) -> None:
        self.model = model
        self.prompts = (safeguarding, adversarial)
        self.lengths = (len(safeguarding), len(adversarial))
        self.width = max(self.lengths)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.num_layers = len(_cache_layers(model))
        self.reusable = reuses_prefix(model)
        self._lock = threading.Lock()
        self._stored: tuple[object, list[KeyValues]] | None = None

    def key_values(self, device: torch.device) -> list[KeyValues]:
        """Keys and values of both soft prompts, per layer, each `[2, heads, W, head_dim]`, left-padded with zeros.

        Computed again when the weights or the active adapters have changed since the last call.
        """
        with self._lock:
            state = _fingerprint(self.model), tuple(prompt._version for prompt in self.prompts)
            if self._stored is None or self._stored[0] != state:
                with torch.no_grad():
                    streams = [self._run_prompt(prompt, device) for prompt in self.prompts]
                    layers = [
                        (self._join(safe[0], adversarial[0]), self._join(safe[1], adversarial[1]))
                        for safe, adversarial in zip(*streams, strict=True)
                    ]
                self._stored = (state, layers)
            return self._stored[1]

    def make_cache(self, inner: Cache | None) -> PairedCache:
        """The cache of one call, as of [`PairedCache`]."""
        return PairedCache(self, inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> PairedStreams:
        return self  # a copy of a conversation's cache goes on with the same model and prompts

    def _run_prompt(self, prompt: torch.Tensor, device: torch.device) -> list[KeyValues]:
        """Keys and values of one soft prompt, per layer, each `[1, heads, n, head_dim]`."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        # A null prompt has no keys: run one token for their shape and crop it off again
        token = self.model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=device))
        embeds = prompt.to(token)[None] if len(prompt) else token
        self.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **self._positions(embeds))
        if not len(prompt):
            cache.crop(-1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _positions(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Position ids of a soft prompt, where they are not the model's own, from 0 on."""
        return {}

    def _join(self, safe: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """`[2, heads, W, head_dim]`."""
        return _stack(safe, adversarial)


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
        self.reuses = False
        if inner is not None and streams.reusable:
            self.reuses = all(type(layer) in (DynamicLayer, StaticLayer) for layer in inner.layers)
            if self.reuses and isinstance(inner, DynamicCache) and not inner.offloading:
                inner.layers = [_GrowingLayer() for _ in range(streams.num_layers)]
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
        # [B]: left padding of x
        self.pads: torch.Tensor | None = None if prompt_mask is None else (prompt_mask.cumsum(-1) == 0).sum(-1)
        self.longest_pad = 0 if self.pads is None else int(self.pads.max())
        # [B, kept, vocab]: logits of the last forward's A rows
        self.adversarial: torch.Tensor | None = None
        self.drafting = False

    def is_intact(self) -> bool:
        """Whether the inner cache holds what this object knows of: no crop, reset or exception came in between."""
        if self.interrupted or self.inner is None:
            return not self.interrupted
        attention = [layer for layer in self.inner.layers if isinstance(layer, DynamicLayer | StaticLayer)]
        if not self.seen:  # no soft prompts either
            return not any(int(layer.get_seq_length()) for layer in attention)
        rows, length = self._size()
        return all(int(layer.get_seq_length()) == length and len(layer.keys) == rows for layer in attention)

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
        if self.inner is not None and self.inner.layers:
            self.inner.reset()
        self.rows = 0
        self.seen = 0
        self.alone = False  # True once the adversarial rows are dropped
        self.interrupted = False  # True while a forward runs, and for ever if it raised
        self.last = 0  # visible length at the last kept position
        self.begin_call(0, 0, 0, None, None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Select the rows that live on in beam search, `[B]`."""
        self.pads = None if self.pads is None else self.pads.index_select(0, beam_idx.to(self.pads.device))
        if self.inner is not None:
            self.inner.reorder_cache(self._both(beam_idx))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` visible tokens (a value of 0 or less, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens, got {tokens_to_remove}.")
        self.adversarial = None  # what comes before the next forward is drafting
        if self.inner is not None:
            self.inner.crop(tokens_to_remove)
            self.seen += tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.pads = None if self.pads is None else self.pads.repeat_interleave(repeats, dim=0)
        self.rows *= repeats
        if self.inner is not None:
            self.inner.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows only."""
        both = self._both(indices)
        self.pads = None if self.pads is None else self.pads[indices]
        self.rows = len(both) * self.rows // self._size()[0]
        if self.inner is not None:
            self.inner.batch_select_indices(both)

    def activate_past_recording(self) -> None:
        """Keep states that a later `crop` may need; generate calls it where it drafts candidates."""
        self.drafting = True
        if self.inner is not None:
            self.inner.activate_past_recording()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a forward that writes here has slipped past the hooks.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "this cache belongs to ACD, but the model's forward ran without its hooks, so no contrast was applied: "
            "call the model itself (not its submodules), with its ACDLogitsProcessor still attached."
        )

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
        x = call[key]
        new = x.shape[1]
        merges = self._merges(seen, new)
        if not seen and not merges:
            self._write_prompts(x.device)

        paired = PairedCall(call, cache=self, name=name, new=new)
        paired["return_dict"] = True
        paired[name] = self.inner
        paired["attention_mask"] = self._mask(call.get("attention_mask"), seen + new, x.device)
        if name == "cache_params" and seen:
            paired["attention_mask"] = None  # a recurrent state has no slots left to mask
        positions = self._each(positions) + self._each_length(x.device)

        if merges:
            # Some of these slots hold soft prompt: the whole call goes through embeddings
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
        key = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
        rows, new = call[key].shape[:2]
        if self.rows and self.inner is not None and rows != self.rows:
            raise ValueError(f"this cache holds {self.rows} rows, but the model was called with {rows}.")
        self.rows = rows
        self.interrupted = True  # from here on, until `_finish`, this object and the inner cache change
        self._drop_adversarial_rows(call)
        seen = self.seen if self.inner is not None else 0
        positions = call.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + new, device=call[key].device)[None]
        return key, seen, positions.expand(rows, new)

    def _finish(self, call: PairedCall) -> None:
        if self.inner is not None:
            self.seen += call.new
        self.last = self.seen if self.inner is not None else call.new
        self.interrupted = False

    def split(self, output: ModelOutput, call: PairedCall) -> ModelOutput:
        """Hand back the S rows of an output of 2B rows, and keep the A rows' logits."""
        both = output.logits[:, -call.new :]
        self.adversarial = None if self.alone else both[self.rows :]
        for key, value in output.items():
            output[key] = self._visible(value, call.new)
        output["logits"] = both[: self.rows]
        if self.inner is not None:
            output[call.name] = self
        self._finish(call)
        return output

    def adversarial_logits(self, ids_length: int) -> torch.Tensor | None:
        """Adversarial logits `[B, vocab]` for the token that follows `ids_length` input ids.

        Returns:
            The logits, or `None` while a draft model or prompt lookup asks before the model itself has run.

        Raises:
            RuntimeError: if no paired forward covers that position.
        """
        if self.adversarial is None and self.drafting:
            return None
        back = self.last - self.offset - ids_length
        if self.adversarial is None or not 0 <= back < self.adversarial.shape[1]:
            raise RuntimeError(
                "ACD has no adversarial logits for this position: the decoding loop did not call the model with the "
                "cache that generate() prepared, so the contrast cannot be applied."
            )
        return self.adversarial[:, -1 - back]

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
            if isinstance(layer, _GrowingLayer):
                layer.limit = self._slots_for(self.max_length - 1)

    def _lengths(self) -> tuple[int, ...]:
        return self.streams.lengths[:1] if self.alone else self.streams.lengths

    def _fill_slots(self) -> bool:
        """Whether every stream's soft prompt fills all W slots."""
        return all(n == self.streams.width for n in self._lengths())

    def _each(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat `[B, ...]` for every stream that still runs."""
        return tensor if self.alone else torch.cat([tensor, tensor])

    def _each_length(self, device: torch.device) -> torch.Tensor:
        """Soft prompt length of every inner row, `[rows, 1]`."""
        return torch.tensor(self._lengths(), device=device).repeat_interleave(self.rows)[:, None]

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        """Inner rows of the given visible rows (indices, or a mask)."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        return rows if self.alone else torch.cat([rows, rows + self.rows])

    def _shift(self, device: torch.device) -> torch.Tensor:
        """How far each inner row's soft prompt moves right over x's left padding, `[rows, 1]`."""
        if self.reuses or not self.longest_pad:
            return torch.zeros(1, 1, dtype=torch.long, device=device)
        assert self.pads is not None
        return self._each(self.pads.to(device))[:, None]

    def _mask(self, visible: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor | None:
        """Attention mask `[rows, W + length]` over soft prompts and visible tokens; `None` where all is visible."""
        width = self.streams.width
        # Without a cache as well as a mask, transformers takes positions with a gap for several texts in one row
        if visible is None and self.inner is not None and self._fill_slots():
            return None
        if visible is None:
            visible = torch.ones(self.rows, length, dtype=torch.long, device=device)
        slots = torch.arange(width + length, device=device)
        end = width + self._shift(device)
        soft = (slots >= end - self._each_length(device)) & (slots < end)
        x = torch.nn.functional.pad(self._each(visible).bool(), (width, 0))
        mask = (soft | x).long()
        if isinstance(self.inner, StaticCache) and not self.streams.takes_positions:
            # Bloom builds its ALiBi distances, and with them the key length, from the mask
            mask = torch.nn.functional.pad(mask, (0, max(0, self.inner.get_max_length() - width - length)))
        return mask

    def _merges(self, seen: int, new: int) -> bool:
        """Whether soft prompts run within a forward of `new` tokens behind `seen`, instead of being stored already."""
        if seen:
            return not self.reuses and seen < self.longest_pad
        if not self.reuses:
            return True
        # Behind stored keys sdpa takes a mask, and computes the half of the square that it skips without one: in a
        # long forward that costs more than the soft prompts
        unmasked = not self.longest_pad and self._fill_slots()
        attention = self.streams.model.config.get_text_config(decoder=True)._attn_implementation
        return unmasked and attention == "sdpa" and new**2 >= _LONG * self.streams.width

    def _write_prompts(self, device: torch.device) -> None:
        """Fill the W prompt slots of every row from the stored keys and values (reused layout)."""
        assert self.inner is not None
        count = torch.tensor([self.rows, 0 if self.alone else self.rows], device=device)
        for index, (keys, values) in enumerate(self.streams.key_values(device)):
            if keys.shape[-2]:
                repeats = count.to(keys.device)
                self.inner.update(keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0), index)

    def _merge_prompts(
        self, call: dict[str, Any], positions: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and positions with the soft prompts in their slots (merged layout).

        Covers slots `W + start` to `W + stop`, and the first W slots too where `start` is 0.
        """
        width, device = self.streams.width, positions.device
        shift = self._shift(device)
        x = call.get("inputs_embeds")
        if x is None:
            x = self.streams.model.get_input_embeddings()(call["input_ids"])
        slots = torch.arange(width + start if start else 0, width + stop, device=device)
        lengths = self._each_length(device)
        soft = slots - (width + shift - lengths)  # index into the row's soft prompt, [rows, slots]
        in_soft = (soft >= 0) & (soft < lengths)
        lead = len(slots) - (stop - start)
        embeds = torch.nn.functional.pad(self._each(x), (0, 0, lead, 0))
        positions = torch.nn.functional.pad(positions, (lead, 0))
        positions = torch.where(in_soft, soft, torch.where(slots < width + shift, 0, positions))
        for stream, prompt in enumerate(self.streams.prompts[: len(self._lengths())]):
            rows = slice(stream * self.rows, (stream + 1) * self.rows)
            embeds[rows][in_soft[rows]] = prompt.to(embeds)[soft[rows][in_soft[rows]]]
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
            if self.inner is not None:
                self._keep_safeguarding(self.inner)
            self.alone = True
            self._limit_layers()

    def _keep_safeguarding(self, inner: Cache) -> None:
        """Drop what belongs to the adversarial stream, while `alone` does not say so yet."""
        inner.reorder_cache(torch.arange(self.rows))

    def _visible(self, value: Any, new: int) -> Any:
        """S rows and visible tokens of an output: hidden states `[rows, slots, h]`, attentions `[rows, h, q, k]`."""
        if isinstance(value, tuple):
            return tuple(self._visible(item, new) for item in value)
        if not isinstance(value, torch.Tensor) or value.shape[0] != len(self._lengths()) * self.rows:
            return value
        value = value[: self.rows]
        if value.ndim == 4:
            return value[:, :, -new:, self.streams.width :]
        return value[:, -new:] if value.ndim == 3 else value


class _GrowingLayer(DynamicLayer):
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
            room = max(stop, min(stop + _SPARE, self.limit))
            self._buffers = (
                _buffer(self.keys, key_states, start, room),
                _buffer(self.values, value_states, start, room),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = new
        self.keys, self.values = self._buffers[0][..., :stop, :], self._buffers[1][..., :stop, :]
        self._written = self.keys
        return self.keys, self.values


def _buffer(old: torch.Tensor, new: torch.Tensor, start: int, room: int) -> torch.Tensor:
    """Room for `room` tokens, with the `start` tokens of `old` in place."""
    rows, heads, _, head_dim = new.shape
    buffer = new.new_empty(rows, heads, room, head_dim)
    if start:
        buffer[..., :start, :] = old
    return buffer


class PairedCall(dict[str, Any]):
    """Keyword arguments of a paired forward. Torch hands this very object to the forward hook."""

    def __init__(self, call: dict[str, Any], cache: PairedCache, name: str, new: int) -> None:
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


def pre_forward_hook(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], PairedCall] | None:
    """Turn a call that carries a `PairedCache` into a call of 2B rows; leave any other call alone."""
    if args and any(isinstance(value, PairedCache) for value in (*args, *kwargs.values())):
        names = list(inspect.signature(model.forward).parameters)
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    paired = pair_call(model, kwargs)
    return None if paired is None else ((), paired)


def pair_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> PairedCall | None:
    """The call of 2B rows for one that carries a `PairedCache`; `None` for any other."""
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if isinstance(cache, PairedCache):
            if cache.streams.model is not model:
                raise ValueError("this cache was filled under ACD by another model.")
            return cache.pair(kwargs, name)
    return None


def forward_hook(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput
) -> ModelOutput | None:
    """Hand back the S rows of a paired call's output."""
    return kwargs.cache.split(output, kwargs) if isinstance(kwargs, PairedCall) else None


def reuses_prefix(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix can be computed once and stand in front of any row, padding in between."""
    return (
        "position_ids" in inspect.signature(model.forward).parameters
        and all(type(layer) is DynamicLayer for layer in _cache_layers(model))
        # Models off transformers' standard masks may measure distances in slots
        and bool(getattr(model, "_supports_attention_backend", False))
    )


def roomier(cache: Cache, width: int, config: Any) -> Cache:
    """The cache to use inside for one `generate` made: a static one gets `width` more slots."""
    lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    if not isinstance(cache, StaticCache) or not lengths:
        return cache
    inner = StaticCache(config=config, max_cache_len=max(lengths) + width, offloading=cache.offloading)
    for old, new in zip(cache.layers, inner.layers, strict=True):
        if isinstance(old, StaticLayer) and old.is_initialized:  # ahead of a compiled prefill
            new.lazy_initialization(*(torch.cat([kv[..., :0, :]] * 2) for kv in (old.keys, old.values)))
    return inner


def _cache_layers(model: PreTrainedModel) -> list[Any]:
    return DynamicCache(config=model.config.get_text_config(decoder=True)).layers


def check_pairable(call: dict[str, Any]) -> None:
    """Raise ValueError for an input that has no meaning in the second stream."""
    for key, value in call.items():
        if isinstance(value, torch.Tensor) and key not in _PAIRABLE:
            raise ValueError(f"ACD cannot pair the model input {key!r}: leave it out.")
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
        raise ValueError("ACD needs a 2-dimensional attention_mask of shape [batch, tokens].")
    if positions is not None and positions.ndim != 2:
        raise ValueError("ACD supports one position per token, not position_ids with several axes (multimodal RoPE).")


def _fingerprint(model: PreTrainedModel) -> object:
    """Changes whenever the weights are written to or replaced, or adapters are switched.

    In-place writes through `.data` escape torch's version counter, and so this.
    """
    weights = tuple(
        (id(p), _address(p), p.dtype, p.device, 0 if p.is_inference() else p._version)
        for p in (*model.parameters(), *model.buffers())
    )
    hooks = tuple(
        id(hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    adapters = tuple(
        (str(m.active_adapters), m.disable_adapters, str(m.merged_adapters), str(getattr(m, "scaling", "")))
        for m in model.modules()
        if hasattr(m, "merged_adapters")
    )
    return weights, hooks, adapters


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without storage of its own, such as a quantised weight
        return 0


def _stack(*tensors: torch.Tensor) -> torch.Tensor:
    """Stack `[1, heads, n, head_dim]` of differing n to `[streams, heads, W, head_dim]`, left-padded."""
    width = max(t.shape[-2] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, 0, width - t.shape[-2], 0)) for t in tensors])
