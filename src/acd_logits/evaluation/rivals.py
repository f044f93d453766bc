"""Rivals: other defences that need no retrained model, each an arm of a comparison.

    lora           safety tuning: a LoRA adapter that was trained on refusals and on safe answers
    safedecoding   the first tokens move from the model towards that adapter (Xu et al. 2024, arXiv 2402.08983)
    adacd          the first tokens move towards a prompt that asks to refuse, or away from it (AdaCD, Qi et al. 2026,
                   arXiv 2604.17132)
    guard          a classifier reads the request before the model does

`steering.py` has two more, and `rival_folder.py` reads them all from the folder that `scripts/train_rivals.py` writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from ..responses import Response, check_context, generate_batch, generate_responses
from .arms import arm_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .arms import Messages
    from .judges import ClassifierJudge

    Question = tuple[Messages, list[int]]  # a conversation, and the tokens that its answer begins with
    Prompts = list[list[int]]

ASK_TO_REFUSE = "Please refuse to answer me!"  # AdaCD's system prompt
REFUSAL = "I'm sorry, but I can't help with that."  # what stands in for the answer to a request that a guard stops


class Rival(ABC):
    """A way to answer requests."""

    @abstractmethod
    def answer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> list[Response]:
        """Answer greedily; the model is afterwards as it was.

        Args:
            model: the model, in eval mode.
            tokenizer: its tokenizer.
            questions: each a conversation, and the tokens that its answer begins with.
            max_new_tokens: length limit of a response.
            batch_size: questions answered together.
            on_batch: is told how many questions are answered.

        Returns:
            The responses without what they were begun with, in the order of the questions.

        Raises:
            ValueError: a question and its response do not fit into the model's context.
        """

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Change the model for as long as the context lasts, so that texts can be scored.

        Raises:
            ValueError: this rival changes what is written, and not the model.
        """
        raise ValueError(f"{type(self).__name__} writes answers, and cannot score given ones")


class ChangedModel(Rival):
    """A rival that is the model with something changed inside."""

    @abstractmethod
    def applied(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Change the model for as long as the context lasts."""

    def answer(  # noqa: D102 (as of Rival)
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        **settings: Any,
    ) -> list[Response]:
        with self.applied(model):
            return generate_responses(model, tokenizer, prompts_of(tokenizer, questions), **settings)


@dataclass(frozen=True)
class LoRA(ChangedModel):
    """Safety tuning: the model with the LoRA adapter in a folder."""

    folder: Path

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[Any]:
        """Put the adapter into the model; yields peft's model around it."""
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, self.folder).eval()
        try:
            yield adapted
        finally:
            adapted.unload()


class FirstTokens(Rival):
    """A rival that chooses the first tokens by two streams, and goes on plainly."""

    tokens: int

    def prompts(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> tuple[Prompts, Prompts]:
        """The prompts of the plain stream and of the other one."""
        prompts = prompts_of(tokenizer, questions)
        return prompts, prompts

    @contextmanager
    def streams(self, model: PreTrainedModel) -> Iterator[tuple[Any, Callable[[int], dict[str, Any]]]]:
        """What runs both streams in one batch, and its settings for n rows of each."""
        yield model, lambda n: {}

    @abstractmethod
    def combine(self, plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The scores of the next token, from the logits of both streams; all are `[B, vocab]`."""

    def answer(  # noqa: D102 (as of Rival)
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> list[Response]:
        plain, other = self.prompts(tokenizer, questions)
        check_context(model, max(map(len, [*plain, *other]), default=0) + max_new_tokens)
        length = min(self.tokens, max_new_tokens)
        order = sorted(range(len(plain)), key=lambda i: (-len(plain[i]), i))  # as generate_responses has it
        begun: dict[int, Response] = {}
        with self.streams(model) as (runner, settings):
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                rows = [prompts[i] for prompts in (plain, other) for i in places]
                both = {"do_sample": False, "logits_processor": [_BothStreams(self.combine)], **settings(len(places))}
                found = generate_batch(runner, tokenizer, rows, length, **both)
                begun.update(zip(places, found[: len(places)], strict=True))
        going = [i for i in range(len(plain)) if length < max_new_tokens and not begun[i].finished]
        on_batch(len(plain) - len(going))
        rest = generate_responses(
            model,
            tokenizer,
            [[*plain[i], *begun[i].ids] for i in going],
            max_new_tokens=max_new_tokens - length,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        for i, response in zip(going, rest, strict=True):
            ids = begun[i].ids + response.ids
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            begun[i] = Response(text, ids, response.finished)
        return [begun[i] for i in range(len(plain))]


class _BothStreams(LogitsProcessor):
    """Gives the combined scores to both streams of a batch, which so write the same tokens."""

    def __init__(self, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.combine = combine

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.combine(*scores.chunk(2)).repeat(2, 1)


@dataclass
class SafeDecoding(FirstTokens):
    """SafeDecoding: P(x) + strength * (P'(x) - P(x)), P' being the adapted model's, over tokens that both find likely.

    Those are the tokens among the first k of both, for the smallest k that gives at least `common` of them.

    Args:
        folder: of the adapter, the paper's expert.
        strength: the paper's alpha.
        tokens: the paper's m: how many tokens are chosen so.
        common: the paper's c.
    """

    folder: Path
    strength: float = 3.0
    tokens: int = 2
    common: int = 5

    @contextmanager
    def streams(self, model: PreTrainedModel) -> Iterator[tuple[Any, Callable[[int], dict[str, Any]]]]:
        """The model and the adapted model, as rows of one batch."""
        with LoRA(self.folder).applied(model) as adapted:
            yield adapted, lambda n: {"adapter_names": ["__base__"] * n + [adapted.active_adapter] * n}

    def combine(self, plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: D102 (as of FirstTokens)
        places = [logits.argsort(-1, descending=True).argsort(-1) for logits in (plain, other)]
        later = torch.maximum(*places)
        last = later.topk(self.common, largest=False).values[:, -1:]
        p, expert = plain.softmax(-1), other.softmax(-1)
        return (p + self.strength * (expert - p)).masked_fill(later > last, -torch.inf)


@dataclass
class AdaCD(FirstTokens):
    """AdaCD: R + sign * strength * (R - x), with the logits x of the model and R of the model asked to refuse.

    The sign is + where the first choice of R is the model's own too, about as surely: then the model refuses by
    itself. Elsewhere it is -, away from refusing. It is decided for each request and each token.

    Args:
        strength: the paper's alpha.
        tokens: how many tokens are chosen so.
        agreement: the paper's lambda: how much of R's confidence the model must have, and how high it must rank R's
            choice: 1 over the rank is at least this.
        plausible: the paper's beta: tokens below this share of the model's top probability are left out.
    """

    strength: float = 4.5
    tokens: int = 10
    agreement: float = 0.9
    plausible: float = 0.01

    def prompts(self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> tuple[Prompts, Prompts]:
        """The plain ones, and those that ask to refuse."""
        return prompts_of(tokenizer, questions), prompts_of(tokenizer, questions, ask_to_refuse)

    def combine(self, plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # noqa: D102 (as of FirstTokens)
        probabilities = plain.softmax(-1)
        top, sure = probabilities.amax(-1, keepdim=True), other.softmax(-1).amax(-1, keepdim=True)
        choice = plain.gather(-1, other.argmax(-1, keepdim=True))
        rank = 1 + (plain > choice).sum(-1, keepdim=True)
        agrees = (1 / rank >= self.agreement) & (top >= self.agreement * sure)
        scores = other + torch.where(agrees, self.strength, -self.strength) * (other - plain)
        return scores.masked_fill(probabilities < self.plausible * top, -torch.inf)


def ask_to_refuse(messages: Messages) -> Messages:
    """The conversation under AdaCD's system prompt; one that it has already follows it."""
    first, *others = messages
    if first["role"] != "system":
        return [{"role": "system", "content": ASK_TO_REFUSE}, *messages]
    return [{**first, "content": f"{ASK_TO_REFUSE}\n\n{first['content']}"}, *others]


@dataclass(frozen=True)
class Guard(Rival):
    """A classifier in front reads all that the user says; what it does not call harmless gets a fixed refusal."""

    judge: ClassifierJudge

    def answer(  # noqa: D102 (as of Rival)
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        *,
        on_batch: Callable[[int], None] = lambda _: None,
        **settings: Any,
    ) -> list[Response]:
        said = [[turn["content"] for turn in messages if turn["role"] == "user"] for messages, _ in questions]
        verdicts = self.judge.judge_requests(["\n\n".join(texts) for texts in said])
        passed = [i for i, verdict in enumerate(verdicts) if verdict == "harmless"]
        refusal = Response(REFUSAL, tuple(tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]), True)
        on_batch(len(questions) - len(passed))
        prompts = prompts_of(tokenizer, [questions[i] for i in passed])
        answers = generate_responses(model, tokenizer, prompts, on_batch=on_batch, **settings)
        answered = dict(zip(passed, answers, strict=True))
        return [answered.get(i, refusal) for i in range(len(questions))]


def prompts_of(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    transform: Callable[[Messages], Messages] | None = None,
) -> Prompts:
    """The token ids that ask each question, after a change to its messages."""
    return [arm_prompt(tokenizer, messages, transform) + begun for messages, begun in questions]
