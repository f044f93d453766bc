"""The report of a comparison: summary.json, report.md and plots, from the results folder alone.

`summary.py` has the numbers. Nothing in the report quotes a response.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..files import write_text
from .arms import ARMS
from .behaviour import TITLES, behaviour_section
from .costs import cost_sections
from .summary import NO_ATTACK, benchmarks_with, find_cell, is_main, main_arms, summarise, sweeps
from .tables import markdown_table, rate_with_n, shown_kappa, shown_rate, shown_test

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .results import ResultsFolder

SUMMARY_NAME, REPORT_NAME = "summary.json", "report.md"
ABLATION = ("acd", "null-ap", "safe-ap", "sp-null", "sp-opposite")  # table 5 of the paper
_FLUENCY = ("Perplexity", "Broken words", "Loops", "Unfinished", "Tokens")


def write_report(results: ResultsFolder) -> Path:
    """Write summary.json, report.md and the plots into the folder.

    Args:
        results: the folder.

    Returns:
        The report's path.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
        ValueError: it holds no finished cell.
    """
    from .plots import write_plots

    if not results.rows:
        raise ValueError(f"{results.path} holds no finished cell yet")
    summary = summarise(results)
    write_text(results.path / SUMMARY_NAME, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    plots = write_plots(summary, results.path)
    write_text(results.path / REPORT_NAME, render_report(summary, results.run["runs"], plots))
    return results.path / REPORT_NAME


def render_report(summary: dict[str, Any], runs: Sequence[dict[str, Any]], plots: Sequence[tuple[str, str]]) -> str:
    """The report as Markdown.

    Args:
        summary: of [`summarise`].
        runs: the runs that filled the folder.
        plots: file name and caption of each plot.
    """
    sections = [
        _heading(summary, runs),
        _harmless_section(summary),
        behaviour_section(summary, [e for e in summary["behaviour"] if is_main(e, summary["main"])], NO_ATTACK),
        _against_section(summary),
        _attack_section(summary),
        _depth_section(summary),
        _refusal_section(summary),
        *cost_sections(summary["benchmarks"], [c for c in summary["costs"] if is_main(c, summary["main"])]),
        _ablation_section(summary),
        _strength_section(summary),
        _fluency_section(summary),
        _endings_section(summary),
        _labels_section(summary),
        "\n\n".join(f"![{caption}]({name})" for name, caption in plots),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _heading(summary: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    settings, main = summary["settings"], summary["main"]
    pair = settings["pair"] or "none"
    if settings["transfer"]:
        pair += " (**trained on another model**)"
    strength = "" if main["alpha"] is None else f"; contrasts at alpha {main['alpha']:g}, beta {main['beta']:g}"
    facts = {
        "Model": settings["model"],
        "Prompt pair": pair,
        "Judge": settings["judge"] + _JUDGES.get(settings["judge"].partition(":")[0], ""),
        "Decoding": f"greedy, at most {settings['max_new_tokens']} new tokens{strength}{_speed(settings)}",
    }
    if runs:
        facts["Last run"] = f"{runs[-1]['date']} on {runs[-1]['device']}"
        versions = [", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs]
        facts["Versions"] = "; then ".join(dict.fromkeys(versions))
    commands = "\n".join(dict.fromkeys(run["command"] for run in runs))
    lines = ["# Comparison", "", *markdown_table(["", ""], [[name, str(value)] for name, value in facts.items()])]
    return "\n".join([*lines, "", "```bash", commands, "```"])


def _speed(settings: dict[str, Any]) -> str:
    horizon, shared = settings.get("horizon"), settings.get("share_instruction_kv")
    text = "" if horizon is None else f"; contrast for {horizon} tokens"
    return text if shared is None else f"{text}; instruction {'shared' if shared else 'not shared'}"


_JUDGES = {
    "keywords": ": an answer is harmless if it refuses and does not take that back",
    "harm": ": an answer that does not refuse is harmful if it goes along with the request, by the model's own states",
}


def _harmless_section(summary: dict[str, Any]) -> str:
    columns = benchmarks_with(summary, "harmless")
    if not columns:
        return ""
    rows = []
    for arm in main_arms(summary):
        cells = [find_cell(summary, benchmark, arm) for benchmark in columns]
        rates = [cell["harmless"]["rate"] for cell in cells if cell]
        mean = f"{sum(rates) / len(rates):.3f}" if len(rates) == len(columns) else ""
        rows.append([ARMS[arm].title, *(shown_rate(cell, "harmless") for cell in cells), mean])
    return "\n".join(
        [
            "## Harmless rate",
            "",
            "Share of harmful requests with a harmless response; higher is better. 95 % intervals in brackets. A",
            "verdict that could not be read is invalid and counts as not harmless.",
            "",
            *markdown_table(["Arm", *(_column(summary, name, "harmless") for name in columns), "Mean"], rows),
        ]
    )


def _against_section(summary: dict[str, Any]) -> str:
    found = {(entry["benchmark"], entry["arm"]): entry for entry in summary["against"]}
    if not found:
        return ""
    columns = list(dict.fromkeys(benchmark for benchmark, _ in found))
    columns.sort(key=lambda benchmark: benchmark is None)
    titles = [summary["benchmarks"][name]["title"] if name else "All" for name in columns]
    rows = [
        [ARMS[arm].title, *(shown_test(found.get((benchmark, arm))) for benchmark in columns)]
        for arm in dict.fromkeys(arm for _, arm in found)
    ]
    return "\n".join(
        [
            "### ACD against each arm",
            "",
            "McNemar's exact test on the same harmful requests: p, in brackets on how many requests only ACD : only",
            "the other arm was harmless, and n. p is not corrected for the number of comparisons.",
            "",
            *markdown_table(["Arm", *titles], rows),
        ]
    )


def _attack_section(summary: dict[str, Any]) -> str:
    """A table of the harmful requests, and one of the safe ones if they were asked."""
    texts = {
        "harmless": (
            "Share of harmful requests with a harmless response, asked plainly and under each attack; higher is",
            "better. 95 % intervals in brackets.",
        ),
        "refused_safe": (
            "Share of safe requests that are refused, by wording, asked plainly and in the same disguises; lower is",
            "better. 95 % intervals in brackets. In disguise, a refusal behind the first words counts, too.",
        ),
    }
    lines = []
    for what, reading in texts.items():
        if table := _attack_table(summary, what):
            lines += ["", *reading, "", *table]
    return "\n".join(["## Under attack", *lines]) if lines else ""


def _attack_table(summary: dict[str, Any], what: str) -> list[str]:
    """What was measured of the requests that have it, by attack and benchmark; empty if there are none."""
    cells = (entry for entry in summary["attacked"] if is_main(entry, summary["main"]) and entry[what]["n"])
    found = {(entry["attack"], entry["benchmark"], entry["arm"]): entry for entry in cells}
    arms = [arm for arm in main_arms(summary) if any(arm == other for _, _, other in found)]
    rows = []
    for attack in [None, *summary["attacks"]]:
        for benchmark in summary["benchmarks"]:
            entries = [found.get((attack, benchmark, arm)) for arm in arms]
            if any(entries):
                title = summary["attacks"][attack]["title"] if attack else NO_ATTACK
                n = max(entry[what]["n"] for entry in entries if entry)
                rates = (shown_rate(entry, what) for entry in entries)
                rows.append([title, summary["benchmarks"][benchmark]["title"], str(n), *rates])
    return markdown_table(["Attack", "Benchmark", "n", *(ARMS[arm].title for arm in arms)], rows) if rows else []


def _depth_section(summary: dict[str, Any]) -> str:
    found = {(e["benchmark"], e["arm"], e["begun_tokens"]): e for e in summary["depth"] if is_main(e, summary["main"])}
    if not found:
        return ""
    depths = sorted({tokens for _, _, tokens in found})
    rows = [
        [
            ARMS[arm].title,
            summary["benchmarks"][benchmark]["title"],
            *(rate_with_n(found.get((benchmark, arm, n)), "refused") for n in depths),
        ]
        for benchmark in summary["benchmarks"]
        for arm in main_arms(summary)
        if any((benchmark, arm, n) in found for n in depths)
    ]
    return "\n".join(
        [
            "## Depth",
            "",
            "Share of harmful requests that were refused, by wording, when the answer has begun with the first tokens",
            "of Base's own; higher is better. n: those to which Base's answer is harmful, and no shorter than that.",
            "",
            *markdown_table(["Arm", "Benchmark", *(f"{n} tokens" for n in depths)], rows),
        ]
    )


def _refusal_section(summary: dict[str, Any]) -> str:
    columns = benchmarks_with(summary, "refused_safe")
    if not columns:
        return ""
    # A benchmark of both kinds shows its other half beside: an arm that refuses everything is not a good one
    kinds = [
        (name, kind)
        for name in columns
        for kind in ("refused_safe", "refused_harmful")
        if kind == "refused_safe" or name in benchmarks_with(summary, "refused_harmful")
    ]
    rows = [
        [ARMS[arm].title, *(shown_rate(find_cell(summary, name, arm), kind) for name, kind in kinds)]
        for arm in main_arms(summary)
    ]
    return "\n".join(
        [
            "## Over-refusal",
            "",
            "Share of requests that were refused, by wording. For safe requests, lower is better; where a benchmark",
            "has harmful ones too, their rate stands beside it.",
            "",
            *markdown_table(["Arm", *(_column(summary, name, kind) for name, kind in kinds)], rows),
        ]
    )


def _ablation_section(summary: dict[str, Any]) -> str:
    arms = [arm for arm in ABLATION if arm in main_arms(summary)]
    columns = benchmarks_with(summary, "harmless")
    if len(arms) < 2 or not columns:
        return ""
    rows = [
        [_streams(arm), *(shown_rate(find_cell(summary, benchmark, arm), "harmless") for benchmark in columns)]
        for arm in arms
    ]
    return "\n".join(
        [
            "## Ablation",
            "",
            "Harmless rate by positive and negative prompt.",
            "",
            *markdown_table(["Prompts", *(_column(summary, name, "harmless") for name in columns)], rows),
        ]
    )


def _streams(arm: str) -> str:
    names = {"sp": "SP", "ap": "AP"}
    return "-".join(names.get(name, name) for name in (ARMS[arm].positive, str(ARMS[arm].negative)))


def _strength_section(summary: dict[str, Any]) -> str:
    rows = []
    for arm, benchmark, cells in sweeps(summary):
        for cell in cells:
            rows.append(
                [
                    ARMS[arm].title,
                    summary["benchmarks"][benchmark]["title"],
                    f"{cell['alpha']:g}",
                    f"{cell['beta']:g}",
                    rate_with_n(cell, "harmless"),
                    rate_with_n(cell, "refused_safe"),
                    *_fluency_columns(cell["fluency"]),
                ]
            )
    if not rows:
        return ""
    heading = ["Arm", "Benchmark", "alpha", "beta", "Harmless rate", "Over-refusal", *_FLUENCY]
    return "\n".join(["## Strength of the contrast", "", *markdown_table(heading, rows)])


def _fluency_columns(fluency: dict[str, Any]) -> list[str]:
    perplexity, broken = fluency["perplexity"], fluency["broken_words"]
    return [
        "" if perplexity is None else f"{perplexity:.1f}",
        "" if broken is None else f"{broken:.2%}",
        f"{fluency['loops']:.1%}",
        f"{fluency['unfinished']:.1%}",
        f"{fluency['tokens']:.0f}",
    ]


def _fluency_section(summary: dict[str, Any]) -> str:
    rows = [
        [
            ARMS[arm].title,
            summary["benchmarks"][benchmark]["title"],
            str(cell["fluency"]["n"]),
            *_fluency_columns(cell["fluency"]),
        ]
        for benchmark in summary["benchmarks"]
        for arm in main_arms(summary)
        if (cell := find_cell(summary, benchmark, arm))
    ]
    if not rows:
        return ""
    return "\n".join(
        [
            "## Fluency",
            "",
            "Perplexity of the responses under the plain model; share of words that were run together; share of",
            "responses that repeat themselves; share that reached the length limit; mean length.",
            "",
            *markdown_table(["Arm", "Benchmark", "n", *_FLUENCY], rows),
        ]
    )


def _endings_section(summary: dict[str, Any]) -> str:
    found = {entry["arm"]: entry for entry in summary["refusals"] if entry["ended"]["n"]}
    rows = [
        [
            ARMS[arm].title,
            str(found[arm]["ended"]["n"]),
            *(shown_rate(found[arm], kind) for kind in ("ended", "repeated")),
        ]
        for arm in main_arms(summary)
        if arm in found
    ]
    if not rows:
        return ""
    return "\n".join(
        [
            "## How refusals end",
            "",
            "Of the refusals, by wording, of all requests: share that ended within the length limit, and share that",
            "loop or say a sentence twice.",
            "",
            *markdown_table(["Arm", "Refusals", "Ended", "Repeated"], rows),
        ]
    )


def _labels_section(summary: dict[str, Any]) -> str:
    labels = summary["labels"]
    if not labels:
        return ""
    titles = {"harmless": "Harmless, by the judge", "refusal": "Refusal, by keywords"}
    rows = [
        [title, *_agreed(counts), *(str(counts[key]) for key in ("both", "only_verdict", "only_label", "neither"))]
        for name, title in titles.items()
        if (counts := labels[name])["n"]
    ]
    if labels["behaviour"]["n"]:
        rows.append(["Refuses, goes along or neither", *_agreed(labels["behaviour"]), "", "", "", ""])
    heading = ["", "n", "Cohen's kappa", "Both yes", "Only the verdict", "Only the label", "Both no"]
    return "\n".join(
        [
            "## Agreement with labels by hand",
            "",
            f"{labels['drawn']} responses, drawn at random over all arms and shown without their arm. n: those that",
            "are labelled. Whether a response is harmless, and which of the three it does, is compared on harmful",
            "requests only, and whether it refuses on plain requests only. Kappas with 95 % bootstrap intervals.",
            "",
            *markdown_table(heading, rows),
            *_confusion_table(labels["behaviour"]),
        ]
    )


def _agreed(counts: dict[str, Any]) -> list[str]:
    return [str(counts["n"]), shown_kappa(counts)]


def _confusion_table(behaviour: dict[str, Any]) -> list[str]:
    if not behaviour["n"]:
        return []
    rows = [[TITLES[label], *map(str, counts.values())] for label, counts in behaviour["counts"].items()]
    return ["", *markdown_table(["Label, by verdict", *TITLES.values()], rows)]


def _column(summary: dict[str, Any], benchmark: str, kind: str) -> str:
    n = max(cell[kind]["n"] for cell in summary["cells"] if cell["benchmark"] == benchmark)
    half = {"refused_safe": ", safe", "refused_harmful": ", harmful"}.get(kind, "")
    return f"{summary['benchmarks'][benchmark]['title']}{half} (n = {n})"
