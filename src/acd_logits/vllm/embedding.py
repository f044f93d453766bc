"""Embedding prompts on vLLM: both streams run whole, [SP; x] and [AP; x].

A request's tokens are [placeholders; x] with n placeholders. N tokens of a step become 2N rows, those of the
safeguarding stream first, with the positions 0, 1, 2, ... in each stream, and with SP and AP embedded where the
placeholders stand. The first N rows go to the stock attention layers, the last N to their twins.

Which rows are soft prompt is told by position, not by token: a prompt that slipped past the checks on requests would
lose its first n tokens to the soft prompts, but never the contrast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention

from .exported import TENSORS, ExportedPair

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class PairedAttention(Attention):
    """A stock attention layer and its twin. A layer becomes one by a change of class: its parameters' names stay."""

    adversarial: Attention

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Attend in each stream by itself.

        Args:
            query: `[2N, heads * head_size]`, or with heads and head size apart; S rows first.
            key: `[2N, kv_heads * head_size]`, likewise.
            value: `[2N, kv_heads * head_size]`, likewise.
            output_shape: of the output, 2N first; default: that of the stock layer.
            output_dtype: of the output; default: that of the query.

        Returns:
            `[2N, heads * head_size]`.
        """
        n = query.shape[0] // 2
        half = None if output_shape is None else torch.Size((n, *output_shape[1:]))
        safe = super().forward(query[:n], key[:n], value[:n], half, output_dtype)
        adversarial = self.adversarial(query[n:], key[n:], value[n:], half, output_dtype)
        return torch.cat([safe, adversarial])


class EmbeddingStreams(torch.nn.Module):
    """The rows of both streams.

    Args:
        vllm_config: of the engine.
        pair: what the folder says about the prompts.
        layers: the attention layers, with their twins.
    """

    prompts: torch.Tensor
    embeds: torch.Tensor
    positions: torch.Tensor

    def __init__(self, vllm_config: Any, pair: ExportedPair, layers: list[Any]) -> None:
        super().__init__()
        for layer in layers:
            layer.__class__ = PairedAttention
        width, rows = pair.hidden_size, 2 * vllm_config.scheduler_config.max_num_batched_tokens
        self.length = pair.num_virtual_tokens
        self.last_token = vllm_config.model_config.get_vocab_size() - 1
        for name, buffer in {
            "prompts": torch.zeros(2, self.length, width),
            # CUDA graphs of pieces of the model read their input where it was at capture
            "embeds": torch.zeros(rows, width),
            "positions": torch.zeros(rows, dtype=torch.long),
        }.items():
            self.register_buffer(name, buffer, persistent=False)

    def enter(
        self, embed: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's input for N tokens of a step.

        Args:
            embed: the model's embedding layer.
            ids: `[N]` tokens.
            positions: `[N]`, each token's place in its request.

        Returns:
            Embeddings `[2N, hidden_size]` and positions `[2N]`, S rows first, with the soft prompts in place.
        """
        tokens = len(ids)
        # The placeholder may lie behind the vocabulary, and what it embeds to is overwritten
        x = embed(ids.clamp(max=self.last_token))
        soft = self.prompts[:, positions.clamp(max=self.length - 1)]
        embeds = self.embeds[: 2 * tokens]
        embeds.view(2, tokens, -1).copy_(torch.where((positions < self.length)[:, None], soft, x))
        doubled = self.positions[: 2 * tokens]
        doubled.view(2, tokens).copy_(positions)
        return embeds, doubled

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """The streams' hidden states side by side, `[N, 2 * hidden_size]`, from `[2N, hidden_size]`."""
        return torch.cat(hidden.chunk(2), dim=-1)

    @torch.no_grad()
    def load(self, embed: Callable[[torch.Tensor], torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the prompts.

        Raises:
            ValueError: their sizes are others, or vLLM's embeddings are not those they were made for.
        """
        safe, adversarial, ids, expected = (tensors[name] for name in TENSORS["embedding"])
        prompts = torch.stack([safe, adversarial]).to(device=self.prompts.device, dtype=torch.float32)
        if prompts.shape != self.prompts.shape:
            raise ValueError(f"the prompts are {list(prompts.shape)}, config.json says {list(self.prompts.shape)}.")
        found = embed(ids.to(prompts.device))
        self.prompts.copy_(prompts * embedding_scale(found.float(), expected.to(found.device).float()))

    def check(self, forward: Any) -> None:
        """Nothing is left to check once all weights are in place."""


def embedding_scale(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How much larger vLLM's embeddings are than those the prompts belong to.

    The prompts live in the space of the embedding layer's output in transformers. vLLM's port of a model may scale
    embeddings in the layer where transformers does it behind, or the other way round; a constant makes up for that.

    Args:
        found: `[k, hidden_size]`, what vLLM makes of some tokens.
        expected: `[k, hidden_size]`, what transformers makes of them.

    Returns:
        The constant; 1.0 where there is no difference but rounding.

    Raises:
        ValueError: if the two differ by more than a constant.
    """
    scale = float((found * expected).sum() / (expected * expected).sum())
    error = float((found - scale * expected).norm() / found.norm())
    if not error < 0.02:  # bf16 rounds by 0.4 %
        raise ValueError(
            "ACD on vLLM does not support this model: vLLM's embeddings are not those of the model that was exported."
        )
    return 1.0 if abs(scale - 1) < 0.02 else scale
