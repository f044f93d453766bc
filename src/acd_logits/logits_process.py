"""Eq. 5 of the ACD paper (arXiv 2406.16743) as a transformers logits processor."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .paired import CACHE_NAMES, PairedCache, PairedStreams, forward_hook, pair_call, pre_forward_hook, roomier
from .prompt_pair import PromptPair, base_model
from .shared import SharedStreams

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle
    from transformers import CompileConfig, GenerationConfig
    from transformers.utils import ModelOutput


logger = logging.get_logger(__name__)


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
    threshold = safe.amax(-1, keepdim=True) + math.log(beta)
    strength = torch.as_tensor(alpha, device=safe.device)
    return scores.masked_fill((safe < threshold) & (strength > 0), -math.inf)


class ACDLogitsProcessor(LogitsProcessor):
    """Adversarial Contrastive Decoding for `model.generate(..., logits_processor=[acd])`.

    Both streams run in one forward of twice the rows (see `paired.py`). Built-in processors (minimum length, bad
    words, repetition penalty) act on the safeguarding stream before the contrast; temperature, top-k and top-p act
    on its result. One object serves any number of calls, one after the other or in several threads.

    The soft prompts' keys and values are stored, and computed again when weights, adapters or hooks change. Only
    in-place writes through `parameter.data` go unnoticed: build a new processor after those.

    Args:
        model: a decoder-only transformers model, or a PeftModel around one (LoRA and the like).
        pair: the prompt pair, checked against the model.
        alpha: strength of the contrast in eq. 5, a float or a `[batch]` tensor for one strength per prompt; 0 is the
            safeguarding prompt alone. Default: the pair's.
        beta: keep tokens with `P_S >= beta * max P_S`; 0 is eq. 5 alone. Default: the pair's.
        horizon: contrast the first `horizon` new tokens, then go on with the safeguarding stream alone at the cost
            of plain decoding; `None` contrasts all.
        share_instruction_kv: keep one copy of the prompt's keys and values for both streams (see `shared.py`), which
            one plain prefill computes. Exact for a pair that was trained so, and an approximation for any other.
            Default: as the pair was trained.

    Raises:
        ValueError: for a value out of range, a pair that does not fit the model, or a model ACD cannot run on.

    Example:
    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from acd_logits import ACDLogitsProcessor, PromptPair

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> acd = ACDLogitsProcessor(model, PromptPair.from_text(model, tokenizer))
    >>> inputs = tokenizer("How do I pick a lock?", return_tensors="pt")
    >>> outputs = model.generate(**inputs, logits_processor=[acd])
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pair: PromptPair,
        alpha: float | torch.Tensor | None = None,
        beta: float | None = None,
        horizon: int | None = None,
        share_instruction_kv: bool | None = None,
    ) -> None:
        self.alpha = check_alpha(pair.alpha if alpha is None else alpha)
        self.beta = check_beta(pair.beta if beta is None else beta)
        self.horizon = check_horizon(horizon)
        self.pair = pair
        self.model = base_model(model)
        check_model(self.model)
        pair.check(self.model)
        trained = pair.config.share_instruction_kv
        share = trained if share_instruction_kv is None else share_instruction_kv
        if share != trained:
            logger.warning(
                f"This prompt pair was trained {'with' if trained else 'without'} share_instruction_kv and is used "
                f"{'with' if share else 'without'} it: it may protect less."
            )
        streams = SharedStreams if share else PairedStreams
        self.streams = streams(self.model, pair.safeguarding, pair.adversarial)
        _attach(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        model: PreTrainedModel,
        *,
        alpha: float | torch.Tensor | None = None,
        beta: float | None = None,
        horizon: int | None = None,
        share_instruction_kv: bool | None = None,
        **kwargs: Any,
    ) -> ACDLogitsProcessor:
        """Load a pair from a folder or the Hub and build the processor.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the pair.
            model: see the class.
            alpha: see the class.
            beta: see the class.
            horizon: see the class.
            share_instruction_kv: see the class.
            **kwargs: passed to `PromptPair.from_pretrained` (`revision`, `subfolder`, `token`, ...).
        """
        pair = PromptPair.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(model, pair, alpha=alpha, beta=beta, horizon=horizon, share_instruction_kv=share_instruction_kv)

    def detach(self) -> None:
        """Restore the model fully, if no other processor uses it. This one raises if it is used afterwards."""
        _detach(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ACDLogitsProcessor:
        return self  # it belongs to its model, which a copied list of processors still goes with

    def __reduce__(self) -> str:
        raise TypeError(
            "an ACDLogitsProcessor belongs to a loaded model and cannot be pickled: save its pair instead."
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raise: `generate` calls the processor that `bind` returns.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "ACDLogitsProcessor was called outside generate() of the model it was built for, so no contrast was "
            "applied: pass it as logits_processor=[acd] to that model's generate() and keep it attached."
        )

    def bind(
        self, generation_config: GenerationConfig, ids_length: int, batch: int, model_kwargs: dict[str, Any]
    ) -> _BoundACD:
        """Put a `PairedCache` into `model_kwargs` and return the processor for this one call.

        Args:
            generation_config: the call's own.
            ids_length: length of the `input_ids` that the decoding loop starts from.
            batch: number of prompts, before beams and return sequences.
            model_kwargs: what the decoding loop passes to the model, changed in place.
        """
        if self not in self.model._acd_attachment.users:
            raise ValueError("this ACDLogitsProcessor was detached from its model: build a new one.")
        if generation_config.token_healing:
            raise ValueError("ACD does not support token_healing: it rewrites the prompt without the contrast.")
        cache = _paired_cache(self, generation_config, model_kwargs)
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        if embeds is not None:
            length = embeds.shape[1]
        elif mask is not None:
            length = mask.shape[1]
        else:  # generate drops a mask of ones and notes its length
            length = getattr(generation_config, "_mask_length", ids_length)
        offset = length - ids_length
        cache.begin_call(length, generation_config.max_length + offset, offset, self.horizon, mask)

        beams, copies = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
        alpha = self.alpha
        if isinstance(alpha, torch.Tensor):
            if len(alpha) != batch:
                raise ValueError(f"alpha has {len(alpha)} entries for a batch of {batch} prompts.")
            alpha = alpha.repeat_interleave(max(beams, copies))[:, None]
        return _BoundACD(cache, alpha, self.beta, normalise=beams > 1, end=_end(ids_length, self.horizon))


class _BoundACD(LogitsProcessor):
    """The processor of one `generate` call."""

    def __init__(
        self, cache: PairedCache, alpha: float | torch.Tensor, beta: float, normalise: bool, end: float
    ) -> None:
        self.cache, self.alpha, self.beta, self.normalise, self.end = cache, alpha, beta, normalise, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Eq. 5 on `[B, vocab]` scores."""
        length = input_ids.shape[1]
        if length >= self.end:
            return scores
        adversarial = self.cache.adversarial_logits(length)
        if adversarial is None:
            return scores
        alpha = self.alpha.to(scores) if isinstance(self.alpha, torch.Tensor) else self.alpha
        result = contrast(scores, adversarial, alpha, self.beta)
        # Beam search adds log-probabilities up over tokens and compares beams
        return result.log_softmax(-1) if self.normalise else result


def check_alpha(alpha: float | torch.Tensor) -> float | torch.Tensor:
    """Return `alpha` as a float or a float32 `[batch]` tensor; raise ValueError unless finite and at least 0."""
    values = torch.as_tensor(alpha, dtype=torch.float32)
    if values.ndim > 1:
        raise ValueError(f"alpha must be a number or a [batch] tensor, got shape {list(values.shape)}.")
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"alpha must be finite and at least 0, got {values.tolist()}.")
    return values if values.ndim else float(alpha)


def check_beta(beta: float) -> float:
    """Return `beta`; raise ValueError unless it lies in [0, 1]."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}.")
    return float(beta)


def check_horizon(horizon: int | None) -> int | None:
    """Return `horizon`; raise ValueError unless it is `None` or a whole number of at least 1."""
    try:
        tokens = None if horizon is None else operator.index(horizon)
    except TypeError:
        tokens = 0
    if tokens is not None and tokens < 1:
        raise ValueError(f"horizon must be a number of tokens, at least 1, or None, got {horizon!r}.")
    return tokens


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that ACD cannot run on."""
    name = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"ACD needs a transformers model with generate(), got {name}.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; ACD supports decoder-only models.")
    arguments = inspect.signature(model.forward).parameters
    if not model._supports_default_dynamic_cache() or not any(cache in arguments for cache in CACHE_NAMES):
        raise ValueError(f"{name} does not keep its state in a transformers Cache, which ACD needs.")
    if getattr(model.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None):
        raise ValueError(f"{name} embeds tokens once per layer, where soft prompts have no embedding.")


def _end(ids_length: int, horizon: int | None) -> float:
    """Length of `input_ids` from which the safeguarding stream goes on alone."""
    return math.inf if horizon is None else ids_length + horizon


def _paired_cache(
    acd: ACDLogitsProcessor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> PairedCache:
    """The call's `PairedCache`: an earlier turn's, or a new one around what generate made; put in `model_kwargs`."""
    name = next((name for name in CACHE_NAMES if model_kwargs.get(name) is not None), CACHE_NAMES[0])
    cache = model_kwargs.get(name)
    known = _known_cache(cache)
    if known is not None:
        same = zip(known.streams.prompts, acd.streams.prompts, strict=True)
        if known.streams.model is not acd.model or not all(torch.equal(a, b) for a, b in same):
            raise ValueError("past_key_values was filled under another model or prompt pair.")
        if type(known.streams) is not type(acd.streams):
            raise ValueError("past_key_values was filled under another share_instruction_kv.")
        if not known.is_intact():
            raise ValueError(
                "past_key_values was changed outside ACD, or left half-written by an error: start again without it, "
                "from the whole conversation."
            )
        paired = known
    elif cache is None:
        if generation_config.use_cache:
            raise ValueError(f"{type(acd.model).__name__} does not keep its state in a transformers Cache.")
        paired = acd.streams.make_cache(None)
    else:
        if not all(_is_empty(layer) for layer in cache.layers):
            raise ValueError(
                "past_key_values was filled without ACD: start from the whole conversation, or pass the cache that a "
                "generate() call with this processor returned."
            )
        config = acd.model.config.get_text_config(decoder=True)
        inner = roomier(cache, acd.streams.width, config)
        paired = acd.streams.make_cache(inner)
        if getattr(cache, "_is_user_defined", False):
            if inner is not cache:
                raise ValueError(
                    "ACD needs more slots than this static cache has: pass cache_implementation='static'."
                )
            cache._paired = paired  # the user will pass this object again in the next turn
    model_kwargs[name] = paired
    return paired


def _known_cache(cache: Any) -> PairedCache | None:
    return cache if isinstance(cache, PairedCache) else getattr(cache, "_paired", None)


def _is_empty(layer: Any) -> bool:
    if any(getattr(layer, "has_previous_state", {}).values()):
        return False
    length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    return int(length) == 0


# ----- what a processor changes on its model, for as long as it is attached -----


class _Attachment:
    """The hooks on one model, and the processors that need them. Copied and pickled with the model, without users."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.handles = handles
        self.users: weakref.WeakSet[ACDLogitsProcessor] = weakref.WeakSet()

    def __getstate__(self) -> list[RemovableHandle]:
        return self.handles

    def __setstate__(self, handles: list[RemovableHandle]) -> None:
        self.handles, self.users = handles, weakref.WeakSet()


def _attach(acd: ACDLogitsProcessor) -> None:
    model = acd.model
    attachment = model.__dict__.get("_acd_attachment")
    if attachment is None:
        foreign = [name for name in _OVERRIDES if name in model.__dict__]
        if foreign:
            raise ValueError(f"this model carries a {foreign[0]} of its own, which ACD cannot see through: remove it.")
        handles = [
            model.register_forward_pre_hook(pre_forward_hook, with_kwargs=True),
            model.register_forward_hook(forward_hook, with_kwargs=True),
        ]
        attachment = model._acd_attachment = _Attachment(handles)
    # Set every time: a pickled model comes back with the hooks, but with the stock methods
    for name, function in _OVERRIDES.items():
        setattr(model, name, MethodType(function, model))
    attachment.users.add(acd)


def _detach(acd: ACDLogitsProcessor) -> None:
    model = acd.model
    attachment = model.__dict__.get("_acd_attachment")
    if attachment is None or acd not in attachment.users:
        return
    attachment.users.discard(acd)
    if not attachment.users:
        for handle in attachment.handles:
            handle.remove()
        for name in (*_OVERRIDES, "_acd_attachment"):
            del model.__dict__[name]


def _contrasting(processors: Any) -> list[ACDLogitsProcessor]:
    return [processor for processor in processors or [] if isinstance(processor, ACDLogitsProcessor)]


def _refuse_continuous_batching(processors: Any) -> None:
    if _contrasting(processors):
        raise ValueError(
            "ACD does not run under continuous batching (generate_batch, cache_implementation='paged'), which would "
            "leave the contrast out: call generate() with another cache."
        )


@functools.wraps(GenerationMixin.generate)
def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: D103 (wraps)
    for name in CACHE_NAMES:  # later transformers mark a cache from the user so by themselves
        if isinstance(kwargs.get(name), Cache):
            kwargs[name]._is_user_defined = True
    # generate() hands a paged call on to generate_batch() without its processors
    if kwargs.get("cache_implementation") == "paged":
        _refuse_continuous_batching(kwargs.get("logits_processor") or (args[2] if len(args) > 2 else None))
    return type(self).generate(self, *args, **kwargs)


@functools.wraps(GenerationMixin.generate_batch)
def generate_batch(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: D103 (wraps)
    _refuse_continuous_batching(kwargs.get("logits_processor"))
    return type(self).generate_batch(self, *args, **kwargs)


@functools.wraps(GenerationMixin._get_logits_processor)
def _get_logits_processor(
    self: PreTrainedModel,
    generation_config: GenerationConfig,
    input_ids_seq_length: int | None = None,
    encoder_input_ids: torch.Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> LogitsProcessorList:
    """Bind an `ACDLogitsProcessor` in the list to this call.

    generate() calls this after it made the cache and before the prefill, with the very `model_kwargs` that the
    decoding loop uses: so the prefill is paired too, and the state of a call lives in its cache.
    """
    found = _contrasting(logits_processor)
    model_kwargs = {} if model_kwargs is None else model_kwargs
    if not found and any(_known_cache(model_kwargs.get(name)) is not None for name in CACHE_NAMES):
        raise ValueError("past_key_values was filled under ACD: pass logits_processor=[acd] in this call too.")
    if len(found) > 1:
        raise ValueError("generate() takes one ACDLogitsProcessor at a time.")
    if found:
        if found[0].model is not self:
            raise ValueError("this ACDLogitsProcessor was built for another model: build one for this model.")
        if input_ids_seq_length is None or encoder_input_ids is None:
            raise ValueError("ACD needs generate(): this decoding loop does not say what it starts from.")
        bound = found[0].bind(generation_config, input_ids_seq_length, len(encoder_input_ids), model_kwargs)
        logits_processor = LogitsProcessorList(bound if p is found[0] else p for p in logits_processor or [])
    return type(self)._get_logits_processor(
        self,
        generation_config=generation_config,
        input_ids_seq_length=input_ids_seq_length,
        encoder_input_ids=encoder_input_ids,
        logits_processor=logits_processor,
        model_kwargs=model_kwargs,
        **kwargs,
    )


@functools.wraps(GenerationMixin._valid_auto_compile_criteria)
def _valid_auto_compile_criteria(
    self: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: GenerationConfig
) -> bool:
    """Judge by the cache inside: what generate() compiles without ACD, it compiles with it."""
    inner = {
        name: cache.inner
        for name, cache in model_kwargs.items()
        # Without position ids (Bloom, Mamba 2), distances come from a mask that grows, or there is none
        if isinstance(cache, PairedCache) and cache.streams.takes_positions
    }
    return type(self)._valid_auto_compile_criteria(self, model_kwargs | inner, generation_config)


@functools.wraps(PreTrainedModel.get_compiled_call)
def get_compiled_call(self: PreTrainedModel, compile_config: CompileConfig | None) -> Callable[..., ModelOutput]:
    """Pair the call outside of what is compiled: this is a call of 2B rows over the inner cache, of static shapes."""
    compiled = type(self).get_compiled_call(self, compile_config)

    def call(**kwargs: Any) -> ModelOutput:
        paired = pair_call(self, kwargs)
        return compiled(**kwargs) if paired is None else paired.cache.split(compiled(**paired.static()), paired)

    return call


_OVERRIDES = {
    "generate": generate,
    "generate_batch": generate_batch,
    "_get_logits_processor": _get_logits_processor,
    "_valid_auto_compile_criteria": _valid_auto_compile_criteria,
    "get_compiled_call": get_compiled_call,
}
