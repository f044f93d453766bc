"""The plots: what a reader must be able to make out."""

import pytest

from acd_logits.evaluation.arms import ARMS
from acd_logits.evaluation.plots import _draw_frontier, arm_means
from acd_logits.evaluation.summary import summarise
from tiny_results import build_two_benchmarks


def test_the_frontier_tells_all_arms_apart():
    def rate(value):
        return {"rate": value, "n": 10, "interval": [value / 2, value]}

    cells = [
        {
            "benchmark": "both",
            "arm": arm,
            "alpha": 0.5 if ARMS[arm].negative is not None else None,
            "beta": 0.1 if ARMS[arm].negative is not None else None,
            "harmless": rate(0.5),
            "refused_safe": rate(0.1),
        }
        for arm in ARMS
    ]
    figure = _draw_frontier({"cells": cells, "main": {"alpha": 0.5, "beta": 0.1}})
    (axes,) = figure.axes
    handles, names = axes.get_legend_handles_labels()
    assert sorted(names) == sorted(arm.title for arm in ARMS.values())
    assert len({(handle.get_marker(), handle.get_color()) for handle in handles}) == len(ARMS)


def test_a_plot_compares_arms_on_the_same_benchmarks(tmp_path):
    results = build_two_benchmarks(tmp_path / "results")
    means = arm_means(summarise(results), "harmless")
    assert list(means) == ["base", "acd"], "safe-AP was run on one benchmark only"
    assert means["base"] == pytest.approx((0.225, 0.0512, 0.6046), abs=1e-4)
