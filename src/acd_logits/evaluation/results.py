"""A results folder holds what a comparison has measured so far, and the settings of its runs.

    run.json         settings, benchmarks, and when and with which command and versions the folder was filled
    results.jsonl    one line per response: its origin, its text and its measurements; a published
                     copy (`publish.py`) has no texts
    summary.json, report.md, *.png    made from these two, see `report.py`

A cell is one arm, at one strength, on one benchmark, asked plainly, under one attack or at one depth. Its lines are
written together when it is finished; lines of a cell that is incomplete, because the run was killed in the middle of
writing it, are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..files import json_line, write_jsonl, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .attacks import Attack
    from .benchmarks import Benchmark

FORMAT_VERSION = 2
RUN_NAME, ROWS_NAME = "run.json", "results.jsonl"
TEXTS = ("request", "response")
PRIVATE = (*TEXTS, "begun", "response_ids")  # a published copy leaves them out


@dataclass(frozen=True)
class Cell:
    """One arm, at one strength, on one benchmark. Arms of one stream have neither alpha nor beta.

    With `attack`, the harmful requests are asked under this attack, or, where all are safe, these. With
    `begun_tokens`, the arm goes on from this many tokens of Base's answers, where [`may_begin`] allows it.
    """

    benchmark: str
    arm: str
    alpha: float | None = None
    beta: float | None = None
    begun_tokens: int = 0
    attack: str | None = None

    @property
    def direct(self) -> Cell:
        """The same cell with all requests asked plainly, and no answer begun."""
        return replace(self, begun_tokens=0, attack=None)


class ResultsFolder:
    """The folder of a comparison.

    Args:
        path: the folder.
        settings: everything that the results depend on, to start a folder or go on with it; `None` to read one.

    Raises:
        OSError: the folder cannot be read or written.
        ValueError: it holds something else, or results of other settings.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.run = self._open(settings)
        self.rows = self._finished_rows(repair=settings is not None)

    def _open(self, settings: dict[str, Any] | None) -> dict[str, Any]:
        file = self.path / RUN_NAME
        if not file.exists():
            if settings is None:
                raise OSError(f"{self.path} holds no results: {RUN_NAME} is missing")
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} holds something other than results: choose another folder")
            known: dict[str, Any] = {"benchmarks": {}, "attacks": {}, "rivals": {}}
            return {"format_version": FORMAT_VERSION, "settings": settings, **known, "runs": []}
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON ({error})") from None
        if not isinstance(run, dict) or run.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{file} was not written by this version of acd-logits: choose another folder")
        for name, value in (settings or {}).items():
            if run["settings"].get(name) != value:
                raise ValueError(
                    f"{self.path} holds results with {name} {run['settings'].get(name)!r}, not {value!r}: "
                    "choose another folder"
                )
        for name in ("attacks", "rivals"):
            run.setdefault(name, {})  # older folders have none
        return run

    def _finished_rows(self, repair: bool) -> list[dict[str, Any]]:
        file = self.path / ROWS_NAME
        lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
        try:
            rows = [json.loads(line) for line in lines[:-1]]  # the last one was cut off if it is not empty
            of_cell: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
            for row in rows:
                of_cell[cell_of(row)].append(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): choose another folder") from None
        self._finished: set[Cell] = {cell for cell, some in of_cell.items() if len(some) == self._size(cell, of_cell)}
        finished = [row for row in rows if cell_of(row) in self._finished]
        if repair and (lines[-1] or len(finished) < len(rows)):
            write_jsonl(file, finished)
        return finished

    def _size(self, cell: Cell, of_cell: Mapping[Cell, Sequence[dict[str, Any]]]) -> int | None:
        if cell.begun_tokens:
            return sum(may_begin(row, cell.begun_tokens) for row in of_cell.get(Cell(cell.benchmark, "base"), []))
        if cell.attack:
            direct = of_cell.get(cell.direct, [])
            return sum(row["label"] == "harmful" for row in direct) or len(direct)
        return self.run["benchmarks"].get(cell.benchmark, {}).get("n")

    def register(
        self,
        benchmarks: Sequence[Benchmark],
        attacks: Mapping[str, Attack] = MappingProxyType({}),
        rivals: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Note the requests that will be asked.

        Args:
            benchmarks: the requests.
            attacks: under which they are asked too, by name.
            rivals: the digests of the rivals that answer, by arm.

        Raises:
            ValueError: two benchmarks share a name, or the folder holds answers to other requests under one, under
                other wordings of an attack, or of other rivals.
        """
        known = self.run["benchmarks"]
        names = Counter(benchmark.name for benchmark in benchmarks)
        for benchmark in benchmarks:
            if names[benchmark.name] > 1:
                raise ValueError(f"{benchmark.name} is given twice: name each benchmark once, and files differently")
            entry = {"title": benchmark.title, "n": len(benchmark.requests), "digest": benchmark.digest}
            if known.setdefault(benchmark.name, entry) != entry:
                raise ValueError(
                    f"{self.path} holds answers to other requests of {benchmark.name}: give the file, --limit and "
                    "--seed of then, or choose another folder"
                )
        for name, attack in attacks.items():
            entry = {"title": attack.title, "digest": attack.digest}
            if self.run["attacks"].setdefault(name, entry) != entry:
                raise ValueError(
                    f"{self.path} holds answers to other wordings of the attack {name}: choose another folder"
                )
        for name, digest in rivals.items():
            if self.run["rivals"].setdefault(name, digest) != digest:
                raise ValueError(f"{self.path} holds answers of another {name}: choose another folder")

    def start(self, facts: dict[str, Any]) -> None:
        """Write down that a run begins.

        Args:
            facts: its date, command, versions.
        """
        self.run["runs"].append(facts)
        self.write_run()

    def write_run(self) -> None:
        """Write run.json, and make the folder if there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / RUN_NAME, json.dumps(self.run, indent=2, ensure_ascii=False) + "\n")

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell's responses are in the folder."""
        return cell in self._finished

    def add(self, cell: Cell, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a finished cell."""
        complete = [{**cell.__dict__, "id": request_id(row["request"]), **row} for row in rows]
        with (self.path / ROWS_NAME).open("a", encoding="utf-8") as file:
            file.write("".join(map(json_line, complete)))
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(complete)
        self._finished.add(cell)


def request_id(text: str) -> str:
    """The id that stands for a request's text: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row belongs to."""
    # Older rows have no depth and no attack
    tokens, attack = row.get("begun_tokens", 0), row.get("attack")
    return Cell(row["benchmark"], row["arm"], row["alpha"], row["beta"], tokens, attack)


def may_begin(row: dict[str, Any], tokens: int) -> bool:
    """Whether an answer may begin with this many tokens of a row of Base: a harmful one that is longer."""
    return row["label"] == "harmful" and row["verdict"] == "harmful" and row["tokens"] > tokens
