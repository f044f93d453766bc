"""Attention over keys in three parts, none of which is copied: those of x, of the prompt, and of the response.

    scores  [B, kv_heads, group * queries, T | n | queries]

The prompt's keys and values are the same for every row, so they are one matrix for all of them. Joined with the others
they would be copied for each row and layer, forwards and backwards, which took longer than the rest of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..decoding import attention

if TYPE_CHECKING:
    from ..pairs.key_values import KeyValues


class PartedAttention:
    """What stands in front of the response in each layer, and who sees it; called for one layer after the other.

    Args:
        x: keys and values of each layer, `[B, kv_heads, T, head_dim]`; none where x has one token.
        prompt: keys and values of each layer, `[1, kv_heads, n, head_dim]`; none for the plain model.
        lengths: tokens of x that are no padding, `[B, 1]`.
        shown: `[B, queries]`, 1 for tokens of the response that are no padding.
    """

    def __init__(
        self, x: list[KeyValues], prompt: list[KeyValues], lengths: torch.Tensor, shown: torch.Tensor
    ) -> None:
        self.x, self.prompt, self.calls = x, prompt, 0
        queries = shown.shape[1]
        slots = torch.arange(x[0][0].shape[-2] if x else 0, device=lengths.device)
        seen = (slots < lengths)[:, None].expand(-1, queries, -1)
        prompted = seen.new_ones(len(seen), queries, prompt[0][0].shape[-2] if prompt else 0)
        self.causal = shown[:, None].bool() & shown.new_ones(queries, queries).bool().tril()
        self.hidden = ~torch.cat([seen, prompted, self.causal], -1)  # [B, queries, T + n + queries]

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What calls this attention instead of the model's own, as an attention mask `[B, 1, queries, queries]`."""
        mask = torch.zeros(self.causal[:, None].shape, dtype=dtype, device=self.causal.device)
        return attention.mark(mask.masked_fill_(~self.causal[:, None], torch.finfo(dtype).min), self)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Attention's output, `[B, queries, heads, head_dim]`.

        Raises:
            ValueError: the model asks for more than plain attention.
        """
        if not attention.is_plain(kwargs):
            raise ValueError("a shared instruction cannot be trained with this model, whose attention is not plain")
        layer, self.calls = self.calls, self.calls + 1
        rows, heads, queries, head_dim = query.shape
        scale = kwargs.get("scaling") or head_dim**-0.5
        query = query.reshape(rows, key.shape[1], -1, head_dim) * scale
        parts = [before[layer] for before in (self.x, self.prompt) if before]
        parts = [(keys.to(query), values.to(query)) for keys, values in (*parts, (key, value))]
        scores = torch.cat([_multiply(query, keys.transpose(-1, -2)) for keys, _ in parts], -1).float()
        hidden = self.hidden[:, None, None].to(scores.device)
        scores = scores.unflatten(2, (-1, queries)).masked_fill(hidden, torch.finfo(scores.dtype).min).flatten(2, 3)
        weights = scores.softmax(-1).to(query).split([keys.shape[-2] for keys, _ in parts], -1)
        output = sum(_multiply(w, values) for w, (_, values) in zip(weights, parts, strict=True))
        assert isinstance(output, torch.Tensor)
        return output.reshape(rows, heads, queries, -1).transpose(1, 2).contiguous()


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[B, heads, m, k]` times `[B or 1, heads, k, n]`; one for all rows is not repeated."""
    if len(right) == len(left):
        return left @ right
    product = left.transpose(0, 1).flatten(1, 2) @ right[0]
    return product.unflatten(1, (len(left), -1)).transpose(0, 1)
