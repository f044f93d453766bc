"""A copy of a results folder that may be shared: every verdict, and no request or response.

Harmful answers should not spread, and the requests of a benchmark are not ours to spread. Requests go by their ids, so
that the copy makes the same report, a later run can be compared with it, and a run goes on from a copy of it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from ..files import write_jsonl, write_text
from .labels import LABELS_NAME
from .results import ROWS_NAME, RUN_NAME, TEXTS, ResultsFolder

if TYPE_CHECKING:
    from typing import Any


def publish(results: ResultsFolder, path: str | os.PathLike[str]) -> ResultsFolder:
    """Copy results without any text of a request or a response.

    Args:
        results: the folder.
        path: where to; a copy made before is replaced.

    Returns:
        The copy, which has no report yet.

    Raises:
        OSError: it cannot be written.
        ValueError: the path holds something else, results of other settings, or these very ones.
    """
    if os.path.realpath(path) == os.path.realpath(results.path):
        raise ValueError(f"{path} is the folder of the run itself: choose another one for its copy")
    copy = ResultsFolder(path, results.run["settings"])
    copy.path.mkdir(parents=True, exist_ok=True)
    write_jsonl(copy.path / ROWS_NAME, map(_without_texts, results.rows))
    labels = results.path / LABELS_NAME
    if labels.exists():
        lines = labels.read_bytes().splitlines()
        write_jsonl(copy.path / LABELS_NAME, [_without_texts(json.loads(line)) for line in lines if line.strip()])
    write_text(copy.path / RUN_NAME, json.dumps(results.run, indent=2, ensure_ascii=False) + "\n")
    return ResultsFolder(path)


def _without_texts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TEXTS}
