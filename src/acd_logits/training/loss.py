"""The losses of SP (eq. 3) and AP (eq. 4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..anchors import SPLITS
from .data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

TERMS = ("L_p", "L_n", "L_r")
FOLLOWED_AND_AVOIDED = {"safeguarding": ("D_HR", "D_HA"), "adversarial": ("D_HA", "D_HR")}


def opo_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    avoided: torch.Tensor,
    splits: torch.Tensor,
    stream: str,
    plain_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 3 (SP) and eq. 4 (AP): L_p + L_n + L_r, as sums over the response tokens y of each row.

    Eq. 4 is eq. 3 with D_HR and D_HA exchanged:

        L_p = -log P(y)         on D_HR, which SP follows
        L_n = -log(1 - P(y))    on D_HA, which SP avoids
        L_r = -log P(y)         on D_S

    Given `plain_logits`, L_r is KL(P_plain || P) instead.

    Args:
        logits: `[B, R, vocab]`.
        labels: `[B, R]`, the response tokens.
        avoided: `[B, R]`, those that L_n is about, as of [`collate`].
        splits: `[B]`, indices into SPLITS.
        stream: "safeguarding" for eq. 3, "adversarial" for eq. 4.
        plain_logits: `[rows of D_S, R, vocab]` of the model without a soft prompt, for the KL forms of L_r.

    Returns:
        `[B, 3]`: what each row adds to L_p, L_n and L_r; divide by the number of tokens for the means.
    """

    def total(
        split: str, labels: torch.Tensor, token_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Sums of `token_loss(logits, y)` over each row of the split, `[B]`; 0 for the other rows."""
        rows = splits == SPLITS.index(split)
        y = labels[rows]
        losses = token_loss(logits[rows].float(), y.clamp(min=0)[..., None]).masked_fill(y == IGNORED, 0.0)
        return torch.zeros(rows.shape, device=losses.device).masked_scatter(rows, losses.sum(-1))

    followed_split, avoided_split = FOLLOWED_AND_AVOIDED[stream]
    l_p = total(followed_split, labels, lambda z, y: -log_p(z, y))
    l_n = total(avoided_split, avoided, lambda z, y: -log_1_minus_p(z, y))
    if plain_logits is None:
        l_r = total("D_S", labels, lambda z, y: -log_p(z, y))
    else:
        l_r = total("D_S", labels, lambda z, y: kl_divergence(plain_logits.float(), z))
    return torch.stack([l_p, l_n, l_r], dim=-1)


def log_p(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Log P(y), `[...]`, of tokens y, `[..., 1]`."""
    return logits.gather(-1, y).squeeze(-1) - logits.logsumexp(-1)


def log_1_minus_p(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log(1 - P(y)), as the probability of all other tokens: exact where P(y) rounds to 1."""
    return logits.scatter(-1, y, -math.inf).logsumexp(-1) - logits.logsumexp(-1)


def kl_divergence(plain_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(P_plain || P) over the vocabulary, `[...]`."""
    log_plain, log_prompted = plain_logits.log_softmax(-1), logits.log_softmax(-1)
    return (log_plain.exp() * (log_plain - log_prompted)).sum(-1)


def count_tokens(labels: torch.Tensor, avoided: torch.Tensor, splits: torch.Tensor, stream: str) -> torch.Tensor:
    """Response tokens in each row that L_p, L_n and L_r are means over, `[B, 3]`."""
    of_term = [SPLITS.index(split) for split in (*FOLLOWED_AND_AVOIDED[stream], "D_S")]
    chosen = splits[:, None] == torch.tensor(of_term, device=splits.device)
    return torch.stack([(tokens != IGNORED).sum(-1) for tokens in (labels, avoided, labels)], dim=-1) * chosen
