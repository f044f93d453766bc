"""Sampling: what the model sees, and under which system prompts."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from acd_logits import anchors
from acd_logits.anchors import SamplingSettings
from acd_logits.anchors.sampling import open_partial
from acd_logits.pairs.texts import OPPOSITE_PROMPT, SAFE_PROMPT
from acd_logits.responses import encode_messages
from tiny_anchors import INSTRUCTIONS, TEMPLATE, build_anchor_model, build_anchor_tokenizer

NO_SYSTEM_TURN = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def tokenizer():
    return build_anchor_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_anchor_model(tokenizer)


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


def test_a_template_that_writes_the_date_goes_on_the_next_day(model, tokenizer, tmp_path, monkeypatch):
    """Every prompt has other tokens then, and its text is the same."""
    settings, rows = SamplingSettings(system_prompts=("null",), max_new_tokens=3), []
    for day in "open", "close":
        dated = lambda tokenizer, turns, day=day: [*tokenizer(day)["input_ids"], *encode_messages(tokenizer, turns)]  # noqa: E731
        monkeypatch.setattr("acd_logits.anchors.sampling.encode_messages", dated)
        rows.append(anchors.sample_responses(model, tokenizer, INSTRUCTIONS[:3], tmp_path / "partial", settings))
    assert rows[0] == rows[1]


def test_a_partial_file_is_converted_line_by_line(tmp_path):
    """So no more than one batch is in memory as JSON."""
    path, seen = tmp_path / "partial.jsonl", []
    assert open_partial(path, "run") == []
    path.write_text(path.read_text() + '[{"a": 1}]\n[{"a": 2}]\n[{"a"')
    assert open_partial(path, "run", lambda rows: rows[0]["a"]) == [1, 2]
    assert path.read_text() == '{"run": "run"}\n[{"a": 1}]\n[{"a": 2}]\n'
    path.write_text('{"run": "run"}\n[{"a": 1}]\nno json\n')
    with pytest.raises(ValueError, match="of a run with another model"):
        open_partial(path, "run", seen.append)
    assert seen == [[{"a": 1}]]
