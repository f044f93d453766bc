"""An anchor set from a model: sample its responses, split them, write the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..files import check_new_file, write_jsonl
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
    instructions: Sequence[dict[str, str]] | None = None,
    refusals: Sequence[dict[str, str]] | None = None,
    settings: SamplingSettings | None = None,
    per_instruction: int = 1,
) -> list[dict[str, Any]]:
    """Sample, split and write an anchor set; an interrupted call is continued by the next one.

    Args:
        model: the target model.
        tokenizer: its tokenizer.
        output_file: the JSONL file to write; `<output_file>.partial.jsonl` holds the responses until it is complete.
        instructions: default: the package's own.
        refusals: default: the package's own.
        settings: how to sample.
        per_instruction: see [`split_responses`].

    Returns:
        The anchors.

    Raises:
        OSError: the output file exists, or a file cannot be read or written.
        ValueError: see [`sample_responses`].
    """
    settings = settings or SamplingSettings()
    check_new_file(output_file)
    partial_file = output_file.with_name(output_file.name + ".partial.jsonl")
    samples = sample_responses(model, tokenizer, instructions or load_instructions(), partial_file, settings)
    anchors = split_responses(samples, refusals or load_refusals(), per_instruction, settings.seed)
    write_jsonl(output_file, anchors)
    partial_file.unlink()
    return anchors
