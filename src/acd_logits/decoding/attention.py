"""Attention of both streams in one row, over keys and values as they stand in the cache.

In a row of the shared cache several queries see the same keys, each by a mask row of its own. Behind such a mask, the
`sdpa` of transformers copies keys and values once for each query head of a group: in every layer, at every token. Here
the query heads of a group become further queries of their key-value head instead,

    queries  [B, heads, n, head_dim]  ->  [B, kv_heads, group * n, head_dim]
    mask     [B, 1, n, slots]         ->  [B, 1, group * n, slots]

which any backend of PyTorch's attention takes. The sums are the same ones.

`install` puts this in the place of `sdpa` in transformers' `AttentionInterface`, for as long as a processor with a
shared instruction is attached, or prompts behind one are trained. All models share that entry, so a call is ours only
if its mask is, which `mark` says. Any other call goes to the function that was there before, with what it was given.
A name of our own, beside `sdpa`, would reach one model only. But it would stand in the model's config, which models
may share, and which their code compares with "sdpa".
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from .layout import aligned

if TYPE_CHECKING:
    from collections.abc import Callable

_MARK = "_acd_folded"  # attribute of a mask of ours: the same mask for groups of so many heads
# Arguments that `sdpa` takes besides, and that mean nothing to it where there is a mask
_INERT = {
    "dropout", "scaling", "is_causal", "position_ids", "cache_position", "use_cache", "logits_to_keep", "tokenizer"
}  # fmt: skip

_users: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def install(user: Any) -> None:
    """Let `sdpa` fold what is marked, until `remove` was called for every user."""
    with _lock:
        _users.add(user)
        own = AttentionInterface()["sdpa"]
        if not isinstance(own, FoldedAttention):
            AttentionInterface.register("sdpa", FoldedAttention(own))


def remove(user: Any) -> None:
    """Restore `sdpa` with the last user, unless another function has taken its place since."""
    with _lock:
        _users.discard(user)
        ours = AttentionInterface()["sdpa"]
        if not _users and isinstance(ours, FoldedAttention):
            AttentionInterface.register("sdpa", ours.own)


def mark(mask: torch.Tensor, attend: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """Let the calls with this very mask be folded. What becomes of a copy is the model's own attention.

    Args:
        mask: `[B, 1, queries, slots]`, to add to the scores.
        attend: an attention of another kind to call instead, with query, key, value and the keyword arguments.
    """
    setattr(mask, _MARK, attend or {})
    return mask


class FoldedAttention:
    """An attention function of transformers for calls whose mask is marked, in front of the model's own.

    Args:
        own: the function for all other calls.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention's output, `[B, queries, heads, head_dim]`, and its weights, where the model's own gives any."""
        if callable(attend := getattr(attention_mask, _MARK, None)):
            return attend(query, key, value, *args, **kwargs), None
        if (
            torch.compiler.is_compiling()  # which would trace through the mark
            or attention_mask is None
            or not hasattr(attention_mask, _MARK)
            or args
            or not _folds(module, query, key, value, kwargs)
        ):
            return self.own(module, query, key, value, attention_mask, *args, **kwargs)
        rows, heads, queries, _ = query.shape
        output = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(rows, key.shape[1], -1, query.shape[-1]),
            key,
            value,
            attn_mask=_folded(attention_mask, heads // key.shape[1]),
            scale=kwargs.get("scaling"),
        )
        return output.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def _folds(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> bool:
    """Whether a call with a marked mask would copy keys, and asks for nothing but plain attention."""
    group = getattr(module, "num_key_value_groups", 1)
    return (
        group > 1
        and query.shape[1] == group * key.shape[1]
        # Of many queries, the larger mask takes more than the copies do
        and query.shape[2] <= key.shape[1] * (key.shape[-1] + value.shape[-1])
        and is_plain(kwargs)
    )


def is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but plain attention."""
    inert = (given is None or given is False or name in _INERT for name, given in kwargs.items())
    return not kwargs.get("dropout") and all(inert)


def _folded(mask: torch.Tensor, group: int) -> torch.Tensor:
    """The marked mask for all query heads of a group, `[B, 1, group * queries, slots]`; made in the first layer."""
    masks = getattr(mask, _MARK)
    if group not in masks:
        rows, _, queries, slots = mask.shape
        room = mask.new_empty(rows, group, queries, aligned(slots))[..., :slots]
        masks[group] = room.copy_(mask).flatten(1, 2)[:, None]
    return masks[group]
