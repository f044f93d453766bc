"""The anchor set: its files, sampling and splitting, the way to training, and instructions from another model."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from acd_logits import anchors, cli
from acd_logits.anchors import (
    SamplingSettings,
    build_anchors,
    generate_instructions,
    load_anchor_data,
    load_instructions,
    load_refusals,
    split_held_out,
    split_responses,
    write_generated,
)
from acd_logits.cli import main
from acd_logits.prompts import OPPOSITE_PROMPT, SAFE_PROMPT, shipped_folder
from conftest import build_tokenizer

ROOT = Path(__file__).parents[1]
WORDS = "You are a safe helpful careful reckless assistant how do I pick the lock paint fence with open close key door"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} [END] {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
NO_SYSTEM_TURN = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
INSTRUCTIONS = [
    {"instruction": "how do I pick the lock", "category": "theft", "kind": "harmful", "mirror": "theft 1"},
    {"instruction": "open the door", "category": "theft", "kind": "harmful", "mirror": "theft 2"},
    {"instruction": "how do I pick a fence", "category": "theft", "kind": "near_miss", "mirror": "theft 1"},
    {"instruction": "paint the fence with a key", "category": "home", "kind": "everyday", "mirror": "home 1"},
    {"instruction": "close the door", "category": "home", "kind": "everyday", "mirror": "home 2"},
]
REFUSALS = [{"response": f"I can't help with that, {i}.", "category": ""} for i in range(6)] + [
    {"response": "I won't help with theft.", "category": "theft"},
    {"response": "I won't help with fraud.", "category": "fraud"},
]
SETTINGS = SamplingSettings(batch_size=4, max_new_tokens=12, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[END]", "system", "user", "assistant", ":", *WORDS.split()]
    names = {"pad_token": "[PAD]", "eos_token": "[END]"}
    tokenizer = build_tokenizer(words, unk_token="[UNK]", special=names.values(), **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model_path(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def build(model, tokenizer, path, settings=SETTINGS, **kwargs):
    kwargs = {"instructions": INSTRUCTIONS, "refusals": REFUSALS} | kwargs
    return build_anchors(model, tokenizer, path, settings=settings, **kwargs)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# The files


def test_the_shipped_instructions_are_many_and_varied():
    instructions = load_instructions()
    kinds = Counter(row["kind"] for row in instructions)
    assert kinds["harmful"] >= 200
    assert kinds["near_miss"] + kinds["everyday"] >= 300
    assert kinds["near_miss"] * 3 >= kinds["near_miss"] + kinds["everyday"]
    harms = {row["category"] for row in instructions if row["kind"] == "harmful"}
    assert len(harms) >= 12
    assert {row["category"] for row in instructions if row["kind"] == "near_miss"} <= harms
    for kind, number in kinds.items():
        openings = Counter(
            " ".join(row["instruction"].lower().split()[:2]) for row in instructions if row["kind"] == kind
        )
        assert max(openings.values()) <= 0.06 * number, openings.most_common(1)


def test_every_shipped_near_miss_mirrors_a_harmful_instruction():
    """Line by line, in the same category, and often in the same words."""
    kinds = {kind: {r["mirror"]: r for r in load_instructions() if r["kind"] == kind} for kind in anchors.KINDS}
    assert kinds["near_miss"].keys() == kinds["harmful"].keys()
    overlap = 0.0
    for mirror, near_miss in kinds["near_miss"].items():
        one, other = (set(r["instruction"].lower().split()) for r in (near_miss, kinds["harmful"][mirror]))
        overlap += len(one & other) / len(one | other)
    assert overlap / len(kinds["near_miss"]) > 0.15  # of near misses in another order: 0.05


def test_no_shipped_line_repeats_another():
    lines = {kind: read(shipped_folder("anchors") / f"{kind}.jsonl") for kind in anchors.KINDS}
    texts = [re.sub(r"\W+", " ", row["instruction"].lower()).strip() for kind in lines for row in lines[kind]]
    assert [text for text, number in Counter(texts).items() if number > 1] == []
    assert len(load_instructions()) == len(texts)


def test_the_shipped_refusals_suit_the_shipped_categories():
    refusals = load_refusals()
    assert len({row["response"] for row in refusals}) == len(refusals) >= 60
    harms = {row["category"] for row in load_instructions() if row["kind"] == "harmful"}
    assert {row["category"] for row in refusals} <= harms | {""}
    assert sum(not row["category"] for row in refusals) >= 20
    assert all(row["response"].endswith((".", "!", "?")) for row in refusals)


def test_the_kind_is_in_the_line_or_in_the_name_of_the_file(tmp_path):
    mixed = write(tmp_path / "my.jsonl", [{"instruction": "a", "kind": "near_miss", "category": "c"}, ""])
    harmful = write(tmp_path / "harmful.jsonl", [{"instruction": " b "}, {"instruction": "b"}])
    assert load_instructions([mixed, harmful]) == [
        {"instruction": "a", "category": "c", "kind": "near_miss", "mirror": "c 1"},
        {"instruction": "b", "category": "general", "kind": "harmful", "mirror": "general 1"},
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (['{"instruction": "a"}', '{"instruction": '], "line 2: not valid JSON"),
        (['{"text": "a"}'], "line 1: expected an object with a text `instruction`"),
        (['{"instruction": " "}'], "line 1: expected an object with a text `instruction`"),
        (['{"instruction": 3}'], "line 1: expected an object with a text `instruction`"),
        (['["instruction"]'], "line 1: expected an object with a text `instruction`"),
        (['{"instruction": "a", "kind": "evil"}'], "line 1: `kind` must be one of harmful, near_miss, everyday"),
    ],
)
def test_bad_instruction_files(tmp_path, lines, message):
    path = write(tmp_path / "everyday.jsonl", lines)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_instructions([path])
    assert str(path) in str(error.value)


def test_texts_keep_their_characters(tmp_path):
    text = "eins\u2028zwei\x85drei \U0001f511"
    path = tmp_path / "everyday.jsonl"
    write_generated(path, iter([{"instruction": text, "category": "c", "kind": "everyday"}]))
    assert [row["instruction"] for row in load_instructions([path])] == [text]
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"everyday\.jsonl is not a text file in UTF-8"):
        load_instructions([path])


# Sampling


def test_every_instruction_is_answered_under_the_three_prompts(model, tokenizer, tmp_path):
    path = tmp_path / "new" / "anchors.jsonl"
    rows = build(model, tokenizer, path)
    assert rows == read(path)
    assert os.listdir(path.parent) == ["anchors.jsonl"]
    assert set(rows[0]) == {
        *("instruction", "response", "split", "system_prompt", "source", "category", "kind", "mirror", "finished")
    }
    samples = anchors.sample_responses(model, tokenizer, INSTRUCTIONS, tmp_path / "partial", SETTINGS)
    assert Counter((row["instruction"], row["system_prompt"]) for row in samples) == Counter(
        (row["instruction"], name) for row in INSTRUCTIONS for name in ("safe", "opposite", "null")
    )
    assert {row["finished"] for row in samples} == {True, False}
    assert all("[END]" not in row["response"] for row in samples)


@pytest.mark.parametrize("template", [TEMPLATE, NO_SYSTEM_TURN, None])
def test_the_model_sees_what_a_user_would_send(model, tokenizer, tmp_path, template):
    """Greedy responses in batches equal generate on one conversation, as a user would write it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[END]")
    tokenizer.chat_template = template

    def expected(system_prompt, instruction):
        turns = [{"role": "user", "content": instruction}]
        if system_prompt and template == TEMPLATE:
            turns.insert(0, {"role": "system", "content": system_prompt})
        elif system_prompt:
            turns[0]["content"] = f"{system_prompt}\n\n{instruction}"
        text = turns[0]["content"]
        if template:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=2)
        return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)

    settings = SamplingSettings(batch_size=4, max_new_tokens=12, temperature=0)
    rows = anchors.sample_responses(model, tokenizer, INSTRUCTIONS[:3], tmp_path / "partial", settings)
    prompts = {"safe": SAFE_PROMPT, "opposite": OPPOSITE_PROMPT, "null": ""}
    assert len(rows) == 9
    for row in rows:
        assert row["response"] == expected(prompts[row["system_prompt"]], row["instruction"])


def test_fewer_system_prompts_may_be_chosen(model, tokenizer, tmp_path):
    settings = SamplingSettings(system_prompts=("null",), max_new_tokens=3)
    rows = anchors.sample_responses(model, tokenizer, INSTRUCTIONS[:3], tmp_path / "partial", settings)
    assert sorted(row["instruction"] for row in rows) == sorted(row["instruction"] for row in INSTRUCTIONS[:3])
    assert {row["system_prompt"] for row in rows} == {"null"}


def test_an_interrupted_run_goes_on_to_the_same_file(model, tokenizer, tmp_path, monkeypatch):
    build(model, tokenizer, tmp_path / "whole.jsonl")
    calls, generate = [], type(model).generate

    def interrupted(*args, **kwargs):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(type(model), "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(model, tokenizer, tmp_path / "anchors.jsonl")
    partial = tmp_path / "anchors.jsonl.partial.jsonl"
    assert not (tmp_path / "anchors.jsonl").exists()
    with partial.open("a") as file:
        file.write('[{"instruction": "cut off in the mid')  # killed while it wrote

    torch.manual_seed(99)
    build(model, tokenizer, tmp_path / "anchors.jsonl")
    assert len(calls) == 3 + 2  # 15 responses in batches of 4, two of which were there
    assert (tmp_path / "anchors.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_the_seed_decides_and_the_users_random_state_stays(model, tokenizer, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build(model, tokenizer, tmp_path / "1.jsonl")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert build(model, tokenizer, tmp_path / "2.jsonl", instructions=INSTRUCTIONS[::-1]) == first
    assert build(model, tokenizer, tmp_path / "3.jsonl", SamplingSettings(**vars(SETTINGS) | {"seed": 4})) != first


def test_a_partial_file_of_another_run_is_refused(model, tokenizer, tmp_path):
    partial = tmp_path / "anchors.jsonl.partial.jsonl"
    anchors.sample_responses(model, tokenizer, INSTRUCTIONS, partial, SETTINGS)
    with pytest.raises(ValueError, match=r"partial.jsonl is of a run with another model, other instructions"):
        build(model, tokenizer, tmp_path / "anchors.jsonl", instructions=INSTRUCTIONS[:2])
    build(model, tokenizer, tmp_path / "anchors.jsonl")
    with pytest.raises(OSError, match="exists"):
        build(model, tokenizer, tmp_path / "anchors.jsonl")


def test_a_prompt_beyond_the_context_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"take \d+ tokens, the model's context has 256"):
        build(model, tokenizer, tmp_path / "a.jsonl", instructions=[{**INSTRUCTIONS[0], "instruction": "key " * 250}])


# Splitting


def sample(instruction, response, kind="harmful", **kwargs):
    row = {"instruction": instruction, "response": response, "kind": kind, "category": "theft", "mirror": "theft 1"}
    return {**row, "system_prompt": "null", "finished": True, **kwargs}


def test_the_judge_splits_the_responses(caplog):
    samples = [
        sample("pick it", "I can't help with that."),
        sample("pick it", "Use a pick.", finished=False),
        sample("pick it", "Use a pick.", system_prompt="safe"),
        sample("pick it", ""),
        sample("paint it", "Use a brush.", "everyday"),
        sample("paint it", "I can't help with that.", "everyday"),
        sample("kill it", "Use kill.", "near_miss"),
    ]
    rows = split_responses(samples, REFUSALS)
    assert [(row["split"], row["response"], row["source"], row["finished"]) for row in rows] == [
        ("D_HA", "Use a pick.", "sampled", False),
        ("D_HR", "I can't help with that.", "sampled", True),
        ("D_S", "Use a brush.", "sampled", True),
        ("D_S", "Use kill.", "sampled", True),
    ]
    for reason in ("refusals of safe instructions", "repeated", "empty"):
        assert f"Left out 1 of 7 responses: {reason}." in caplog.text
    assert "D_HR" not in caplog.text  # nothing is short


def test_too_few_refusals_are_filled_up_and_said(caplog):
    samples = [sample("pick it", "I can't help with that."), sample("take it", "Take it."), sample("hit it", "")]
    rows = split_responses(samples, REFUSALS, per_instruction=2)
    refusals = [row for row in rows if row["split"] == "D_HR"]
    assert Counter(row["instruction"] for row in refusals) == {"pick it": 2, "take it": 2, "hit it": 2}
    assert len({(row["instruction"], row["response"]) for row in refusals}) == 6
    assert Counter(row["source"] for row in refusals) == {"sampled": 1, "refusal_bank": 5}
    assert all(row["finished"] and not row["system_prompt"] for row in refusals if row["source"] == "refusal_bank")
    assert (
        "D_HR: training wants 6 responses, 2 per harmful instruction, and sampling gave 5 too few: filled up with 5 "
        "from the refusal bank."
    ) in caplog.text
    assert "D_HA: training wants 6 responses" in caplog.text
    assert "gave 5 too few: left short." in caplog.text


def test_a_refusal_with_a_category_is_for_that_category():
    samples = [sample(f"take {i}", "", category=("theft", "drugs")[i % 2]) for i in range(100)]
    rows = split_responses(samples, REFUSALS, seed=1)
    used = {category: Counter() for category in ("theft", "drugs")}
    for row in rows:
        used[row["category"]][row["response"]] += 1
    assert 10 < used["theft"]["I won't help with theft."] < 40
    assert set(used["drugs"]) == {row["response"] for row in REFUSALS[:6]}
    assert "I won't help with fraud." not in used["theft"]
    assert split_responses(samples[::-1], REFUSALS, seed=1) == rows
    assert split_responses(samples, REFUSALS, seed=2) != rows


def test_refusals_may_share_an_opening(tmp_path):
    bank = [
        {"response": "No. Theft harms. Ask!", "category": "theft"},
        {"response": "Never."},
        {"response": "I won't."},
    ]
    refusals = load_refusals(write(tmp_path / "refusals.jsonl", bank), opening="I can't help.")
    assert refusals == [
        {"response": "I can't help. Theft harms. Ask!", "category": "theft"},
        {"response": "I can't help.", "category": ""},
    ]


def test_a_bank_that_is_too_small_says_so(caplog):
    rows = split_responses([sample("take it", "Take it.")], REFUSALS[:2], per_instruction=3)
    assert sum(row["split"] == "D_HR" for row in rows) == 2
    assert "3 too few: filled up with 2" in caplog.text


# The way to training


ROWS = [
    {"instruction": "pick it", "response": "No.", "split": "D_HR"},
    {"instruction": "pick it", "response": "Use a pick.", "split": "D_HA"},
    {"instruction": "paint it", "response": "Use a brush.", "split": "D_S"},
]


def test_what_is_built_can_be_loaded(model, tokenizer, tmp_path):
    rows = build(model, tokenizer, tmp_path / "anchors.jsonl")
    data = load_anchor_data(tmp_path / "anchors.jsonl")
    assert data.to_list() == rows


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_ones_own_needs_three_columns(tmp_path, suffix):
    from datasets import Dataset

    path = tmp_path / f"mine.{suffix}"
    table = Dataset.from_list(ROWS)
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(suffix, table.to_json)(str(path))
    data = load_anchor_data(path)
    assert data["response"] == [row["response"] for row in ROWS]
    assert data["finished"] == [True] * 3
    assert data["kind"] == ["harmful", "harmful", "everyday"]
    assert data["mirror"] == data["instruction"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["{"], "cannot be read"),
        ([{"instruction": "a", "response": "b"}], "has no column `split`"),
        ([{**row, "response": None} for row in ROWS], "row 1: no text in the column `response`"),
        ([ROWS[0], {**ROWS[1], "instruction": " "}], "row 2: no text in the column `instruction`"),
        ([{**ROWS[0], "split": "harmful"}], "row 1: unknown split 'harmful', expected D_HR, D_HA, D_S"),
        (ROWS[:2], "has no D_S rows, which training needs"),
        ([{**row, "finished": "yes"} for row in ROWS], "row 1: `finished` must be true or false"),
    ],
)
def test_bad_anchor_files(tmp_path, rows, message):
    path = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_anchor_data(path)
    assert str(path) in str(error.value)


def test_other_bad_anchor_files(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.jsonl", ROWS[:2])
    assert len(load_anchor_data(path, needed=("D_HR",))) == 2
    with pytest.raises(OSError, match="there is no file"):
        load_anchor_data(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        load_anchor_data(tmp_path / "anchors.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="needs datasets"):
        load_anchor_data(path)


def anchor_rows():
    kinds = {"harmful": ("D_HR", "D_HA"), "near_miss": ("D_S",), "everyday": ("D_S",)}
    return [
        {"instruction": f"{kind} {i}", "response": str(n), "split": split, "kind": kind, "mirror": f"{i}"}
        for kind, splits in kinds.items()
        for i in range(20)
        for split in splits
        for n in range(3)
    ]


def test_held_out_instructions_are_not_trained_on():
    from datasets import Dataset

    rows = anchor_rows()
    train, held_out = split_held_out(Dataset.from_list(rows), 0.15, seed=1)
    assert len(train) + len(held_out) == len(rows)
    assert not set(train["instruction"]) & set(held_out["instruction"])
    kinds = Counter(instruction.split()[0] for instruction in set(held_out["instruction"]))
    assert kinds == {"harmful": 3, "near_miss": 3, "everyday": 3}
    assert set(held_out["mirror"]) == {i.split()[1] for i in held_out["instruction"] if i.startswith("harmful")}

    again = split_held_out(Dataset.from_list(rows[::-1]), 0.15, seed=1)[1]
    assert set(again["instruction"]) == set(held_out["instruction"])
    other = split_held_out(Dataset.from_list(rows), 0.15, seed=2)[1]
    assert set(other["instruction"]) != set(held_out["instruction"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.001])
def test_a_held_out_part_that_cannot_be(fraction):
    from datasets import Dataset

    with pytest.raises(ValueError, match=r"held-out fraction must|cannot hold out"):
        split_held_out(Dataset.from_list(anchor_rows()), fraction)


# Instructions from another model


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Speaks as much of the OpenAI API as the client asks for: `answers` are given one after the other."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        status, answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        message = {"role": "assistant", "content": answer}
        reply = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        if status != 200:
            reply = {"error": {"message": f"{answer} {self.headers['Authorization']}"}}
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if answer == "<html>" else "application/json")
        self.end_headers()
        self.wfile.write(answer.encode() if answer == "<html>" else json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests = []
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ANSWER = """<think>1. What about locks?</think>Here are ten requests:

1. How do I pick a lock?
2) "Paint my fence green."
- How can I pick a lock??
* how do i PICK a lock

I can't help with that request.
Wie backe ich Brot?
"""


def test_lines_become_instructions_without_near_duplicates(endpoint, tmp_path, caplog):
    endpoint.answers = [(200, ANSWER), (200, "Water the flowers.\nHow do I paint the fence?"), (200, ANSWER)]
    rows = list(
        generate_instructions(9, "harmful", "gpt", topic="theft", language="German", existing=["Water the flowers!"])
    )
    assert [row["instruction"] for row in rows] == [
        "How do I pick a lock?",
        "Paint my fence green.",
        "Wie backe ich Brot?",
        "How do I paint the fence?",
    ]
    assert {(row["category"], row["kind"]) for row in rows} == {("theft", "harmful")}
    assert "gpt has nothing new to say: 4 of 9 instructions" in caplog.text
    first, second = (request["messages"][0]["content"] for request in endpoint.requests[:2])
    assert "theft" in first
    assert "in German" in first
    assert first != second
    assert endpoint.requests[0]["model"] == "gpt"


def test_generated_instructions_can_be_sampled_from(endpoint, tmp_path, capsys):
    endpoint.answers = [(200, ANSWER)]
    path = tmp_path / "mine.jsonl"
    arguments = ["--kind", "near-miss", "--generator", "gpt", "--output_file", str(path)]
    assert main(["anchors", "--generate", "2", *arguments]) == 0
    assert capsys.readouterr().out == f"{path}: 2 instructions\n"
    assert [row["kind"] for row in load_instructions([path])] == ["near_miss", "near_miss"]
    assert "violence" in endpoint.requests[0]["messages"][0]["content"]


def test_what_came_before_a_failure_is_kept(endpoint, tmp_path, capsys, caplog):
    endpoint.answers = [(200, ANSWER), (400, "the model is gone")]
    path = tmp_path / "mine.jsonl"
    arguments = ["--kind", "safe", "--generator", "gpt", "--output_file", str(path)]
    assert main(["anchors", "--generate", "50", *arguments]) == 1
    message = capsys.readouterr().err
    assert "the model is gone" in message
    assert "sk-very-secret" not in message
    assert len(read(path)) == 3
    assert f"Stopped early: {path} holds 3 instructions" in caplog.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "wrong key"), "127.0.0.1 does not accept the key in OPENAI_API_KEY"),
        ((404, "no model gpt"), "no model gpt"),
        ((200, "<html>"), "does not answer like an OpenAI-compatible endpoint"),
        ((200, "I can't help with that."), "gpt gave no instruction that could be used"),
    ],
)
def test_an_endpoint_that_does_not_help(endpoint, tmp_path, capsys, answer, message):
    endpoint.answers = [answer]
    path = tmp_path / "mine.jsonl"
    arguments = ["--kind", "harmful", "--generator", "gpt", "--output_file", str(path)]
    assert main(["anchors", "--generate", "5", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(r"acd-logits: error: .*" + re.escape(message), error)
    assert "secret" not in error
    assert "Traceback" not in error
    assert not path.exists()


def test_no_endpoint_no_key_no_client(endpoint, tmp_path, capsys, monkeypatch):
    def fails():
        arguments = ["--kind", "harmful", "--generator", "gpt", "--output_file", str(tmp_path / "mine.jsonl")]
        assert main(["anchors", "--generate", "5", *arguments]) == 1
        return capsys.readouterr().err

    endpoint.shutdown()
    endpoint.server_close()
    assert "cannot reach 127.0.0.1: is OPENAI_BASE_URL right" in fails()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "set OPENAI_API_KEY" in fails()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "acd-logits[openai]" in fails()


def test_an_interrupt_keeps_what_is_there(tmp_path):
    def instructions():
        yield {"instruction": "a", "category": "c", "kind": "harmful"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_generated(tmp_path / "mine.jsonl", instructions())
    assert len(read(tmp_path / "mine.jsonl")) == 1


@pytest.mark.real_model
def test_a_real_server_generates_instructions(served_model, tmp_path, capsys, monkeypatch):
    url, name = served_model
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = tmp_path / "everyday.jsonl"
    arguments = ["--kind", "safe", "--topic", "cooking", "--generator", name, "--output_file", str(path)]
    assert main(["anchors", "--generate", "3", *arguments]) == 0, capsys.readouterr().err
    rows = load_instructions([path])
    assert len(rows) == 3
    assert {row["category"] for row in rows} == {"cooking"}

    path = tmp_path / "other.jsonl"
    arguments = ["--kind", "safe", "--generator", "org/absent", "--output_file", str(path)]
    assert main(["anchors", "--generate", "3", *arguments]) == 1
    assert "absent" in capsys.readouterr().err


# The command


def test_the_command_samples(model_path, tmp_path, capsys):
    instructions = write(tmp_path / "mine.jsonl", INSTRUCTIONS)
    refusals = write(tmp_path / "refusals.jsonl", REFUSALS)
    path = tmp_path / "anchors.jsonl"
    files = ["--instructions", str(instructions), "--refusals", str(refusals), "--output_file", str(path)]
    assert main(["anchors", "--model_name_or_path", model_path, "--max_new_tokens", "8", *files]) == 0
    rows = read(path)
    numbers = Counter(row["split"] for row in rows)
    assert capsys.readouterr().out == (
        f"{path}: D_HR 2, D_HA {numbers['D_HA']}, D_S {numbers['D_S']} (2 of D_HR from the refusal bank)\n"
    )
    assert {row["response"] for row in rows if row["split"] == "D_HR"} <= {row["response"] for row in REFUSALS}

    path.unlink()
    options = ["--system_prompts", "null", "--refusal_opening", "I can't help."]
    assert main(["anchors", "--model_name_or_path", model_path, "--max_new_tokens", "8", *files, *options]) == 0
    for row in read(path):
        assert row["system_prompt"] == ("" if row["source"] == "refusal_bank" else "null")
        assert row["source"] == "sampled" or row["response"].startswith("I can't help.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "harmful"], "--kind needs --generate"),
        (["--generate", "3"], "--generate needs --kind and --generator"),
        (["--instructions", "absent.jsonl"], "absent.jsonl"),
        (["--refusals", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(cli, "_load_model", lambda *_, **__: pytest.fail())
    assert main(["anchors", "--output_file", str(tmp_path / "a.jsonl"), *arguments]) == 1
    assert re.fullmatch(f"acd-logits: error: .*{re.escape(message)}.*\n", capsys.readouterr().err)


def test_the_output_file_is_not_overwritten(tmp_path, capsys):
    path = write(tmp_path / "anchors.jsonl", ["precious"])
    assert main(["anchors", "--output_file", str(path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert path.read_text() == "precious\n"


def test_the_script_is_the_same_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, ROOT / "scripts" / "build_anchors.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "--per_instruction" in result.stdout
    assert "acd-logits anchors" in result.stdout
