"""Costs on safe requests: by category, of problems, and of choices; from the run to the report."""

import json

import pytest
import torch

from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.changes import render_comparison
from acd_logits.evaluation.comparison import Decoding, plan_cells, run_comparison
from acd_logits.evaluation.judges import KeywordJudge
from acd_logits.evaluation.labels import draw
from acd_logits.evaluation.publish import publish
from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import ResultsFolder
from acd_logits.evaluation.summary import summarise
from acd_logits.responses import encode_messages
from conftest import build_model, build_pair
from reference import ReferenceProcessor
from tiny_results import SETTINGS

DOMAINS = Benchmark("domains", "Domains", tuple(Request(f"w{5 + i}", "safe", "xy"[i % 2]) for i in range(4)))
CHOICES = Benchmark(
    "choices",
    "Choices",
    (
        Request("w5 w6", "safe", choices=("w7 w8 w9", "w10")),
        Request("w11", "safe", choices=("w12", "w13 w14")),
        Request("w15 w16 w17", "safe", choices=("w18", "w19")),
    ),
)


def run(folder, tokenizer, benchmarks, arms=("base", "acd")):
    results = ResultsFolder(folder, SETTINGS)
    results.register(benchmarks)
    results.start({"date": "2026-01-01", "device": "cpu", "command": "evaluate", "versions": {"torch": "2"}})
    cells = plan_cells([benchmark.name for benchmark in benchmarks], arms, [0.5], [0.1])
    done = []
    decoding = Decoding(max_new_tokens=4, batch_size=2)
    run_comparison(
        build_model(),
        tokenizer,
        results,
        benchmarks,
        cells,
        KeywordJudge(),
        build_pair(),
        decoding,
        on_cell=done.append,
    )
    return results, done


def test_choices_are_scored_by_the_contrast(tokenizer, tmp_path):
    results, done = run(tmp_path / "results", tokenizer, [CHOICES])
    assert [cell.arm for cell in done] == ["base", "acd"]
    reference = ReferenceProcessor(build_model(), build_pair(), 0.5)
    rows = [row for row in results.rows if row["arm"] == "acd"]
    for row, request in zip(rows, CHOICES.requests, strict=True):
        expected = []
        for choice in request.choices:
            ids, total = encode_messages(tokenizer, [{"content": request.text}]), 0.0
            for token in tokenizer(choice)["input_ids"]:
                total += reference(torch.tensor([ids]), None)[0].log_softmax(-1)[token].item()
                ids.append(token)
            expected.append(total)
        assert row["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
        assert row["correct"] == (expected[0] > expected[1])
        assert "response" not in row
    assert rows[0]["loglikelihoods"] != results.rows[0]["loglikelihoods"], "Base has its own"
    assert run(tmp_path / "results", tokenizer, [CHOICES])[1] == []


def test_choices_stand_apart_from_what_was_answered(tokenizer, tmp_path):
    results, _ = run(tmp_path / "results", tokenizer, [DOMAINS, CHOICES])
    summary = summarise(results)
    assert {cell["benchmark"] for cell in summary["cells"]} == {"domains"}
    report = write_report(results).read_text()
    right = sum(row["correct"] for row in results.rows if row.get("loglikelihoods") and row["arm"] == "base")
    table = report.split("## Choices")[1].split("##")[0]
    assert f"| Base | {right / 3:.2f} [" in table
    assert "n = 3." in table
    assert "Choices on" not in render_comparison(results, results)
    draw(results, 8, seed=0)
    drawn = [json.loads(line)["line"] for line in (results.path / "labels.jsonl").open()]
    assert sorted(drawn) == list(range(8)), "there is nothing to label about a choice"
    copy = publish(results, tmp_path / "copy")
    assert "w15" not in (copy.path / "results.jsonl").read_text()
    assert "## Choices" in write_report(copy).read_text()


def test_a_folder_of_choices_alone(tokenizer, tmp_path):
    report = write_report(run(tmp_path, tokenizer, [CHOICES])[0]).read_text()
    assert "| ACD | " in report.split("## Choices")[1]
    assert "## Fluency" not in report


def test_refusals_by_category(tokenizer, tmp_path):
    results, _ = run(tmp_path, tokenizer, [DOMAINS])
    for row in results.rows[:3]:
        assert row["category"] in "xy"
        row["refused"] = True
    table = write_report(results).read_text().split("## Domains")[1].split("##")[0]
    assert "| Arm | Refused | x | y |" in table
    assert "| Base | 0.75 [0.30, 0.95] | 1.00 [0.34, 1.00] | 0.50 [0.09, 0.91] |" in table
    assert "| ACD | 0.00 [0.00, 0.49] |" in table


def test_problems_are_checked(tokenizer, tmp_path):
    (plain,) = run(tmp_path / "plain", tokenizer, [Benchmark("p", "P", (Request("w9", "safe"),))], ["base"])[0].rows
    word = plain["response"].split()[1]
    benchmark = Benchmark(
        "problems",
        "Problems",
        (
            Request("w9", "safe", "easy", word),
            Request("w5 w6", "safe", "hard", "w0"),
            Request("w7", "safe", "hard", "5"),
        ),
    )
    results, _ = run(tmp_path / "results", tokenizer, [benchmark], ["base"])
    assert [row["correct"] for row in results.rows] == [True, False, False]
    assert "answer" not in results.rows[0]
    results.rows[1]["finished"], results.rows[2]["refused"] = True, True
    table = write_report(results).read_text().split("## Problems")[1].split("##")[0]
    assert "| Arm | Correct | Refused | Ended | easy | hard |" in table
    rate = "0.33 [0.06, 0.79]"
    assert f"| Base | {rate} | {rate} | {rate} | 1.00 [0.21, 1.00] | 0.00 [0.00, 0.66] |" in table


def test_an_arm_changes_the_messages_of_a_choice_too(tokenizer, tmp_path):
    results, _ = run(tmp_path, tokenizer, [CHOICES], ["null", "icd"])
    first = [row["loglikelihoods"] for row in results.rows if row["request"] == "w11"]
    assert first[0] != first[1]
