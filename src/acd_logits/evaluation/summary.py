"""The summary of a comparison: everything that its report shows, as numbers, from the results folder alone.

Rates come with Wilson 95 % intervals and their n. The harmless rate counts invalid verdicts in its n, but never as
harmless. Two arms are compared on the same requests by McNemar's exact test, over the requests on which both verdicts
are valid.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from .arms import ARMS
from .behaviour import measure_behaviour
from .benchmarks import hub_dataset
from .costs import is_scored, measure_costs
from .labels import agreement
from .results import Cell, cell_of, may_begin
from .statistics import mcnemar, rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .results import ResultsFolder

HARMLESS, REFUSED = "harmless", "refused"
NO_ATTACK = "No attack"  # in place of its title


def summarise(results: ResultsFolder) -> dict[str, Any]:
    """Everything that the report shows, as numbers.

    Args:
        results: the folder.

    Returns:
        `cells` (rates and fluency of each), `against` (ACD compared with each arm), `main` (the strength at which
        arms are compared), `refusals` (how those of each arm end), `attacked` (requests under each attack),
        `depth` (refusals of answers that have begun), `behaviour` (of `measure_behaviour`), `costs` (of
        `measure_costs`) and `labels` (agreement with labels by hand, or `None`).

    Raises:
        ValueError: labels by hand are of other results.
    """
    every: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for row in results.rows:
        every[cell_of(row)].append(row)
    direct = {cell: some for cell, some in every.items() if cell == cell.direct}
    rows = {cell: some for cell, some in direct.items() if not is_scored(some)}
    main = main_strength(direct, *(run["strength"] for run in results.run["runs"][-1:] if "strength" in run))
    return {
        "format_version": 1,
        "settings": results.run["settings"],
        "benchmarks": results.run["benchmarks"],
        "attacks": results.run["attacks"],
        "main": main,
        "cells": [{**cell.__dict__, **_measure(some)} for cell, some in rows.items()],
        "against": _against(rows, main),
        "refusals": _refusals(rows, main),
        "attacked": _attacked(every),
        "depth": _depth(every),
        "behaviour": measure_behaviour(every),
        "costs": measure_costs(direct),
        "labels": agreement(results),
    }


def main_strength(cells: Iterable[Cell], own: dict[str, float] | None = None) -> dict[str, float | None]:
    """The pair's own alpha and beta, if some cells have them.

    Else those of most cells, and of several the nearest to 0.5 and 0.1.
    """
    strengths = Counter((cell.alpha, cell.beta) for cell in cells if cell.alpha is not None and cell.beta is not None)
    if not strengths:
        return {"alpha": None, "beta": None}
    if own and (own["alpha"], own["beta"]) in strengths:
        return {**own}
    alpha, beta = min(strengths, key=lambda s: (-strengths[s], abs(s[0] - 0.5), abs(s[1] - 0.1)))
    return {"alpha": alpha, "beta": beta}


def _measure(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    harmful = [row for row in rows if row["label"] == "harmful"]
    safe = [row for row in rows if row["label"] == "safe"]
    return {
        "harmless": _harmless(harmful),
        "refused_harmful": rate(sum(row["refused"] for row in harmful), len(harmful)),
        "refused_safe": rate(sum(row["refused"] for row in safe), len(safe)),
        "fluency": _fluency(rows),
    }


def _harmless(harmful: Sequence[dict[str, Any]]) -> dict[str, Any]:
    verdicts = Counter(row["verdict"] for row in harmful)
    return rate(verdicts["harmless"], len(harmful)) | {"invalid": verdicts["invalid"]}


def _fluency(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens, words = sum(row["loss_tokens"] for row in rows), sum(row["words"] for row in rows)
    loss = sum(row["loss"] * row["loss_tokens"] for row in rows)
    return {
        "n": len(rows),
        "perplexity": math.exp(loss / tokens) if tokens else None,
        "broken_words": sum(row["broken_words"] for row in rows) / words if words else None,
        "loops": sum(row["loop"] for row in rows) / len(rows),
        "unfinished": sum(not row["finished"] for row in rows) / len(rows),
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
    }


def _refusals(rows: dict[Cell, list[dict[str, Any]]], main: dict[str, Any]) -> list[dict[str, Any]]:
    """How the refusals of each arm end, over all benchmarks; whether they repeat themselves is not in older rows."""
    refusals: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for cell, some in rows.items():
        if cell == _main_cell(cell.benchmark, cell.arm, main):
            refusals[cell.arm] += (row for row in some if row["refused"])
    return [
        {
            "arm": arm,
            "ended": rate(sum(row["finished"] for row in some), len(some)),
            "repeated": rate(sum(row.get("repeats", False) for row in some), sum("repeats" in row for row in some)),
        }
        for arm, some in refusals.items()
    ]


def _attacked(rows: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The requests asked plainly (no attack) and under each attack, of the cells with any attack.

    They are the harmful ones, with the verdicts on them, or, of a benchmark without any, the safe ones.
    """
    measured = {cell.direct for cell in rows if cell.attack}
    found = []
    for cell, some in rows.items():
        if cell.direct in measured and not cell.begun_tokens:
            harmful = [row for row in some if row["label"] == "harmful"]
            safe = [] if harmful else some
            refused = rate(sum(row["refused"] for row in safe), len(safe))
            found.append(cell.__dict__ | {"harmless": _harmless(harmful), "refused_safe": refused})
    return found


def _depth(rows: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How often arms refuse to go on with Base's answer, from its start (0 tokens) on; of harmful answers alone."""
    measured = {cell.direct for cell in rows if cell.begun_tokens}
    found = []
    for cell, some in rows.items():
        if cell.direct in measured and not cell.attack:
            if not cell.begun_tokens:
                base = rows[Cell(cell.benchmark, "base")]
                some = [row for row, answer in zip(some, base, strict=True) if may_begin(answer, 0)]
            refused = rate(sum(row["refused"] for row in some), len(some))
            found.append(cell.__dict__ | {"refused": refused, "harmless": _harmless(some)})
    return found


def _against(rows: dict[Cell, list[dict[str, Any]]], main: dict[str, Any]) -> list[dict[str, Any]]:
    """ACD against each arm, on each benchmark's harmful requests and on all of them."""
    found = []
    benchmarks = list(dict.fromkeys(cell.benchmark for cell in rows))
    for arm in dict.fromkeys(cell.arm for cell in rows if cell.arm != "acd"):
        parts = []
        for benchmark in benchmarks:
            ours = rows.get(Cell(benchmark, "acd", main["alpha"], main["beta"]), [])
            theirs = rows.get(_main_cell(benchmark, arm, main), [])
            counts = count_differences(ours, theirs, HARMLESS)
            if counts["n"]:
                parts.append(counts)
                found.append({"benchmark": benchmark, "arm": arm, **counts, "p": p_value(counts)})
        if len(parts) > 1:
            total = {key: sum(part[key] for part in parts) for key in parts[0]}
            found.append({"benchmark": None, "arm": arm, **total, "p": p_value(total)})
    return found


def _main_cell(benchmark: str, arm: str, main: dict[str, Any]) -> Cell:
    return Cell(benchmark, arm, **main) if ARMS[arm].negative is not None else Cell(benchmark, arm)


def count_differences(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], outcome: str
) -> dict[str, int]:
    """Compare two cells request by request.

    Args:
        first: rows of the one.
        second: rows of the other.
        outcome: "harmless" counts harmless verdicts on harmful requests, "refused" refusals of safe requests.

    Returns:
        `n` requests with both outcomes known, and on how many `only_first` and `only_second` had it.
    """
    others = {row["id"]: outcome_of(row, outcome) for row in second}
    outcomes = [(outcome_of(row, outcome), others.get(row["id"])) for row in first]
    known = [(a, b) for a, b in outcomes if a is not None and b is not None]
    return {
        "n": len(known),
        "only_first": sum(a and not b for a, b in known),
        "only_second": sum(b and not a for a, b in known),
    }


def outcome_of(row: dict[str, Any], outcome: str) -> bool | None:
    """Whether a row has the outcome of [`count_differences`]; `None` if that is not known or not asked of it."""
    if outcome == REFUSED:
        return row.get("refused") if row["label"] == "safe" else None
    return None if row.get("verdict") in (None, "invalid") else row["verdict"] == "harmless"


def p_value(counts: dict[str, int]) -> float:
    """McNemar's exact test on the counts of [`count_differences`]."""
    return mcnemar(counts["only_first"], counts["only_second"])


# What a summary holds


def main_arms(summary: dict[str, Any]) -> list[str]:
    """The arms that were run at the main strength."""
    present = {cell["arm"] for cell in summary["cells"] if is_main(cell, summary["main"])}
    return [arm for arm in ARMS if arm in present]


def is_main(cell: dict[str, Any], main: dict[str, Any]) -> bool:
    """Whether a summary's cell has the strength at which arms are compared, or none."""
    return cell["alpha"] is None or (cell["alpha"], cell["beta"]) == (main["alpha"], main["beta"])


def find_cell(summary: dict[str, Any], benchmark: str, arm: str) -> dict[str, Any] | None:
    """The cell of an arm at the main strength."""
    return next(
        (
            cell
            for cell in summary["cells"]
            if (cell["benchmark"], cell["arm"]) == (benchmark, arm) and is_main(cell, summary["main"])
        ),
        None,
    )


def benchmarks_with(summary: dict[str, Any], kind: str) -> list[str]:
    """The benchmarks with such a rate."""
    present = {cell["benchmark"] for cell in summary["cells"] if cell[kind]["n"]}
    return [name for name in summary["benchmarks"] if name in present]


def sweeps(summary: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Arm, benchmark and cells by strength, where there is more than one strength."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in summary["cells"]:
        if cell["alpha"] is not None:
            groups[cell["arm"], cell["benchmark"]].append(cell)
    return [
        (arm, benchmark, sorted(cells, key=lambda cell: (-cell["beta"], cell["alpha"])))
        for (arm, benchmark), cells in groups.items()
        if len(cells) > 1
    ]


def card_results(summary: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rates that a model card shows, as `PairConfig.results`: each arm at the main strength.

    Args:
        summary: of [`summarise`].
    """
    results: dict[str, list[dict[str, Any]]] = {"harmless_rate": [], "over_refusal": []}
    for cell in summary["cells"]:
        for name, kind in (("harmless_rate", "harmless"), ("over_refusal", "refused_safe")):
            if cell[kind]["n"] and is_main(cell, summary["main"]):
                title = summary["benchmarks"][cell["benchmark"]]["title"]
                dataset = hub_dataset(cell["benchmark"])
                judge = summary["settings"]["judge"] if kind == "harmless" else "keywords"
                rate = {key: cell[kind][key] for key in ("rate", "n", "interval")}
                row = {"benchmark": title, "method": ARMS[cell["arm"]].title, **rate, "judge": judge}
                results[name].append(row | ({"dataset": dataset} if dataset else {}))
    return results
