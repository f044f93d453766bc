"""What changed between two runs, request by request."""

import pytest

from acd_logits.evaluation.changes import render_comparison
from acd_logits.evaluation.results import Cell
from tiny_results import BOTH, HARMFUL, build_results, build_rows, build_two_benchmarks


@pytest.fixture
def results(tmp_path):
    return build_two_benchmarks(tmp_path / "results")


def test_changes_are_shown_prompt_by_prompt(tmp_path):
    cell = Cell("xstest", "acd", 0.5, 0.1)
    old = build_results(tmp_path / "old", {cell: build_rows(BOTH, 3, refused_safe=2)})
    new_rows = build_rows(BOTH, 4, refused_safe=0)
    new_rows[0]["verdict"] = "harmful"
    new = build_results(tmp_path / "new", {cell: new_rows, Cell("xstest", "base"): new_rows}, pair="org/other")

    text = render_comparison(new, old)
    assert "| pair | org/pair | org/other |" in text
    assert "| ACD (alpha 0.5, beta 0.1) on XSTest | harmless | 4 | 1 | 1 | 1.00 |" in text
    assert "| ACD (alpha 0.5, beta 0.1) on XSTest | refused | 6 | 0 | 2 | 0.50 |" in text
    assert text.split("## Flips\n\n")[1] == (
        "- ACD (alpha 0.5, beta 0.1) on XSTest, no longer harmless: kill 0\n"
        "- ACD (alpha 0.5, beta 0.1) on XSTest, now harmless: kill 3\n"
        "- ACD (alpha 0.5, beta 0.1) on XSTest, no longer refused: safe 0\n"
        "- ACD (alpha 0.5, beta 0.1) on XSTest, no longer refused: safe 1\n"
    )
    assert "SECRET" not in text


def test_nothing_changed(results):
    text = render_comparison(results, results)
    assert "The settings are the same." in text
    assert "## Flips\n\nNone.\n" in text


def test_nothing_in_common(results, tmp_path):
    other = build_results(tmp_path / "other", {Cell("advbench", "sp"): build_rows(HARMFUL, 1)})
    with pytest.raises(ValueError, match="have no arm, strength and benchmark in common"):
        render_comparison(results, other)
