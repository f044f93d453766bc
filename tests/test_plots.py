"""The plots: what a reader must be able to make out."""

import itertools

import pytest

from acd_logits.evaluation.plots import _label_heights


def test_labels_of_points_at_one_place_do_not_cover_each_other():
    heights = _label_heights({"base": (0.1, 0.5), "oid": (0.1, 0.5), "sp": (0.12, 0.52), "acd": (0.9, 0.5)})
    assert heights["acd"] == 0.5  # nothing is near
    near = sorted(heights[arm] for arm in ("base", "oid", "sp"))
    assert near[-1] == pytest.approx(0.52)
    assert all(above - below >= 0.045 - 1e-6 for below, above in itertools.pairwise(near))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_labels_at_the_edge_stay_in_the_plot(rate):
    arms = ("base", "null", "opposite", "ap", "nid", "oid")
    heights = sorted(_label_heights(dict.fromkeys(arms, (0.0, rate))).values())
    assert heights[0] >= 0
    assert heights[-1] <= 1
    assert all(above - below >= 0.045 - 1e-6 for below, above in itertools.pairwise(heights))


def test_a_label_far_below_another_stays_at_its_point():
    assert _label_heights({"base": (0.1, 0.2), "acd": (0.1, 0.9)}) == {"base": 0.2, "acd": 0.9}
