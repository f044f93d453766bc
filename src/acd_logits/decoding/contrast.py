"""Eq. 5 of the ACD paper (arXiv 2406.16743). It needs torch alone."""

from __future__ import annotations

import math

import torch


def contrast(
    safe: torch.Tensor,
    adversarial: torch.Tensor,
    alpha: float | torch.Tensor,
    beta: float = 0.0,
    keep_temperature: bool = True,
) -> torch.Tensor:
    """Eq. 5, `logit_S - alpha * logit_A`, over `1 - alpha`, for the tokens the safeguarding stream finds plausible.

    Args:
        safe: `[B, vocab]` logits (or log-probabilities) of the safeguarding stream; `-inf` entries stay `-inf`.
        adversarial: `[B, vocab]` logits of the adversarial stream.
        alpha: strength, a float or `[B, 1]`. Rows at 0 are the safeguarding stream alone, as it is.
        beta: keep tokens with `P_S >= beta * max P_S` only (Li et al. 2023); 0 keeps all.
        keep_temperature: divide by `1 - alpha`, what the coefficients of eq. 5 sum to, so that where the streams
            agree the result is what they agree on. Rows with `alpha` of 1 or more stay as they are, as everything
            does with `False`, which is eq. 5 alone.

    Returns:
        `[B, vocab]` unnormalised scores in the dtype of `safe`.
    """
    adversarial = adversarial.to(safe)
    if isinstance(alpha, torch.Tensor):
        scores = torch.addcmul(safe, adversarial, alpha.to(safe), value=-1)
    elif alpha == 0:
        return safe
    else:
        scores = torch.sub(safe, adversarial, alpha=alpha)
    if keep_temperature:
        scores.div_(coefficient_sum(alpha))
    # -inf less -inf is NaN; under a threshold, every -inf is below it
    cut = safe.isneginf() if beta == 0 else safe < safe.amax(-1, keepdim=True).add_(math.log(beta))
    scores.masked_fill_(cut, -math.inf)
    return torch.where(alpha == 0, safe, scores) if isinstance(alpha, torch.Tensor) else scores


def coefficient_sum(alpha: float | torch.Tensor) -> float | torch.Tensor:
    """`1 - alpha`, by which a contrast of this strength flattens the scores; 1 where `alpha` is 1 or more."""
    if isinstance(alpha, torch.Tensor):
        return (1 - alpha).masked_fill(alpha >= 1, 1.0)  # no branch, which would wait for the device
    return 1 - alpha if alpha < 1 else 1.0
