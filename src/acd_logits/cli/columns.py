"""Two answers in two columns, which grow on the screen while they are generated."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING

from .command import show

if TYPE_CHECKING:
    from .assistant import Assistant


def terminal_shows_columns() -> bool:
    """Whether stdout is a terminal that is wide enough and can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and shutil.get_terminal_size().columns >= 80


def print_columns(assistant: Assistant, prompt: str, labels: tuple[str, str]) -> None:
    """Stream the plain answer into the left column, then the safeguarded one into the right."""
    headings = side_by_side(*labels, shutil.get_terminal_size().columns)
    show("\n".join([f"Prompt: {prompt}", "", *headings, ""]))
    texts = ["", ""]
    rows = 0

    def draw(lines: list[str]) -> None:
        nonlocal rows
        up = f"\x1b[{rows}F" if rows else ""
        show(up + "\x1b[J" + "".join(line + "\n" for line in lines))
        rows = len(lines)

    for side in (0, 1):

        def add(text: str, side: int = side) -> None:
            texts[side] += text
            width, height = shutil.get_terminal_size()
            # The cursor cannot go back to what has left the screen: show as much as fits, down to the new text.
            end = max(len(side_by_side(texts[side], "", width)), height - 1)
            draw(side_by_side(texts[0], texts[1], width)[max(0, end - (height - 1)) : end])

        assistant.answer([{"role": "user", "content": prompt}], safeguarded=side == 1, on_text=add)
    draw([*side_by_side(texts[0], texts[1], shutil.get_terminal_size().columns), ""])


def side_by_side(left: str, right: str, width: int) -> list[str]:
    """Set two texts in two columns, in lines that a terminal of this width does not break."""
    column = (width - 5) // 2
    rows = itertools.zip_longest(_wrap(left, column), _wrap(right, column), fillvalue="")
    return [f"{row[0]:<{column}} | {row[1]}".rstrip().replace("\0", "") for row in rows]


def _wrap(text: str, column: int) -> list[str]:
    # Chinese characters and emoji fill two cells: a NUL after each makes it count as two until the line is printed.
    # A cut between the two makes a line one cell too long, which the columns leave room for.
    cells = "".join(c + "\0" if unicodedata.east_asian_width(c) in "WF" else c for c in text)
    return [row for line in cells.strip("\n").split("\n") for row in textwrap.wrap(line, column) or [""]]
