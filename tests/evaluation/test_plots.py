"""The plots: what a reader must be able to make out."""

from acd_logits.evaluation.arms import ARMS
from acd_logits.evaluation.plots import _draw_frontier


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
