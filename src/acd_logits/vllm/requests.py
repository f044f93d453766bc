"""The placeholders of the prompt pair in every request, and which requests an ACD model answers.

n placeholders enter a prompt of token ids x where it enters vLLM, behind tokenizer and chat template:

    embedding prompts    [placeholders | x]
    key-value prompts    [x without its last token | placeholders | last token of x]

The engine checks that they are there, since requests can reach it past the API (`AsyncLLM.add_request` takes finished
ones). An error there is the request's own: its client gets `finish_reason: "error"`, and the engine goes on.
"""

from __future__ import annotations

import functools
from typing import Any

from .exported import MOST_ALPHA, ExportedPair

ALPHA_ARGUMENT = "acd_alpha"
PROCESSOR = "acd_logits.vllm:RequestAlpha"


def install_checks() -> None:
    """Wrap vLLM's entries for requests; a second call changes nothing.

    Raises:
        AttributeError, ImportError: this vLLM has other entries.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(InputProcessor, "process_inputs", _admit)
    _wrap(InputProcessor, "resolve_watermarking", _check_beams)  # the one method that beam search calls once
    _wrap(EngineCore, "preprocess_add_request", _check_placeholders)


def _wrap(owner: Any, name: str, around: Any) -> None:
    """Replace a method by `around(method, self, *args, **kwargs)`."""
    method = getattr(owner, name)
    if hasattr(method, "_acd"):
        return

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(method, self, *args, **kwargs)

    wrapper._acd = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)


def _admit(method: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a request of an API call, and put the placeholders into it."""
    request = method(processor, *args, **kwargs)
    admit_request(request, processor.vllm_config)
    return request


def _check_placeholders(method: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    check_request(kwargs["request"] if "request" in kwargs else args[0], engine.vllm_config)
    return method(engine, *args, **kwargs)


def _check_beams(method: Any, processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    pair = ExportedPair.of(processor.vllm_config.model_config)
    if pair is not None and pair.prompt_type == "key_value" and hasattr(params, "beam_width"):
        # Each step would be a request of its own, whose prompt, with all but its last token, does not see the prompts
        raise _refusal("key-value prompts cannot be decoded by vLLM's beam search")
    return method(processor, params, *args, **kwargs)


def admit_request(request: Any, vllm_config: Any) -> None:
    """Put the placeholders into a request for an ACD model; let the requests for any other model pass.

    Args:
        request: vLLM's `EngineCoreRequest`; changed.
        vllm_config: of the engine it is meant for.

    Raises:
        VLLMValidationError: the model cannot answer it with the contrast. The API answers 400.
    """
    pair = ExportedPair.of(vllm_config.model_config)
    if pair is None:
        return
    reason = _prompt_fault(request) or _sampling_fault(request.sampling_params, vllm_config, pair)
    ids, n, room = request.prompt_token_ids or [], pair.num_virtual_tokens, vllm_config.model_config.max_model_len
    if not reason and pair.placeholder_id in ids:
        reason = "its prompt holds the placeholder token of the prompt pair"
    if not reason and len(ids) + n >= room:
        reason = (
            f"its prompt of {len(ids)} tokens and the prompt pair's {n} leave no room for an answer within the "
            f"maximum length of {room}"
        )
    if reason:
        raise _refusal(reason)
    place = _place(len(ids), pair)
    request.prompt_token_ids = [*ids[:place], *[pair.placeholder_id] * n, *ids[place:]]


def check_request(request: Any, vllm_config: Any) -> None:
    """Refuse what reaches the engine of an ACD model and cannot be answered with the contrast.

    Args:
        request: vLLM's `EngineCoreRequest`.
        vllm_config: of the engine.

    Raises:
        VLLMValidationError: with one sentence.
    """
    pair = ExportedPair.of(vllm_config.model_config)
    if pair is None:
        return
    reason = _prompt_fault(request) or _sampling_fault(request.sampling_params, vllm_config, pair)
    ids, n = list(request.prompt_token_ids or []), pair.num_virtual_tokens
    place = _place(len(ids) - n, pair)
    placeholders = [i for i, token in enumerate(ids) if token == pair.placeholder_id]
    if not reason and (len(ids) <= n or placeholders != list(range(place, place + n))):
        reason = f"its prompt does not hold the {n} placeholder tokens that stand for the prompt pair in their place"
    if reason:
        raise _refusal(reason)


def _refusal(reason: str) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(f"ACD refuses this request: {reason}.")


def _place(length: int, pair: ExportedPair) -> int:
    """In front of which of a prompt's tokens the placeholders stand."""
    return 0 if pair.prompt_type == "embedding" else length - 1


def _prompt_fault(request: Any) -> str | None:
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "it brings embeddings, and the contrast needs a prompt of tokens"
    if request.resumable:
        return "it streams its input, and the contrast needs the whole prompt"
    return None if request.prompt_token_ids else "its prompt is empty"


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
    named = [params.allowed_token_ids, *(params.bad_words_token_ids or ())]
    if any(pair.placeholder_id in tokens for tokens in named if tokens):
        return "its allowed_token_ids or bad_words hold the placeholder token of the prompt pair"
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
    """What is wrong with a strength, if anything: it must be from 0 to `MOST_ALPHA`."""
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if number and 0 <= alpha <= MOST_ALPHA:
        return None
    return f"{ALPHA_ARGUMENT} must be a number from 0 to {MOST_ALPHA}, not {alpha!r}"


def takes_request_alpha(model_config: Any) -> bool:
    """Whether the server was started with the processor for a strength per request."""
    names = [getattr(processor, "__name__", str(processor)) for processor in model_config.logits_processors or []]
    return any(name.rpartition(":")[2] == PROCESSOR.rpartition(":")[2] for name in names)
