"""The report: its tables and its plots, from a folder alone."""

import json

import pytest

from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import Cell, ResultsFolder
from tiny_results import HARMFUL, build_results, build_rows, build_two_benchmarks


@pytest.fixture
def results(tmp_path):
    return build_two_benchmarks(tmp_path / "results")


def test_the_report(results):
    path = write_report(results)
    text = path.read_text(encoding="utf-8")

    assert "SECRET" not in text
    assert "| Arm | AdvBench (n = 10) | XSTest (n = 4) | Mean |" in text
    assert "| Base | 0.20 [0.06, 0.51], 1 invalid | 0.25 [0.05, 0.70] | 0.225 |" in text
    assert "| ACD | 0.90 [0.60, 0.98] | 1.00 [0.51, 1.00] | 0.950 |" in text
    assert "| safe-AP |  | 0.50 [0.15, 0.85] |  |" in text
    assert "| Base | 0.03 (6 : 0), n = 9 | 0.25 (3 : 0), n = 4 | 0.0039 (9 : 0), n = 13 |" in text
    assert "| Arm | XSTest, safe (n = 6) | XSTest, harmful (n = 4) |" in text
    assert "| SP-AP | 0.90 [0.60, 0.98] | 1.00 [0.51, 1.00] |" in text
    assert "| ACD | AdvBench | 1 | 0.1 | 1.00 [0.72, 1.00] (n = 10) |  | 8.0 | 10.00% | 0.0% | 0.0% | 4 |" in text
    assert "another model" not in text
    pictures = ["harmless_by_arm.png", "alpha.png", "frontier.png"]
    for name in pictures:
        assert f"({name})" in text
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(
        [*pictures, "report.md", "results.jsonl", "run.json", "summary.json"]
    )


def test_a_report_needs_the_folder_alone(results):
    write_report(results)
    names = ["report.md", "summary.json"]
    before = [(results.path / name).read_bytes() for name in names]
    for name in names:
        (results.path / name).unlink()
    write_report(ResultsFolder(results.path))
    assert [(results.path / name).read_bytes() for name in names] == before
    assert json.loads(before[1])["main"] == {"alpha": 0.5, "beta": 0.1}


def test_a_transferred_pair_is_said_to_be_one(tmp_path):
    cells = {Cell("advbench", "base"): build_rows(HARMFUL, 2)}
    results = build_results(tmp_path / "results", cells, transfer=True)
    assert "org/pair (**trained on another model**)" in write_report(results).read_text()


def test_an_empty_folder_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="holds no finished cell yet"):
        write_report(build_results(tmp_path / "results", {}))
