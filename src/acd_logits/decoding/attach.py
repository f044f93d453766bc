"""All that is done to a model for as long as a processor is attached to it: hooks, and overrides on the instance.

`generate()` builds its list of logits processors in `_get_logits_processor`, after it made the cache and before the
prefill. The override there binds a contrast to that one call. Around it stand the checks that nothing is left out: the
override of `generate()` notes the call before any decoding method sees it, and raises at its end if nothing was bound.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from abc import abstractmethod
from contextvars import ContextVar
from types import MethodType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .call import CACHE_NAMES, PairedCall
from .hooks import check_hooks
from .paired import PairedCache, known_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.utils.hooks import RemovableHandle
    from transformers import CompileConfig, GenerationConfig
    from transformers.generation import CandidateGenerator
    from transformers.utils import ModelOutput


check_hooks()

# Set while `check_left_padding` generates, the one time that a model which is safeguarded by itself may do so plainly
checks_padding: ContextVar[bool] = ContextVar("checks_padding", default=False)


class ContrastProcessor(LogitsProcessor):
    """A logits processor that needs its model attached, and binds itself to one call at a time."""

    model: PreTrainedModel

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raise: `generate` calls the processor that `bind` returns.

        Raises:
            RuntimeError: always.
        """
        _raise_unbound()

    @abstractmethod
    def bind(
        self, generation_config: GenerationConfig, ids_length: int, prompts: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> BoundProcessor:
        """Put a `PairedCache` into `model_kwargs` and return the processor for this one call.

        Args:
            generation_config: the call's own.
            ids_length: length of the `input_ids` that the decoding loop starts from.
            prompts: what the call starts from, ids or embeddings `[batch, ...]`, before beams and return sequences.
            model_kwargs: what the decoding loop passes to the model, changed in place.
        """


class BoundProcessor(LogitsProcessor):
    """The processor of one `generate` call."""

    cache: PairedCache
    ones: torch.Tensor | None  # an attention mask of ones, taken out of the call


def _raise_unbound() -> NoReturn:
    raise RuntimeError(
        "ACDLogitsProcessor was called outside generate() of the model it was built for, so no contrast was "
        "applied: pass it as logits_processor=[acd] to that model's generate() and keep it attached."
    )


class _Call(LogitsProcessor):
    """A processor's place in one `generate` call, which knows whether the contrast was applied."""

    def __init__(self, processor: ContrastProcessor) -> None:
        self.processor = processor
        self.bound: BoundProcessor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        _raise_unbound()

    def end(self) -> None:
        """Raise RuntimeError if tokens were chosen without the contrast."""
        if self.bound is None:
            raise RuntimeError(
                "generate() came back without having used its ACDLogitsProcessor, so no contrast was applied: use a "
                "decoding method that calls logits_processor at every token."
            )
        self.bound.cache.owed.close()


# ----- attaching -----


class _Attachment:
    """The hooks on one model, and the processors that need them. Copied and pickled with the model, without users."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.handles = handles
        self.users: weakref.WeakSet[ContrastProcessor] = weakref.WeakSet()

    def __getstate__(self) -> list[RemovableHandle]:
        return self.handles

    def __setstate__(self, handles: list[RemovableHandle]) -> None:
        self.handles, self.users = handles, weakref.WeakSet()


# Threads may attach to one model, and detach from it, at the same time
_lock = threading.Lock()


def attach(processor: ContrastProcessor) -> None:
    """Put hooks and overrides on the processor's model, unless they are there; raise ValueError if it has its own."""
    model = processor.model
    with _lock:
        attachment = model.__dict__.get("_acd_attachment")
        if attachment is None:
            if foreign := [name for name in _OVERRIDES if not _is_stock(model, name)]:
                raise ValueError(
                    f"this model carries a {foreign[0]} of its own, which ACD cannot see through: remove it."
                )
            handles = [
                model.register_forward_pre_hook(pre_forward_hook, with_kwargs=True),
                model.register_forward_hook(forward_hook, with_kwargs=True),
            ]
            attachment = model._acd_attachment = _Attachment(handles)
        # Set every time: a pickled model comes back with the hooks, but with the stock methods
        for name, function in _OVERRIDES.items():
            setattr(model, name, MethodType(function, model))
        attachment.users.add(processor)


def _is_stock(model: PreTrainedModel, name: str) -> bool:
    """Whether a method is the class's: peft's `generate()` leaves some of those on the model itself."""
    return name not in model.__dict__ or model.__dict__[name] == MethodType(getattr(type(model), name), model)


def detach(processor: ContrastProcessor) -> None:
    """Take a processor off its model, and the hooks and overrides with the last one."""
    model = processor.model
    with _lock:
        if not is_attached(processor):
            return
        attachment = model._acd_attachment
        attachment.users.discard(processor)
        if not attachment.users:
            for handle in attachment.handles:
                handle.remove()
            for name in (*_OVERRIDES, "_acd_attachment"):
                del model.__dict__[name]


def is_attached(processor: ContrastProcessor) -> bool:
    """Whether the processor's model still has its hooks for it."""
    attachment = processor.model.__dict__.get("_acd_attachment")
    return attachment is not None and processor in attachment.users


# ----- hooks -----


def pre_forward_hook(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], PairedCall] | None:
    """Turn a call that carries a `PairedCache` into a call of 2B rows; leave any other call alone."""
    if args and any(isinstance(value, PairedCache) for value in (*args, *kwargs.values())):
        names = list(inspect.signature(model.forward).parameters)
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    paired = _pair_call(model, kwargs)
    return None if paired is None else ((), paired)


def _pair_call(model: PreTrainedModel, kwargs: dict[str, Any]) -> PairedCall | None:
    """The call of 2B rows for one that carries a `PairedCache`; `None` for any other."""
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if isinstance(cache, PairedCache):
            if cache.streams.model is not model:
                raise ValueError("this cache was filled under ACD by another model.")
            return cache.pair(kwargs, name)
    return None


def forward_hook(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput
) -> ModelOutput | None:
    """Hand back the S rows of a paired call's output."""
    return kwargs.cache.split(output, kwargs) if isinstance(kwargs, PairedCall) else None


# ----- overrides -----


def _calls(processors: Iterable[Any] | None) -> list[_Call]:
    """The places of ACD in a list of processors."""
    return [processor for processor in processors or [] if is_noted(processor)]


def is_noted(processor: Any) -> bool:
    """Whether an item of a list of processors is ACD's place in a call that `generate` has noted."""
    return isinstance(processor, _Call)


def _noted(processors: Any) -> Any:
    """The same processors as a list, each of ours in a place of its own; any iterable is read once, here."""
    if processors is None:
        return None
    if isinstance(processors, ContrastProcessor):
        raise ValueError("logits_processor takes a list: pass logits_processor=[acd].")
    noted = [_Call(item) if isinstance(item, ContrastProcessor) else item for item in processors]
    return LogitsProcessorList(noted)


@functools.wraps(GenerationMixin.generate)
def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: D103 (wraps)
    for name in CACHE_NAMES:  # later transformers mark a cache from the user so by themselves
        if isinstance(kwargs.get(name), Cache):
            kwargs[name]._is_user_defined = True
    if len(args) > 2:
        args = (*args[:2], _noted(args[2]), *args[3:])
    elif kwargs.get("logits_processor") is not None:
        kwargs["logits_processor"] = _noted(kwargs["logits_processor"])
    calls = _calls(args[2] if len(args) > 2 else kwargs.get("logits_processor"))
    if calls and kwargs.get("cache_implementation") == "paged":
        _refuse_continuous_batching()
    if calls and _keeps_step(self, kwargs.get("synced_gpus")):
        raise ValueError(
            "ACD does not run where several processes share the weights (DeepSpeed ZeRO-3, FSDP, synced_gpus): one "
            "that has finished runs on without the contrast, to keep step. Load the whole model in each process."
        )
    output = type(self).generate(self, *args, **kwargs)
    for call in calls:
        call.end()
    return output


def _keeps_step(model: PreTrainedModel, synced: bool | None) -> bool:
    """Whether generate() goes on for as long as any process does, as transformers decides it."""
    if synced is None:
        synced = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return synced and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@functools.wraps(GenerationMixin.init_continuous_batching)
def init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Refuse, while a processor is there: what it gives would generate without one."""
    if self._acd_attachment.users:
        _refuse_continuous_batching()
    return type(self).init_continuous_batching(self, *args, **kwargs)


@functools.wraps(GenerationMixin.generate_batch)
def generate_batch(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Refuse, while a processor is there: `type(model).generate()` hands a paged call on to here without its own."""
    if self._acd_attachment.users:
        _refuse_continuous_batching()
    return type(self).generate_batch(self, *args, **kwargs)


def _refuse_continuous_batching() -> NoReturn:
    raise ValueError(
        "ACD does not run under continuous batching (generate_batch, cache_implementation='paged'), which would "
        "leave the contrast out: call generate() with another cache, or acd.detach() first for plain text."
    )


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
    """Bind the contrast in the list to this call.

    generate() calls this after it made the cache and before the prefill, with the very `model_kwargs` that the
    decoding loop uses: so the prefill is paired too, and the state of a call lives in its cache.
    """
    processors = _noted(logits_processor)
    found = _calls(processors)
    model_kwargs = {} if model_kwargs is None else model_kwargs
    if not found and any(known_cache(model_kwargs.get(name)) is not None for name in CACHE_NAMES):
        raise ValueError("past_key_values was filled under ACD: pass logits_processor=[acd] in this call too.")
    if len(found) > 1:
        raise ValueError("generate() takes one ACDLogitsProcessor at a time.")
    if found:
        [call] = found
        if call.processor.model is not self:
            raise ValueError("this ACDLogitsProcessor was built for another model: build one for this model.")
        if input_ids_seq_length is None or encoder_input_ids is None:
            raise ValueError("ACD needs generate(): this decoding loop does not say what it starts from.")
        call.bound = call.processor.bind(generation_config, input_ids_seq_length, encoder_input_ids, model_kwargs)
        processors = LogitsProcessorList(call.bound if item is call else item for item in processors)
    return type(self)._get_logits_processor(
        self,
        generation_config=generation_config,
        input_ids_seq_length=input_ids_seq_length,
        encoder_input_ids=encoder_input_ids,
        logits_processor=processors,
        model_kwargs=model_kwargs,
        **kwargs,
    )


@functools.wraps(GenerationMixin._get_candidate_generator)
def _get_candidate_generator(
    self: PreTrainedModel, *args: Any, logits_processor: LogitsProcessorList, **kwargs: Any
) -> CandidateGenerator:
    """Let drafts be drawn without the contrast, which has no logits for them: each is verified under it."""
    drafting = LogitsProcessorList(item for item in logits_processor if not isinstance(item, BoundProcessor))
    for item in logits_processor:
        if isinstance(item, BoundProcessor) and item.ones is not None:  # some ways to draft need it
            kwargs["model_kwargs"].setdefault("attention_mask", item.ones)
    return type(self)._get_candidate_generator(self, *args, logits_processor=drafting, **kwargs)


@functools.wraps(GenerationMixin.prepare_inputs_for_generation)
def prepare_inputs_for_generation(
    self: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Keep the paired cache where a model drops its cache, to compute all keys anew under other frequencies.

    Phi-3 does so where the text passes `original_max_position_embeddings`. Under ACD the soft prompts count as text.
    """
    name = next((name for name in CACHE_NAMES if isinstance(kwargs.get(name), PairedCache)), None)
    if name is None:
        return type(self).prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
    cache: PairedCache = kwargs[name]
    if cache.must_restart(input_ids.shape[1] + cache.offset):
        cache.restart()
        kwargs["next_sequence_length"] = None
    inputs = type(self).prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
    if inputs.get(name) is None:
        if cache.seen:
            cache.restart()
            kwargs["next_sequence_length"] = None
            inputs = type(self).prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        inputs[name] = cache
    if getattr(self.config.get_text_config(decoder=True), "output_router_logits", False):
        inputs["output_router_logits"] = False  # a loss for training, over a mask of one stream
    if not cache.seen and cache.offset and not kwargs.get("is_first_iteration"):
        raise ValueError(
            f"the text passes the length behind which {type(self).__name__} needs all keys anew, and a part of it was "
            "not given as input_ids: start again from the whole conversation, in tokens."
        )
    return inputs


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
        paired = _pair_call(self, kwargs)
        return compiled(**kwargs) if paired is None else paired.cache.split(compiled(**paired.static()), paired)

    return call


_OVERRIDES = {
    "generate": generate,
    "generate_batch": generate_batch,
    "init_continuous_batching": init_continuous_batching,
    "_get_logits_processor": _get_logits_processor,
    "_get_candidate_generator": _get_candidate_generator,
    "prepare_inputs_for_generation": prepare_inputs_for_generation,
    "_valid_auto_compile_criteria": _valid_auto_compile_criteria,
    "get_compiled_call": get_compiled_call,
}
