"""A strength per request, for servers that are started with `--logits-processors acd_logits.vllm:RequestAlpha`.

Clients then pass `"vllm_xargs": {"acd_alpha": 0.3}`, and those that pass nothing get the exported strength. It is off
unless asked for: with it, a client can weaken the safeguard of its own answers (0 is the safeguarding prompt alone).

vLLM tells its logits processors which request has which row of the batch, before each forward. This one changes no
logits; it keeps that list for the model, which contrasts with each row's strength in `compute_logits`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from .exported import ExportedPair
from .requests import ALPHA_ARGUMENT, alpha_fault

if TYPE_CHECKING:
    import torch

# By the id of the engine's compilation config, the object that its runner, its model and its processors share
_processors: weakref.WeakValueDictionary[int, RequestAlpha] = weakref.WeakValueDictionary()


class RequestAlpha(LogitsProcessor):
    """Reads `acd_alpha` of every request. vLLM builds one for each worker."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        if ExportedPair.of(vllm_config.model_config) is None:
            raise ValueError("RequestAlpha needs a model that acd-logits exported.")
        self.rows: dict[int, float] = {}
        _processors[id(vllm_config.compilation_config)] = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request's strength.

        Raises:
            VLLMValidationError: unless it is a finite number of at least 0.
        """
        alpha = (sampling_params.extra_args or {}).get(ALPHA_ARGUMENT, 0)
        if fault := alpha_fault(alpha):
            raise VLLMValidationError(f"{fault}.", parameter=ALPHA_ARGUMENT, value=alpha)

    def is_argmax_invariant(self) -> bool:
        """`apply` changes nothing."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that enter, leave or move in the batch."""
        process_dict_updates(self.rows, batch_update, _alpha_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are: `compute_logits` has contrasted them."""
        return logits


def strengths(compilation_config: Any, default: float, rows: int) -> float | list[float]:
    """The strength of every row of the batch, or one for all.

    Args:
        compilation_config: of the engine.
        default: the exported strength.
        rows: number of rows.
    """
    processor = _processors.get(id(compilation_config))
    if processor is None or not processor.rows:
        return default
    return [processor.rows.get(row, default) for row in range(rows)]


def _alpha_of(params: Any, prompt: Any, output: Any) -> float | None:
    alpha = (params.extra_args or {}).get(ALPHA_ARGUMENT)
    return None if alpha is None else float(alpha)
