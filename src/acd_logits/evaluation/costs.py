"""What protection costs on safe requests: refusals by category, problems solved, and the better answers preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arms import ARMS
from .statistics import rate
from .tables import markdown_table, shown_rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .results import Cell

    Rows = Sequence[dict[str, Any]]


def is_scored(rows: Rows) -> bool:
    """Whether these are rows of a benchmark of choices, to which nothing was answered."""
    return "loglikelihoods" in rows[0]


def measure_costs(cells: Mapping[Cell, Rows]) -> list[dict[str, Any]]:
    """The costs in each cell of safe requests that have categories, known answers or choices.

    Args:
        cells: the rows of each cell.

    Returns:
        For each such cell, and each of its categories (`category`; `None` for all): the rate `refused`; of problems
        also `correct` and `ended`; of choices `correct` alone.
    """
    found = []
    for cell, rows in cells.items():
        categories = dict.fromkeys(row["category"] for row in rows if row.get("category"))
        if categories or "correct" in rows[0]:
            for category in (None, *categories):
                some = [row for row in rows if category in (None, row.get("category"))]
                found.append(cell.__dict__ | {"category": category} | _measure(some))
    return found


def _measure(rows: Rows) -> dict[str, Any]:
    counted = {"correct": "correct"} if is_scored(rows) else {"refused": "refused"}
    if "correct" in rows[0] and not is_scored(rows):
        counted |= {"correct": "correct", "ended": "finished"}
    return {name: rate(sum(row[key] for row in rows), len(rows)) for name, key in counted.items()}


_MEANING = {
    ("refused",): "Share of requests that were refused, by wording, in all and by category; lower is better.",
    ("correct", "refused", "ended"): (
        "Share of problems that were solved, refused by wording, and answered to the end; the last columns are the "
        "share solved of each kind."
    ),
    ("correct",): "Share of questions on which the better answer is likelier than the worse one.",
}


def cost_sections(benchmarks: dict[str, dict[str, Any]], costs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A section of the report for each benchmark with costs.

    Args:
        benchmarks: of a summary.
        costs: its costs, at one strength.
    """
    found = {(cost["benchmark"], cost["arm"], cost["category"]): cost for cost in costs}
    for benchmark, known in benchmarks.items():
        whole = {arm: found[benchmark, arm, None] for arm in ARMS if (benchmark, arm, None) in found}
        if whole:
            yield _section(known["title"], whole, found)


def _section(title: str, whole: dict[str, dict[str, Any]], found: dict[tuple[str, str, str | None], Any]) -> str:
    first = next(iter(whole.values()))
    kinds = next(kinds for kinds in _MEANING if {*kinds} == {*first} & {"correct", "refused", "ended"})
    benchmark, main = first["benchmark"], kinds[0]
    categories = dict.fromkeys(category for name, _, category in found if name == benchmark and category)
    rows = [
        [
            ARMS[arm].title,
            *(shown_rate(cost, kind) for kind in kinds),
            *(shown_rate(found.get((benchmark, arm, category)), main) for category in categories),
        ]
        for arm, cost in whole.items()
    ]
    heading = ["Arm", *(kind.capitalize() for kind in kinds), *categories]
    lines = [f"## {title}", "", f"{_MEANING[kinds]} n = {first[main]['n']}."]
    return "\n".join([*lines, "", *markdown_table(heading, rows)])
