"""What changed between two runs of a comparison, request by request.

Nothing in it quotes a response.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..files import write_text
from .arms import ARMS
from .results import Cell, cell_of
from .summary import HARMLESS, REFUSED, count_differences, outcome_of, p_value
from .tables import markdown_table, shown_p

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .results import ResultsFolder

COMPARISON_NAME = "comparison.md"


def write_comparison(new: ResultsFolder, old: ResultsFolder) -> Path:
    """Write what changed since an old run into the folder of the new one.

    Args:
        new: the new results.
        old: the old ones.

    Returns:
        The path of the file.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the two have no arm, strength and benchmark in common.
    """
    path = new.path / COMPARISON_NAME
    write_text(path, render_comparison(new, old))
    return path


def render_comparison(new: ResultsFolder, old: ResultsFolder) -> str:
    """What changed from an old run to a new one, prompt by prompt, as Markdown.

    Args:
        new: the new results.
        old: the old ones.

    Raises:
        ValueError: the two have no arm, strength and benchmark in common.
    """
    groups: list[dict[Cell, list[dict[str, Any]]]] = [defaultdict(list), defaultdict(list)]
    for results, rows in zip((new, old), groups, strict=True):
        for row in results.rows:
            rows[cell_of(row)].append(row)
    ours, theirs = groups
    table: list[list[str]] = []
    flips: list[str] = []
    for cell in [cell for cell in ours if cell in theirs]:
        for outcome in (HARMLESS, REFUSED):
            counts = count_differences(ours[cell], theirs[cell], outcome)
            if counts["n"]:
                name = f"{ARMS[cell.arm].title}{_strength(cell)} on {new.run['benchmarks'][cell.benchmark]['title']}"
                gained, lost = counts["only_first"], counts["only_second"]
                table.append([name, outcome, str(counts["n"]), f"{gained}", f"{lost}", shown_p(p_value(counts))])
                flips += _flips(name, ours[cell], theirs[cell], outcome)
    if not table:
        raise ValueError(f"{new.path} and {old.path} have no arm, strength and benchmark in common")
    changed = [
        [name, str(old.run["settings"].get(name)), str(value)]
        for name, value in new.run["settings"].items()
        if old.run["settings"].get(name) != value
    ]
    heading = ["Arm", "Outcome", "n", "Only new", "Only old", "p (McNemar)"]
    return "\n".join(
        [
            "# What changed",
            "",
            *(markdown_table(["Setting", "Old", "New"], changed) if changed else ["The settings are the same."]),
            "",
            "On how many requests only the new or only the old run had the outcome: a harmless response to a harmful",
            "request, or the refusal of a safe one.",
            "",
            *markdown_table(heading, table),
            "",
            "## Flips",
            "",
            *(flips or ["None."]),
            "",
        ]
    )


def _flips(name: str, new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]], outcome: str) -> list[str]:
    before = {row["id"]: outcome_of(row, outcome) for row in old}
    lines = []
    for row in new:
        now, then = outcome_of(row, outcome), before.get(row["id"])
        if now is not None and then is not None and now != then:
            change = f"now {outcome}" if now else f"no longer {outcome}"
            request = row.get("request", f"request {row['id']}")
            lines.append(f"- {name}, {change}: {' '.join(request.split())}")
    return lines


def _strength(cell: Cell) -> str:
    strength = "" if cell.alpha is None else f" (alpha {cell.alpha:g}, beta {cell.beta:g})"
    under = f" under {cell.attack}" if cell.attack else ""
    return f"{strength}{under} behind {cell.begun_tokens} tokens" if cell.begun_tokens else f"{strength}{under}"
