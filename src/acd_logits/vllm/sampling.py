"""A strength per request, for servers that are started with `--logits-processors acd_logits.vllm:RequestAlpha`.

Clients then pass `"vllm_xargs": {"acd_alpha": 0.3}`, and those that pass nothing get the exported strength. It is off
unless asked for: with it, a client can weaken the safeguard of its own answers (0 is the safeguarding prompt alone).

vLLM tells its logits processors about the requests of a batch. This one changes no logits; it keeps the strengths for
the model, which contrasts with each row's in `compute_logits`. vLLM has two model runners, with an interface for
processors each, and `RequestAlpha` has both: the first runner says which request has which row of the batch, and the
second one which has which slot of a table, and, to the state of a model (`alpha_state`), which slot has which row.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstProcessor
from vllm.v1.sample.logits_processor import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondProcessor

from .exported import ExportedPair
from .requests import ALPHA_ARGUMENT, alpha_fault

# By the id of the engine's compilation config, the object that its runner, its model and its processors share
_processors: weakref.WeakValueDictionary[int, RequestAlpha] = weakref.WeakValueDictionary()


class RequestAlpha(FirstProcessor, SecondProcessor):
    """Reads `acd_alpha` of every request. vLLM builds one for each worker.

    Args:
        vllm_config: of the engine.
        runner: what the model runner hands over: a device and whether to pin memory, or its table of requests.

    Raises:
        ValueError: for a model that is not ours.
    """

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        pair = ExportedPair.of(vllm_config.model_config)
        if pair is None:
            raise ValueError("RequestAlpha needs a model that acd-logits exported.")
        self.default = pair.alpha
        self.rows: dict[int, float] = {}
        self.slots: torch.Tensor | None = None
        self.slot_of_row: torch.Tensor | None = None
        if len(runner) == 1:
            (requests,) = runner
            self.slots = torch.full((requests.max_num_reqs,), self.default, device=requests.device)
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
        """Follow requests that enter, leave or move in the batch of the first runner."""
        process_dict_updates(self.rows, batch_update, lambda params, *_: _alpha_of(params))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the strength of a request that enters a slot of the second runner; it asks for no change of logits."""
        assert self.slots is not None  # the second runner built this object
        alpha = _alpha_of(sampling_params)
        self.slots[req_idx] = self.default if alpha is None else alpha
        return False

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        """Return the logits as they are: `compute_logits` has contrasted them."""
        return logits

    def of_rows(self, rows: int, device: torch.device) -> torch.Tensor | None:
        """The strength of every row of the batch, `[rows]`; `None`: the exported one for all."""
        if self.slots is not None:
            if self.slot_of_row is None or len(self.slot_of_row) != rows:  # a trial run, of no requests
                return None
            return self.slots[self.slot_of_row]
        if not self.rows:
            return None
        return torch.tensor([self.rows.get(row, self.default) for row in range(rows)], device=device)


def processor_of(vllm_config: Any) -> RequestAlpha | None:
    """The engine's processor for a strength per request; `None` on a server that was started without."""
    return _processors.get(id(vllm_config.compilation_config))


def _alpha_of(params: Any) -> float | None:
    alpha = (params.extra_args or {}).get(ALPHA_ARGUMENT)
    return None if alpha is None else float(alpha)


@functools.cache
def alpha_state(stock: Any) -> Any:
    """The class by which the second runner prepares steps of a model, from vLLM's: it notes the slots of the rows."""

    class AlphaState(stock):
        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            if processor := processor_of(self.vllm_config):
                processor.slot_of_row = input_batch.expanded_idx_mapping
            return super().prepare_inputs(input_batch, req_states)

    return AlphaState
