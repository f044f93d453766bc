"""The refusal bank: ready-made refusals, for models that hardly refuse anything themselves.

They are few, and begin alike: the loss of a small model is then about when to refuse, and not about which of many
wordings comes next.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..files import shipped_folder
from .tables import read_jsonl

if TYPE_CHECKING:
    import os


def load_refusals(path: str | os.PathLike[str] | None = None) -> list[dict[str, str]]:
    """Read the refusal bank from a JSONL file.

    Args:
        path: the file. A line is an object with `response` and perhaps `category`: a refusal with a category is used
            for harmful instructions of that category only. Default: the package's own.

    Returns:
        The refusals as dictionaries of these keys, without repetitions; `category` is "" for a general refusal.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or a line (its number is given) is not as above.
    """
    rows = read_jsonl(Path(path or shipped_folder("anchors") / "refusals.jsonl"), required=("response",))
    refusals = [{"response": row["response"].strip(), "category": str(row.get("category") or "")} for _, row in rows]
    return [dict(row) for row in dict.fromkeys(tuple(refusal.items()) for refusal in refusals)]
