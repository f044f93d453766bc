"""The shared forward: both streams of ACD over one copy of the instruction (the paper's appendix C).

If the instruction x does not see the soft prompt in front of it, its keys and values are the same in both streams, and
the same as in plain generation. So they are computed once, and one copy of them serves both streams. Only the last
prompt token, which the first new token is predicted from, and the new tokens see the soft prompts. A row of the cache
holds

    [ x without its last token | SP | AP | last token of S | last token of A | new token of S | new token of A | ... ]

and a decoding step adds two tokens to each of B rows, one per stream, where `paired.py` adds one to each of 2B rows.
A mask lets a token of one stream see x, its own soft prompt and its own stream's tokens. With rotary embeddings
the order of the slots does not matter: x has the positions 0 to L - 1 that it has without a soft prompt, and the soft
prompts of n tokens the positions -n to -1.

A short x runs in one forward with its last token's two copies, under one mask: a second forward would read all weights
again. A long one runs by itself first, without a mask, as in plain generation.

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
from .layout import aligned, hide, shared_pattern, under_x
from .paired import PairedCache
from .streams import PairedStreams

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput

    from ..pairs.key_values import KeyValues


_SHORT = 256  # tokens up to which a prompt runs in one forward, and in all rows 8 times as many


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

    def key_values(self, device: torch.device) -> list[KeyValues | None]:
        """Keys and values of both soft prompts, per layer, each `[1, kv_heads, n_s + n_a, head_dim]`."""
        if not self.key_value:
            return super().key_values(device)
        both = torch.cat([prompt.to(device) for prompt in self.prompts])  # [n, layers, 2, kv_heads, head_dim]
        rows = both.permute(1, 2, 3, 0, 4)[:, :, None]
        return [(keys, values) for keys, values in rows]

    def check_like(self, cache: Cache) -> None:
        """Raise ValueError where key-value prompts have other sizes than a filled cache.

        Where there is one head, it would be copied to all by broadcasting.
        """
        ours = {(self.prompts[0].shape[1], *self.prompts[0].shape[3:])}
        parts = (part for layer in cache.layers for part in (layer.keys, layer.values))
        found = {(len(cache.layers), *part.shape[1::2]) for part in parts}
        if found != ours:
            raise ValueError(
                f"{type(self.model).__name__} keeps keys and values of {sorted(found)}, the prompt pair has "
                f"{sorted(ours)} (layers, key-value heads, head size): use a pair made for this model."
            )

    def _first_position(self, length: int) -> int:
        return -length

    def _join(self, safe: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
        """`[1, heads, n_s + n_a, head_dim]`."""
        return torch.cat([safe, adversarial], dim=-2)


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
        """The call of both streams for a call of one; runs what is new of a long instruction on the way."""
        if isinstance(call.get("logits_to_keep"), torch.Tensor):
            raise ValueError("share_instruction_kv takes a number as logits_to_keep.")
        key, seen, positions = self._start(call)
        x = call[key]
        new = x.shape[1]
        visible = call.get("attention_mask")
        cache: Any = self.inner
        if cache is None:
            cache = DynamicCache(config=self.streams.model.config.get_text_config(decoder=True))
        together = min(new, max(0, self.shared - seen))
        paired = PairedCall(call, cache=self, name=name, new=new)
        paired.update({"return_dict": True, name: cache, "position_ids": positions})
        self.contrasted = new - together
        if not self.contrasted:  # a chunk of the instruction
            return paired
        if call.get("logits_to_keep"):
            paired["logits_to_keep"] = call["logits_to_keep"] * len(self._lengths())
        if self.inner is not None and not seen and not self.alone and new <= _SHORT and self.rows * new <= 8 * _SHORT:
            return self._all_at_once(paired, key, together, self._stream_mask(visible, new, x.device))
        # Behind x, key-value prompts see what the layers' keys are like; a prompt of one token is run for that alone
        probe = int(self.streams.key_value and not seen + together)
        # The host sends or computes them first, or it would wait until the device is done with x
        prompts = self._soft_prompts(x.device) if seen <= self.shared else []
        if together + probe:
            part = {key: x[:, : together + probe], "position_ids": positions[:, : together + probe], name: cache}
            part["attention_mask"] = None if visible is None else visible[:, : seen + together + probe]
            self.streams.model(**part, use_cache=True, logits_to_keep=1)
        if probe:
            cache.crop(-1)
        self._write_prompts_into(cache, prompts)
        paired[key] = self._in_turns(x[:, together:])
        paired["position_ids"] = self._in_turns(positions[:, together:])
        mask = self._stream_mask(visible, seen + new, x.device)
        paired["attention_mask"] = mask if mask is None else mark(mask)
        return paired

    def _all_at_once(self, paired: PairedCall, key: str, together: int, own: torch.Tensor | None) -> PairedCall:
        """The call of x and of both streams behind it, which see what `own` says."""
        assert self.inner is not None and own is not None  # two streams have a mask
        for layer, prompts in zip(self.inner.layers, self._soft_prompts(own.device), strict=True):
            if prompts is not None:
                layer.put_between(prompts, own.shape[2])
        for name in (key, "position_ids"):
            x, last = paired[name].split([together, self.contrasted], dim=1)
            paired[name] = torch.cat([x, self._in_turns(last)], dim=1)
        paired["attention_mask"] = mark(under_x(own, together, paired.get("attention_mask")))
        return paired

    def split(self, output: ModelOutput, call: PairedCall) -> ModelOutput:
        """Hand back SP's tokens of an output, and keep AP's logits."""
        adversarial = None
        if self.contrasted:
            if not self.alone:
                adversarial = output.logits[:, -2 * self.contrasted :][:, 1::2]
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
        return self._first_own() + contrasted * len(self._lengths())

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows

    def _in_turns(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every token once per stream, side by side: `[B, tokens, ...]`; a single token is not copied."""
        copies = len(self._lengths())
        return tensor.unsqueeze(2).expand(-1, -1, copies, *tensor.shape[2:]).flatten(1, 2)

    def _soft_prompts(self, device: torch.device) -> list[KeyValues | None]:
        """Keys and values of the soft prompts; with `use_cache=False` every forward needs them."""
        layers = self._prompts or self.streams.key_values(device)
        self._prompts = layers if self.inner is None else None
        return layers

    def _write_prompts_into(self, cache: Cache, prompts: list[KeyValues | None]) -> None:
        """Put the soft prompts behind the shared part of every row; AP, the last of them, not past the horizon."""
        if prompts and self.streams.key_value:
            self.streams.check_like(cache)
        stop = sum(self._lengths())
        for index, layer in enumerate(prompts):
            if layer is not None:
                keys, values = layer
                if self.streams.key_value:
                    keys, values = keys.to(cache.layers[index].keys), values.to(cache.layers[index].values)
                cache.update(*(part[:, :, :stop].expand(self.rows, -1, -1, -1) for part in (keys, values)), index)

    def _stream_mask(self, visible: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor | None:
        """What each stream's last `contrasted` tokens see, `[B, 1, queries, slots]`; `None` where that is all."""
        copies, slots, contrasted = len(self._lengths()), self._slots_for(length), self.contrasted
        if visible is None and copies == contrasted == 1:
            return None
        mask = self._pattern_for(slots, self.streams.model.dtype, device)[:, : aligned(slots)]
        if contrasted > 1:
            mask = mask.repeat(contrasted, 1)
            new = contrasted * copies
            later = torch.ones(new, new, dtype=torch.bool, device=device).triu(1)
            hide(mask[:, slots - new : slots], later)
        mask = mask.expand(self.rows, 1, -1, -1)
        if visible is not None:
            mask, hidden = mask.clone(), (visible == 0)[:, None, None]
            hide(mask[..., : self.shared], hidden[..., : self.shared])
            own = mask[..., self._first_own() : slots].unflatten(-1, (-1, copies))
            hide(own, hidden[..., self.shared :, None])
        return mask[..., :slots]

    def _make_pattern(self, slots: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return shared_pattern(self._lengths(), self.shared, slots, dtype, device)

    def _first_own(self) -> int:
        """The slot behind x and the soft prompts."""
        return self.shared + sum(self._lengths())

    def _keep_safeguarding(self, layer: Any) -> None:
        kept, first = self._first_own(), self.shared + sum(self.streams.lengths)

        def write(old: torch.Tensor, new: torch.Tensor) -> None:
            torch.cat([old[..., :kept, :], old[..., first::2, :]], dim=-2, out=new)

        layer.move(self.rows, self._slots_for(self.seen), write)

    def _visible(self, value: Any, new: int) -> Any:
        """SP's part of an output: hidden states `[B, queries, h]`, attentions `[B, heads, queries, slots]`."""
        if isinstance(value, tuple):
            return tuple(self._visible(item, new) for item in value)
        if not isinstance(value, torch.Tensor) or value.shape[0] != self.rows or value.ndim < 3:
            return value
        copies = len(self._lengths())
        last = copies * self.contrasted  # x may be in front
        if value.ndim == 3:
            return value[:, -last:][:, ::copies]
        value = value[:, :, -last:][:, :, ::copies]
        return torch.cat([value[..., : self.shared], value[..., self._first_own() :: copies]], dim=-1)
