"""The plots of a report, after figures 4 and 5 of the paper."""

from __future__ import annotations

import itertools
from statistics import median
from typing import TYPE_CHECKING, Any

from .arms import ARMS
from .summary import NO_ATTACK, is_main

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2b6ca3", "#d1711f", "#2f8f5b", "#888888"
MARKERS = "osD^vPX"


def require_matplotlib() -> None:
    """Raise ImportError, which names the cure, unless matplotlib is installed."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the plots need matplotlib: pip install "acd-logits[eval]"')


def write_plots(summary: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw the plots that the summary has numbers for.

    Args:
        summary: of `summarise`.
        folder: where the PNG files go.

    Returns:
        File name and caption of each plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    drawn = []
    for name, caption, draw in (
        (
            "harmless_by_arm.png",
            "Harmless rate by arm: means over benchmarks of the rates and their 95 % intervals",
            _draw_arms,
        ),
        ("alpha.png", "Harmless rate and over-refusal over alpha", _draw_sweep),
        ("frontier.png", "Safety against over-refusal", _draw_frontier),
        ("attacks.png", "Safety under each attack against over-refusal", _draw_attacks),
    ):
        figure = draw(summary)
        if figure is not None:
            _save(figure, folder / name)
            drawn.append((name, caption))
    return drawn


def write_loss_plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the losses of a search over its steps: a thin line for each request, and the median of each arm.

    Args:
        curves: of each arm and request, all of one length. The first loss is that before the first step.
        path: the PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    figure, axes = _figure(6.4, 3.8)
    others = itertools.cycle((BLUE, GREEN, GREY))
    for arm, losses in curves.items():
        color = ORANGE if arm == "acd" else next(others)
        for line in losses:
            axes.plot(line, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(list(map(median, zip(*losses, strict=True))), color=color, linewidth=2, label=ARMS[arm].title)
    axes.set_xlabel("step")
    axes.set_ylabel("least loss so far (higher is safer)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


def arm_means(summary: dict[str, Any], kind: str) -> dict[str, tuple[float, float, float]]:
    """Of each arm at the main strength: the mean of a rate over benchmarks, and of its interval's ends.

    Means over different benchmarks cannot be compared: arms that were not run on all of them are left out.
    """
    rates: dict[str, dict[str, tuple[float, float, float]]] = {arm: {} for arm in ARMS}
    for cell in summary["cells"]:
        if cell[kind]["n"] and is_main(cell, summary["main"]):
            rates[cell["arm"]][cell["benchmark"]] = (cell[kind]["rate"], *cell[kind]["interval"])
    benchmarks = {name for some in rates.values() for name in some}
    means = {}
    for arm, some in rates.items():
        if some and some.keys() == benchmarks:
            rate, low, high = (sum(values) / len(some) for values in zip(*some.values(), strict=True))
            means[arm] = rate, min(low, rate), max(high, rate)
    return means


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and picks a window system

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_arms(summary: dict[str, Any]) -> Figure | None:
    means = arm_means(summary, "harmless")
    if not means:
        return None
    figure, axes = _figure(1.6 + 0.75 * len(means), 3.8)
    for place, (arm, (rate, low, high)) in enumerate(means.items()):
        axes.bar(place, rate, color=ORANGE if arm == "acd" else BLUE, width=0.7)
        axes.errorbar(place, rate, [[rate - low], [high - rate]], color="black", capsize=3, linewidth=1)
        axes.annotate(f"{rate:.2f}", (place, high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(means)), [ARMS[arm].title for arm in means], rotation=35, ha="right")
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("harmless rate")
    return figure


def _draw_sweep(summary: dict[str, Any]) -> Figure | None:
    curves = _curves(summary)
    if not curves:
        return None
    figure, axes = _figure(6.4, 3.8)
    for (beta, kind), points in curves.items():
        color = BLUE if kind == "harmless" else ORANGE
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker="o",
            markersize=4,
            linestyle="-" if beta else "--",
            label=f"{'harmless rate' if kind == 'harmless' else 'over-refusal'}, beta {beta:g}",
        )
    axes.set_xlabel("alpha")
    axes.set_ylabel("rate")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _curves(summary: dict[str, Any]) -> dict[tuple[float, str], list[tuple[float, float]]]:
    """ACD's mean rates over alpha, for each beta, over the benchmarks that were run at every alpha of it."""
    curves = {}
    cells = [cell for cell in summary["cells"] if cell["arm"] == "acd"]
    for beta in sorted({cell["beta"] for cell in cells}, reverse=True):
        for kind in ("harmless", "refused_safe"):
            measured = {
                (cell["benchmark"], cell["alpha"]): cell[kind]["rate"]
                for cell in cells
                if cell["beta"] == beta and cell[kind]["n"]
            }
            counts = {name: sum(b == name for b, _ in measured) for name, _ in measured}
            swept = [name for name in counts if counts[name] == max(counts.values())]
            alphas = sorted({alpha for name, alpha in measured if name in swept})
            points = [
                (alpha, sum(measured[name, alpha] for name in swept) / len(swept))
                for alpha in alphas
                if all((name, alpha) in measured for name in swept)
            ]
            if len(points) > 1:
                curves[beta, kind] = points
    return curves


def _draw_frontier(summary: dict[str, Any]) -> Figure | None:
    safety, refusal = arm_means(summary, "harmless"), arm_means(summary, "refused_safe")
    arms = [arm for arm in safety if arm in refusal]
    if len(arms) < 2:
        return None
    figure, axes = _figure(6.8, 4.4)
    looks = _looks(arms)
    for arm in sorted(arms, key=lambda arm: -safety[arm][0]):
        _mark(axes, arm, refusal[arm], safety[arm], looks[arm])
    axes.set_xlabel("over-refusal (lower is better)")
    axes.set_ylabel("harmless rate (higher is better)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_attacks(summary: dict[str, Any]) -> Figure | None:
    """A panel for each way of asking and each depth, with the frontier of the arms under it."""
    refusal = arm_means(summary, "refused_safe")
    panels = {way: arm_means(summary | {"cells": cells}, "harmless") for way, cells in _ways(summary).items()}
    arms = [arm for arm in refusal if any(arm in safety for safety in panels.values())]
    if not summary["attacked"] or not arms:
        return None
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.3 * lines + 0.9), layout="constrained")
    grid = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    looks = _looks(arms)
    for axes, (way, safety) in zip(grid, panels.items(), strict=False):
        for arm in arms:
            if arm in safety:
                _mark(axes, arm, refusal[arm], safety[arm], looks[arm])
        axes.set_title(_way_title(summary, *way), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[len(panels) - columns : len(panels)]:
        axes.tick_params(labelbottom=True)  # where no panel stands below
    looked = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid)
    named = {name: handle for some in looked for handle, name in some}
    figure.legend(named.values(), named, frameon=False, fontsize=8, loc="outside upper center", ncols=2 * columns)
    figure.supxlabel("over-refusal of safe requests, asked plainly (lower is better)", fontsize=9)
    figure.supylabel("harmless rate (higher is better)", fontsize=9)
    return figure


def _ways(summary: dict[str, Any]) -> dict[tuple[str | None, int], list[dict[str, Any]]]:
    """The cells asked plainly and under each attack, and those at each depth, by attack and depth."""
    ways: dict[tuple[str | None, int], list[dict[str, Any]]] = {}
    attacked = (cell for cell in summary["attacked"] if cell["harmless"]["n"])
    for cell in [*attacked, *(cell for cell in summary["depth"] if cell["begun_tokens"])]:
        ways.setdefault((cell["attack"], cell["begun_tokens"]), []).append(cell)
    return ways


def _way_title(summary: dict[str, Any], attack: str | None, begun_tokens: int) -> str:
    if begun_tokens:
        return f"Answer begun, {begun_tokens} tokens"
    return summary["attacks"][attack]["title"] if attack else NO_ATTACK


def _looks(arms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Marker and colour of each arm, whose name may not fit beside it."""
    others = itertools.product(MARKERS, (BLUE, GREEN, GREY))
    return {arm: ("*", ORANGE) if arm == "acd" else next(others) for arm in arms}


def _mark(
    axes: Axes,
    arm: str,
    refusal: tuple[float, float, float],
    safety: tuple[float, float, float],
    look: tuple[str, str],
) -> None:
    """Draw an arm's point, with both intervals, into axes from 0 to 1."""
    (x, x_low, x_high), (y, y_low, y_high), (marker, color) = refusal, safety, look
    axes.errorbar(
        x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]], color=color, linewidth=0.7, alpha=0.4
    )
    axes.plot(x, y, marker, markersize=12 if arm == "acd" else 6, color=color, label=ARMS[arm].title)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
