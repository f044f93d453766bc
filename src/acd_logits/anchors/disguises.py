"""Disguises: an instruction inside a story, a game, rules for the reply, earlier turns.

A pair that was trained on bare instructions alone lets many more harmful ones through when something is wrapped around
them. Whatever is around a harmful instruction is around the near miss that mirrors it, too: so the disguise itself is
nothing to refuse.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import shipped_folder
from .splits import IN_DISGUISE
from .tables import read_jsonl

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

PLACE = "{request}"  # of the instruction in a disguise


def load_disguises(path: str | os.PathLike[str] | None = None) -> list[list[str]]:
    """Read disguises from a JSONL file.

    Args:
        path: the file. A line is an object with `texts`, of the user and the assistant in turn, from the user's first
            to the user's last. `{request}` stands for the instruction, in the last one at least, which must say more.
            Default: the package's own.

    Returns:
        The texts of each disguise.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or a line (its number is given) is not as above.
    """
    path = Path(path or shipped_folder("anchors") / "disguises.jsonl")
    disguises = []
    for number, row in read_jsonl(path, required=()):
        texts = row.get("texts") if isinstance(row, dict) else None
        if not isinstance(texts, list) or len(texts) % 2 == 0 or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(f"{path}, line {number}: `texts` must be a list of one, three, five ... texts")
        if PLACE not in texts[-1] or texts[-1].strip() == PLACE:
            raise ValueError(f"{path}, line {number}: the last of `texts` must hold {PLACE}, and more")
        disguises.append(texts)
    return disguises


def disguise_instructions(
    instructions: Sequence[dict[str, Any]], disguises: Sequence[Sequence[str]], share: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Instructions once more, in disguise.

    Args:
        instructions: as of [`load_instructions`]. Those behind earlier turns are left as they are.
        disguises: as of [`load_disguises`]; they are taken in turn, in random order.
        share: how many of the others to disguise, from 0 to 1; those that mirror each other count as one.
        seed: chooses the instructions, and what is around each.

    Returns:
        The disguised instructions, with their kinds and categories. Those that mirror each other are in the same
        disguise, and mirror each other there.
    """
    by_mirror = defaultdict(list)
    for row in instructions:
        if not row.get("history"):
            by_mirror[row["mirror"]].append(row)
    choice = random.Random(seed)
    mirrors = choice.sample(sorted(by_mirror), round(share * len(by_mirror)))
    order = itertools.cycle(choice.sample(list(disguises), len(disguises)))
    disguised = []
    for mirror, texts in zip(mirrors, order, strict=False):
        for row in by_mirror[mirror]:
            *history, instruction = (text.replace(PLACE, row["instruction"]) for text in texts)
            disguised.append(
                {**row, "instruction": instruction, "history": history, "mirror": f"{mirror}{IN_DISGUISE}"}
            )
    return disguised
