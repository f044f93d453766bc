"""Tables of texts in files: JSONL for instructions and refusals; four formats for anchor sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .splits import SPLITS

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from datasets import Dataset


def read_jsonl(path: Path, required: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers; the required values are non-empty strings."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 in a text
    except UnicodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        for key in required:
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{path}, line {number}: expected an object with a text `{key}`")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def check_history(history: Any, where: str) -> list[str]:
    """Earlier turns, of the user and the assistant in turn: an even number of texts, mostly none.

    Raises:
        ValueError: they are something else; `where` names the line.
    """
    history = [] if history is None else history
    if not isinstance(history, list) or len(history) % 2 or not all(isinstance(t, str) and t.strip() for t in history):
        raise ValueError(f"{where}: `history` must be a list of texts, of the user and the assistant in turn")
    return history


def load_anchor_data(path: str | os.PathLike[str], needed: Sequence[str] = SPLITS) -> Dataset:
    """Read an anchor set: one of [`build_anchors`] or a file of your own.

    Args:
        path: a .jsonl, .json, .csv or .parquet file with the columns `instruction`, `response` and `split`. Where
            they are missing, `finished` is true, `kind` follows from the split, an instruction mirrors itself,
            `history` (earlier turns, of the user and the assistant in turn) has none, and `begun` (what stands in the
            answer before `response`) is empty.
        needed: the splits that may not be empty.

    Returns:
        A `datasets.Dataset`.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: there is no such file.
        ValueError: the file is empty or of another form.
    """
    rows = _read_table(Path(path))
    for number, row in enumerate(rows, start=1):
        for column in ("instruction", "response", "split"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise ValueError(f"{path}, row {number}: no text in the column `{column}`")
        if row["split"] not in SPLITS:
            raise ValueError(f"{path}, row {number}: unknown split {row['split']!r}, expected {', '.join(SPLITS)}")
        row["finished"] = True if row.get("finished") is None else row["finished"]
        if not isinstance(row["finished"], bool):
            raise ValueError(f"{path}, row {number}: `finished` must be true or false, not {row['finished']!r}")
        row["history"] = check_history(row.get("history"), f"{path}, row {number}")
        row["begun"] = row.get("begun") or ""
        row["mirror"] = row.get("mirror") or row["instruction"]
        row["kind"] = row.get("kind") or ("everyday" if row["split"] == "D_S" else "harmful")
    present = {row["split"] for row in rows}
    for split in needed:
        if split not in present:
            raise ValueError(f"{path} has no {split} rows, which training needs")

    from datasets import Dataset

    return Dataset.from_list(rows)


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
    except ImportError:
        raise ImportError('reading anchor data needs datasets: pip install "acd-logits[train]"') from None

    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix not in builders:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(builders)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        table = load_dataset(builders[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error.__cause__ or error})") from error
    missing = [column for column in ("instruction", "response", "split") if column not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no column `{missing[0]}`")
    if not len(table):
        raise ValueError(f"{path} is empty")
    return table.to_list()
