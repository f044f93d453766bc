"""Judging the responses of a comparison anew: another judge, and no response generated again."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..files import write_jsonl
from ..refusal import is_refusal, turns_around
from .judges import continuation_judge
from .labels import read_labels
from .results import ROWS_NAME, RUN_NAME, ResultsFolder, cell_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .judges import Judge
    from .results import Cell


def check_rejudging(old: ResultsFolder, path: Path, settings: dict[str, Any]) -> None:
    """Check, before any work is done, that results can be judged anew.

    Args:
        old: the results.
        path: the folder of the new ones.
        settings: of the new ones.

    Raises:
        ValueError: the path holds something already, or the results are none or have no texts.
    """
    if not old.rows:
        raise ValueError(f"{old.path} holds no finished cell yet")
    if (path / RUN_NAME).exists():
        raise ValueError(f"{path} holds results already: choose another folder for those that are judged anew")
    ResultsFolder(path, settings)
    if any(row["label"] == "harmful" and "response" not in row for row in old.rows):
        raise ValueError(f"{old.path} holds responses without their texts: name the folder of the run itself")


def judge_again(
    old: ResultsFolder,
    path: Path,
    settings: dict[str, Any],
    judge: Judge,
    facts: dict[str, Any],
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> ResultsFolder:
    """Write results with the verdicts of another judge into a new folder, with their labels by hand.

    Answers that have begun are left out, since the verdicts decide which answers they are.

    Args:
        old: the results, of [`check_rejudging`].
        path: the new folder.
        settings: of the new results.
        judge: gives the verdicts.
        facts: date, command and versions of this run.
        on_cell: is told each cell that is judged.

    Raises:
        OSError: the judge does not answer, or the folder cannot be written. Nothing is written then.
    """
    cells: dict[Cell, list[int]] = defaultdict(list)
    for line, row in enumerate(old.rows):
        if not cell_of(row).begun_tokens:
            cells[cell_of(row)].append(line)
    judged: dict[int, dict[str, Any]] = {}
    for cell, lines in cells.items():
        judged |= zip(lines, _judge_cell(cell, [old.rows[line] for line in lines], judge), strict=True)
        on_cell(cell)
    places = {line: place for place, line in enumerate(sorted(judged))}
    new = ResultsFolder(path, settings)
    new.run = {**old.run, "settings": settings, "runs": [*old.run["runs"], facts]}
    new.write_run()
    write_jsonl(path / ROWS_NAME, (judged[line] for line in places))
    for file in old.path.glob("labels*.jsonl"):
        write_jsonl(path / file.name, ({**label, "line": places[label["line"]]} for label in read_labels(file)))
    return ResultsFolder(path)


def _judge_cell(cell: Cell, rows: list[dict[str, Any]], judge: Judge) -> list[dict[str, Any]]:
    plain = cell == cell.direct
    judge, refuses = (judge, is_refusal) if plain else (continuation_judge(judge), turns_around)
    harmful = [row for row in rows if row["label"] == "harmful"]
    verdicts = iter(judge.judge([row["request"] for row in harmful], [row["response"] for row in harmful]))
    return [
        row | {"refused": refuses(row["response"], row["request"]), "verdict": next(verdicts)}
        if row["label"] == "harmful"
        else row
        for row in rows
    ]
