"""The assistant of `generate`, `chat` and `explain`: a loaded model that answers plainly or safeguarded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .command import CommandError, user_errors
from .loading import load_adapter, load_model, load_pair
from .options import (
    above_zero,
    add_contrast_arguments,
    add_device_arguments,
    add_length_argument,
    add_model_argument,
    add_pair_arguments,
    add_speed_arguments,
    share,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..decoding.explanation import Explanation
    from ..decoding.logits_process import ACDLogitsProcessor


def add_assistant_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that [`load_assistant`] reads."""
    model = parser.add_argument_group("model and prompt pair")
    add_model_argument(model)
    add_pair_arguments(model)
    add_device_arguments(model)

    decoding = parser.add_argument_group("decoding")
    add_contrast_arguments(decoding)
    add_speed_arguments(decoding)
    add_length_argument(decoding, default=128)
    decoding.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    decoding.add_argument("--temperature", type=above_zero, help="sample at this temperature (default: the model's)")
    decoding.add_argument(
        "--top_p",
        type=share,
        help="sample from the likeliest tokens with this total probability (default: the model's)",
    )
    decoding.add_argument("--seed", type=int, help="make sampling repeatable with this seed")


@dataclass(frozen=True)
class Assistant:
    """A loaded model and what it generates with.

    What safeguards an answer is the contrast of a pair, or a distilled adapter, behind which the model is once more.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    safeguard: ACDLogitsProcessor | PeftModel
    alpha: float
    beta: float
    seed: int | None
    generation_settings: dict[str, Any]

    def answer(
        self,
        conversation: list[dict[str, str]],
        *,
        safeguarded: bool,
        on_text: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> str:
        """Generate the next turn.

        Args:
            conversation: the turns so far.
            safeguarded: whether the contrast, or the adapter, answers.
            on_text: receives the answer piece by piece, without control characters.
            **kwargs: passed to `generate()` too.
        """
        import torch
        from peft import PeftModel

        inputs = self.encode(conversation)
        if self.seed is not None:
            # Before each answer: the plain and the safeguarded one draw the same random numbers, and an answer does
            # not depend on the prompts before it.
            torch.manual_seed(self.seed)
        by_adapter = safeguarded and isinstance(self.safeguard, PeftModel)
        tokens = (self.safeguard if by_adapter else self.model).generate(
            **inputs,
            **self.generation_settings,
            logits_processor=[self.safeguard] if safeguarded and not by_adapter else [],
            streamer=_streamer(self.tokenizer, on_text) if on_text else None,
            **kwargs,
        )
        return self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def explain(
        self, prompt: str, num_candidates: int, on_text: Callable[[str], None] | None = None, **kwargs: Any
    ) -> Explanation:
        """Answer a prompt with the contrast, and say what it did to each token; the rest is as for `answer`."""
        import torch

        if self.seed is not None:
            torch.manual_seed(self.seed)
        inputs = self.encode([{"role": "user", "content": prompt}])
        [explanation] = self.safeguard.explain(
            **inputs,
            **self.generation_settings,
            tokenizer=self.tokenizer,
            num_candidates=num_candidates,
            streamer=_streamer(self.tokenizer, on_text) if on_text else None,
            **kwargs,
        )
        return replace(explanation, prompt=prompt)  # without the chat template

    def encode(self, conversation: list[dict[str, str]]) -> dict[str, Any]:
        """A conversation as ids and mask `[1, length]`, in the chat template if there is one."""
        if self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = self.tokenizer(conversation[-1]["content"], return_tensors="pt")
        # Some tokenizers add token_type_ids, which most causal models refuse.
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def load_assistant(
    args: argparse.Namespace, *, needs_chat_template: bool = False, adapter: str | None = None
) -> Assistant:
    """Load pair or adapter, tokenizer and model, in this order: what is quickly found to be wrong comes first."""
    if not args.do_sample and (args.temperature is not None or args.top_p is not None):
        raise CommandError("--temperature and --top_p need --do_sample")
    if adapter:
        return _load_distilled(args, needs_chat_template, adapter)

    from ..decoding.logits_process import ACDLogitsProcessor
    from ..pairs.prompt_pair import PromptPair

    with user_errors(OSError, ValueError):
        pair = load_pair(args)
    model, tokenizer = load_model(args, needs_chat_template=needs_chat_template)
    with user_errors(ValueError):
        pair = pair or PromptPair.from_text(model, tokenizer)
        pair.check_chat_template(tokenizer)
        acd = ACDLogitsProcessor(
            model,
            pair,
            alpha=args.alpha,
            beta=args.beta,
            horizon=args.horizon,
            share_instruction_kv=args.share_instruction_kv,
            frozen_model=True,
        )
    return Assistant(
        model,
        tokenizer,
        acd,
        alpha=pair.alpha if args.alpha is None else args.alpha,
        beta=pair.beta if args.beta is None else args.beta,
        seed=args.seed,
        generation_settings=_generation_settings(args, tokenizer),
    )


def _load_distilled(args: argparse.Namespace, needs_chat_template: bool, adapter: str) -> Assistant:
    from ..pairs.distilled import DistilledPrompt

    for name in ("pair", "revision", "alpha", "beta", "horizon", "share_instruction_kv"):
        if getattr(args, name) is not None:
            raise CommandError(f"--{name} is about a pair, and an adapter has learned its contrast: leave one out")
    with user_errors(OSError, ValueError):
        distilled = DistilledPrompt.from_pretrained(adapter)
    model, tokenizer = load_model(args, needs_chat_template=needs_chat_template)
    return Assistant(
        model,
        tokenizer,
        load_adapter(model, tokenizer, adapter, distilled),
        alpha=distilled.facts["teacher"]["alpha"],
        beta=distilled.facts["teacher"]["beta"],
        seed=args.seed,
        generation_settings=_generation_settings(args, tokenizer),
    )


def _generation_settings(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "do_sample", "temperature", "top_p")}
    # One row needs no padding; generate() would say in every call that it chose the end token for it.
    settings["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {name: value for name, value in settings.items() if value is not None}


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class CallbackStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # Without control characters, a model cannot send commands to the terminal.
            on_text(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text))

    return CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
