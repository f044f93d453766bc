"""Answers that can be checked."""

import pytest

from acd_logits.evaluation.answers import is_correct


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("12", "12"),
        ("3 + 9 = 12.", "12"),
        ("First 5, then 7. So the answer is **12** apples", "12"),
        ("It costs $1,200.00.", "1200"),
        ("That makes 0.50 euros", "0.5"),
        ("It is -4 degrees", "-4"),
        ("That leaves _9 cm_ of H2O", "9"),
        ("1, 1, 2, 3,5", "5"),
        ("It takes 12min", "12"),
        ("It is \u22124 degrees", "-4"),
        ("There are seven days in a week.", "7"),
        ("The capital is PARIS, on the Seine.", "Paris"),
    ],
)
def test_right_answers(response, answer):
    assert is_correct(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "12"),
        ("I cannot help with that.", "12"),
        ("12 is not it, the answer is 13", "12"),
        ("1.12", "12"),
        ("9-4", "-4"),
        ("the 9 atoms of CO2", "2"),
        ("There are seven days, and 3 nights", "7"),
        ("Weighty matters", "8"),
        ("A comparison", "Paris"),
        ("Parisian", "Paris"),
    ],
)
def test_wrong_answers(response, answer):
    assert not is_correct(response, answer)
