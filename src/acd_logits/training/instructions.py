"""Keys and values of instructions that see no prompt: those of the plain model, computed once for all steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from ..pairs.key_values import KeyValues

TOGETHER = 32  # instructions run at a time
CACHE_BYTES = 6 << 30  # so much of the instructions' keys and values is kept; those beyond are computed anew


class InstructionCache:
    """The plain model's keys and values of instructions.

    Args:
        model: the frozen model, with full attention over plain keys and values.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Of each row what its chat template begins with, which many rows have in common, and the rest
        self._kept: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._beginnings: dict[tuple[int, ...], torch.Tensor] = {}
        self._bytes = 0
        self._devices: list[torch.device] = []  # of the layers

    def __call__(self, instructions: Sequence[tuple[int, ...]]) -> list[KeyValues]:
        """Keys and values of each layer, `[B, heads, T, head_dim]`, padded with zeros on the right.

        Args:
            instructions: B rows of token ids; a row may be empty.
        """
        new = sorted({row for row in instructions if row and row not in self._kept}, key=len)
        parts = {row: self._kept[row] for row in instructions if row in self._kept}
        for start in range(0, len(new), TOGETHER):  # rows of like length make little padding
            parts |= self._compute_and_keep(new[start : start + TOGETHER])
        found = {row: torch.cat(halves) for row, halves in parts.items()}
        if not found:  # prompts of one token
            return []
        nothing = next(iter(found.values()))[:0]
        rows = torch.nn.utils.rnn.pad_sequence([found.get(row, nothing) for row in instructions], batch_first=True)
        layers = rows.permute(2, 3, 0, 4, 1, 5).contiguous().unbind()  # `[2, B, heads, T, head_dim]` each
        return [tuple(layer.to(device)) for layer, device in zip(layers, self._devices, strict=True)]

    def _compute_and_keep(
        self, rows: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]:
        """The states of each row's beginning and rest, kept as long as there is room."""
        beginning, rests = self._compute(rows)
        common = rows[0][: len(beginning)]
        beginning = self._beginnings.get(common, beginning)
        parts = {row: (beginning, rest) for row, rest in zip(rows, rests, strict=True)}
        for row, (_, rest) in parts.items():
            needed = rest.nbytes + (0 if common in self._beginnings else beginning.nbytes)
            if self._bytes + needed <= CACHE_BYTES:
                self._kept[row], self._beginnings[common] = parts[row], beginning
                self._bytes += needed
        return parts

    @torch.no_grad()
    def _compute(self, rows: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The states of what all rows begin with, which is run once, and those of the rest of each row.

        Returns:
            `[tokens, layers, 2, heads, head_dim]` each.
        """
        device = self.model.device
        common = common_length(rows)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        decoder = self.model.base_model  # no logits are wanted
        if common:
            prefix = torch.tensor([rows[0][:common]], device=device)
            decoder(input_ids=prefix, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(rows))
        rest = [torch.tensor(row[common:], dtype=torch.long) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True).to(device)  # on the right, which none sees
        if padded.shape[1]:
            decoder(input_ids=padded, past_key_values=cache, use_cache=True)
        self._devices = [layer.keys.device for layer in cache.layers]
        # [rows, tokens, layers, 2, heads, head_dim]
        states = torch.stack(
            [
                torch.stack([kv.transpose(1, 2).to(device) for kv in (layer.keys, layer.values)], 2)
                for layer in cache.layers
            ],
            2,
        )
        # Copies: a slice would keep the whole batch in memory
        rests = [row_states[common : len(row)].clone() for row, row_states in zip(rows, states, strict=True)]
        return states[0, :common].clone(), rests


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    columns = zip(*rows, strict=False)
    different = (i for i, column in enumerate(columns) if len(set(column)) > 1)
    return next(different, min(map(len, rows), default=0))
