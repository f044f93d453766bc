"""The shared forward: both streams of ACD over one copy of the instruction (the paper's appendix C).

If the instruction x does not see the soft prompt in front of it, its keys and values are the same in both streams, and
the same as in plain generation. So one plain prefill computes them, and one copy of them serves both streams. Only
the last prompt token, which the first new token is predicted from, and the new tokens see the soft prompts. A row of
the cache holds

    [ x without its last token | SP | AP | last token of S | last token of A | new token of S | new token of A | ... ]

and a decoding step adds two tokens to each of B rows, one per stream, where `paired.py` adds one to each of 2B rows.
A mask lets a token of one stream see x, its own soft prompt and its own stream's tokens. With rotary embeddings
the order of the slots does not matter: x has the positions 0 to L - 1 that it has without a soft prompt, and the soft
prompts of n tokens the positions -n to -1.

For a pair that was trained so (`--share_instruction_kv`) this is exact. With any other pair x would see the soft
prompt, and this is an approximation. Key-value prompts are decoded in this form only: their keys and values go into
the slots as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from ..pairs.key_values import check_shareable
from .attention import mark
from .call import PairedCall
from .paired import PairedCache
from .streams import PairedStreams

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput

    from ..pairs.key_values import KeyValues

_BOTH = -1  # in place of a stream: x, which both see


class SharedStreams(PairedStreams):
    """The two soft prompts on one model, at negative positions in front of a shared x.

    Args:
        model: a decoder-only model with rotary embeddings and full attention.
        safeguarding: SP, `[n_s, hidden_size]`, or keys and values `[n_s, layers, 2, kv_heads, head_dim]`.
        adversarial: AP, likewise.
        frozen_model: see the base class; of no effect with key-value prompts.

    Raises:
        ValueError: the model is another one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        safeguarding: torch.Tensor,
        adversarial: torch.Tensor,
        frozen_model: bool = False,
    ) -> None:
        self.key_value = safeguarding.ndim == 5
        check_shareable(model, self.key_value)
        super().__init__(model, safeguarding, adversarial, frozen_model)
        self.reusable = True  # texts long enough to change the frequencies are refused

    def key_values_like(self, cache: Cache) -> list[KeyValues | None]:
        """Key-value prompts for each layer of a filled cache, in its dtype and on its device.

        Returns:
            Keys and values per layer, each `[1, kv_heads, n_s + n_a, head_dim]`.

        Raises:
            ValueError: the cache has other sizes. Where there is one head, it would be copied to all by broadcasting.
        """
        ours = {(self.prompts[0].shape[1], *self.prompts[0].shape[3:])}
        parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
        found = {(len(cache.layers), *part.shape[1::2]) for part in parts}
        if found != ours:
            raise ValueError(
                f"{type(self.model).__name__} keeps keys and values of {sorted(found)}, the prompt pair has "
                f"{sorted(ours)} (layers, key-value heads, head size): use a pair made for this model."
            )
        layers: list[KeyValues | None] = []
        for index, layer in enumerate(cache.layers):
            keys, values = torch.cat([prompt[:, index].to(layer.keys.device) for prompt in self.prompts]).unbind(1)
            layers.append((_as_rows(keys).to(layer.keys), _as_rows(values).to(layer.values)))
        return layers

    def _first_position(self, length: int) -> int:
        return -length

    def _join(self, safe: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """`[1, heads, n_s + n_a, head_dim]`."""
        return torch.cat([safe, adversarial], dim=-2)


def _as_rows(parts: torch.Tensor) -> torch.Tensor:
    """`[n, heads, head_dim]` as one row of a cache, `[1, heads, n, head_dim]`."""
    return parts.transpose(0, 1)[None]


class SharedCache(PairedCache):
    """The cache of one `generate` call under ACD with a shared instruction: B rows outside and inside."""

    streams: SharedStreams

    def __init__(self, streams: SharedStreams, inner: Cache | None) -> None:
        self.shared = 0  # visible tokens that both streams share
        self.contrasted = 0  # visible tokens of the last forward that they do not
        super().__init__(streams, inner)
        if inner is not None and not (self.reuses and isinstance(inner, DynamicCache) and not inner.offloading):
            raise ValueError(
                "share_instruction_kv works with a dynamic cache only: leave out cache_implementation and "
                "past_key_values."
            )

    def begin_call(
        self, prompt_length: int, max_length: int, offset: int, horizon: int | None, prompt_mask: torch.Tensor | None
    ) -> None:
        """See [`PairedCache.begin_call`]. What is shared is the prompt of a conversation's first call.

        Raises:
            ValueError: the text may pass the length from which on the model has other rotary frequencies.
        """
        limit = self.streams.long_from
        if limit is not None and max_length > limit:
            what = "share_instruction_kv computes the soft prompts' keys apart from the text"
            if self.streams.key_value:
                what = "key-value prompts keep their keys whatever the text"
            raise ValueError(
                f"{what}, and beyond {limit} tokens {type(self.streams.model).__name__} has other rotary frequencies: "
                f"{'' if self.streams.key_value else 'leave it out, or '}let prompt and new tokens fit into {limit} "
                "tokens."
            )
        # With use_cache=False every forward needs them
        self._prompts: list[KeyValues | None] | None = None
        if not self.seen:
            self.shared = max(prompt_length - 1, 0)
        super().begin_call(prompt_length, max_length, offset, horizon, prompt_mask)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` visible tokens.

        Raises:
            ValueError: for a positive number, or tokens of the shared instruction.
        """
        if self.inner is not None and self.seen + tokens_to_remove <= self.shared and tokens_to_remove:
            raise ValueError("a shared instruction cannot be cropped: start again without past_key_values.")
        super().crop(tokens_to_remove)
        if self.inner is not None and not self.alone:
            self.inner.crop(tokens_to_remove)  # of the other stream

    # ----- the forward -----

    def pair(self, call: dict[str, Any], name: str) -> PairedCall:
        """The call of both streams for a call of one; runs what is new of the shared instruction on the way."""
        if isinstance(call.get("logits_to_keep"), torch.Tensor):
            raise ValueError("share_instruction_kv takes a number as logits_to_keep.")
        key, seen, positions = self._start(call)
        x = call[key]
        new = x.shape[1]
        visible = call.get("attention_mask")
        if visible is None:
            visible = torch.ones(self.rows, seen + new, dtype=torch.long, device=x.device)
        cache: Any = self.inner
        if cache is None:
            cache = DynamicCache(config=self.streams.model.config.get_text_config(decoder=True))
        together = min(new, max(0, self.shared - seen))
        paired = PairedCall(call, cache=self, name=name, new=new)
        paired.update({"return_dict": True, name: cache, "attention_mask": visible, "position_ids": positions})
        self.contrasted = new - together
        if not self.contrasted:  # a chunk of the instruction
            return paired
        # Behind x, key-value prompts see what the layers' keys are like; a prompt of one token is run for that alone
        probe = int(self.streams.key_value and not seen + together)
        if together + probe:
            part = {key: x[:, : together + probe], "position_ids": positions[:, : together + probe], name: cache}
            part["attention_mask"] = visible[:, : seen + together + probe]
            self.streams.model(**part, use_cache=True, logits_to_keep=1)
        if probe:
            cache.crop(-1)
        if seen <= self.shared:
            self._write_prompts_into(cache, x.device)
        copies = len(self._lengths())
        paired[key] = x[:, together:].repeat_interleave(copies, 1)
        paired["position_ids"] = positions[:, together:].repeat_interleave(copies, 1)
        paired["attention_mask"] = mark(self._stream_mask(visible))
        if call.get("logits_to_keep"):
            paired["logits_to_keep"] = call["logits_to_keep"] * copies
        return paired

    def split(self, output: ModelOutput, call: PairedCall) -> ModelOutput:
        """Hand back SP's tokens of an output, and keep AP's logits."""
        adversarial = None
        if self.contrasted:
            if not self.alone:
                adversarial = output.logits[:, 1::2]
            for key, value in output.items():
                output[key] = self._visible(value, call.new)
        output[call.name] = self
        self._finish(call, output.logits.shape[1], adversarial)
        return output

    # ----- slots and masks -----

    def _size(self) -> tuple[int, int]:
        return self.rows, self._slots_for(self.seen)

    def _slots_for(self, visible: int) -> int:
        contrasted = visible - self.shared
        if contrasted <= 0:
            return visible
        return self.shared + sum(self._lengths()) + contrasted * len(self._lengths())

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows

    def _write_prompts_into(self, cache: Cache, device: torch.device) -> None:
        """Put the soft prompts behind the shared part of every row; AP, the last of them, not past the horizon."""
        stop = sum(self._lengths())
        learned = self.streams.key_value
        layers = self._prompts or (self.streams.key_values_like(cache) if learned else self.streams.key_values(device))
        self._prompts = layers if self.inner is None else None
        for index, layer in enumerate(layers):
            if layer is not None:
                cache.update(*(part[:, :, :stop].expand(self.rows, -1, -1, -1) for part in layer), index)

    def _slots(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream and visible token of every slot, for `length` visible tokens; soft prompts stand before them all."""
        streams = torch.arange(len(self._lengths()), device=device)
        prompts = [torch.full((n,), stream, device=device) for stream, n in enumerate(self._lengths())]
        times = torch.arange(length, device=device)
        shared, own = times[: self.shared], times[self.shared :]
        stream = [torch.full_like(shared, _BOTH), *prompts, streams.repeat(len(own))]
        time = [shared, shared.new_full((sum(self._lengths()),), -1), own.repeat_interleave(len(streams))]
        return torch.cat(stream), torch.cat(time)

    def _stream_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """To add to the scores of each stream's last `contrasted` tokens, `[B, 1, queries, slots]`."""
        stream, time = self._slots(visible.shape[1], visible.device)
        queries = slice(len(stream) - self.contrasted * len(self._lengths()), None)
        sees = (stream == _BOTH) | (stream == stream[queries, None])
        sees &= time <= time[queries, None]
        shown = torch.cat([visible.new_ones(len(visible), 1), visible], dim=1).bool()[:, time + 1]
        dtype = self.streams.model.dtype
        mask = torch.zeros(len(visible), 1, *sees.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~(sees & shown[:, None])[:, None], torch.finfo(dtype).min)

    def _keep_safeguarding(self, inner: Cache) -> None:
        stream, _ = self._slots(self.seen, torch.device("cpu"))
        kept = (stream != 1).nonzero()[:, 0]
        for layer in inner.layers:
            layer.keys, layer.values = (kv[..., kept.to(kv.device), :] for kv in (layer.keys, layer.values))

    def _visible(self, value: Any, new: int) -> Any:
        """SP's part of an output: hidden states `[B, queries, h]`, attentions `[B, heads, queries, slots]`."""
        if isinstance(value, tuple):
            return tuple(self._visible(item, new) for item in value)
        if not isinstance(value, torch.Tensor) or value.shape[0] != self.rows or value.ndim < 3:
            return value
        copies = len(self._lengths())
        if value.ndim == 3:
            return value[:, ::copies]
        stream, time = self._slots(self.seen + new if self.inner is not None else new, value.device)
        return value[:, :, ::copies, ((stream <= 0) & (time >= 0)).nonzero()[:, 0]]
