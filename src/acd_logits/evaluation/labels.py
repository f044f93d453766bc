"""Labels by hand: how far the verdicts of a comparison can be trusted.

`labels.jsonl` in the results folder holds responses, drawn at random over all cells, in random order and without the
name of their arm, for a person to fill in:

    line                the response's line in results.jsonl, from 0
    request, response   what was asked and answered
    harmless, refusal   null until labelled, then true or false

The report shows how far the verdicts agree with those that are labelled. Files `labels-*.jsonl` beside it hold earlier
draws, such as the labels that a judge is trained on. What they hold is not drawn again.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..files import write_jsonl
from .behaviour import TITLES, behaviour_of
from .results import TEXTS, cell_of
from .statistics import kappa

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .results import ResultsFolder

LABELS_NAME, EARLIER = "labels.jsonl", "labels-*.jsonl"
QUESTIONS = ("harmless", "refusal")


def _is_direct(row: dict[str, Any]) -> bool:
    """Whether the request was asked as it stands: refusals under attack are judged in another way."""
    cell = cell_of(row)
    return cell == cell.direct


def draw(results: ResultsFolder, n: int, seed: int, harmful: bool = False) -> Path:
    """Draw responses to label.

    Args:
        results: the folder.
        n: how many responses.
        seed: of the draw.
        harmful: draws responses to harmful requests, also to those under attack, instead of those to plain requests.

    Returns:
        The path of the file to fill in.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: there is one already, there are fewer responses, their texts are not there, or an earlier draw is
            of other results.
    """
    path = results.path / LABELS_NAME
    if path.exists():
        raise ValueError(
            f"{path} is there already: fill it in, remove it to draw anew, or keep it as {EARLIER} and draw others"
        )
    earlier = {_texts(row) for file in results.path.glob(EARLIER) for row, _ in labelled_rows(results, file)}
    whole = [line for line, row in enumerate(results.rows) if _may_be_drawn(row, harmful)]
    if any("response" not in results.rows[line] for line in whole):
        raise ValueError(f"{results.path} holds responses without their texts: draw from the folder of the run itself")
    left = [line for line in whole if _texts(results.rows[line]) not in earlier]
    if n > len(left):
        others = " that are not labelled yet" if len(left) < len(whole) else ""
        raise ValueError(f"{results.path} holds {len(left)} responses{others}, {n} cannot be drawn")
    lines = random.Random(seed).sample(left, n)
    drawn = [
        {"line": line, **{text: results.rows[line][text] for text in TEXTS}, **dict.fromkeys(QUESTIONS)}
        for line in lines
    ]
    write_jsonl(path, drawn)
    return path


def _may_be_drawn(row: dict[str, Any], harmful: bool) -> bool:
    if "refused" not in row:
        return False
    return row["label"] == "harmful" and not cell_of(row).begun_tokens if harmful else _is_direct(row)


def _texts(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(text) for text in TEXTS)


def read_labels(path: Path) -> list[dict[str, Any]]:
    """The drawn responses of a file, with their labels."""
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def labelled_rows(results: ResultsFolder, path: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows that a file of labels was drawn from, each with its labels.

    Args:
        results: the folder.
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, a label is neither true, false nor null, or a response is not the one in
            results.jsonl.
    """
    found = []
    try:
        for label in read_labels(path):
            row = results.rows[label["line"]] if label["line"] < len(results.rows) else None
            if row is None or _texts(row) != _texts(label):
                raise ValueError(f"{path} was drawn from other results: remove it to draw anew")
            for question in QUESTIONS:
                if label[question] not in (True, False, None):
                    raise ValueError(f"{path}: {label[question]!r} is no label: {question} is true, false or null")
            found.append((row, label))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): mend it, or remove it to draw anew") from None
    return found


def labelled_behaviour(label: dict[str, Any]) -> str | None:
    """What a response to a harmful request does by its labels, as of `behaviour_of`; `None` if they do not say."""
    if label["harmless"] is None or (label["harmless"] and label["refusal"] is None):
        return None
    return behaviour_of("harmless" if label["harmless"] else "harmful", bool(label["refusal"]))


def agreement(results: ResultsFolder) -> dict[str, Any] | None:
    """How far the verdicts agree with the labels.

    Args:
        results: the folder.

    Returns:
        `None` without labels; else how many responses were `drawn`, and three agreements, each with `n`, `kappa` and
        its `interval`. `refusal` (on plain requests) and `harmless` (on harmful ones, where a verdict could be read)
        say how often label and verdict were yes: `both`, `only_label`, `only_verdict` and `neither`. `behaviour` (as
        `harmless`) has `counts`, by the label and then by the verdict.

    Raises:
        ValueError: as of [`labelled_rows`].
    """
    path = results.path / LABELS_NAME
    if not path.exists():
        return None
    drawn = labelled_rows(results, path)
    compared: dict[str, list[tuple[Any, Any]]] = {name: [] for name in (*QUESTIONS, "behaviour")}
    for row, label in drawn:
        if _is_direct(row) and label["refusal"] is not None:
            compared["refusal"].append((label["refusal"], row["refused"]))
        verdict = behaviour_of(row["verdict"], row["refused"])
        if verdict and label["harmless"] is not None:
            compared["harmless"].append((label["harmless"], row["verdict"] == "harmless"))
        if verdict and (by_label := labelled_behaviour(label)):
            compared["behaviour"].append((by_label, verdict))
    found = {name: kappa(pairs) for name, pairs in compared.items()}
    return {
        "drawn": len(drawn),
        **{name: found[name] | _counts(compared[name]) for name in QUESTIONS},
        "behaviour": found["behaviour"] | {"counts": confusion(compared["behaviour"])},
    }


def _counts(compared: Sequence[tuple[bool, bool]]) -> dict[str, int]:
    counts = Counter(compared)
    return {
        "both": counts[True, True],
        "only_label": counts[True, False],
        "only_verdict": counts[False, True],
        "neither": counts[False, False],
    }


def confusion(compared: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How often each behaviour by label was each behaviour by verdict."""
    counts = Counter(compared)
    return {label: {verdict: counts[label, verdict] for verdict in TITLES} for label in TITLES}
