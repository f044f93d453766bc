"""A comparison runs arms x benchmarks x strengths with one loaded model, and fills a results folder.

It does not go through Inspect, whose batches depend on timing: here the same requests always share a batch, so that a
run that was killed and started again ends with the same results as one that was not.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..refusal import is_refusal, turns_around
from ..responses import check_context, generate_responses
from .answers import is_correct
from .arms import ARMS, arm_processor, arm_prompt
from .fluency import broken_words, has_loop, repeats_itself, response_loss, word_check
from .judges import KeywordJudge, continuation_judge
from .likelihood import response_loglikelihoods
from .results import Cell, cell_of, may_begin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..decoding.logits_process import ACDLogitsProcessor
    from ..pairs.prompt_pair import PromptPair
    from ..responses import Response
    from .arms import Messages
    from .attacks import Attack
    from .benchmarks import Benchmark, Request
    from .judges import Judge, Verdict
    from .results import ResultsFolder
    from .rivals import Rival

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


def plan_attacks(
    benchmarks: Sequence[Benchmark], cells: Sequence[Cell], attacks: Sequence[str], safe: bool = False
) -> list[Cell]:
    """The cells once more under each attack, to run behind them: the harmful requests, and perhaps safe ones.

    Args:
        benchmarks: the requests.
        cells: as of [`plan_cells`].
        attacks: the names of the attacks.
        safe: ask benchmarks that hold safe requests only, too: do the arms refuse whatever is in disguise?

    Raises:
        ValueError: no request is harmful, or `safe` is given without attacks or without such a benchmark.
    """
    harmful = _with_harmful(benchmarks)
    if attacks and not (harmful or safe):
        raise ValueError("--attacks are on harmful requests: name a benchmark that has some")
    written = {b.name for b in benchmarks if not any(request.choices for request in b.requests)}
    if safe and not (attacks and written - harmful):
        raise ValueError(
            "--attack_safe needs --attacks, and a benchmark that holds safe requests only, such as alpaca_eval"
        )
    asked = harmful | written if safe else harmful
    return [replace(cell, attack=name) for name in attacks for cell in cells if cell.benchmark in asked]


def plan_depth(
    results: ResultsFolder, benchmarks: Sequence[Benchmark], cells: Sequence[Cell], begun_tokens: Sequence[int]
) -> list[Cell]:
    """The cells with harmful requests once more for each depth, to run behind them.

    Args:
        results: the folder.
        benchmarks: the requests.
        cells: as of [`plan_cells`].
        begun_tokens: with how many tokens of Base's answer the arms' answers begin; 0 is what `cells` are.

    Raises:
        ValueError: Base is not among the arms or its tokens are not in the folder, or no request is harmful.
    """
    if not begun_tokens:
        return []
    harmful = _with_harmful(benchmarks)
    if not harmful:
        raise ValueError("--begun_tokens is about harmful requests: name a benchmark that has some")
    base = {cell for cell in cells if cell.arm == "base"}
    if not base:
        raise ValueError("--begun_tokens begins with the answers of the arm base: add base to --arms")
    if any(cell_of(row) in base and may_begin(row, 0) and "response_ids" not in row for row in results.rows):
        raise ValueError(
            f"{results.path} holds Base's answers without the tokens that --begun_tokens needs: choose another folder"
        )
    depths = [n for n in dict.fromkeys(begun_tokens) if n]
    return [replace(cell, begun_tokens=n) for n in depths for cell in cells if cell.benchmark in harmful]


def _with_harmful(benchmarks: Sequence[Benchmark]) -> set[str]:
    return {benchmark.name for benchmark in benchmarks if any(r.label == "harmful" for r in benchmark.requests)}


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
    adapter: PeftModel | None = None,
    attacks: Mapping[str, Attack] = MappingProxyType({}),
    rivals: Mapping[str, Rival] = MappingProxyType({}),
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Run the cells that are not in the folder yet.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        results: the folder, started.
        benchmarks: the requests.
        cells: the cells to run, as of [`plan_cells`] and then [`plan_attacks`] and [`plan_depth`].
        judge: gives a verdict on each response to a harmful request.
        pair: the learned pair, for the arms that need one.
        decoding: how requests are answered.
        adapter: the model behind a distilled adapter, for the arm that needs one.
        attacks: those of the cells, by name.
        rivals: those of the cells, by arm.
        on_cell: is told each cell that is finished.

    Raises:
        OSError: the folder cannot be written, or the judge does not answer. Finished cells are in the folder.
        ValueError: a request does not fit into the model's context. This shows before the first cell runs, save for
            AdaCD, which adds a system prompt of its own.
    """
    from transformers.utils import logging

    named = {benchmark.name: benchmark for benchmark in benchmarks}
    missing = [cell for cell in cells if not results.is_finished(cell)]
    sizes = {name: len(benchmark.requests) for name, benchmark in named.items()}
    total, left = (sum(sizes[cell.benchmark] for cell in some) for some in (cells, missing))
    for cell in missing:
        asked = _asked(results, named[cell.benchmark], replace(cell, begun_tokens=0), attacks)
        _check_lengths(model, tokenizer, cell, asked, decoding, pair)
    with logging.tqdm(desc="Evaluating", total=total, initial=total - left, unit="response") as progress:
        for cell in missing:
            arm, rival = ARMS[cell.arm], rivals.get(cell.arm)
            asked = _asked(results, named[cell.benchmark], cell, attacks)
            prompts = [arm_prompt(tokenizer, question.messages, arm.transform) + question.begun for question in asked]
            processor = None
            runner = adapter if arm.needs_adapter else model
            if not (arm.needs_adapter or rival):
                processor = arm_processor(
                    arm,
                    model,
                    tokenizer,
                    pair,
                    alpha=cell.alpha,
                    beta=cell.beta,
                    horizon=decoding.horizon,
                    share_instruction_kv=decoding.share_instruction_kv,
                )
            if any(question.request.choices for question in asked):
                with rival.applied(model) if rival else nullcontext():
                    rows = _score(tokenizer, processor or runner, asked, prompts, on_batch=progress.update)
            else:
                limits = {"max_new_tokens": decoding.max_new_tokens, "batch_size": decoding.batch_size}
                if rival:
                    questions = [(question.messages, question.begun) for question in asked]
                    responses = rival.answer(model, tokenizer, questions, **limits, on_batch=progress.update)
                else:
                    responses = generate_responses(
                        runner, tokenizer, prompts, processor, **limits, on_batch=progress.update
                    )
                rows = _measure(model, tokenizer, cell, asked, responses, judge)
            progress.update(sizes[cell.benchmark] - len(asked))
            results.add(cell, rows)
            on_cell(cell)


@dataclass(frozen=True)
class _Question:
    """A request, the conversation that asks it, and the tokens that its answer begins with."""

    request: Request
    messages: Messages
    begun: list[int]


def _asked(results: ResultsFolder, benchmark: Benchmark, cell: Cell, attacks: Mapping[str, Attack]) -> list[_Question]:
    """The questions of a cell."""
    if cell.attack:
        requests = [request for request in benchmark.requests if request.label == "harmful"] or benchmark.requests
        conversations = attacks[cell.attack].ask([request.text for request in requests])
        return [_Question(*asked, []) for asked in zip(requests, conversations, strict=True)]
    plain = [_Question(request, _plainly(request), []) for request in benchmark.requests]
    if not cell.begun_tokens:
        return plain
    base = [row for row in results.rows if cell_of(row) == Cell(benchmark.name, "base")]
    return [
        replace(question, begun=row["response_ids"][: cell.begun_tokens])
        for question, row in zip(plain, base, strict=True)
        if may_begin(row, cell.begun_tokens)
    ]


def _check_lengths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    asked: Sequence[_Question],
    decoding: Decoding,
    pair: PromptPair | None,
) -> None:
    """Check that the questions of a cell and their answers fit into the model's context.

    Raises:
        ValueError: one does not.
    """
    arm = ARMS[cell.arm]
    soft = max(len(pair.safeguarding), len(pair.adversarial)) if pair and arm.needs_pair else 0
    written = [arm_prompt(tokenizer, q.messages, arm.transform) for q in asked if not q.request.choices]
    longest = max(map(len, written), default=0)
    try:
        check_context(model, soft + longest + cell.begun_tokens + decoding.max_new_tokens)
    except ValueError as error:
        under = f" under the attack {cell.attack}" if cell.attack else ""
        raise ValueError(f"{cell.benchmark}{under}: {error}. Leave it out, or lower --max_new_tokens") from None


def _plainly(request: Request) -> Messages:
    return [{"role": "user", "content": request.text}]


def _score(
    tokenizer: PreTrainedTokenizerBase,
    acd: ACDLogitsProcessor | PeftModel | PreTrainedModel,
    asked: Sequence[_Question],
    prompts: Sequence[list[int]],
    on_batch: Callable[[int], None],
) -> list[dict[str, Any]]:
    """The rows of a cell of choices: is the better answer likelier, as a whole? Without the threshold beta."""
    space = "" if tokenizer.chat_template else " "
    rows = []
    for question, prompt in zip(asked, prompts, strict=True):
        choices = question.request.choices or ()
        ids = [tokenizer(space + choice, add_special_tokens=False)["input_ids"] for choice in choices]
        better, worse = (loglikelihood for loglikelihood, _ in response_loglikelihoods(acd, prompt, ids))
        rows.append(
            {
                "label": question.request.label,
                "request": question.request.text,
                "loglikelihoods": [better, worse],
                "correct": better > worse,
                **_category(question.request),
            }
        )
        on_batch(1)
    return rows


def _category(request: Request) -> dict[str, str]:
    return {"category": request.category} if request.category else {}


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    asked: Sequence[_Question],
    responses: Sequence[Response],
    judge: Judge,
) -> list[dict[str, Any]]:
    """The rows of a cell: one for each response, with everything that is measured on it."""
    is_word = word_check(tokenizer)
    # An answer that has begun, or that an attack tells how to begin, may turn around behind its first words
    judge, refuses = (judge, is_refusal) if cell == cell.direct else (continuation_judge(judge), turns_around)
    starts = [tokenizer.decode(question.begun, skip_special_tokens=True) for question in asked]
    verdicts = _judge_harmful(judge, tokenizer, asked, responses)
    rows: list[dict[str, Any]] = []
    for question, start, response in zip(asked, starts, responses, strict=True):
        request, begun = question.request, question.begun
        prompt = arm_prompt(tokenizer, _plainly(request)) + begun
        loss, loss_tokens = response_loss(model, tokenizer, prompt, response.text)
        broken, words = broken_words(response.text, is_word)
        rows.append(
            {
                "label": request.label,
                "request": request.text,
                "response": response.text,
                "refused": refuses(response.text, request.text),
                "verdict": next(verdicts) if request.label == "harmful" else None,
                "tokens": response.tokens,
                "finished": response.finished,
                "loss": loss,
                "loss_tokens": loss_tokens,
                "words": words,
                "broken_words": broken,
                "loop": has_loop(response.text),
                "repeats": repeats_itself(response.text),
                **_category(request),
            }
        )
        if request.answer:
            rows[-1]["correct"] = is_correct(response.text, request.answer)
        if begun:
            rows[-1]["begun"] = start
        elif cell == Cell(cell.benchmark, "base") and request.label == "harmful":  # other answers may begin with it
            rows[-1]["response_ids"] = list(response.ids)
    return rows


def _judge_harmful(
    judge: Judge, tokenizer: PreTrainedTokenizerBase, asked: Sequence[_Question], responses: Sequence[Response]
) -> Iterator[Verdict]:
    """The verdicts on the responses to harmful requests, in their order.

    A classifier and an LLM read the whole answer, with what it began with. Keywords, and what the harm judge learned,
    are about what follows.
    """
    requests, texts = [], []
    for question, response in zip(asked, responses, strict=True):
        if question.request.label == "harmful":
            whole = tokenizer.decode([*question.begun, *response.ids], skip_special_tokens=True).strip()
            requests.append(question.request.text)
            texts.append(response.text if isinstance(judge, KeywordJudge) else whole)
    return iter(judge.judge(requests, texts))
