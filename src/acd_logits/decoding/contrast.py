"""Eq. 5 of the ACD paper (arXiv 2406.16743). It needs torch alone."""

from __future__ import annotations

import math

import torch


def contrast(
    safe: torch.Tensor, adversarial: torch.Tensor, alpha: float | torch.Tensor, beta: float = 0.0
) -> torch.Tensor:
    """Eq. 5: `logit_S - alpha * logit_A`, over the tokens the safeguarding stream finds plausible.

    Args:
        safe: `[B, vocab]` logits (or log-probabilities) of the safeguarding stream; `-inf` entries stay `-inf`.
        adversarial: `[B, vocab]` logits of the adversarial stream.
        alpha: strength, a float or `[B, 1]`. Rows at 0 are the safeguarding stream alone.
        beta: keep tokens with `P_S >= beta * max P_S` only (Li et al. 2023); 0 keeps all, which is eq. 5 alone.

    Returns:
        `[B, vocab]` unnormalised scores in the dtype of `safe`.
    """
    scores = torch.where(safe.isneginf(), safe, safe - alpha * adversarial.to(safe))
    if beta == 0:
        return scores
    implausible = safe < safe.amax(-1, keepdim=True) + math.log(beta)
    if isinstance(alpha, torch.Tensor):
        implausible &= alpha > 0
    elif alpha == 0:
        return scores
    return scores.masked_fill(implausible, -math.inf)
