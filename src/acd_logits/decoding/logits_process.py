"""Eq. 5 of the ACD paper (arXiv 2406.16743) as a transformers logits processor."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerationMixin
from transformers.utils import logging

from ..pairs.fit import base_model
from ..pairs.key_values import cache_layers
from ..pairs.prompt_pair import PromptPair
from ..ranges import check_alpha, check_beta, check_horizon
from . import attention
from .attach import BoundProcessor, ContrastProcessor, attach, checks_padding, detach, is_attached
from .call import CACHE_NAMES
from .contrast import contrast
from .explain import explain
from .layers import is_empty, roomier, take
from .paired import PairedCache, known_cache
from .shared import SharedCache, SharedStreams
from .streams import PairedStreams

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from .explanation import Explanation

logger = logging.get_logger(__name__)


class ACDLogitsProcessor(ContrastProcessor):
    """Adversarial Contrastive Decoding for `model.generate(..., logits_processor=[acd])`.

    Both streams run in one forward of twice the rows (see `paired.py`). Built-in processors (minimum length, bad
    words, repetition penalty) act on the safeguarding stream before the contrast; temperature, top-k and top-p act
    on its result. One object serves any number of calls, one after the other or in several threads.

    Every call computes the soft prompts' keys and values anew, so it follows whatever happened to the model: optimiser
    steps, adapters, hooks, patched modules. `frozen_model=True` saves that for a model that stays as it is.

    Args:
        model: a decoder-only transformers model, or a PeftModel around one (LoRA and the like).
        pair: the prompt pair, checked against the model.
        alpha: strength of the contrast in eq. 5, a float or a `[batch]` tensor for one strength per prompt; 0 is the
            safeguarding prompt alone. Default: the pair's.
        beta: keep tokens with `P_S >= beta * max P_S`; 0 keeps all. Default: the pair's.
        horizon: contrast the first `horizon` new tokens, then go on with the safeguarding stream alone at the cost
            of plain decoding; `None` contrasts all.
        share_instruction_kv: keep one copy of the prompt's keys and values for both streams (see `shared.py`), which
            are those of plain generation. Exact for a pair that was trained so, and an approximation for any other.
            Default: as the pair was trained. Key-value prompts are always decoded so.
        frozen_model: your promise that nothing about the model changes while this processor is used: no weights,
            adapters, hooks, dtypes. The first call then computes the soft prompts' keys and values for all.
            Key-value prompts have theirs, and gain nothing.
        keep_temperature: divide the contrast by `1 - alpha`, what its coefficients sum to (for `alpha` below 1), so
            that sampling is at the temperature you set. `False` is eq. 5 alone, which at `alpha` 0.5 samples as at
            twice that. Greedy search chooses the same tokens either way.

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
        frozen_model: bool = False,
        keep_temperature: bool = True,
    ) -> None:
        if not isinstance(pair, PromptPair):
            raise ValueError(f"pair must be a PromptPair, got {type(pair).__name__}: PromptPair(sp, ap) makes one.")
        self.alpha = check_alpha(pair.alpha if alpha is None else alpha)
        self.beta = check_beta(pair.beta if beta is None else beta)
        self.horizon = check_horizon(horizon)
        self.keep_temperature = keep_temperature
        self.pair = pair
        self._given, self.model = model, base_model(model)
        check_model(self.model)
        pair.check(self.model)
        trained = bool(pair.config.share_instruction_kv)
        share = trained if share_instruction_kv is None else share_instruction_kv
        _check_flags(share_instruction_kv=share, frozen_model=frozen_model, keep_temperature=keep_temperature)
        if pair.config.prompt_type == "key_value" and not share:
            raise ValueError(
                "key-value prompts are decoded with a shared instruction: leave out share_instruction_kv=False, or "
                "use embedding prompts."
            )
        if share != trained:
            logger.warning(
                f"This prompt pair was trained {'with' if trained else 'without'} share_instruction_kv and is used "
                f"{'with' if share else 'without'} it: it may protect less."
            )
        streams = SharedStreams if share else PairedStreams
        self.streams = streams(self.model, pair.safeguarding, pair.adversarial, frozen_model)
        self._make_cache: Callable[..., PairedCache] = SharedCache if share else PairedCache
        if self.streams.lengths[0] != self.streams.lengths[1]:
            check_left_padding(self.model)
        attach(self)
        if share:
            attention.install(self)

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
        frozen_model: bool = False,
        keep_temperature: bool = True,
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
            frozen_model: see the class.
            keep_temperature: see the class.
            **kwargs: passed to `PromptPair.from_pretrained` (`revision`, `subfolder`, `token`, ...).
        """
        pair = PromptPair.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(model, pair, alpha, beta, horizon, share_instruction_kv, frozen_model, keep_temperature)

    def explain(
        self,
        inputs: torch.Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        num_candidates: int = 5,
        **kwargs: Any,
    ) -> list[Explanation]:
        """Generate, and show what the contrast did to each new token.

        One ordinary `generate()` call, and one plain forward over the finished text. All probabilities are those at
        temperature 1, whatever the temperature of the call. Those of ACD are the distribution that was sampled from:
        the contrast, divided by `1 - alpha` unless `keep_temperature=False`, with 0 for tokens cut by `beta`.

        Args:
            inputs: what `generate()` takes first; usually left out, with `input_ids` among the keywords.
            tokenizer: the model's.
            num_candidates: how many of the likeliest tokens of each stream to keep.
            **kwargs: passed to `generate()`, which must decode one row per prompt: greedy search or sampling.

        Returns:
            One [`Explanation`] per prompt.

        Raises:
            ValueError: for beams, drafts, several sequences per prompt, `inputs_embeds`, other processors, or texts
                beyond the length from which on a model has other rotary frequencies.
        """
        settings = {name: getattr(self, name) for name in ("alpha", "beta", "horizon", "keep_temperature")}
        return explain(self, settings, inputs, tokenizer, num_candidates, kwargs)

    def detach(self) -> None:
        """Restore the model fully, if no other processor uses it. This one raises if it is used afterwards."""
        detach(self)
        attention.remove(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ACDLogitsProcessor:
        return self  # it belongs to its model, which a copied list of processors still goes with

    def __reduce__(self) -> str:
        raise TypeError(
            "an ACDLogitsProcessor belongs to a loaded model and cannot be pickled: save its pair instead."
        )

    def bind(
        self, generation_config: GenerationConfig, ids_length: int, prompts: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> _BoundACD:
        """See the base class."""
        if not is_attached(self):
            raise ValueError("this ACDLogitsProcessor was detached from its model: build a new one.")
        base_model(self._given)  # adapters may have come since
        if generation_config.token_healing:
            raise ValueError("ACD does not support token_healing: it rewrites the prompt without the contrast.")
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        if embeds is not None:
            length = embeds.shape[1]
        elif mask is not None:
            length = mask.shape[1]
        else:  # generate drops a mask of ones and notes its length
            length = getattr(generation_config, "_mask_length", ids_length)
        offset = length - ids_length
        max_length = generation_config.max_length + offset
        self.streams.check_length(max_length)
        cache = _paired_cache(self, generation_config, model_kwargs)
        ones = _take_ones(cache, model_kwargs)
        cache.begin_call(length, max_length, offset, self.horizon, mask if ones is None else None)

        beams, copies = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
        alpha = self.alpha
        if isinstance(alpha, torch.Tensor):
            if len(alpha) != len(prompts):
                raise ValueError(f"alpha has {len(alpha)} entries for a batch of {len(prompts)} prompts.")
            # Moved here, where the device is idle: later the host would wait for it
            alpha = alpha.to(prompts.device).repeat_interleave(max(beams, copies))[:, None]
        end = _end(ids_length, self.horizon)
        return _BoundACD(cache, alpha, self.beta, self.keep_temperature, beams > 1, end, ones)


class _BoundACD(BoundProcessor):
    """The processor of one `generate` call."""

    def __init__(
        self,
        cache: PairedCache,
        alpha: float | torch.Tensor,
        beta: float,
        keep_temperature: bool,
        normalise: bool,
        end: float,
        ones: torch.Tensor | None,
    ) -> None:
        self.ones = ones
        self.cache, self.alpha, self.beta, self.keep_temperature = cache, alpha, beta, keep_temperature
        self.normalise, self.end = normalise, end
        self.checked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Eq. 5 on `[B, vocab]` scores."""
        length = input_ids.shape[1]
        adversarial = self.cache.owed.take(length)
        if length >= self.end:
            return scores
        if adversarial is None or len(adversarial) != len(scores):
            rows = 0 if adversarial is None else len(adversarial)
            raise RuntimeError(
                f"the decoding loop asks for a contrast of {len(scores)} rows, and ACD has {rows} rows of adversarial "
                "logits, so it cannot be applied: select rows of the cache too."
            )
        adversarial = adversarial.to(scores.device)  # which is that of the inputs, and not always the model's
        if not self.checked:  # once a call: reading from the device makes it wait
            self._check_nan(scores, adversarial)
        if isinstance(self.alpha, torch.Tensor):
            self.alpha = self.alpha.to(scores)  # generate() has them in float32, where `bind` put it
        result = contrast(scores, adversarial, self.alpha, self.beta, self.keep_temperature)
        # Beam search adds log-probabilities up over tokens and compares beams
        return result.log_softmax(-1) if self.normalise else result

    def _check_nan(self, scores: torch.Tensor, adversarial: torch.Tensor) -> None:
        if bool((scores.isnan() | adversarial.isnan()).any()):
            streams = {"safeguarding": scores, "adversarial": adversarial}
            names = " and the ".join(name for name, logits in streams.items() if bool(logits.isnan().any()))
            model = self.cache.streams.model
            raise ValueError(
                f"{type(model).__name__} gives NaN behind the {names} prompt, in {model.dtype}: load it in a dtype "
                "of wider range, such as bfloat16, or use a pair made for it."
            )
        self.checked = True


def _check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that ACD cannot run on."""
    name = type(model).__name__
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"ACD needs a transformers model with generate(), got {name}.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; ACD supports decoder-only models.")
    try:
        cache_layers(model)
    except AttributeError:  # BLT, whose config has no layers of its own
        raise ValueError(f"{name} does not keep its state in a transformers Cache, which ACD needs.") from None
    arguments = inspect.signature(model.forward).parameters
    if not model._supports_default_dynamic_cache() or not any(cache in arguments for cache in CACHE_NAMES):
        raise ValueError(f"{name} does not keep its state in a transformers Cache, which ACD needs.")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "hidden_size_per_layer_input", None) or getattr(config, "ple_layer_ids", None):
        raise ValueError(f"{name} embeds tokens once per layer, where soft prompts have no embedding.")
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        raise ValueError(f"{name} chooses experts by token ids, which soft prompts have none of.")
    scaled = config.model_type == "falcon_h1" and config.embedding_multiplier != 1
    if scaled or (config.model_type == "mvp" and config.scale_embedding):
        raise ValueError(f"{name} scales the embeddings of its tokens, and not those of soft prompts.")
    if "inputs_embeds" not in arguments:
        raise ValueError(f"{name} takes no inputs_embeds, as which soft prompts are given.")


def check_left_padding(model: PreTrainedModel) -> None:
    """Raise ValueError for a model on which a padded prompt is not what it is without padding.

    The shorter one of two soft prompts stands behind padding. Two tokens are generated from a short prompt, plain,
    with one padding token and without: transformers knows how each model wants to be called.
    """
    device = "cpu" if model.device.type == "meta" else model.device  # accelerate brings it to offloaded weights
    ids = torch.arange(3, 7, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
    mask = torch.ones_like(ids)
    settings = GenerationConfig(
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    training = [module for module in model.modules() if module.training]
    for module in training:  # no dropout here
        module.training = False
    plainly = checks_padding.set(True)
    try:
        alone, behind = (
            torch.cat(
                type(model)
                .generate(
                    model,
                    torch.nn.functional.pad(ids, (pads, 0)),
                    attention_mask=torch.nn.functional.pad(mask, (pads, 0)),
                    generation_config=settings,
                    # Both write one token, and not two between which noise decides
                    prefix_allowed_tokens_fn=lambda *_: [int(ids[0, 0])],
                )
                .logits
            )
            for pads in (0, 1)
        )
    finally:
        checks_padding.reset(plainly)
        for module in training:
            module.training = True
    # The index of Minimax M3 counts in blocks of slots, which a padding token seldom moves a token out of
    by_slots = "minimax_m3_sparse" in (getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    # Kernels differ with the number of tokens: SmolLM2 came to 0.003 on one CPU, in float32, where others are exact
    noise = 1e-2 if model.dtype == torch.float32 else 0.1
    if by_slots or bool((alone - behind).abs().max() > noise * alone.std()):
        raise ValueError(
            f"{type(model).__name__} does not handle left padding, which the shorter soft prompt needs: use prompts "
            "of one length."
        )


def _take_ones(cache: PairedCache, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Take a mask of ones out of the call, as later transformers do: every step would look for a zero in it."""
    mask = model_kwargs.get("attention_mask")
    needed = cache.seen or isinstance(cache.inner, StaticCache)  # to tell how much of the text is new, or is there
    return None if mask is None or needed or not bool((mask == 1).all()) else model_kwargs.pop("attention_mask")


def _end(ids_length: int, horizon: int | None) -> float:
    """Length of `input_ids` from which the safeguarding stream goes on alone."""
    return math.inf if horizon is None else ids_length + horizon


def _paired_cache(
    acd: ACDLogitsProcessor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> PairedCache:
    """The call's `PairedCache`: an earlier turn's, or a new one around what generate made; put in `model_kwargs`."""
    name = next((name for name in CACHE_NAMES if model_kwargs.get(name) is not None), CACHE_NAMES[0])
    cache = model_kwargs.get(name)
    known = known_cache(cache)
    if known is not None:
        same = zip(known.streams.prompts, acd.streams.prompts, strict=True)
        if known.streams.model is not acd.model or not all(torch.equal(a, b) for a, b in same):
            raise ValueError("past_key_values was filled under another model or prompt pair.")
        if type(known.streams) is not type(acd.streams):
            raise ValueError("past_key_values was filled under another share_instruction_kv.")
        if known.inner is None:
            raise ValueError(
                "past_key_values comes from a call with use_cache=False and holds nothing: start again without it, "
                "from the whole conversation."
            )
        if not known.is_intact():
            raise ValueError(
                "past_key_values was changed outside ACD, or left half-written by an error: start again without it, "
                "from the whole conversation."
            )
        paired = known
    elif cache is None:
        if generation_config.use_cache:
            raise ValueError(f"{type(acd.model).__name__} does not keep its state in a transformers Cache.")
        paired = acd._make_cache(acd.streams, None)
    else:
        if not all(is_empty(layer) for layer in cache.layers):
            raise ValueError(
                "past_key_values was filled without ACD: start from the whole conversation, or pass the cache that a "
                "generate() call with this processor returned."
            )
        config = acd.model.config.get_text_config(decoder=True)
        if cache.offloading and Version(transformers.__version__) < Version("5.20"):
            raise ValueError(
                f"the offloaded caches of transformers {transformers.__version__} may read keys before they are "
                "written, and then give wrong tokens: upgrade to 5.20 or later, or choose another cache."
            )
        mine = getattr(cache, "_is_user_defined", False)
        if mine and isinstance(cache, StaticCache):
            raise ValueError("ACD needs more slots than this static cache has: pass cache_implementation='static'.")
        paired = acd._make_cache(acd.streams, roomier(cache, acd.streams.width, config))
        if mine:
            take(cache, paired)  # the user will pass this object again in the next turn
    model_kwargs[name] = paired
    return paired
