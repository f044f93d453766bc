"""Files: written in one step, read with one sentence for what is wrong, and those that ship with the package."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


def write_text(path: Path, text: str) -> None:
    """Write the file in one step: a reader, or a crash, never meets half of it.

    Args:
        path: the file, in a folder that exists.
        text: what it will hold, in UTF-8.

    Raises:
        OSError: it cannot be written; then it is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file in one step, as [`write_text`]."""
    write_text(path, "".join(map(json_line, rows)))


def json_line(row: dict[str, Any]) -> str:
    """A row as a line of a JSONL file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def check_new_file(path: Path) -> None:
    """Raise FileExistsError where a file is already; make its folder where there is none."""
    if path.exists():
        raise FileExistsError(f"{path} exists: delete it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)


def digest(*values: Any) -> str:
    """The SHA-256 of values as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file of a saved pair; raise ValueError with its name where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or save the pair again.") from None


def shipped_folder(name: str) -> Path:
    """A folder of the repository's `prompts/`: from the installed package, or from the checkout it runs in."""
    installed = Path(__file__).parent / "_prompts"
    return (installed if installed.is_dir() else Path(__file__).parents[2] / "prompts") / name
