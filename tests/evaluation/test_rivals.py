"""The rivals: each answers as its paper says, and leaves the model as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from acd_logits.evaluation.rivals import (
    ASK_TO_REFUSE,
    REFUSAL,
    AdaCD,
    Guard,
    LoRA,
    SafeDecoding,
    ask_to_refuse,
)
from acd_logits.responses import encode_messages, generate_responses
from conftest import VOCAB, build_model

TEXTS = ["w5 w6 w7", "w10 w11 w12 w13 w14", "w15"]
QUESTIONS = [([{"role": "user", "content": text}], []) for text in TEXTS]


def prompt(tokenizer, question):
    messages, begun = question
    return encode_messages(tokenizer, messages) + begun


def plain_responses(model, tokenizer, questions=QUESTIONS, length=6):
    return generate_responses(model, tokenizer, [prompt(tokenizer, q) for q in questions], max_new_tokens=length)


def adapt(model):
    """The model with a random adapter, loud enough to change what it says."""
    torch.manual_seed(4)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.4)
    return adapted.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora")
    adapt(build_model()).save_pretrained(path)
    return path


def test_safety_tuning_is_the_adapted_model_for_as_long_as_it_answers(model, tokenizer, adapter):
    before = plain_responses(model, tokenizer)
    answers = LoRA(adapter).answer(model, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=2)
    assert answers == plain_responses(adapt(build_model()), tokenizer)
    assert answers != before
    assert plain_responses(model, tokenizer) == before
    assert not hasattr(model, "peft_config")


def write(model, ids, length, choose):
    """Tokens chosen one at a time, from the ids of both streams, without padding or cache."""
    plain, other = ids
    written = []
    for _ in range(length):
        token = choose([*plain, *written], [*other, *written])
        written.append(token)
    return written


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def safe_decoding_token(plain, expert, strength, common):
    """As the paper has it: widen k until enough tokens are among the first k of both."""
    order, expert_order = (some.argsort(descending=True).tolist() for some in (plain, expert))
    k = common
    while len(space := set(order[:k]) & set(expert_order[:k])) < common:
        k += 1
    p, q = plain.softmax(-1), expert.softmax(-1)
    return max(space, key=lambda token: (p[token] + strength * (q[token] - p[token])).item())


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_safe_decoding_moves_the_first_tokens_towards_the_expert(model, tokenizer, adapter, strength):
    rival = SafeDecoding(adapter, strength=strength, tokens=3, common=4)
    answers = rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=2)
    base, expert = build_model(), adapt(build_model())
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = prompt(tokenizer, question)

        def choose(ids, _):
            return safe_decoding_token(logits(base, ids), logits(expert, ids), strength, 4)

        first = write(base, (ids, ids), 3, choose)
        rest = write(base, (ids + first, []), 3, lambda ids, _: logits(base, ids).argmax().item())
        assert list(answer.ids) == first + rest
        assert answer.text == tokenizer.decode(answer.ids)
    assert not hasattr(model, "peft_config")


def test_safe_decoding_over_all_tokens_goes_from_the_model_to_the_expert(model, tokenizer, adapter):
    for strength, expected in ((0.0, model), (1.0, adapt(build_model()))):
        rival = SafeDecoding(adapter, strength=strength, tokens=6, common=VOCAB)
        assert rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=6) == plain_responses(expected, tokenizer)


def ada_cd_token(plain, asked, rival):
    """As the paper has it: the rank of the asked model's choice, both confidences, the sign, the plausible tokens."""
    p, q = plain.softmax(-1), asked.softmax(-1)
    rank = plain.argsort(descending=True).tolist().index(asked.argmax().item()) + 1
    refuses = 1 / rank >= rival.agreement and p.max() >= rival.agreement * q.max()
    scores = asked + (rival.strength if refuses else -rival.strength) * (asked - plain)
    scores[p < rival.plausible * p.max()] = -torch.inf
    return scores.argmax().item(), refuses


@pytest.mark.parametrize("agreement", [0.9, 0.3])
def test_ada_cd_decides_the_sign_for_every_request_and_token(tokenizer, agreement):
    model, signs = build_model(seed=2), set()
    rival = AdaCD(strength=0.4, tokens=4, agreement=agreement, plausible=0.05)
    tokenizer.chat_template = "{% for m in messages %}{{ 'w90 ' if m.role == 'system' }}{{ m.content }} {% endfor %}w3"
    answers = rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=2)
    for (messages, _), answer in zip(QUESTIONS, answers, strict=True):
        plain = encode_messages(tokenizer, messages)
        asked = encode_messages(tokenizer, [{"role": "system", "content": ASK_TO_REFUSE}, *messages])

        def choose(ids, others):
            token, refuses = ada_cd_token(logits(model, ids), logits(model, others), rival)
            signs.add(bool(refuses))
            return token

        first = write(model, (plain, asked), 4, choose)
        rest = write(model, (plain + first, []), 2, lambda ids, _: logits(model, ids).argmax().item())
        assert list(answer.ids) == first + rest
    assert signs == {True, False}


def test_ada_cd_asks_to_refuse_before_anything_else():
    user = {"role": "user", "content": "open the door"}
    assert ask_to_refuse([user]) == [{"role": "system", "content": ASK_TO_REFUSE}, user]
    first, *others = ask_to_refuse([{"role": "system", "content": "Be brief."}, user])
    assert first == {"role": "system", "content": f"{ASK_TO_REFUSE}\n\nBe brief."}
    assert others == [user]


def test_first_tokens_that_are_the_whole_answer(model, tokenizer, adapter):
    rival = SafeDecoding(adapter, tokens=5, common=3)
    counted = []
    whole = rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=5, on_batch=counted.append)
    short = rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=2)
    assert [response.ids[:2] for response in whole] == [response.ids for response in short]
    assert sum(counted) == 3
    end = whole[0].ids.index(whole[0].ids[2])
    model.generation_config.eos_token_id = [whole[0].ids[2]]
    ended = rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=8, on_batch=counted.append)
    assert (ended[0].ids, ended[0].finished) == (whole[0].ids[:end], True)
    assert sum(counted) == 6
    with pytest.raises(ValueError, match="the longest prompt and its response take"):
        rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=300)


class Words:
    """Calls one text harmless, and cannot read another."""

    def judge_requests(self, requests):
        self.requests = requests
        return [
            "harmless" if "w15" in request else "invalid" if "w10" in request else "harmful" for request in requests
        ]


def test_a_guard_stops_what_it_does_not_call_harmless(model, tokenizer):
    judge, counted = Words(), []
    turns = [{"role": "assistant", "content": "w15"}, {"role": "user", "content": "w8"}]
    questions = [*QUESTIONS, (QUESTIONS[0][0] + turns, [])]
    answers = Guard(judge).answer(model, tokenizer, questions, max_new_tokens=6, batch_size=2, on_batch=counted.append)
    assert judge.requests == [*TEXTS, "w5 w6 w7\n\nw8"], "what the assistant says is not the request"
    assert [answer.text == REFUSAL for answer in answers] == [True, True, False, True]
    assert answers[0].finished
    assert answers[2] == plain_responses(model, tokenizer)[2]
    assert sum(counted) == 4


def test_answers_go_on_from_what_they_were_begun_with(model, tokenizer, adapter):
    (messages, _), *_ = QUESTIONS
    (whole,) = LoRA(adapter).answer(model, tokenizer, [(messages, [])], max_new_tokens=6)
    (rest,) = LoRA(adapter).answer(model, tokenizer, [(messages, list(whole.ids[:2]))], max_new_tokens=4)
    assert rest.ids == whole.ids[2:]
    (whole,) = AdaCD(tokens=6).answer(model, tokenizer, [(messages, [])], max_new_tokens=6)
    (rest,) = AdaCD(tokens=6).answer(model, tokenizer, [(messages, list(whole.ids[:2]))], max_new_tokens=4)
    assert rest.ids == whole.ids[2:]


def test_what_writes_answers_alone_scores_none(model):
    with pytest.raises(ValueError, match="AdaCD writes answers, and cannot score given ones"):
        AdaCD().applied(model)
