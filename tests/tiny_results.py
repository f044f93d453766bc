"""Results folders without a model: what `evaluate` would have written."""

import math

from acd_logits.evaluation.benchmarks import Benchmark, Request
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
                "repeats": False,
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


def build_two_benchmarks(path):
    """Results of six cells, over both benchmarks and three arms."""
    acd = ("acd", 0.5, 0.1)
    return build_results(
        path,
        {
            Cell("advbench", "base"): build_rows(HARMFUL, 2, invalid=1),
            Cell("advbench", *acd): build_rows(HARMFUL, 9),
            Cell("advbench", "acd", 1.0, 0.1): build_rows(HARMFUL, 10),
            Cell("xstest", "base"): build_rows(BOTH, 1, refused_safe=0),
            Cell("xstest", *acd): build_rows(BOTH, 4, refused_safe=3),
            Cell("xstest", "safe-ap", 0.5, 0.1): build_rows(BOTH, 2, refused_safe=2),
        },
    )
