"""A copy of a results folder that may be shared: it has every verdict, and no request or response.

Harmful answers should not spread, and the requests of a benchmark are not ours to spread. Requests go by their ids, so
that the copy makes the same report, a later run can be compared with it, and a run goes on from a copy of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..files import write_jsonl
from .labels import LABELS_NAME, read_labels
from .results import PRIVATE, ROWS_NAME, ResultsFolder

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
    copy.run = results.run
    copy.write_run()
    write_jsonl(copy.path / ROWS_NAME, map(_without_texts, results.rows))
    (copy.path / LABELS_NAME).unlink(missing_ok=True)  # of an older copy, and perhaps of other lines
    if (results.path / LABELS_NAME).exists():
        write_jsonl(copy.path / LABELS_NAME, map(_without_texts, read_labels(results.path / LABELS_NAME)))
    return ResultsFolder(path)


def _without_texts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in PRIVATE}
