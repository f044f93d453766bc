"""The results folder: cells are whole or absent, and other settings are refused."""

import json

import pytest

from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.results import Cell, ResultsFolder, request_id

SETTINGS = {"model": "tiny", "judge": "keywords"}
TWO = Benchmark("two", "Two", (Request("a", "harmful"), Request("b\u2028b", "safe")))
ROWS = [{"request": request.text, "label": request.label} for request in TWO.requests]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "new" / "results"


@pytest.fixture
def results(folder):
    results = ResultsFolder(folder, SETTINGS)
    results.register([TWO])
    results.start({"command": "first"})
    return results


def test_cells_come_back_in_their_order(results, folder):
    cells = [Cell("two", "base"), Cell("two", "acd", 0.5, 0.1), Cell("two", "acd", 0.5, 0.0)]
    for cell in cells[:2]:
        results.add(cell, ROWS)

    again = ResultsFolder(folder, SETTINGS)
    assert again.rows == results.rows
    assert [again.is_finished(cell) for cell in cells] == [True, True, False]
    assert again.rows[3] == {
        "benchmark": "two",
        "arm": "acd",
        "alpha": 0.5,
        "beta": 0.1,
        "begun_tokens": 0,
        "attack": None,
        "id": request_id(ROWS[1]["request"]),
        **ROWS[1],
    }


@pytest.mark.parametrize("kept", [0, 5, -1, -20])
def test_a_cell_that_was_cut_off_is_dropped(results, folder, kept):
    results.add(Cell("two", "base"), ROWS)
    whole = (folder / "results.jsonl").read_bytes()
    results.add(Cell("two", "oid", 0.5, 0.1), ROWS)
    both = (folder / "results.jsonl").read_bytes()
    cut = both[: len(whole) + kept] if kept >= 0 else both[:kept]
    (folder / "results.jsonl").write_bytes(cut)

    again = ResultsFolder(folder, SETTINGS)
    assert len(again.rows) == 2
    assert (folder / "results.jsonl").read_bytes() == whole
    again.add(Cell("two", "oid", 0.5, 0.1), ROWS)
    assert (folder / "results.jsonl").read_bytes() == both


def test_each_run_is_noted(results, folder):
    again = ResultsFolder(folder, SETTINGS)
    again.register([TWO])
    again.start({"command": "second"})
    run = json.loads((folder / "run.json").read_text())
    assert [run["command"] for run in run["runs"]] == ["first", "second"]
    assert run["settings"] == SETTINGS
    assert run["benchmarks"]["two"]["n"] == 2


def test_nothing_is_written_before_the_start(folder):
    ResultsFolder(folder, SETTINGS).register([TWO])
    assert not folder.exists()


def test_other_settings_are_refused(results, folder):
    with pytest.raises(ValueError, match="holds results with judge 'keywords', not 'llm:x': choose another folder"):
        ResultsFolder(folder, {**SETTINGS, "judge": "llm:x"})
    other = Benchmark("two", "Two", (*TWO.requests, Request("c", "safe")))
    with pytest.raises(ValueError, match="holds answers to other requests of two"):
        ResultsFolder(folder, SETTINGS).register([other])


def test_two_benchmarks_of_one_name(folder):
    with pytest.raises(ValueError, match="two is given twice"):
        ResultsFolder(folder, SETTINGS).register([TWO, TWO])


def test_folders_of_something_else(results, folder, tmp_path):
    with pytest.raises(ValueError, match="holds something other than results"):
        ResultsFolder(tmp_path, SETTINGS)
    with pytest.raises(OSError, match=r"holds no results: run\.json is missing"):
        ResultsFolder(tmp_path)
    (folder / "results.jsonl").write_text("{\n\n")
    with pytest.raises(ValueError, match=r"results\.jsonl is damaged"):
        ResultsFolder(folder)
    (folder / "run.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"run\.json was not written by this version"):
        ResultsFolder(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not valid JSON"):
        ResultsFolder(folder)
