"""Markdown tables, and how a rate and a p-value are written in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def shown_rate(cell: dict[str, Any] | None, kind: str) -> str:
    """A rate and its interval; an empty text where there is none."""
    if cell is None or cell[kind]["rate"] is None:
        return ""
    low, high = cell[kind]["interval"]
    invalid = cell[kind].get("invalid")
    note = f", {invalid} invalid" if invalid else ""
    return f"{cell[kind]['rate']:.2f} [{low:.2f}, {high:.2f}]{note}"


def rate_with_n(cell: dict[str, Any] | None, kind: str) -> str:
    """A rate, its interval and its n."""
    shown = shown_rate(cell, kind)
    return f"{shown} (n = {cell[kind]['n']})" if cell and shown else ""


def shown_test(entry: dict[str, Any] | None) -> str:
    """The p-value of a test, with the requests on which the two arms differ."""
    if entry is None:
        return ""
    return f"{shown_p(entry['p'])} ({entry['only_first']} : {entry['only_second']}), n = {entry['n']}"


def shown_kappa(agreement: dict[str, Any]) -> str:
    """A kappa and its interval; an empty text where there is none."""
    if agreement["kappa"] is None:
        return ""
    low, high = agreement["interval"]
    return f"{agreement['kappa']:.2f} [{low:.2f}, {high:.2f}]"


def shown_p(p: float) -> str:
    """A p-value in as many digits as it is worth."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
