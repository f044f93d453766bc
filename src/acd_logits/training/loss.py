"""The losses of SP (eq. 3), of AP (eq. 4), and of their contrast (eq. 5), which is what decoding uses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..anchors import SPLITS
from ..decoding.contrast import contrast
from .data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from .data import Batch

TERMS = ("L_p", "L_n", "L_r")
# The contrast is to do what SP is to do
FOLLOWED_AND_AVOIDED = {
    "safeguarding": ("D_HR", "D_HA"),
    "adversarial": ("D_HA", "D_HR"),
    "contrast": ("D_HR", "D_HA"),
}


def joint_loss(
    safe: torch.Tensor,
    adversarial: torch.Tensor,
    labels: torch.Tensor,
    avoided: torch.Tensor,
    splits: torch.Tensor,
    alpha: float,
    plain_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_S (eq. 3), L_A (eq. 4) and L_C: eq. 3 on the contrast `(S - alpha A) / (1 - alpha)` that eq. 5 decodes from.

    Args:
        safe: `[B, R, vocab]` logits of the safeguarding stream S.
        adversarial: `[B, R, vocab]` logits of the adversarial stream A.
        labels: see [`opo_loss`].
        avoided: see [`opo_loss`].
        splits: see [`opo_loss`].
        alpha: strength of the contrast, below 1.
        plain_logits: see [`opo_loss`].

    Returns:
        `[B, 3, 3]`: what each row adds to L_p, L_n and L_r of S, of A and of their contrast.
    """
    safe, adversarial = safe.float(), adversarial.float()
    logits = {
        "safeguarding": safe,
        "adversarial": adversarial,
        "contrast": contrast(safe, adversarial, alpha),
    }
    losses = [opo_loss(z, labels, avoided, splits, stream, plain_logits) for stream, z in logits.items()]
    return torch.stack(losses, dim=1)


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
        stream: "safeguarding" or "contrast" for eq. 3, "adversarial" for eq. 4.
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


def mirror_loss(safe: torch.Tensor, harmful: torch.Tensor, openings: torch.Tensor) -> torch.Tensor:
    """L_m: a refusal is to begin behind a harmful instruction rather than behind the safe one that mirrors it.

        L_m = log(1 + exp(m(safe) - m(harmful))),  m = log-odds of the tokens that refusals begin with

    What both instructions have in common, and how often the prompt refuses at all, cancel out. It is not in the paper.

    Args:
        safe: `[..., vocab]` logits of the first token behind the safe instructions.
        harmful: `[..., vocab]`, behind those that mirror them.
        openings: first tokens of refusals, `[k]`.

    Returns:
        `[...]`.
    """

    def log_odds(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        others = logits.index_fill(-1, openings, -math.inf)
        return logits[..., openings].logsumexp(-1) - others.logsumexp(-1)

    return torch.nn.functional.softplus(log_odds(safe) - log_odds(harmful))


def mirrored_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of a batch L_m is about.

    Args:
        batch: as of [`collate`].

    Returns:
        Rows of D_S and rows of D_HR, `[k]` each, that mirror each other one by one, without answers that have begun.
    """
    splits, mirrors = batch["splits"], batch["mirrors"]
    from_the_start = (batch["begun"] == 0) & (batch["labels"][:, 0] != IGNORED)
    safe, harmful = ((splits == SPLITS.index(split)) & from_the_start for split in ("D_S", "D_HR"))
    pairs = safe[:, None] & harmful & (mirrors[:, None] == mirrors)
    safe_rows, harmful_rows = pairs.nonzero(as_tuple=True)
    return safe_rows, harmful_rows


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


def count_tokens(labels: torch.Tensor, avoided: torch.Tensor, splits: torch.Tensor) -> torch.Tensor:
    """Response tokens in each row that the terms of [`joint_loss`] are means over, `[B, 3, 3]`."""
    counts = torch.stack([(tokens != IGNORED).sum(-1) for tokens in (labels, avoided, labels)], dim=-1)
    of_term = [[SPLITS.index(s) for s in (*both, "D_S")] for both in FOLLOWED_AND_AVOIDED.values()]
    return counts[:, None] * (splits[:, None, None] == torch.tensor(of_term, device=splits.device))
