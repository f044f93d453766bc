"""An anchor set in one call: every instruction under every prompt, interruptions, seeds."""

import os
from collections import Counter

import pytest
import torch

from acd_logits import anchors
from acd_logits.anchors import SamplingSettings, load_anchor_data
from tiny_anchors import (
    INSTRUCTIONS,
    SETTINGS,
    build_anchor_model,
    build_anchor_tokenizer,
    build_tiny_anchors,
    read_lines,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_anchor_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_anchor_model(tokenizer)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_every_instruction_is_answered_under_the_three_prompts(model, tokenizer, tmp_path):
    path = tmp_path / "new" / "anchors.jsonl"
    rows = build_tiny_anchors(model, tokenizer, path)
    assert rows == read_lines(path)
    assert os.listdir(path.parent) == ["anchors.jsonl"]
    assert set(rows[0]) == {
        *("instruction", "response", "split", "system_prompt", "source", "category", "kind", "mirror", "finished"),
        *("history", "begun"),
    }
    samples = anchors.sample_responses(model, tokenizer, INSTRUCTIONS, tmp_path / "partial", SETTINGS)
    assert Counter((row["instruction"], row["system_prompt"]) for row in samples) == Counter(
        (row["instruction"], name) for row in INSTRUCTIONS for name in ("safe", "opposite", "null")
    )
    assert {row["finished"] for row in samples} == {True, False}
    assert all("[END]" not in row["response"] for row in samples)


def test_an_interrupted_run_goes_on_to_the_same_file(model, tokenizer, tmp_path, monkeypatch):
    build_tiny_anchors(model, tokenizer, tmp_path / "whole.jsonl")
    calls, generate = [], type(model).generate

    def interrupted(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(type(model), "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_tiny_anchors(model, tokenizer, tmp_path / "anchors.jsonl")
    partial = tmp_path / "anchors.jsonl.partial.jsonl"
    assert not (tmp_path / "anchors.jsonl").exists()
    with partial.open("a") as file:
        file.write('[{"instruction": "cut off in the mid')  # killed while it wrote

    torch.manual_seed(99)
    build_tiny_anchors(model, tokenizer, tmp_path / "anchors.jsonl")
    assert len(calls) == 3 + 2  # 15 responses in batches of 4, two of which were there
    assert (tmp_path / "anchors.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_the_seed_decides_and_the_users_random_state_stays(model, tokenizer, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_tiny_anchors(model, tokenizer, tmp_path / "1.jsonl")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert build_tiny_anchors(model, tokenizer, tmp_path / "2.jsonl", instructions=INSTRUCTIONS[::-1]) == first
    assert (
        build_tiny_anchors(model, tokenizer, tmp_path / "3.jsonl", SamplingSettings(**vars(SETTINGS) | {"seed": 4}))
        != first
    )


def test_a_partial_file_of_another_run_is_refused(model, tokenizer, tmp_path):
    partial = tmp_path / "anchors.jsonl.partial.jsonl"
    anchors.sample_responses(model, tokenizer, INSTRUCTIONS, partial, SETTINGS)
    with pytest.raises(ValueError, match=r"partial.jsonl is of a run with another model, other instructions"):
        build_tiny_anchors(model, tokenizer, tmp_path / "anchors.jsonl", instructions=INSTRUCTIONS[:2])
    build_tiny_anchors(model, tokenizer, tmp_path / "anchors.jsonl")
    with pytest.raises(OSError, match="exists"):
        build_tiny_anchors(model, tokenizer, tmp_path / "anchors.jsonl")


def test_a_prompt_beyond_the_context_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"take \d+ tokens, the model's context has 256"):
        build_tiny_anchors(
            model, tokenizer, tmp_path / "a.jsonl", instructions=[{**INSTRUCTIONS[0], "instruction": "key " * 250}]
        )


def test_what_is_built_can_be_loaded(model, tokenizer, tmp_path):
    rows = build_tiny_anchors(model, tokenizer, tmp_path / "anchors.jsonl")
    data = load_anchor_data(tmp_path / "anchors.jsonl")
    assert data.to_list() == rows


def test_a_refused_safe_instruction_is_asked_again(model, tokenizer, tmp_path, monkeypatch):
    """From other first tokens than the refusals', here the one that most responses begin with."""
    rows = build_tiny_anchors(model, tokenizer, tmp_path / "first.jsonl")
    word = Counter(row["response"].split()[0] for row in rows if row["source"] == "sampled").most_common(1)[0][0]
    monkeypatch.setattr("acd_logits.anchors.build.is_refusal", lambda text: text.startswith(word))
    refusals = [{"response": f"{word} help", "category": ""}]
    again = build_tiny_anchors(model, tokenizer, tmp_path / "second.jsonl", refusals=refusals, answer_safe=True)
    first = {(row["instruction"], row["response"]) for row in rows}
    new = [row for row in again if (row["instruction"], row["response"]) not in first and row["source"] == "sampled"]
    assert new
    for row in new:
        assert row["kind"] != "harmful"
        assert not row["response"].startswith(word)
    assert sorted(os.listdir(tmp_path)) == ["first.jsonl", "second.jsonl"]
