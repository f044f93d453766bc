"""What a student learns from: what the pair says to the anchors' prompts, and its distribution at each of its tokens.

The teacher is the pair as it decodes: the softmax of the contrast `(S - alpha A) / (1 - alpha)` over the tokens that
`beta` keeps. While the pair writes a continuation, the distributions it draws from are kept: the `top_k` likeliest
tokens, and as one number the probability of all others. So nothing is computed twice.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor
from transformers.utils import logging

from ..anchors import SPLITS, load_anchor_data, split_held_out
from ..anchors.sampling import open_partial
from ..decoding.logits_process import ACDLogitsProcessor
from ..files import digest
from ..pairs.fit import chat_template_digest
from ..responses import Response, check_context, end_tokens, generate_batch
from .data import AnchorExamples, collate, encode_anchors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..pairs.prompt_pair import PromptPair
    from .data import Batch, Example

TEACHER_BYTES = 4 << 30  # no more of the teacher's distributions is kept in memory


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """How the teacher answers, and what is kept of its distributions.

    Args:
        alpha: strength of the contrast.
        beta: its plausibility threshold.
        temperature: of sampling; 0 takes the likeliest token.
        max_response_tokens: length limit of a continuation.
        top_k: how many tokens of a distribution are kept.
        batch_size: prompts continued together.
        seed: the same seed gives the same continuations on the same machine.
    """

    alpha: float
    beta: float
    temperature: float
    max_response_tokens: int
    top_k: int
    batch_size: int
    seed: int


def load_prompts(
    train_file: str, tokenizer: PreTrainedTokenizerBase, chat: bool, held_out: float, seed: int, limit: int | None
) -> AnchorExamples:
    """The prompts of an anchor set, each once, without responses; those with an answer begun are prompts too.

    Args:
        train_file: the anchor set.
        tokenizer: the model's tokenizer.
        chat: use the chat template.
        held_out: share of the instructions to hold out, the same ones as training a pair does with this seed.
        seed: chooses them.
        limit: draw this many prompts, mirrors together; `None` takes all.

    Raises:
        ImportError, OSError, ValueError: as of [`load_anchor_data`] and [`split_held_out`].
    """
    rows = load_anchor_data(train_file, needed=())
    sides = split_held_out(rows, held_out, seed) if held_out else (rows, [])
    parts = [_distinct(encode_anchors(side, tokenizer, chat, 1)) for side in sides]
    if limit is not None and (total := sum(map(len, parts))) > limit:
        # By chance, and what mirrors each other together: a balanced batch has both
        parts = [sorted(part, key=lambda e: digest("drawn", seed, e["mirror"])) for part in parts]
        parts = [part[: round(limit * len(part) / total)] for part in parts]
    for part in parts:
        part.sort(key=lambda e: len(e["input_ids"]))
    if not parts[0] or (held_out and not parts[1]):
        raise ValueError(f"{train_file} leaves too few prompts: raise --max_prompts")
    return AnchorExamples(*parts)


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """One example for each prompt, in two splits: of harmful instructions, and of safe ones."""
    kept: dict[tuple[int, ...], Example] = {}
    for example in examples:
        split = "D_S" if SPLITS[example["split"]] == "D_S" else "D_HR"
        empty = {"response": [], "opening": 0, "avoid_until": 0, "split": SPLITS.index(split)}
        kept.setdefault(tuple(example["input_ids"]), example | empty)
    return list(kept.values())


def check_memory(prompts: int, max_response_tokens: int, top_k: int) -> int:
    """How many bytes the teacher's distributions may take.

    Raises:
        ValueError: they are more than `TEACHER_BYTES`.
    """
    needed = prompts * max_response_tokens * (8 * top_k + 4)
    if needed > TEACHER_BYTES:
        raise ValueError(
            f"the teacher's distributions may take {needed / 2**30:.1f} GiB, more than {TEACHER_BYTES >> 30}: lower "
            "--top_k, --max_response_tokens or --max_prompts"
        )
    return needed


def ask_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: AnchorExamples,
    pair: PromptPair,
    settings: TeacherSettings,
    partial_file: Path,
) -> AnchorExamples:
    """Continue every prompt with the pair's own `generate()`, and keep its distributions.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        examples: the prompts, as of [`load_prompts`].
        pair: the teacher.
        settings: how it answers.
        partial_file: receives each finished batch, as a line of JSON without texts; a run that was interrupted goes on
            from there, and a finished one is read from it.

    Returns:
        The examples with `response`, the tokens of the continuation with the one that ends it, and of each of them
        `teacher_ids`, `[R, k]`, likeliest first, and `teacher_log_probs`, `[R, k + 1]`, with that of all others last.
        Where several tokens may end a response, the one with the lowest id stands for whichever did.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it belongs to a run with other settings, or a prompt does not fit into the model's context.
    """
    # By their texts, and not by their tokens: some chat templates write the date into those
    asked = sorted(examples, key=lambda e: (-len(e["input_ids"]), e["texts"], e["split"]))
    prompts = [e["input_ids"] for e in asked]
    soft = max(len(pair.safeguarding), len(pair.adversarial))
    check_context(model, soft + len(prompts[0]) + settings.max_response_tokens)
    texts = [[e["texts"], e["split"]] for e in asked]
    form = chat_template_digest(tokenizer)
    run = digest(model.name_or_path, str(model.dtype), pair.digest, vars(settings), form, texts)
    done = open_partial(partial_file, run, _batch_tensors)
    batches = [prompts[i : i + settings.batch_size] for i in range(0, len(prompts), settings.batch_size)]
    acd = ACDLogitsProcessor(model, pair, alpha=settings.alpha, beta=settings.beta, frozen_model=True)
    progress = logging.tqdm(desc="Teacher", total=len(prompts), initial=sum(map(len, done)), unit="response")
    with progress, partial_file.open("a", encoding="utf-8") as file:
        for batch in batches[len(done) :]:
            written = _continue_batch(model, tokenizer, acd, batch, settings)
            file.write(json.dumps(written) + "\n")
            file.flush()
            done.append(_batch_tensors(written))  # the lists take many times as much memory
            progress.update(len(batch))
    acd.detach()
    rows = zip(prompts, itertools.chain.from_iterable(done), strict=True)
    found = {tuple(ids): row for ids, row in rows}
    sides = examples.train, examples.held_out
    return AnchorExamples(*([e | found[tuple(e["input_ids"])] for e in side] for side in sides))


class _Recorder(LogitsProcessor):
    """Notes the distribution at every step: it stands behind the contrast, and before any temperature."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probs = scores.float().log_softmax(-1)
        kept, ids = log_probs.topk(min(self.top_k, scores.shape[-1] - 1))
        tail = log_probs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        self.steps.append((ids.cpu(), torch.cat([kept, tail], -1).cpu()))
        return scores


def _continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    acd: ACDLogitsProcessor,
    prompts: Sequence[list[int]],
    settings: TeacherSettings,
) -> list[dict[str, Any]]:
    """Of each prompt `response`, and of each of its tokens `ids`, `log_probs` and `tail`, without what is -inf."""
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
    recorder = _Recorder(settings.top_k)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
        # The settings and the batch decide its seed, whatever batches came before it, and in whichever run
        torch.manual_seed(int(digest(settings.seed, prompts)[:15], 16))
        responses = generate_batch(
            model,
            tokenizer,
            prompts,
            settings.max_response_tokens,
            logits_processor=[acd, recorder],
            repetition_penalty=1.0,  # the contrast alone is the teacher, whatever the model's generation_config says
            **sampling,
        )
    return [_row(i, response, recorder, end_tokens(model, tokenizer)) for i, response in enumerate(responses)]


def _row(i: int, response: Response, recorder: _Recorder, ends: set[int]) -> dict[str, Any]:
    written = [*response.ids, *([min(ends)] if response.finished else [])]
    row: dict[str, Any] = {"response": written, "ids": [], "log_probs": [], "tail": []}
    for ids, log_probs in recorder.steps[: len(written)]:
        kept = [(token, round(p, 5)) for token, p in zip(ids[i].tolist(), log_probs[i].tolist(), strict=False)]
        kept = [(token, p) for token, p in kept if p > -math.inf]
        row["ids"].append([token for token, _ in kept])
        row["log_probs"].append([p for _, p in kept])
        tail = log_probs[i, -1].item()
        row["tail"].append(None if tail == -math.inf else round(tail, 5))
    return row


def _batch_tensors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_tensors(row) for row in rows]


def _tensors(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the file as an example has it; where fewer tokens are kept, the likeliest fills up, at -inf."""
    width = max(map(len, row["ids"]))
    ids = torch.tensor([[*kept, *[kept[0]] * (width - len(kept))] for kept in row["ids"]], dtype=torch.int32)
    tails = [-math.inf if tail is None else tail for tail in row["tail"]]
    log_probs = torch.tensor(
        [[*kept, *[-math.inf] * (width - len(kept)), t] for kept, t in zip(row["log_probs"], tails, strict=True)]
    )
    return {"response": row["response"], "teacher_ids": ids, "teacher_log_probs": log_probs}


def collate_teacher(examples: Sequence[Example]) -> Batch:
    """A batch as of [`collate`], with `teacher_ids` `[B, R, k]` and `teacher_log_probs` `[B, R, k + 1]`."""
    batch = collate(examples)
    rows, length = batch["labels"].shape
    width = max(e["teacher_ids"].shape[1] for e in examples)
    ids = torch.zeros(rows, length, width, dtype=torch.long)
    log_probs = torch.full((rows, length, width + 1), -math.inf)
    for i, example in enumerate(examples):
        own, p = example["teacher_ids"], example["teacher_log_probs"]
        # What fills a token's row up is a token that it has already
        ids[i, : len(own)] = own[:, :1]
        ids[i, : len(own), : own.shape[1]] = own
        log_probs[i, : len(own), : own.shape[1]] = p[:, :-1]
        log_probs[i, : len(own), -1] = p[:, -1]
    return batch | {"teacher_ids": ids, "teacher_log_probs": log_probs}
