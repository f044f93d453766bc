"""The comparison: what a row holds, and that a run which was stopped ends like one that was not."""

import math

import pytest

from acd_logits import responses
from acd_logits.evaluation.arms import ARMS, arm_processor
from acd_logits.evaluation.attacks import Attack
from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.comparison import Decoding, plan_cells, run_comparison
from acd_logits.evaluation.fluency import response_loss
from acd_logits.evaluation.results import Cell, ResultsFolder
from acd_logits.responses import encode_messages, generate_responses
from conftest import build_model, build_pair

MIXED = Benchmark(
    "mixed",
    "Mixed",
    (Request("w5 w6 w7", "harmful"), Request("w8 w9", "safe"), Request("w10 w11 w12 w13 w14", "harmful")),
)
SAFE = Benchmark("safe", "Safe", (Request("w20 w21", "safe"),))
CELLS = plan_cells(["mixed", "safe"], ["base", "sp", "acd"], [0.5, 1.0], [0.1])


class LengthJudge:
    """Calls long responses harmless, and breaks down in front of the given response."""

    name = "length"

    def __init__(self, fails_at=math.inf):
        self.asked, self.fails_at = [], fails_at

    def judge(self, requests, responses):
        self.asked += requests
        if len(self.asked) > self.fails_at:
            raise OSError("the judge does not answer")
        return ["harmless" if len(response) > 20 else "harmful" for response in responses]


def run(folder, tokenizer, judge=None, cells=CELLS):
    results = ResultsFolder(folder, {"model": "tiny"})
    results.register([MIXED, SAFE])
    results.start({})
    done = []
    try:
        run_comparison(
            build_model(),
            tokenizer,
            results,
            [MIXED, SAFE],
            cells,
            judge or LengthJudge(),
            build_pair(),
            Decoding(max_new_tokens=6, batch_size=2),
            on_cell=done.append,
        )
    finally:
        results.done = done
    return results


def test_cells_are_every_combination():
    assert [
        Cell(benchmark, *rest)
        for benchmark in ("mixed", "safe")
        for rest in (("base",), ("sp",), ("acd", 0.5, 0.1), ("acd", 1.0, 0.1))
    ] == CELLS
    assert len(plan_cells(["a"], ["oid", "oid"], [0.5, 0.5], [0.0, 0.1])) == 2


def test_rows_hold_what_the_library_answers(tokenizer, tmp_path):
    results = run(tmp_path, tokenizer)
    model, pair = build_model(), build_pair()

    assert results.done == CELLS
    assert len(results.rows) == 4 * 3 + 4 * 1
    for arm, alpha in (("sp", None), ("acd", 1.0)):
        beta = None if alpha is None else 0.1
        rows = [row for row in results.rows if (row["benchmark"], row["arm"], row["alpha"]) == ("mixed", arm, alpha)]
        acd = arm_processor(ARMS[arm], model, tokenizer, pair, alpha, beta)
        prompts = [encode_messages(tokenizer, [{"content": request.text}]) for request in MIXED.requests]
        for row, prompt in zip(rows, prompts, strict=True):
            (alone,) = generate_responses(model, tokenizer, [prompt], acd, max_new_tokens=6)
            assert (row["response"], row["tokens"], row["finished"]) == (alone.text, alone.tokens, alone.finished)
            assert row["loss"] == pytest.approx(response_loss(model, tokenizer, prompt, alone.text)[0], abs=1e-4)
            assert row["refused"] is False
    assert [row["verdict"] for row in results.rows if row["label"] == "safe"] == [None] * 8
    for row in results.rows:
        if row["label"] == "harmful":
            assert [row["verdict"]] == LengthJudge().judge([row["request"]], [row["response"]])


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tokenizer, tmp_path, fails_at):
    whole = run(tmp_path / "whole", tokenizer)
    with pytest.raises(OSError, match="does not answer"):
        run(tmp_path / "parts", tokenizer, LengthJudge(fails_at))
    first = len(ResultsFolder(tmp_path / "parts").rows)
    results = run(tmp_path / "parts", tokenizer)

    assert first < len(results.rows)
    assert len(results.done) == len(CELLS) - (fails_at // 2)
    files = [(tmp_path / name / "results.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert results.rows == whole.rows
    assert run(tmp_path / "parts", tokenizer).done == []


def test_a_folder_grows(tokenizer, tmp_path):
    run(tmp_path, tokenizer, cells=CELLS[:1])
    assert run(tmp_path, tokenizer).done == CELLS[1:]


def test_transforms_reach_the_model(tokenizer, tmp_path, monkeypatch):
    asked = []

    def encode(tokenizer, messages):
        asked.append([message["content"] for message in messages])
        return encode_messages(tokenizer, messages)

    monkeypatch.setattr(responses, "encode_messages", encode)
    run(tmp_path, tokenizer, cells=plan_cells(["safe"], ["icd"], [0.5], [0.1]))
    assert len(asked[0]) == 3
    assert asked[-1] == ["w20 w21"], "the loss is that of the plain request"


def test_a_request_that_is_too_long(tokenizer, tmp_path):
    model, prompt = build_model(), [5] * 250
    with pytest.raises(ValueError, match=r"the longest prompt and its response take 260 tokens, .+ has 256"):
        generate_responses(model, tokenizer, [prompt], max_new_tokens=10)


def test_a_request_that_is_too_long_is_found_before_any_answer(tokenizer, tmp_path):
    long = Attack("Long", (lambda request: [{"role": "user", "content": " ".join([request, *["w5"] * 250])}],))
    results = ResultsFolder(tmp_path, {"model": "tiny"})
    results.register([MIXED], {"long": long})
    cells = [Cell("mixed", "base"), Cell("mixed", "base", attack="long")]
    with pytest.raises(ValueError, match=r"mixed under the attack long: the longest prompt .+ Leave it out, or lower"):
        run_comparison(
            build_model(),
            tokenizer,
            results,
            [MIXED],
            cells,
            LengthJudge(),
            decoding=Decoding(max_new_tokens=6),
            attacks={"long": long},
        )
    assert not results.rows
