"""The ranges of what strengthens and limits the contrast: for calls, configs and commands alike."""

from __future__ import annotations

import math
import operator

import torch


def check_alpha(alpha: float | torch.Tensor) -> float | torch.Tensor:
    """Return `alpha` as a float or a float32 `[batch]` tensor; raise ValueError unless finite and at least 0."""
    try:
        values = torch.as_tensor(alpha, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"alpha must be a number or a [batch] tensor, got {alpha!r}.") from None
    if values.ndim > 1:
        raise ValueError(f"alpha must be a number or a [batch] tensor, got shape {list(values.shape)}.")
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"alpha must be finite and at least 0, got {values.tolist()}.")
    return values if values.ndim else float(alpha)


def check_beta(beta: float) -> float:
    """Return `beta`; raise ValueError unless it lies in [0, 1]."""
    try:
        value = math.nan if isinstance(beta, str | bytes) else float(beta)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta!r}.")
    return value


def check_horizon(horizon: int | None) -> int | None:
    """Return `horizon`; raise ValueError unless it is `None` or a whole number of at least 1."""
    try:
        tokens = None if horizon is None else operator.index(horizon)
    except TypeError:
        tokens = 0
    if tokens is not None and tokens < 1:
        raise ValueError(f"horizon must be a number of tokens, at least 1, or None, got {horizon!r}.")
    return tokens
