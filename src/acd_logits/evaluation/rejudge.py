"""Judging the responses of a comparison anew: another judge, and no response generated again."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..files import write_jsonl
from ..refusal import is_refusal, turns_around
from .judges import continuation_judge
from .labels import read_labels
from .results import ResultsFolder, cell_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .judges import Judge
    from .results import Cell

_ASKED = ("id", "response")  # what a row and the row that it was judged from share


def check_rejudging(old: ResultsFolder, path: Path, settings: dict[str, Any]) -> ResultsFolder:
    """Check, before any work is done, that results can be judged anew.

    Args:
        old: the results.
        path: the folder of the new ones: a new one, or one that this judge has begun to fill.
        settings: of the new ones.

    Returns:
        The new results, as far as they are there.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it holds something else, or the results are none or have no texts.
    """
    if not old.rows:
        raise ValueError(f"{old.path} holds no finished cell yet")
    if path.resolve() == old.path.resolve():
        raise ValueError(f"{path} holds what is to be judged anew: choose another folder for the new verdicts")
    if any(row["label"] == "harmful" and "response" not in row for row in old.rows):
        raise ValueError(f"{old.path} holds responses without their texts: name the folder of the run itself")
    new, cells = ResultsFolder(path, settings), _lines_of_cells(old)
    for cell, lines in _lines_of_cells(new).items():
        if [_asked(new.rows[i]) for i in lines] != [_asked(old.rows[i]) for i in cells.get(cell, [])]:
            raise ValueError(f"{path} holds verdicts on other responses than {old.path}: choose another folder")
    return new


def judge_again(
    old: ResultsFolder,
    new: ResultsFolder,
    judge: Judge,
    facts: dict[str, Any],
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Write results with the verdicts of another judge, with their labels by hand.

    Answers that have begun are left out, since the verdicts decide which answers they are.

    Args:
        old: the results.
        new: those with the new verdicts, of [`check_rejudging`]. What is in them stays.
        judge: gives the verdicts.
        facts: date, command and versions of this run.
        on_cell: is told each cell that is judged.

    Raises:
        OSError: the judge does not answer, or the folder cannot be written. Finished cells are in it.
    """
    earlier = new.run["runs"] or old.run["runs"]
    new.run = {**old.run, "settings": new.run["settings"], "runs": [*earlier, facts]}
    new.write_run()
    cells = _lines_of_cells(old)
    for cell, lines in cells.items():
        if not new.is_finished(cell):
            new.add(cell, _judge_cell(cell, [old.rows[line] for line in lines], judge))
            on_cell(cell)
    order = [line for cell in _lines_of_cells(new) for line in cells[cell]]
    places = {line: place for place, line in enumerate(order)}
    for file in old.path.glob("labels*.jsonl"):
        if not (new.path / file.name).exists():
            labels = ({**label, "line": places[label["line"]]} for label in read_labels(file))
            write_jsonl(new.path / file.name, labels)


def _lines_of_cells(results: ResultsFolder) -> dict[Cell, list[int]]:
    """The lines of each cell in which no answer has begun."""
    cells: dict[Cell, list[int]] = defaultdict(list)
    for line, row in enumerate(results.rows):
        if not cell_of(row).begun_tokens:
            cells[cell_of(row)].append(line)
    return dict(cells)


def _asked(row: dict[str, Any]) -> list[Any]:
    return [row.get(name) for name in _ASKED]


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
