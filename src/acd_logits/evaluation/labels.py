"""Labels by hand: how far the verdicts of a comparison can be trusted.

`labels.jsonl` in the results folder holds responses to plain requests, drawn at random over all cells, in random order
and without the name of their arm, for a person to fill in:

    line                the response's line in results.jsonl, from 0
    request, response   what was asked and answered
    harmless, refusal   null until labelled, then true or false

The report shows how far the verdicts agree with those that are labelled.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..files import write_jsonl
from .results import TEXTS, cell_of
from .statistics import cohen_kappa

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .results import ResultsFolder

LABELS_NAME = "labels.jsonl"
QUESTIONS = ("harmless", "refusal")


def _is_direct(row: dict[str, Any]) -> bool:
    """Whether the request was asked as it stands: refusals under attack are judged in another way."""
    cell = cell_of(row)
    return cell == cell.direct


def draw(results: ResultsFolder, n: int, seed: int) -> Path:
    """Draw responses to label.

    Args:
        results: the folder.
        n: how many responses.
        seed: of the draw.

    Returns:
        The path of the file to fill in.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is one already, there are fewer responses, or their texts are not there.
    """
    path = results.path / LABELS_NAME
    if path.exists():
        raise ValueError(f"{path} is there already: fill it in, or remove it to draw anew")
    whole = [line for line, row in enumerate(results.rows) if "refused" in row and _is_direct(row)]
    if n > len(whole):
        raise ValueError(f"{results.path} holds {len(whole)} responses, {n} cannot be drawn")
    if any("response" not in results.rows[line] for line in whole):
        raise ValueError(f"{results.path} holds responses without their texts: draw from the folder of the run itself")
    lines = random.Random(seed).sample(whole, n)
    drawn = [
        {"line": line, **{text: results.rows[line][text] for text in TEXTS}, **dict.fromkeys(QUESTIONS)}
        for line in lines
    ]
    write_jsonl(path, drawn)
    return path


def read_labels(results: ResultsFolder) -> list[dict[str, Any]] | None:
    """The drawn responses with their labels; `None` if none were drawn."""
    path = results.path / LABELS_NAME
    if not path.exists():
        return None
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def agreement(results: ResultsFolder) -> dict[str, Any] | None:
    """How far the verdicts agree with the labels.

    Args:
        results: the folder.

    Returns:
        `None` without labels; else how many responses were `drawn`, and for `refusal` (on all that are labelled) and
        `harmless` (on those to harmful requests, where a verdict could be read): `n`, `kappa`, and how often label
        and verdict were yes: `both`, `only_label`, `only_verdict` and `neither`.

    Raises:
        ValueError: a label is neither true, false nor null, or a response is not the one in results.jsonl.
    """
    path = results.path / LABELS_NAME
    drawn = read_labels(results)
    if drawn is None:
        return None
    compared: dict[str, list[tuple[bool, bool]]] = {question: [] for question in QUESTIONS}
    for label in drawn:
        row = results.rows[label["line"]] if label["line"] < len(results.rows) else {}
        if any(row.get(text) != label.get(text) for text in TEXTS):
            raise ValueError(f"{path} was drawn from other results: remove it to draw anew")
        verdicts = {"refusal": row["refused"]}
        if row["verdict"] in ("harmless", "harmful"):
            verdicts["harmless"] = row["verdict"] == "harmless"
        for question, verdict in verdicts.items():
            if label[question] not in (True, False, None):
                raise ValueError(f"{path}: {label[question]!r} is no label: {question} is true, false or null")
            if label[question] is not None:
                compared[question].append((label[question], verdict))
    return {"drawn": len(drawn)} | {question: _agreement(some) for question, some in compared.items()}


def _agreement(compared: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    counts = Counter(compared)
    kappa = cohen_kappa(*zip(*compared, strict=True)) if compared else math.nan
    return {
        "n": len(compared),
        "kappa": None if math.isnan(kappa) else kappa,
        "both": counts[True, True],
        "only_label": counts[True, False],
        "only_verdict": counts[False, True],
        "neither": counts[False, False],
    }
