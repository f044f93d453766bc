"""An anchor set from a model: sample its responses, split them, write the file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..files import check_new_file, write_jsonl
from ..refusal import is_refusal
from .instructions import load_instructions
from .refusals import load_refusals
from .sampling import SamplingSettings, sample_responses
from .splits import split_responses

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_anchors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_file: Path,
    *,
    instructions: Sequence[dict[str, Any]] | None = None,
    refusals: Sequence[dict[str, str]] | None = None,
    settings: SamplingSettings | None = None,
    per_instruction: int = 1,
    own_refusals: bool = True,
    begun_share: float = 0.0,
    answer_safe: bool = False,
) -> list[dict[str, Any]]:
    """Sample, split and write an anchor set; an interrupted call is continued by the next one.

    Args:
        model: the target model.
        tokenizer: its tokenizer.
        output_file: the JSONL file to write; `<output_file>.partial.jsonl` and `<output_file>.again.jsonl` hold the
            responses until it is complete.
        instructions: default: the package's own.
        refusals: default: the package's own.
        settings: how to sample.
        per_instruction: see [`split_responses`].
        own_refusals: see [`split_responses`].
        begun_share: see [`split_responses`].
        answer_safe: where the model refuses a safe instruction, sample once more, and let no response begin as the
            refusals do. These are the instructions that a model has most to learn about.

    Returns:
        The anchors.

    Raises:
        OSError: the output file exists, or a file cannot be read or written.
        ValueError: see [`sample_responses`].
    """
    settings = settings or SamplingSettings()
    check_new_file(output_file)
    instructions, refusals = instructions or load_instructions(), refusals or load_refusals()
    partial_files = [output_file.with_name(f"{output_file.name}.{name}.jsonl") for name in ("partial", "again")]
    samples = sample_responses(model, tokenizer, instructions, partial_files[0], settings)
    if answer_safe:
        refused = {row["instruction"] for row in samples if row["kind"] != "harmful" and is_refusal(row["response"])}
        openings = {tokenizer(row["response"], add_special_tokens=False)["input_ids"][0] for row in refusals}
        samples += sample_responses(
            model,
            tokenizer,
            [row for row in instructions if row["instruction"] in refused],
            partial_files[1],
            dataclasses.replace(settings, begin_suppress_tokens=tuple(sorted(openings))),
        )
    anchors = split_responses(samples, refusals, per_instruction, settings.seed, own_refusals, begun_share)
    write_jsonl(output_file, anchors)
    for file in partial_files:
        file.unlink(missing_ok=True)
    return anchors
