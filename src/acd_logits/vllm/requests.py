"""Which requests an ACD model answers, checked where they enter vLLM and again where they enter its engine.

A prompt must begin with the n placeholders and hold no other. The tokenizer of an exported folder sees to that, so
what is refused here went around it: token ids or a chat template of the client's own, `add_special_tokens` turned
round, truncation from the left, a message that spells the placeholder.

The engine is checked as well since requests can reach it past the API (`AsyncLLM.add_request` takes finished ones). An
error there is the request's own: its client gets `finish_reason: "error"`, and the engine goes on.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from .exported import ExportedPair

ALPHA_ARGUMENT = "acd_alpha"
PROCESSOR = "acd_logits.vllm:RequestAlpha"


def install_checks() -> None:
    """Wrap vLLM's two entries for requests; a second call changes nothing.

    Raises:
        AttributeError, ImportError: this vLLM has other entries.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    for owner, name in ((InputProcessor, "process_inputs"), (EngineCore, "preprocess_add_request")):
        if not hasattr(getattr(owner, name), "_acd"):
            setattr(owner, name, _checked(getattr(owner, name), returns_request=owner is InputProcessor))


def _checked(method: Any, returns_request: bool) -> Any:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if returns_request:
            request = method(self, *args, **kwargs)
            check_request(request, self.vllm_config)
            return request
        check_request(kwargs["request"] if "request" in kwargs else args[0], self.vllm_config)
        return method(self, *args, **kwargs)

    wrapper._acd = True  # type: ignore[attr-defined]
    return wrapper


def check_request(request: Any, vllm_config: Any) -> None:
    """Refuse what an ACD model cannot answer with the contrast; let the requests of any other model pass.

    Args:
        request: vLLM's `EngineCoreRequest`.
        vllm_config: of the engine it is meant for.

    Raises:
        VLLMValidationError: with one sentence; the API answers 400.
    """
    pair = ExportedPair.of(vllm_config.model_config)
    if pair is None:
        return
    reason = _prompt_fault(request, pair) or _sampling_fault(request.sampling_params, vllm_config, pair)
    if reason:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(f"ACD refuses this request: {reason}.")


def _prompt_fault(request: Any, pair: ExportedPair) -> str | None:
    ids, n = request.prompt_token_ids, pair.num_virtual_tokens
    if ids is None or request.prompt_embeds is not None:
        return "it brings embeddings, and the contrast needs a prompt of tokens"
    if request.resumable:
        return "it streams its input, and the contrast needs the whole prompt"
    if list(ids[:n]) != [pair.placeholder_id] * n:
        return (
            f"its prompt does not begin with the {n} placeholder tokens that stand for the prompt pair: the model's "
            "own chat template puts them there, and without a template add_special_tokens does"
        )
    if pair.placeholder_id in ids[n:]:
        return "its prompt holds placeholder tokens of the prompt pair behind the first ones"
    return "its prompt is empty" if len(ids) == n else None


def _sampling_fault(params: Any, vllm_config: Any, pair: ExportedPair) -> str | None:
    if params is None:
        return "an ACD model generates text only"
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return "prompt_logprobs (echo with logprobs) would score the placeholders of the prompt pair"
    if ALPHA_ARGUMENT in (params.extra_args or {}):
        if not takes_request_alpha(vllm_config.model_config):
            return f"{ALPHA_ARGUMENT} needs a server that was started with --logits-processors {PROCESSOR}"
        if fault := alpha_fault(params.extra_args[ALPHA_ARGUMENT]):
            return fault
    if not 0.1 <= params.repetition_penalty <= 10:
        # It multiplies the contrasted logits, where tokens without plausibility lie far below the others
        return "its repetition_penalty is not between 0.1 and 10"
    if any(pair.placeholder_id in word for word in params.bad_words_token_ids or ()):
        return "its bad_words hold the placeholder token"
    if pair.placeholder_id >= vllm_config.model_config.get_vocab_size() and vllm_config.use_v2_model_runner:
        return _second_runner_fault(params)
    return None


def _second_runner_fault(params: Any) -> str | None:
    """What vLLM's V2 model runner does without a bound on token ids, where the placeholder lies behind the last."""
    penalised = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
    structured = params.structured_outputs
    if penalised or (structured is not None and structured._backend == "guidance"):
        what = "penalties need" if penalised else "the structured output backend guidance needs"
        return f"{what} vLLM's V1 model runner for this model (VLLM_USE_V2_MODEL_RUNNER=0)"
    return None


def alpha_fault(alpha: Any) -> str | None:
    """What is wrong with a strength, if anything: it must be a finite number of at least 0."""
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if number and math.isfinite(alpha) and alpha >= 0:
        return None
    return f"{ALPHA_ARGUMENT} must be a finite number of at least 0, not {alpha!r}"


def takes_request_alpha(model_config: Any) -> bool:
    """Whether the server was started with the processor for a strength per request."""
    names = [getattr(processor, "__name__", str(processor)) for processor in model_config.logits_processors or []]
    return any(name.rpartition(":")[2] == PROCESSOR.rpartition(":")[2] for name in names)
