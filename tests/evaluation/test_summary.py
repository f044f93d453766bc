"""The summary: the numbers of a report."""

import pytest

from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import Cell
from acd_logits.evaluation.summary import main_strength, summarise
from tiny_results import BOTH, HARMFUL, build_results, build_rows, build_two_benchmarks


@pytest.fixture
def results(tmp_path):
    return build_two_benchmarks(tmp_path / "results")


def find(summary, benchmark, arm, alpha=None):
    return next(
        cell for cell in summary["cells"] if (cell["benchmark"], cell["arm"], cell["alpha"]) == (benchmark, arm, alpha)
    )


def test_rates(results):
    summary = summarise(results)
    base = find(summary, "advbench", "base")
    assert (base["harmless"]["count"], base["harmless"]["n"], base["harmless"]["invalid"]) == (2, 10, 1)
    assert base["harmless"]["rate"] == 0.2, "an invalid verdict is in n, and not harmless"
    assert base["harmless"]["interval"] == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert base["refused_safe"] == {"count": 0, "n": 0, "rate": None, "interval": (0.0, 1.0)}
    acd = find(summary, "xstest", "acd", 0.5)
    assert (acd["harmless"]["rate"], acd["refused_harmful"]["rate"], acd["refused_safe"]["rate"]) == (1, 1, 0.5)


def test_fluency(results):
    fluency = find(summarise(results), "xstest", "base")["fluency"]
    assert fluency == {
        "n": 10,
        "perplexity": pytest.approx(8),
        "broken_words": pytest.approx(0.1),
        "loops": 0,
        "unfinished": 0,
        "tokens": 4,
    }


def test_how_refusals_end(tmp_path):
    rows = build_rows(BOTH, 3, refused_safe=1)
    rows[0] |= {"finished": False, "repeats": True}
    rows[3] |= {"finished": False, "repeats": True}  # no refusal
    other = [{name: value for name, value in row.items() if name != "repeats"} for row in build_rows(HARMFUL, 1)]
    acd = Cell("xstest", "acd", 0.5, 0.1), Cell("advbench", "acd", 0.5, 0.1), Cell("advbench", "acd", 1.0, 0.1)
    cells = dict(zip(acd, (rows, other, build_rows(HARMFUL, 10)), strict=True))
    results = build_results(tmp_path / "results", cells | {Cell("xstest", "base"): build_rows(BOTH, 0)})
    found = {entry["arm"]: entry for entry in summarise(results)["refusals"]}

    assert (found["acd"]["ended"]["count"], found["acd"]["ended"]["n"]) == (4, 5)
    assert (found["acd"]["repeated"]["count"], found["acd"]["repeated"]["n"]) == (1, 4), "an older row does not say"
    assert found["base"]["ended"]["n"] == 0
    report = write_report(results).read_text()
    assert "| ACD | 5 | 0.80 [0.38, 0.96] | 0.25 [0.05, 0.70] |" in report.split("## How refusals end")[1]


def test_acd_is_compared_on_the_same_requests(results):
    against = {(entry["benchmark"], entry["arm"]): entry for entry in summarise(results)["against"]}
    # The request without a verdict is left out
    assert against["advbench", "base"] == {
        "benchmark": "advbench", "arm": "base", "n": 9, "only_first": 6, "only_second": 0, "p": 2 / 2**6,
    }  # fmt: skip
    assert against[None, "base"]["n"] == 13
    assert against[None, "base"]["only_first"] == 9
    assert against["xstest", "safe-ap"]["p"] == 0.5
    assert (None, "safe-ap") not in against


def test_the_main_strength_is_the_pairs_own_or_that_of_most_cells():
    assert main_strength([Cell("a", "base")]) == {"alpha": None, "beta": None}
    cells = [Cell("a", "acd", alpha, 0.1) for alpha in (0.0, 0.4, 0.6, 1.0)]
    assert main_strength(cells)["alpha"] == 0.4
    cells.append(Cell("a", "oid", 1.0, 0.1))
    assert main_strength(cells) == {"alpha": 1.0, "beta": 0.1}
    assert main_strength(cells, {"alpha": 0.6, "beta": 0.1}) == {"alpha": 0.6, "beta": 0.1}
    assert main_strength(cells, {"alpha": 0.3, "beta": 0.1}) == {"alpha": 1.0, "beta": 0.1}  # which nobody measured
