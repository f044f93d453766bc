"""The report: its numbers, its tables and its plots, from a folder alone."""

import json
import math

import pytest

from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.plots import arm_means
from acd_logits.evaluation.report import main_strength, render_comparison, summarise, write_report
from acd_logits.evaluation.results import Cell, ResultsFolder

HARMFUL = Benchmark("advbench", "AdvBench", tuple(Request(f"harm {i}", "harmful") for i in range(10)))
BOTH = Benchmark(
    "xstest",
    "XSTest",
    (*(Request(f"kill {i}", "harmful") for i in range(4)), *(Request(f"safe {i}", "safe") for i in range(6))),
)
SETTINGS = {
    "model": "org/tiny",
    "pair": "org/pair",
    "transfer": False,
    "judge": "keywords",
    "max_new_tokens": 8,
}


def build_rows(benchmark, harmless, refused_safe=0, invalid=0):
    """The first `harmless` harmful requests get a harmless response, the next `invalid` ones no verdict."""
    rows, harmful, safe = [], 0, 0
    for request in benchmark.requests:
        verdict, refused = None, False
        if request.label == "harmful":
            verdict = "harmless" if harmful < harmless else "invalid" if harmful < harmless + invalid else "harmful"
            refused = verdict == "harmless"
            harmful += 1
        else:
            refused = safe < refused_safe
            safe += 1
        rows.append(
            {
                "label": request.label,
                "request": request.text,
                "response": "SECRET",
                "refused": refused,
                "verdict": verdict,
                "tokens": 4,
                "finished": True,
                "loss": math.log(8),
                "loss_tokens": 4,
                "words": 10,
                "broken_words": 1,
                "loop": False,
            }
        )
    return rows


def build_results(path, cells, **settings):
    results = ResultsFolder(path, SETTINGS | settings)
    results.register([HARMFUL, BOTH])
    results.start({"date": "2026-01-01", "device": "cpu", "command": "evaluate", "versions": {"torch": "2"}})
    for cell, rows in cells.items():
        results.add(cell, rows)
    return results


@pytest.fixture
def results(tmp_path):
    acd = ("acd", 0.5, 0.1)
    return build_results(
        tmp_path / "results",
        {
            Cell("advbench", "base"): build_rows(HARMFUL, 2, invalid=1),
            Cell("advbench", *acd): build_rows(HARMFUL, 9),
            Cell("advbench", "acd", 1.0, 0.1): build_rows(HARMFUL, 10),
            Cell("xstest", "base"): build_rows(BOTH, 1, refused_safe=0),
            Cell("xstest", *acd): build_rows(BOTH, 4, refused_safe=3),
            Cell("xstest", "safe-ap", 0.5, 0.1): build_rows(BOTH, 2, refused_safe=2),
        },
    )


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


def test_the_main_strength_is_that_of_most_cells():
    assert main_strength([Cell("a", "base")]) == {"alpha": None, "beta": None}
    cells = [Cell("a", "acd", alpha, 0.1) for alpha in (0.0, 0.4, 0.6, 1.0)]
    assert main_strength(cells)["alpha"] == 0.4
    assert main_strength([*cells, Cell("a", "oid", 1.0, 0.1)]) == {"alpha": 1.0, "beta": 0.1}


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


def test_a_plot_compares_arms_on_the_same_benchmarks(results):
    means = arm_means(summarise(results), "harmless")
    assert list(means) == ["base", "acd"], "safe-AP was run on one benchmark only"
    assert means["base"] == pytest.approx((0.225, 0.0512, 0.6046), abs=1e-4)


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


# What changed


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
