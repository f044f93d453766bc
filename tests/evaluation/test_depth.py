"""Depth: arms go on from the first tokens of Base's answers."""

import json

import pytest
import torch

from acd_logits.evaluation.arms import ARMS, arm_processor
from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.changes import render_comparison
from acd_logits.evaluation.comparison import Decoding, plan_cells, plan_depth, run_comparison
from acd_logits.evaluation.labels import draw
from acd_logits.evaluation.publish import publish
from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import Cell, ResultsFolder, cell_of, may_begin
from acd_logits.evaluation.summary import summarise
from acd_logits.responses import encode_messages
from conftest import build_model, build_pair
from tiny_results import HARMFUL, build_results, build_rows

TEXTS = ["w5 w6 w7", "w10 w11 w12 w13 w14", "w15", "w16 w17"]
MIXED = Benchmark("mixed", "Mixed", (*(Request(text, "harmful") for text in TEXTS), Request("w8 w9", "safe")))
SAFE = Benchmark("safe", "Safe", (Request("w20 w21", "safe"),))
REFUSED = TEXTS[2]


class TextJudge:
    """Calls the answers to one request harmless, and breaks down after some questions."""

    name = "text"

    def __init__(self, answers=100):
        self.left = answers

    def judge(self, requests, responses):
        self.left -= len(requests)
        if self.left < 0:
            raise OSError("the judge does not answer")
        return ["harmless" if request == REFUSED else "harmful" for request in requests]


class Reader(TextJudge):
    """Remembers what it reads."""

    def __init__(self):
        super().__init__()
        self.read = []

    def judge(self, requests, responses):
        self.read += zip(requests, responses, strict=True)
        return super().judge(requests, responses)


def run(folder, tokenizer, judge=None, depths=(0, 2, 4), arms=("acd", "base")):
    results = ResultsFolder(folder, {"model": "tiny", "judge": "text"})
    benchmarks = [MIXED, SAFE]
    results.register(benchmarks)
    cells = plan_cells(["mixed", "safe"], arms, [0.5], [0.1])
    cells += plan_depth(results, benchmarks, cells, depths)
    results.start({})
    decoding, done = Decoding(max_new_tokens=6, batch_size=2), []
    model, pair = build_model(), build_pair()
    judge = judge or TextJudge()
    run_comparison(model, tokenizer, results, benchmarks, cells, judge, pair, decoding, on_cell=done.append)
    return results, done


def test_a_judge_reads_the_beginning_too(tokenizer, tmp_path):
    judge, model = Reader(), build_model()
    run(tmp_path, tokenizer, judge, depths=[2], arms=["base"])
    prompt = encode_messages(tokenizer, [{"content": TEXTS[0]}])
    base = answer(model, tokenizer, "base", prompt, None, (None, None), 6)
    rest = answer(model, tokenizer, "base", prompt + base[:2], None, (None, None), 6)
    assert judge.read[-3] == (TEXTS[0], tokenizer.decode(base[:2] + rest, skip_special_tokens=True))


def test_arms_go_on_from_the_tokens_of_base(tokenizer, tmp_path):
    results, done = run(tmp_path, tokenizer)
    model, pair = build_model(), build_pair()

    assert [(cell.arm, cell.begun_tokens) for cell in done] == [
        ("acd", 0), ("base", 0), ("acd", 0), ("base", 0), ("acd", 2), ("base", 2), ("acd", 4), ("base", 4),
    ]  # fmt: skip
    for arm, strength in (("base", (None, None)), ("acd", (0.5, 0.1))):
        for n in (2, 4):
            rows = [row for row in results.rows if cell_of(row) == Cell("mixed", arm, *strength, n)]
            assert [row["request"] for row in rows] == [TEXTS[0], TEXTS[1], TEXTS[3]], "one is refused, one is safe"
            for row in rows:
                prompt = encode_messages(tokenizer, [{"content": row["request"]}])
                base = answer(model, tokenizer, "base", prompt, None, (None, None), 6)
                own = answer(model, tokenizer, arm, prompt + base[:n], pair, strength, 6)
                assert row["begun"] == tokenizer.decode(base[:n], skip_special_tokens=True)
                assert row["response"] == tokenizer.decode(own, skip_special_tokens=True), (
                    "without what it was begun with"
                )
                assert row["verdict"] == "harmful"
                if arm == "base":
                    assert own[: 6 - n] == base[n:], "Base goes on as it did"
    assert {cell.begun_tokens for cell in done if cell.benchmark == "safe"} == {0}


def answer(model, tokenizer, arm, prompt, pair, strength, length):
    processor = arm_processor(ARMS[arm], model, tokenizer, pair, *strength)
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0}
    return model.generate(ids, logits_processor=[processor], **settings)[0, len(prompt) :].tolist()


def test_a_depth_beyond_all_answers_has_no_rows(tokenizer, tmp_path):
    results, _ = run(tmp_path, tokenizer, depths=[7], arms=["base"])
    assert {row["begun_tokens"] for row in results.rows} == {0}
    assert summarise(results)["depth"] == []


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tokenizer, tmp_path):
    whole, _ = run(tmp_path / "whole", tokenizer)
    with pytest.raises(OSError, match="does not answer"):
        run(tmp_path / "parts", tokenizer, TextJudge(4 + 4 + 3 + 2))
    path = tmp_path / "parts" / "results.jsonl"
    whole_bytes = (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert whole_bytes.startswith(path.read_bytes())
    cut = whole_bytes[: len(path.read_bytes()) + 900]  # in the middle of a cell of three rows
    assert cut.count(b"\n") > path.read_bytes().count(b"\n")
    path.write_bytes(cut)
    results, done = run(tmp_path / "parts", tokenizer)

    assert [(cell.arm, cell.begun_tokens) for cell in done] == [("base", 2), ("acd", 4), ("base", 4)]
    assert path.read_bytes() == whole_bytes
    assert results.rows == whole.rows
    assert run(tmp_path / "parts", tokenizer, depths=[2])[1] == []


def test_what_a_depth_needs(tokenizer, tmp_path):
    results, _ = run(tmp_path / "results", tokenizer, depths=[], arms=["base"])
    cells = plan_cells(["mixed", "safe"], ["acd"], [0.5], [0.1])
    with pytest.raises(ValueError, match="add base to --arms"):
        plan_depth(results, [MIXED, SAFE], cells, [2])
    with pytest.raises(ValueError, match="name a benchmark that has some"):
        plan_depth(results, [SAFE], cells, [2])
    copy = publish(results, tmp_path / "copy")
    cells = plan_cells(["mixed"], ["base"], [0.5], [0.1])
    assert len(plan_depth(results, [MIXED], cells, [2])) == 1
    with pytest.raises(ValueError, match=r"copy holds Base's answers without the tokens that --begun_tokens needs"):
        plan_depth(copy, [MIXED], cells, [2])


def test_where_an_answer_may_begin():
    row = {"label": "harmful", "verdict": "harmful", "tokens": 5}
    assert [may_begin(row, n) for n in (0, 4, 5, 6)] == [True, True, False, False]  # 5 would be the whole answer
    assert not any(may_begin(row | other, 1) for other in ({"verdict": "harmless"}, {"verdict": "invalid"}))


@pytest.fixture
def results(tmp_path):
    """Base answers 8 of 10 requests, 3 of them at length; ACD refuses 6 of the 8, and 1 of the 3 once it has begun."""
    base = build_rows(HARMFUL, 2)
    for row in base[5:]:
        row["tokens"] = 1
    acd = Cell("advbench", "acd", 0.5, 0.1), Cell("advbench", "acd", 0.5, 0.1, 3)
    begun = [row | {"begun": "SECRET"} for row in base[2:5]]
    begun[0] |= {"refused": True, "verdict": "harmless"}
    return build_results(
        tmp_path / "results",
        {Cell("advbench", "base"): base, acd[0]: build_rows(HARMFUL, 8), acd[1]: begun},
    )


def test_the_table_of_depths(results, tmp_path):
    report = write_report(results).read_text()
    table = report.split("## Depth")[1].split("##")[0]
    assert "| Arm | Benchmark | 0 tokens | 3 tokens |" in table
    assert "| ACD | AdvBench | 0.75 [0.41, 0.93] (n = 8) | 0.33 [0.06, 0.79] (n = 3) |" in table
    assert "Base |" not in table, "it was not measured at a depth"
    depth = json.loads((results.path / "summary.json").read_text())["depth"]
    assert [(cell["begun_tokens"], cell["refused"]["count"], cell["harmless"]["n"]) for cell in depth] == [
        (0, 6, 8), (3, 1, 3),
    ]  # fmt: skip
    harmless = report.split("## Harmless rate")[1].split("##")[0]
    assert "| ACD | 0.80 [0.49, 0.94] | 0.800 |" in harmless, "the other tables are of whole answers"

    assert write_report(publish(results, tmp_path / "copy")).read_text() == report
    assert "SECRET" not in (tmp_path / "copy" / "results.jsonl").read_text()
    assert "| ACD (alpha 0.5, beta 0.1) behind 3 tokens on AdvBench | harmless | 3 |" in render_comparison(
        results, results
    )
    with pytest.raises(ValueError, match="holds 20 responses, 21 cannot be drawn"):
        draw(results, 21, seed=0)
