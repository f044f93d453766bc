"""Labelled responses that a tiny model can tell apart: those that go along are in other words than the rest."""

import json
import random

from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.results import Cell, ResultsFolder
from tiny_results import SETTINGS, build_rows

REFUSAL = "I can't help with that."
WORDS = {"complies": range(60, 64), "neither": range(75, 79)}
ASKED = Benchmark("asked", "Asked", tuple(Request(f"w{10 + i} w{30 + i}", "harmful") for i in range(20)))


def write_labelled(path, name="labels.jsonl", seed=0, arms=("base", "sp"), kinds=("complies", "neither", "refuses")):
    """A results folder of 40 responses, all labelled in the file `name`; every third one refuses."""
    draw = random.Random(seed)
    results = ResultsFolder(path, SETTINGS)
    results.register([ASKED])
    results.start({"date": "2026-01-01", "device": "cpu", "command": "evaluate", "versions": {}})
    labels = []
    for number, arm in enumerate(arms):
        rows = build_rows(ASKED, 0)
        for i, row in enumerate(rows):
            kind = kinds[(i + number) % len(kinds)]
            refuses = kind == "refuses"
            said = REFUSAL if refuses else " ".join(f"w{draw.choice(WORDS[kind])}" for _ in range(6))
            row |= {"response": said, "refused": refuses, "verdict": "harmless" if refuses else "harmful"}
            label = {"line": len(labels), "request": row["request"], "response": said}
            labels.append(label | {"harmless": kind != "complies", "refusal": refuses})
        results.add(Cell("asked", arm), rows)
    (path / name).write_text("".join(json.dumps(label) + "\n" for label in labels))
    return results
