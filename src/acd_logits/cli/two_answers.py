"""The plain and the safeguarded answer to one prompt, growing side by side; what the demo page shows."""

from __future__ import annotations

import argparse
import functools
import textwrap
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import StoppingCriteriaList

from ..decoding.logits_process import ACDLogitsProcessor
from .assistant import Assistant, load_assistant
from .command import CommandError
from .loading import pair_name
from .turns import Stopped, Turn, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

MAX_CHARACTERS = 10_000  # of a prompt: a reader's, and no attempt to keep the server busy
NUM_CANDIDATES = 5
THREAD_NAME = "acd-answer"
_KEPT = 2  # loaded models; the one used longest ago makes room
_AT_LEAST_EVERY = 0.25  # seconds between two looks at the answers, which is also how soon a closed tab is noticed
_AT_MOST_EVERY = 0.05


@dataclass
class Answer:
    """One of the two answers.

    Args:
        text: what there is of it.
        turn: its number of tokens and its time.
        view: a page with what the contrast did to each token, once the answer is finished.
        error: why there is no answer, in one sentence.
        done: whether nothing more will come.
    """

    turn: Turn
    text: str = ""
    view: str = ""
    error: str = ""
    done: bool = False


class Answerer:
    """Loads models and pairs by name, and answers prompts with them, for several users at once.

    Args:
        args: the arguments of `acd-logits demo`, for all that a request does not name itself.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.turns = Turns()
        self._load = functools.lru_cache(maxsize=_KEPT)(self._load_anew)

    def load(self, model: str, pair: str) -> Assistant:
        """The assistant of this model and pair, from memory if it was used lately.

        Args:
            model: the demo model's name, a folder or a Hub id.
            pair: likewise, or `text`; empty for the model's default.

        Raises:
            CommandError: there is no such model or pair, or they do not fit each other.
        """
        try:
            with self.turns:  # while a model is loaded, the default dtype of the whole process may be another
                return self._load(*self.names(model, pair))
        except CommandError:
            raise
        except Exception as error:
            raise CommandError(_sentence(error)) from error

    def names(self, model: str, pair: str) -> tuple[str, str]:
        """The model and the pair that `load` loads, the name of the default pair included."""
        return model, pair_name(argparse.Namespace(model_name_or_path=model, pair=pair or None))

    def _load_anew(self, model: str, pair: str) -> Assistant:
        if (model, pair) == (self.args.model_name_or_path, pair_name(self.args)):
            return load_assistant(self.args)
        # The command line speaks of its own pair
        other = {"model_name_or_path": model, "pair": pair, "revision": None, "alpha": None, "beta": None}
        return load_assistant(argparse.Namespace(**vars(self.args) | other))

    def answer(
        self, assistant: Assistant, prompt: str, alpha: float, beta: float, horizon: int | None
    ) -> Generator[tuple[Answer, Answer], None, None]:
        """Answer a prompt plainly and safeguarded; yields both answers again and again while they grow.

        Closing the iterator ends both at their next token.

        Args:
            assistant: what answers.
            prompt: the user's words, without a chat template.
            alpha: as of `ACDLogitsProcessor`.
            beta: likewise.
            horizon: likewise.

        Raises:
            CommandError: the prompt is longer than the model takes.
        """
        conversation = [{"role": "user", "content": prompt}]
        _check_length(assistant, conversation)
        stop, changed = threading.Event(), threading.Event()
        answers = Answer(Turn(self.turns, stop)), Answer(Turn(self.turns, stop))

        def generate_safeguarded(**kwargs: Any) -> tuple[str, str]:
            # One of its own: other users have other settings at the same time
            acd = ACDLogitsProcessor(
                assistant.model, assistant.safeguard.pair, alpha, beta, horizon, frozen_model=True
            )
            explanation = replace(assistant, safeguard=acd).explain(prompt, NUM_CANDIDATES, **kwargs)
            return explanation.answer, explanation.to_html()

        def generate_plain(**kwargs: Any) -> tuple[str, str]:
            return assistant.answer(conversation, safeguarded=False, **kwargs), ""

        for answer, generate in zip(answers, (generate_plain, generate_safeguarded), strict=True):
            work = functools.partial(_work, answer, generate, changed)
            threading.Thread(target=work, name=THREAD_NAME, daemon=True).start()
        try:
            done = False
            while not done:
                changed.wait(_AT_LEAST_EVERY)
                changed.clear()
                done = all(answer.done for answer in answers)
                yield answers
                time.sleep(_AT_MOST_EVERY)
        finally:
            stop.set()


def check_prompt(prompt: str) -> None:
    """Raise CommandError for a prompt that is empty, or longer than a page should take."""
    if not prompt.strip():
        raise CommandError("the prompt is empty")
    if len(prompt) > MAX_CHARACTERS:
        raise CommandError(f"the prompt has {len(prompt):,} characters, and this page takes {MAX_CHARACTERS:,}")


def _check_length(assistant: Assistant, conversation: list[dict[str, str]]) -> None:
    taken, new = assistant.encode(conversation)["input_ids"].shape[1], assistant.generation_settings["max_new_tokens"]
    limit = getattr(assistant.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and taken + new > limit:
        raise CommandError(f"the prompt has {taken:,} tokens, and the model takes {limit:,} with {new:,} new ones")


def _sentence(error: Exception) -> str:
    """What users read of an error. Those who run the server also find in its log where it comes from."""
    if not isinstance(error, ValueError):  # that is the user's
        traceback.print_exception(error)
    return textwrap.shorten(str(error) or type(error).__name__, 500, placeholder=" ...")


def _work(answer: Answer, generate: Callable[..., tuple[str, str]], changed: threading.Event) -> None:
    """Generate one answer, in a thread of its own."""

    def on_text(text: str) -> None:
        answer.text += text
        changed.set()

    try:
        with answer.turn:
            answer.text, answer.view = generate(on_text=on_text, stopping_criteria=StoppingCriteriaList([answer.turn]))
    except Stopped:
        pass
    except Exception as error:  # whatever it is, the server goes on, and says so
        answer.text, answer.error = "", _sentence(error)  # a part of an answer might be without contrast
    finally:
        answer.done = True
        changed.set()
