"""Responses of the target model to every instruction, under a safe, an opposite and no system prompt."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..files import digest
from ..pairs.fit import chat_template_digest
from ..pairs.texts import OPPOSITE_PROMPT, SAFE_PROMPT, has_system_turn
from ..responses import as_messages, check_context, encode_messages, generate_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM_PROMPTS = {"safe": SAFE_PROMPT, "opposite": OPPOSITE_PROMPT, "null": ""}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are sampled.

    Args:
        system_prompts: names in SYSTEM_PROMPTS; every instruction is answered once under each.
        batch_size: responses sampled together.
        max_new_tokens: length limit of a response.
        temperature: of sampling; 0 takes the likeliest token. (At 1.0, SmolLM2-135M writes gibberish.)
        top_p: sample from the likeliest tokens with this total probability.
        seed: the same seed gives the same responses on the same machine.
        begin_suppress_tokens: tokens that no response begins with.
    """

    system_prompts: tuple[str, ...] = tuple(SYSTEM_PROMPTS)
    batch_size: int = 32
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    begin_suppress_tokens: tuple[int, ...] = ()


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[dict[str, Any]],
    partial_file: Path,
    settings: SamplingSettings,
) -> list[dict[str, Any]]:
    """Let the target model answer every instruction under the system prompts (section 3.2).

    Args:
        model: the target model, in eval mode.
        tokenizer: its tokenizer. Without a chat template, the system prompt and the bare instruction are the text.
        instructions: as of [`load_instructions`].
        partial_file: receives each finished batch; a run that was interrupted goes on from there.
        settings: how to sample.

    Returns:
        One dictionary per instruction and system prompt: `instruction`, `category`, `kind`, `history`,
        `system_prompt`, `response`, `finished`. The order depends on the lengths of the prompts.

    Raises:
        OSError: the partial file cannot be read or written.
        ValueError: it belongs to a run with other settings, or a prompt does not fit into the model's context.
    """
    prompt_ids = _prompt_encoder(tokenizer)
    requests = [
        (
            {**instruction, "system_prompt": name},
            prompt_ids(SYSTEM_PROMPTS[name], [*instruction.get("history", ()), instruction["instruction"]]),
        )
        for instruction in instructions
        for name in settings.system_prompts
    ]
    # Prompts of one length make no padding. The longest first: if memory does not suffice, it shows at once.
    requests.sort(key=lambda request: (-len(request[1]), json.dumps(request[0])))
    check_context(model, max((len(ids) for _, ids in requests), default=0) + settings.max_new_tokens)

    # By their texts, and not by their tokens: some chat templates write the date into those
    asked = [row for row, _ in requests]
    form = chat_template_digest(tokenizer)
    done = open_partial(partial_file, digest(model.name_or_path, str(model.dtype), asdict(settings), form, asked))
    batches = [requests[i : i + settings.batch_size] for i in range(0, len(requests), settings.batch_size)]
    progress = logging.tqdm(desc="Sampling", total=len(requests), initial=sum(map(len, done)), unit="response")
    with progress, partial_file.open("a", encoding="utf-8") as file:
        for batch in batches[len(done) :]:
            responses = _sample_batch(model, tokenizer, [ids for _, ids in batch], settings)
            done.append([{**row, **response} for (row, _), response in zip(batch, responses, strict=True)])
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
            progress.update(len(batch))
    return list(itertools.chain.from_iterable(done))


def _prompt_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, Sequence[str]], list[int]]:
    """A function of system prompt and turns: the token ids that a user's own conversation would have."""
    own_turn = has_system_turn(tokenizer)

    def prompt_ids(system_prompt: str, texts: Sequence[str]) -> list[int]:
        turns = as_messages(texts)
        if system_prompt and own_turn:
            turns.insert(0, {"role": "system", "content": system_prompt})
        elif system_prompt:
            turns[0]["content"] = f"{system_prompt}\n\n{texts[0]}"
        return encode_messages(tokenizer, turns)

    return prompt_ids


def _sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: SamplingSettings
) -> list[dict[str, Any]]:
    """Continue the prompts; for each, its `response` and whether it `finished`."""
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    if settings.begin_suppress_tokens:
        sampling["begin_suppress_tokens"] = list(settings.begin_suppress_tokens)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        # The settings and the batch decide its seed, whatever batches came before it, and in whichever run
        torch.manual_seed(int(digest(settings.seed, prompts)[:15], 16))
        responses = generate_batch(model, tokenizer, prompts, settings.max_new_tokens, **sampling)
    return [{"response": response.text, "finished": response.finished} for response in responses]


def open_partial(path: Path, digest: str, convert: Callable[[list[dict[str, Any]]], Any] = list) -> list[Any]:
    """The finished batches of an interrupted run: a line with its digest, then a line per batch.

    Args:
        path: the file, which is made if it is missing.
        digest: of what the batches depend on.
        convert: what is kept of a batch; called line by line, so that no more than one batch is in memory as JSON.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it belongs to another run, or is damaged.
    """
    header, batches, complete = {"run": digest}, [], 0
    with path.open("ab+") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):  # it was cut off if the run was killed in it
                break
            try:
                content = json.loads(line)
            except ValueError:
                content = None
            if content is None or (not complete and content != header):
                raise ValueError(
                    f"{path} is of a run with another model, other instructions or settings: repeat those, or delete "
                    "it"
                )
            if complete:
                batches.append(convert(content))
            complete += len(line)
        file.truncate(complete)
        if not complete:
            file.write(json.dumps(header).encode() + b"\n")
    return batches
