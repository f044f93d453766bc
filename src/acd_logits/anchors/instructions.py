"""Instructions of three kinds: harmful; near misses, which are safe but sound dangerous; everyday."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import shipped_folder
from .tables import check_history, read_jsonl

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

KINDS = ("harmful", "near_miss", "everyday")


def load_instructions(paths: Sequence[str | os.PathLike[str]] | None = None) -> list[dict[str, Any]]:
    """Read instructions from JSONL files.

    Args:
        paths: the files. A line is an object with `instruction`, `category` (default "general") and `kind`, one of
            harmful, near_miss and everyday; a file named after a kind need not say it in every line. Earlier turns
            may stand in `history`, a list of texts of the user and the assistant in turn. Default: the package's own.

    Returns:
        The instructions as dictionaries of these four keys, without repetitions. A fifth key, `mirror`, holds the
        category and the instruction's number in it. The package's near misses mirror its harmful instructions line by
        line.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is empty, or a line (its number is given) is not as above.
    """
    instructions: dict[str, dict[str, Any]] = {}
    numbers: Counter[tuple[str, str]] = Counter()
    for path in map(Path, paths or [shipped_folder("anchors") / f"{kind}.jsonl" for kind in KINDS]):
        for number, row in read_jsonl(path, required=("instruction",)):
            kind = row.get("kind", path.stem)
            if kind not in KINDS:
                raise ValueError(f"{path}, line {number}: `kind` must be one of {', '.join(KINDS)}, not {kind!r}")
            history = check_history(row.get("history"), f"{path}, line {number}")
            category = str(row.get("category") or "general")
            text = row["instruction"].strip()
            if text not in instructions:
                numbers[kind, category] += 1
                mirror = f"{category} {numbers[kind, category]}"
                row = {"instruction": text, "category": category, "kind": kind, "mirror": mirror}
                instructions[text] = {**row, "history": history}
    return list(instructions.values())
