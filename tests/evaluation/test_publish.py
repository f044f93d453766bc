"""A published copy: the same report and the same verdicts, without a text."""

import json

import pytest

from acd_logits.evaluation.changes import render_comparison
from acd_logits.evaluation.labels import agreement, draw
from acd_logits.evaluation.publish import publish
from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import Cell, ResultsFolder
from test_labels import fill_in
from tiny_results import BOTH, HARMFUL, SETTINGS, build_results, build_rows

BASE, ACD = Cell("xstest", "base"), Cell("xstest", "acd", 0.5, 0.1)


@pytest.fixture
def results(tmp_path):
    cells = {BASE: build_rows(BOTH, 1, refused_safe=0), ACD: build_rows(BOTH, 2, refused_safe=3, invalid=1)}
    return build_results(tmp_path / "results", cells)


def test_the_copy_has_the_report_and_no_text(results, tmp_path):
    fill_in(draw(results, 20, seed=0), results)
    copy = publish(results, tmp_path / "docs" / "run")
    assert write_report(copy).read_text() == write_report(results).read_text()
    assert agreement(copy)["refusal"]["n"] == 20
    text = "".join(path.read_text() for path in copy.path.iterdir() if path.suffix != ".png")
    assert "SECRET" not in text
    assert not any(request.text in text for request in BOTH.requests)


def test_a_later_run_is_compared_with_it(results, tmp_path):
    rows = build_rows(BOTH, 1, refused_safe=0)
    newer = build_results(tmp_path / "newer", {ACD: rows})
    shown = render_comparison(newer, publish(results, tmp_path / "copy"))
    assert shown == render_comparison(newer, results)
    assert "no longer refused: safe 0" in shown


def test_a_run_goes_on_from_it(results, tmp_path):
    publish(results, tmp_path / "copy")
    again = ResultsFolder(tmp_path / "copy", SETTINGS)
    again.register([HARMFUL, BOTH])
    assert again.is_finished(ACD)
    again.add(Cell("advbench", "base"), build_rows(HARMFUL, 5))
    assert "AdvBench" in write_report(again).read_text()
    with pytest.raises(ValueError, match="holds responses without their texts: draw from the folder of the run"):
        draw(again, 1, seed=0)


def test_a_newer_copy_replaces_the_older(results, tmp_path):
    labels = draw(results, 3, seed=0)
    assert (publish(results, tmp_path / "copy").path / "labels.jsonl").exists()
    labels.unlink()
    results.add(Cell("advbench", "base"), build_rows(HARMFUL, 5))
    copy = publish(results, tmp_path / "copy")
    assert len(copy.rows) == len(results.rows)
    assert agreement(copy) is None


def test_what_must_not_be_replaced(results, tmp_path):
    with pytest.raises(ValueError, match="is the folder of the run itself"):
        publish(results, tmp_path / "x" / ".." / "results")
    assert json.loads((results.path / "results.jsonl").read_text().splitlines()[0])["response"] == "SECRET"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds something other than results"):
        publish(results, tmp_path / "other")
