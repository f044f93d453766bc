"""What a way of decoding chooses its tokens from, with a gradient: for an attacker who knows everything about it.

The forwards are those of `ACDLogitsProcessor`, for rows of one length:

    [ soft prompt | request up to the suffix | suffix | end of the request | target ]
      keys and values, computed once            tokens of the forward

If the processor shares the instruction, only the request's last token and the target see the soft prompt.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from ..decoding.contrast import contrast
from ..decoding.layers import reuses_prefix
from ..decoding.layout import TAKE_ADDITIVE, hide
from ..decoding.shared import SharedStreams
from ..pairs.key_values import prompt_key_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..decoding.logits_process import ACDLogitsProcessor
    from ..pairs.key_values import KeyValues

    Begun = list[list[KeyValues]]  # by stream and layer: what stands in front of a forward's tokens


class Defence:
    """What a processor decodes with, as an attacker sees it who knows everything about it.

    Args:
        acd: the processor, with one strength for all rows and no horizon. With `alpha` 0 it is one stream alone.
        batch_size: candidates in one forward.

    Raises:
        ValueError: the model's keys and values depend on more than the tokens in front and their positions, or its
            generation_config has a repetition penalty.
    """

    def __init__(self, acd: ACDLogitsProcessor, batch_size: int = 32) -> None:
        self.acd, self.model, self.batch_size = acd, acd.model, batch_size
        attention = acd.streams.attention
        if not reuses_prefix(self.model) or attention not in TAKE_ADDITIVE:
            raise ValueError(
                f"the adaptive attack needs full attention over plain keys, which {type(self.model).__name__} with "
                f"{attention} attention has not: choose another model, or attn_implementation='sdpa'."
            )
        penalty = self.model.generation_config.repetition_penalty
        if penalty not in (None, 1.0):
            raise ValueError(
                f"the model's generation_config has repetition_penalty {penalty:g}, which the adaptive attack does "
                "not follow: set it to 1."
            )
        self.shared = isinstance(acd.streams, SharedStreams)
        self.prompts = [self._key_values(prompt) for prompt in acd.streams.prompts[: 2 if acd.alpha else 1]]

    @torch.no_grad()
    def _key_values(self, prompt: torch.Tensor) -> list[KeyValues]:
        """Keys and values of a soft prompt by layer, each `[1, kv_heads, n, head_dim]`."""
        if prompt.ndim == 5:  # they are, [n, layers, 2, kv_heads, head_dim]
            keys_and_values = prompt.to(self.model.device, self.model.dtype).permute(1, 2, 3, 0, 4)[:, :, None]
            return [(keys, values) for keys, values in keys_and_values]
        layers = prompt_key_values(self.model, prompt[None].to(self.model.device), -len(prompt) if self.shared else 0)
        return [layer for layer in layers if layer is not None]

    @torch.no_grad()
    def begin(self, ids: list[int]) -> Begun:
        """Keys and values of each soft prompt and the request's first tokens, which are the same for all suffixes."""
        begun = []
        for prompt in self.prompts:
            _, cache = self._forward(prompt, _length(prompt), self._embed([ids]), blind=len(ids), kept=1)
            begun.append([(layer.keys, layer.values) for layer in cache.layers])
        return begun

    def logits(self, begun: Begun, embeds: torch.Tensor, response_length: int) -> list[torch.Tensor]:
        """The logits of each stream at the tokens of a response.

        Args:
            begun: what stands in front of the tokens.
            embeds: of the request's other tokens and the response, `[B, T, hidden_size]`.
            response_length: R.

        Returns:
            SP's logits, and AP's where there is a contrast: `[B, R, vocab]` each, in float32.
        """
        blind = embeds.shape[1] - response_length - 1  # the request without its last token
        streams = []
        for prompt, states in zip(self.prompts, begun, strict=True):
            logits, _ = self._forward(states, _length(prompt), embeds, blind, response_length + 1)
            streams.append(logits[:, :-1].float())
        return streams

    def _forward(
        self, states: list[KeyValues], prompt_length: int, embeds: torch.Tensor, blind: int, kept: int
    ) -> tuple[torch.Tensor, DynamicCache]:
        """One stream behind its keys and values, of which the first `prompt_length` are the soft prompt's.

        The first `blind` tokens do not see the soft prompt where the instruction is shared.
        """
        rows, new = embeds.shape[:2]
        before = _length(states)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for index, (keys, values) in enumerate(states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        mask = torch.zeros(new, before + new, dtype=embeds.dtype, device=embeds.device)
        hide(mask, torch.ones_like(mask, dtype=torch.bool).triu(before + 1))
        if self.shared:
            mask[:blind, :prompt_length] = torch.finfo(mask.dtype).min
        start = before - prompt_length if self.shared else before  # it has negative positions there
        output = self.model(
            inputs_embeds=embeds,
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=torch.arange(start, start + new, device=embeds.device).expand(rows, -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        )
        return output.logits, cache

    @torch.no_grad()
    def losses(self, begun: Begun, rows: Sequence[list[int]], target: list[int]) -> torch.Tensor:
        """The loss of the target behind each row, the request's other tokens: `[len(rows)]`."""
        found = []
        for start in range(0, len(rows), self.batch_size):
            embeds = self._embed([row + target for row in rows[start : start + self.batch_size]])
            found.append(self._loss(begun, embeds, target))
        return torch.cat(found)

    def gradient(self, begun: Begun, suffix: list[int], after: list[int], target: list[int]) -> torch.Tensor:
        """The gradient of the loss with respect to the one-hot tokens of a suffix, `[len(suffix), vocab]`."""
        embedding = self.model.get_input_embeddings()
        with torch.no_grad():  # what the layer gives, which may be more than a look into its weights
            table = embedding(torch.arange(embedding.num_embeddings, device=self.model.device))
        tokens = torch.tensor(suffix, device=self.model.device)
        one_hot = torch.nn.functional.one_hot(tokens, len(table)).to(table).requires_grad_()
        embeds = torch.cat([(one_hot @ table)[None], self._embed([after + target])], dim=1)
        (gradient,) = torch.autograd.grad(self._loss(begun, embeds, target).sum(), one_hot)
        return gradient

    def _loss(self, begun: Begun, embeds: torch.Tensor, target: list[int]) -> torch.Tensor:
        tokens = torch.tensor(target, device=embeds.device).expand(len(embeds), -1)
        return target_loss(self.logits(begun, embeds, len(target)), tokens, self.acd.alpha, self.acd.beta)

    def _embed(self, rows: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            return self.model.get_input_embeddings()(torch.tensor(rows, device=self.model.device))


def target_loss(
    streams: Sequence[torch.Tensor], targets: torch.Tensor, alpha: float | torch.Tensor, beta: float
) -> torch.Tensor:
    """How unlikely a target is: the mean over its tokens of what stands between each and being chosen.

    That is its negative log-likelihood among the tokens that the threshold `beta` leaves, and how far it is below the
    threshold itself. A token that is cut has probability 0, which would give no gradient.

    Args:
        streams: SP's logits, and AP's where there is a contrast, `[B, R, vocab]` each.
        targets: `[B, R]`.
        alpha: strength of the contrast.
        beta: plausibility threshold.

    Returns:
        `[B]`.
    """
    safe, *others = streams
    wanted = targets[..., None]
    if not others:
        return -safe.log_softmax(-1).gather(-1, wanted).mean((1, 2))
    threshold = safe.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    cut = (safe < threshold).scatter(-1, wanted, False)
    scores = contrast(safe, others[0], alpha).masked_fill(cut, -math.inf)
    missing = (threshold - safe.gather(-1, wanted)).relu()
    return (missing - scores.log_softmax(-1).gather(-1, wanted)).mean((1, 2))


def _length(states: list[KeyValues]) -> int:
    return states[0][0].shape[-2]
