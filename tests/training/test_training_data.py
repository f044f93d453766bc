"""Examples: the text as inference sees it, and what of a response is learned."""

import pytest

from acd_logits.training import collate, encode_anchors, encode_example
from acd_logits.training.data import IGNORED, end_of_turn, leave_out_apologies, refusal_openings
from tiny_training import CHAT_TEMPLATE, HARMFUL, anchor_examples, anchor_rows


def test_training_text_is_what_inference_sees(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    turn = [{"role": "user", "content": "w5 w6"}]
    inference = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert inference == [90, 5, 6, 2, 91]
    assert encode_example(tokenizer, "w5 w6", "w7 w8", chat=True, finished=True) == (inference, [7, 8, 2])
    assert encode_example(tokenizer, "w5 w6", "w7 w8", chat=True, finished=False) == (inference, [7, 8])
    plain = tokenizer("w5 w6")["input_ids"]
    assert encode_example(tokenizer, "w5 w6", "w7 w8", chat=False, finished=True) == (plain, [7, 8, 2])


@pytest.mark.parametrize(
    ("behind", "token"),
    [("<turn> w5", "<turn>"), ("w5 <turn> <eos>", "<turn>"), ("", "<eos>"), ("w5", "<eos>")],
)
def test_the_templates_own_token_ends_a_turn(tokenizer, behind, token):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}w90 {{ m.content }} " + behind + " {% endfor %}"
    assert end_of_turn(tokenizer, chat=True) == tokenizer.convert_tokens_to_ids(token)
    assert end_of_turn(tokenizer, chat=False) == tokenizer.eos_token_id


def test_what_refusal_and_answer_begin_with_is_not_avoided(tokenizer):
    rows = [
        {"instruction": "w5", "response": "w9 w10 w11", "split": "D_HR"},
        {"instruction": "w5", "response": "w9 w12 w11", "split": "D_HA"},
        {"instruction": "w5", "response": "w13 w10 w11", "split": "D_HA"},
        {"instruction": "w6", "response": "w9 w10 w11", "split": "D_HA"},
        {"instruction": "w5", "response": "w9 w10 w11", "split": "D_S"},
    ]
    rows = [{**row, "finished": False, "kind": "harmful", "mirror": ""} for row in rows]
    batch = collate(encode_anchors(rows, tokenizer, False, 64))
    assert batch["labels"].tolist() == [[9, 10, 11], [9, 12, 11], [13, 10, 11], [9, 10, 11], [9, 10, 11]]
    assert batch["avoided"].tolist() == [
        [IGNORED, 10, 11],
        [IGNORED, 12, 11],
        [13, 10, 11],
        [9, 10, 11],
        [9, 10, 11],
    ]


def test_long_responses_are_cut_off(tokenizer):
    (example,) = encode_anchors(anchor_rows(1)[:1], tokenizer, False, 2)
    prompt = f"{HARMFUL} w30"
    parts = {"input_ids": tokenizer(prompt)["input_ids"], "response": [50, 51], "opening": 0, "avoid_until": 2}
    parts |= {"split": 0, "instruction": prompt, "kind": "harmful", "mirror": "0", "begun": False}
    assert example == parts | {"texts": [[], prompt, ""]}


def test_refusals_are_followed_to_their_end_and_avoided_at_their_start(tokenizer):
    rows = anchor_rows(1)[:2]
    refusal, answer = encode_anchors(rows, tokenizer, False, 2, 48)
    assert refusal["response"] == [50, 51, 52, tokenizer.eos_token_id]
    assert answer["response"] == [60, 61]
    assert collate([refusal])["avoided"].tolist() == [[50, 51, IGNORED, IGNORED]]


def test_earlier_turns_and_what_has_begun_are_a_part_of_the_prompt(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = {"history": ["w5", "w6"], "begun": "w8 w9"}
    prompt, response = encode_example(tokenizer, "w7", "w10", chat=True, finished=True, **turns)
    assert (prompt, response) == ([90, 5, 2, 91, 6, 2, 90, 7, 2, 91, 8, 9], [10, 2])
    assert encode_example(tokenizer, "w7", "w10", chat=False, finished=False, **turns)[0] == [5, 6, 7, 8, 9]


@pytest.mark.real_model
def test_smollm2_text():
    from transformers import AutoTokenizer

    from acd_logits.demo_model import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    prompt, response = encode_example(tokenizer, "Hi there", "Hello!", chat=True, finished=True)
    text = tokenizer.decode(prompt + response)
    assert text.endswith("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>")


def test_answers_that_begin_as_refusals_do_are_not_followed(tokenizer):
    """What is left of them is the place of the first token, on safe requests."""
    examples = anchor_examples(tokenizer, held_out=0).train[:6]
    refusal, answer, safe = examples[:3]
    answer["response"], safe["response"] = [50, 60, 61], [50, 70, 71]
    openings = refusal_openings(examples)
    assert openings == [50]
    kept = leave_out_apologies(examples, openings)
    assert kept == [refusal, {**safe, "response": [50], "apology": True}, *examples[3:]]
    assert safe["response"] == [50, 70, 71]


def test_what_goes_on_with_an_answer_is_no_apology(tokenizer):
    refusal, _, safe = anchor_examples(tokenizer, held_out=0).train[:3]
    behind = refusal | {"begun": True, "response": [70, 50]}
    assert refusal_openings([refusal, behind]) == [50]
    safe |= {"begun": True, "response": [50, 71]}
    assert leave_out_apologies([safe], [50]) == [safe]
