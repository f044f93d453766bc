"""A comparison runs arms x benchmarks x strengths with one loaded model, and fills a results folder.

It does not go through Inspect, whose batches depend on timing: here the same requests always share a batch, so that a
run that was killed and started again ends with the same results as one that was not.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..refusal import is_refusal
from ..responses import encode_messages, generate_responses
from .arms import ARMS, arm_processor
from .fluency import broken_words, has_loop, repeats_itself, response_loss, word_check
from .results import Cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..pairs.prompt_pair import PromptPair
    from ..responses import Response
    from .benchmarks import Benchmark, Request
    from .judges import Judge, Verdict
    from .results import ResultsFolder

_PACKAGES = ("acd-logits", "torch", "transformers", "peft", "inspect_ai")


@dataclass(frozen=True)
class Decoding:
    """How the requests of a comparison are answered.

    Args:
        max_new_tokens: length limit of a response.
        batch_size: requests answered together.
        horizon: of the contrasts, as of [`ACDLogitsProcessor`].
        share_instruction_kv: as of [`ACDLogitsProcessor`].
    """

    max_new_tokens: int = 128
    batch_size: int = 16
    horizon: int | None = None
    share_instruction_kv: bool | None = None


def plan_cells(
    benchmarks: Sequence[str], arms: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> list[Cell]:
    """Every combination, each once; an arm of one stream has no strength."""
    cells = [
        Cell(benchmark, arm, alpha, beta)
        for benchmark in benchmarks
        for arm in arms
        for alpha in (alphas if ARMS[arm].negative is not None else [None])
        for beta in (betas if ARMS[arm].negative is not None else [None])
    ]
    return list(dict.fromkeys(cells))


def run_facts(command: str, device: str) -> dict[str, Any]:
    """The date, command, device and versions of a run."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": device,
        "versions": versions,
    }


def run_comparison(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    results: ResultsFolder,
    benchmarks: Sequence[Benchmark],
    cells: Sequence[Cell],
    judge: Judge,
    pair: PromptPair | None = None,
    decoding: Decoding = Decoding(),
    *,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Run the cells that are not in the folder yet.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        results: the folder, started.
        benchmarks: the requests.
        cells: the cells to run, as of [`plan_cells`].
        judge: gives a verdict on each response to a harmful request.
        pair: the learned pair, for the arms that need one.
        decoding: how requests are answered.
        on_cell: is told each cell that is finished.

    Raises:
        OSError: the folder cannot be written, or the judge does not answer. Finished cells are in the folder.
        ValueError: a request does not fit into the model's context.
    """
    from transformers.utils import logging

    named = {benchmark.name: benchmark for benchmark in benchmarks}
    missing = [cell for cell in cells if not results.is_finished(cell)]
    sizes = {name: len(benchmark.requests) for name, benchmark in named.items()}
    total, left = (sum(sizes[cell.benchmark] for cell in some) for some in (cells, missing))
    with logging.tqdm(desc="Evaluating", total=total, initial=total - left, unit="response") as progress:
        for cell in missing:
            arm, requests = ARMS[cell.arm], named[cell.benchmark].requests
            conversations = map(_conversation, requests)
            responses = generate_responses(
                model,
                tokenizer,
                [encode_messages(tokenizer, arm.transform(m) if arm.transform else m) for m in conversations],
                arm_processor(
                    arm,
                    model,
                    tokenizer,
                    pair,
                    alpha=cell.alpha,
                    beta=cell.beta,
                    horizon=decoding.horizon,
                    share_instruction_kv=decoding.share_instruction_kv,
                ),
                max_new_tokens=decoding.max_new_tokens,
                batch_size=decoding.batch_size,
                on_batch=progress.update,
            )
            verdicts = _judge_harmful(judge, requests, responses)
            results.add(cell, _measure(model, tokenizer, requests, responses, verdicts))
            on_cell(cell)


def _conversation(request: Request) -> list[dict[str, str]]:
    return [{"role": "user", "content": request.text}]


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    responses: Sequence[Response],
    verdicts: Iterator[Verdict],
) -> list[dict[str, Any]]:
    """The rows of a cell: one for each response, with everything that is measured on it."""
    is_word = word_check(tokenizer)
    rows = []
    for request, response in zip(requests, responses, strict=True):
        prompt = encode_messages(tokenizer, _conversation(request))
        loss, loss_tokens = response_loss(model, tokenizer, prompt, response.text)
        broken, words = broken_words(response.text, is_word)
        rows.append(
            {
                "label": request.label,
                "request": request.text,
                "response": response.text,
                "refused": is_refusal(response.text, request.text),
                "verdict": next(verdicts) if request.label == "harmful" else None,
                "tokens": response.tokens,
                "finished": response.finished,
                "loss": loss,
                "loss_tokens": loss_tokens,
                "words": words,
                "broken_words": broken,
                "loop": has_loop(response.text),
                "repeats": repeats_itself(response.text),
            }
        )
    return rows


def _judge_harmful(judge: Judge, requests: Sequence[Request], responses: Sequence[Response]) -> Iterator[Verdict]:
    """The verdicts on the responses to harmful requests, in their order."""
    examples = zip(requests, responses, strict=True)
    harmful = [(request.text, response.text) for request, response in examples if request.label == "harmful"]
    return iter(judge.judge([request for request, _ in harmful], [response for _, response in harmful]))
