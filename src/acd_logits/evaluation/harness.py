"""The model `acd` of lm-evaluation-harness: its Hugging Face model, with the contrast in all it generates and scores.

python -m acd_logits.evaluation.harness --model acd --model_args pretrained=org/model,pair=org/pair,alpha=0.5 \
    --tasks gsm8k,hellaswag --batch_size 8

lm_eval 0.4.13 knows the models of its own package only, so this module is run in its place: it registers `acd` and
hands over to lm_eval's command line. Later versions find the class by the entry point `lm_eval.models`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers.utils import logging

from ..decoding.logits_process import ACDLogitsProcessor
from ..decoding.shared import SharedStreams
from ..demo_model import resolve_model_name, resolve_pair_name
from ..pairs.fit import check_fit_unloaded
from ..pairs.prompt_pair import PromptPair
from ..pairs.texts import MANUAL_TEXTS
from ..ranges import check_alpha, check_beta
from .likelihood import contrasted_logits, response_loglikelihoods

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.get_logger(__name__)

# Options of HFLM that load the model into another library's class, or split it in a way that was never tried
_UNSUPPORTED = ("autogptq", "gptqmodel", "tp_plan")


@register_model("acd")
class ACDLM(HFLM):
    """A Hugging Face model under ACD, for generative and for log-likelihood tasks.

    Generation runs through an [`ACDLogitsProcessor`]. A log-likelihood is that of the distribution which the processor
    samples from: the softmax of the contrast at every position, with the soft prompts in front of the whole context.

    Args:
        pretrained: Hub id or folder of the model, the demo model's name, or a loaded model.
        pair: the prompt pair, or its Hub id or folder; `"text"` takes the manual prompts (a folder of that name is
            reached as `"./text"`).
        alpha: strength of the contrast, 0 is SP alone; default: the pair's.
        beta: plausibility threshold. Default: the pair's for generation, and 0 for log-likelihoods. A token that the
            threshold cuts has probability 0, and a text that holds one has log-likelihood `-inf`: one such text makes
            a perplexity infinite, and choices that all hold one are a tie, which lm_eval gives to the first. A `beta`
            that is given is used for both.
        transfer: accept a pair of another model of the same hidden size and vocabulary.
        **kwargs: those of [`HFLM`], such as `dtype`, `peft`, `parallelize` and `batch_size`. Its `max_length` counts
            the soft prompt.

    Raises:
        OSError: the pair or the model cannot be loaded.
        ValueError: the pair is missing or does not fit the model, a value is out of range, or the contrast cannot be
            applied to the model or under one of the options.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        pair: str | PromptPair | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        transfer: bool = False,
        **kwargs: Any,
    ) -> None:
        if pair is None:
            raise ValueError("the model acd needs pair=FOLDER_OR_HUB_ID, or pair=text: --model hf is the plain model.")
        _check_numbers(alpha, beta)
        for option in _UNSUPPORTED:
            if kwargs.get(option):
                raise ValueError(f"the model acd cannot apply its contrast under {option}: leave it out.")
        if isinstance(pair, str):
            pair = None if pair == MANUAL_TEXTS else PromptPair.from_pretrained(resolve_pair_name(pair))
        if isinstance(pretrained, str):
            pretrained = resolve_model_name(pretrained)
        # What `_get_backend` checks, once the model's config is there
        self._unchecked = pair, pretrained if isinstance(pretrained, str) else pretrained.name_or_path, transfer
        super().__init__(pretrained, **kwargs)
        pair = pair or PromptPair.from_text(self.model, self.tokenizer)
        pair.check_chat_template(self.tokenizer)
        self.acd = ACDLogitsProcessor(self.model, pair, alpha, beta, frozen_model=True)
        self.loglikelihood_beta = 0.0 if beta is None else self.acd.beta

    @property
    def max_length(self) -> int:
        """Tokens of a text that fit into the model's context behind the soft prompt."""
        return super().max_length - self.acd.streams.width

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results about the model, with the strengths in use."""
        return super().get_model_info() | {
            "acd_alpha": self.acd.alpha,
            "acd_beta": self.acd.beta,
            "acd_loglikelihood_beta": self.loglikelihood_beta,
        }

    def _get_backend(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be contrasted. HFLM calls this before it loads tokenizer and model."""
        super()._get_backend(config, *args, **kwargs)
        if self.backend != "causal" or config.is_encoder_decoder:
            raise ValueError(
                f"ACD supports decoder-only models, and {config.model_type} would run as an encoder-decoder here: "
                "choose another model, and leave backend out."
            )
        pair, name, transfer = self._unchecked
        if pair is not None:
            check_fit_unloaded(pair.config, config, name, transfer)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, logits_processor=[self.acd], **generation_kwargs)

    def _model_call(self, inps: torch.Tensor) -> torch.Tensor:
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            return contrasted_logits(self.acd, inps, self.loglikelihood_beta)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        if isinstance(self.acd.streams, SharedStreams):
            answers = self._score_behind_instructions(requests)
        else:
            answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if any(loglikelihood == -math.inf for loglikelihood, _ in answers):
            logger.warning_once(
                f"beta={self.loglikelihood_beta} gives some texts the log-likelihood -inf: their perplexity is "
                "infinite, and choices may tie. Leave beta out, or pass beta=0, to score all tokens."
            )
        return answers

    def _score_behind_instructions(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """Score each continuation behind its context, which both streams share; one at a time."""
        answers = []
        for texts, context, continuation in logging.tqdm(requests, desc="Scoring"):
            kept = context[-max(1, self.max_length + 1 - len(continuation)) :]  # from the left, as HFLM does
            answers += response_loglikelihoods(self.acd, kept, [continuation], self.loglikelihood_beta)
            if texts is not None:  # it is, of rolling windows
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers


def _check_numbers(alpha: float | None, beta: float | None) -> None:
    """Raise ValueError for a strength or a threshold that is no number, or out of range."""
    for name, value, check in (("alpha", alpha, check_alpha), ("beta", beta, check_beta)):
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name} must be a number, got {value!r}.")
        if value is not None:
            check(value)


if __name__ == "__main__":
    cli_evaluate()
