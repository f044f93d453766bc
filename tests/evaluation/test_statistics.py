"""The statistics, against values worked out elsewhere."""

import math

import pytest

from acd_logits.evaluation.statistics import cohen_kappa, kappa, mcnemar, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # the first two rows: Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (50, 50, 0.9287, 1.0),
    ],
)
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (1, 8, 0.0390625), (10, 2, 0.03857421875), (0, 40, 2**-39)],
)
def test_mcnemar_is_a_sign_test(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == p


def test_mcnemar_of_many():
    assert 0 < mcnemar(2000, 1800) < 0.01


def test_kappa():
    # Cohen's kappa of the table [[20, 5], [10, 15]]: agreement 0.7, by chance 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1
    assert math.isnan(cohen_kappa(["a", "a"], ["a", "a"]))
    assert math.isnan(cohen_kappa([], []))


def test_kappa_with_its_interval():
    pairs = [("yes", "yes")] * 80 + [("yes", "no")] * 20 + [("no", "yes")] * 40 + [("no", "no")] * 60
    found = kappa(pairs)
    assert (found["n"], found["kappa"]) == (200, pytest.approx(0.4))
    # Asymptotic standard error of this table: 0.0635 (Fleiss, Cohen and Everitt 1969)
    assert found["interval"] == pytest.approx([0.4 - 1.96 * 0.0635, 0.4 + 1.96 * 0.0635], abs=0.02)
    assert kappa(pairs) == found
    assert kappa([]) == {"n": 0, "kappa": None, "interval": None}
    assert kappa([("yes", "yes")]) == {"n": 1, "kappa": None, "interval": None}
