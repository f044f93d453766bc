"""`acd.explain`: its probabilities against separate slow forwards, and what it refuses."""

import copy
import json
import math

import pytest
import torch
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, Phi3Config, Phi3ForCausalLM, set_seed

from acd_logits import ACDLogitsProcessor
from acd_logits.decoding import Candidate, NewToken
from conftest import DEVICE, HIDDEN, VOCAB, build_batch, build_key_value_pair, build_model, build_pair
from reference import shared_logits

ALPHA, BETA, NEW, K = 0.6, 0.05, 9, 4
STREAMS = ("plain", "safeguarding", "adversarial", "acd")


def explain(model, pair, tokenizer, batch, acd=None, **kwargs):
    processor = ACDLogitsProcessor(model, pair, **{"alpha": ALPHA, "beta": BETA} | (acd or {}))
    kwargs = {"do_sample": False, "max_new_tokens": NEW} | kwargs
    set_seed(0)
    return processor.explain(**batch, tokenizer=tokenizer, num_candidates=K, **kwargs)


@torch.no_grad()
def slow(model, pair, prompt, answer, alpha, beta, horizon, shared, temperature):
    """The four distributions in front of each token of the answer, by a forward of its own for each stream."""
    steps = []
    for step in range(len(answer)):
        ids = torch.tensor(prompt + answer[:step], device=DEVICE)

        def stream(soft, ids=ids):
            if shared:
                return shared_logits(model, soft, ids, len(prompt))[-1].float()
            embeds = torch.cat([soft, model.get_input_embeddings()(ids)])[None]
            return model(inputs_embeds=embeds, use_cache=False).logits[0, -1].float()

        plain = model(ids[None], use_cache=False).logits[0, -1].float()
        safe, adversarial = stream(pair.safeguarding), stream(pair.adversarial)
        if horizon is not None and step >= horizon:
            steps.append((plain, safe, None, safe))
            continue
        acd = (safe - alpha * adversarial) / (1 - alpha if temperature else 1)
        if beta and alpha:
            acd = acd.masked_fill(safe < safe.max() + math.log(beta), -math.inf)
        steps.append((plain, safe, adversarial, acd if alpha else safe))
    return [[None if each is None else each.softmax(-1) for each in step] for step in steps]


CASES = {
    "greedy": ({}, {}),
    "sampling": ({}, {"do_sample": True, "temperature": 1.7, "top_k": 20}),
    "horizon": ({"horizon": 4}, {}),
    "all_tokens": ({"beta": 0.0}, {"do_sample": True}),
    "eq_5_alone": ({"keep_temperature": False}, {"do_sample": True}),
    "one_strength_per_prompt": ({"alpha": torch.tensor([0.0, 0.4, 0.9])}, {}),
    "frozen": ({"frozen_model": True}, {}),
    "shared": ({"share_instruction_kv": True}, {}),
    "shared_sampling_horizon": ({"share_instruction_kv": True, "horizon": 3}, {"do_sample": True}),
    "static": ({}, {"cache_implementation": "static", "disable_compile": True}),
    "no_cache": ({}, {"use_cache": False}),
    "chunked": ({}, {"prefill_chunk_size": 4}),
}


def check(model, pair, tokenizer, batch, acd, kwargs):
    untouched = copy.deepcopy(model)
    explanations = explain(model, pair, tokenizer, batch, acd, **kwargs)
    assert len(explanations) == len(batch["input_ids"])
    for row, explanation in enumerate(explanations):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        answer = [token.token_id for token in explanation.tokens]
        assert explanation.prompt == tokenizer.decode(prompt)
        alpha, beta = float(torch.as_tensor(acd.get("alpha", ALPHA)).expand(3)[row]), acd.get("beta", BETA)
        assert (explanation.alpha, explanation.beta) == (pytest.approx(alpha), beta)
        shared = acd.get("share_instruction_kv", False) or pair.config.prompt_type == "key_value"
        options = (alpha, beta, acd.get("horizon"), shared, acd.get("keep_temperature", True))
        expected = slow(untouched, pair, prompt, answer, *options)
        for token, distributions in zip(explanation.tokens, expected, strict=True):
            check_token(token, distributions)


def check_token(token, distributions):
    for stream, distribution in zip(STREAMS, distributions, strict=True):
        got = [getattr(candidate, stream) for candidate in token.candidates]
        if distribution is None:
            assert got == [None] * len(got)
            continue
        wanted = distribution[[candidate.token_id for candidate in token.candidates]]
        torch.testing.assert_close(torch.tensor(got), wanted.cpu(), atol=1e-4, rtol=0)
        likeliest = [i for i in distribution.topk(K).indices.tolist() if distribution[i] > 1e-4]
        assert set(likeliest) <= {candidate.token_id for candidate in token.candidates}
        assert token.first(stream).token_id == int(distribution.argmax())
    _, safe, _, acd = distributions
    assert token.num_kept == int((acd > 0).sum())
    assert token.cut_probability == pytest.approx(float(safe[acd == 0].sum()), abs=1e-4)
    for candidate in token.candidates:
        before, behind = float(safe[candidate.token_id]), float(acd[candidate.token_id])
        if abs(before - behind) > 1e-4:
            assert candidate.change == ("cut" if behind == 0 else "raised" if behind > before else "lowered")


@pytest.mark.parametrize("lengths", [(11,) * 3, (11, 6, 9)], ids=["even", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_separate_forwards(model, pair, tokenizer, case, lengths):
    check(model, pair, tokenizer, build_batch(lengths), *CASES[case])


@pytest.mark.parametrize("name", ["mistral_sliding", "gpt2", "bloom", "mamba2", "gemma3"])
def test_other_architectures(tokenizer, name):
    check(build_model(name), build_pair(5, 5), tokenizer, build_batch(), {}, {"do_sample": True})


@pytest.mark.parametrize("acd", [{}, {"horizon": 3}], ids=["all", "horizon"])
def test_key_value_pairs(model, tokenizer, acd):
    check(model, build_key_value_pair(), tokenizer, build_batch(), acd, {})


def test_the_tokens_are_those_of_generate(model, pair, tokenizer):
    batch, acd = build_batch(), ACDLogitsProcessor(model, pair, ALPHA, BETA)
    for kwargs in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}):
        set_seed(3)
        expected = model.generate(**batch, logits_processor=[acd], max_new_tokens=NEW, **kwargs)
        set_seed(3)
        got = acd.explain(**batch, tokenizer=tokenizer, max_new_tokens=NEW, **kwargs)
        assert [[token.token_id for token in row.tokens] for row in got] == expected[:, 11:].tolist()


def test_greedy_answers_part_where_plain_generation_goes_on_otherwise(model, tokenizer):
    batch = build_batch((11, 11, 11, 11))
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, 11:]
    places = []
    quiet = build_pair(scale=1.0)
    for row, explanation in enumerate(explain(model, quiet, tokenizer, batch, {"alpha": 0.1})):
        answer = [token.token_id for token in explanation.tokens]
        different = [i for i in range(NEW) if answer[: i + 1] != plain[row, : i + 1].tolist()]
        assert explanation.parts_at == (different[0] if different else None)
        places.append(explanation.parts_at)
    assert len(set(places)) > 1, "this test needs rows that part in different places"


def test_equal_prompts_change_nothing(model, tokenizer):
    prompt = torch.zeros(0, HIDDEN, device=DEVICE)
    from acd_logits import PromptPair

    (explanation,) = explain(model, PromptPair(prompt, prompt), tokenizer, build_batch((8,)), {"alpha": 0.0})
    assert explanation.parts_at is None
    assert {candidate.change for token in explanation.tokens for candidate in token.candidates} == {"same"}


def test_an_answer_ends_with_its_end(model, pair, tokenizer):
    batch = build_batch()
    whole = explain(model, pair, tokenizer, batch)
    ends = [row.tokens[place].token_id for row, place in zip(whole, (2, 5), strict=False)]
    shorter = explain(model, pair, tokenizer, batch, eos_token_id=ends, pad_token_id=0)
    for before, behind in zip(whole, shorter, strict=True):
        ids = [token.token_id for token in before.tokens]
        stop = min((ids.index(end) + 1 for end in ends if end in ids), default=NEW)
        assert [token.token_id for token in behind.tokens] == ids[:stop]
    assert len({len(row.tokens) for row in shorter}) > 1


def test_an_answer_that_a_stopping_criterion_ends(model, pair, tokenizer):
    batch = build_batch()
    whole = explain(model, pair, tokenizer, batch)
    stop = whole[0].tokens[2].token_id

    def stops(input_ids, scores):
        return input_ids[:, -1] == stop

    settings = {"stopping_criteria": [stops], "eos_token_id": 96, "pad_token_id": 0}
    first = explain(model, pair, tokenizer, batch, **settings)[0]
    assert [token.token_id for token in first.tokens] == [token.token_id for token in whole[0].tokens[:3]]


def test_processors_that_act_first_are_in_stream_s(model, pair, tokenizer):
    batch = build_batch((11,))
    banned = explain(model, pair, tokenizer, batch)[0].tokens[0].token_id
    first = explain(model, pair, tokenizer, batch, bad_words_ids=[[banned]])[0].tokens[0]
    assert first.token_id != banned
    assert all(candidate.safeguarding == 0 for candidate in first.candidates if candidate.token_id == banned)


def test_a_second_turn_from_the_returned_cache(model, pair, tokenizer):
    batch, acd = build_batch((8,)), ACDLogitsProcessor(model, pair, ALPHA, BETA)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    first = model.generate(**batch, logits_processor=[acd], return_dict_in_generate=True, **settings)
    text = {"input_ids": torch.cat([first.sequences, first.sequences[:, :3]], 1)}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    (expected,) = acd.explain(**text, tokenizer=tokenizer, **settings)
    (got,) = acd.explain(**text, past_key_values=first.past_key_values, tokenizer=tokenizer, **settings)
    assert [token.token_id for token in got.tokens] == [token.token_id for token in expected.tokens]
    for ours, theirs in zip(got.tokens, expected.tokens, strict=True):
        assert ours.chosen.plain == pytest.approx(theirs.chosen.plain, abs=1e-4)
        assert ours.chosen.acd == pytest.approx(theirs.chosen.acd, abs=1e-4)


def test_texts_of_tokens_make_up_the_answer(model, pair, tokenizer):
    (explanation,) = explain(model, pair, tokenizer, build_batch((11,)))
    assert "".join(token.text for token in explanation.tokens).strip() == explanation.answer


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 2}, "not under beam search"),
        ({"num_beams": 2, "do_sample": True}, "not under beam sample"),
        ({"prompt_lookup_num_tokens": 2}, "not under assisted generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "leave out num_return_sequences"),
        ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 2)])}, "leave out logits_processor"),
        ({"custom_generate": lambda **_: None}, "leave out custom_generate"),
        ({"position_ids": torch.arange(11)[None]}, "leave out position_ids"),
        ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1, got 0"),
        ({"num_candidates": True}, "num_candidates must be a whole number of at least 1, got True"),
    ],
)
def test_refused(model, pair, tokenizer, kwargs, message):
    acd = ACDLogitsProcessor(model, pair)
    with pytest.raises(ValueError, match=message) as error:
        acd.explain(**build_batch((11,)), tokenizer=tokenizer, max_new_tokens=3, **kwargs)
    assert "\n" not in str(error.value)


def test_drafts_and_embeddings_are_refused(model, pair, tokenizer):
    acd = ACDLogitsProcessor(model, pair)
    with pytest.raises(ValueError, match="leave out assistant_model"):
        acd.explain(**build_batch((11,)), tokenizer=tokenizer, assistant_model=build_model(seed=5))
    embeds = model.get_input_embeddings()(build_batch((11,))["input_ids"]).detach()
    with pytest.raises(ValueError, match="needs the whole text as input_ids"):
        acd.explain(inputs_embeds=embeds, tokenizer=tokenizer, max_new_tokens=3)


def test_texts_with_other_frequencies_are_refused(pair, tokenizer):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters=rope,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    acd = ACDLogitsProcessor(Phi3ForCausalLM(config).eval().to(DEVICE), pair)
    assert len(acd.explain(**build_batch((11,)), tokenizer=tokenizer, max_new_tokens=9)[0].tokens) == 9
    with pytest.raises(ValueError, match="Phi3ForCausalLM has other rotary frequencies"):
        acd.explain(**build_batch((11,)), tokenizer=tokenizer, max_new_tokens=60)


def test_a_tie_is_no_parting():
    """As in bfloat16, where the two likeliest tokens often have the same logit."""
    tied = [Candidate(token, "", 0.4, 0.5, 0.1, acd, "raised") for token, acd in ((7, 0.3), (3, 0.7))]
    assert not NewToken(3, "", tuple(tied), 2, 0.0).parts


def test_the_model_is_left_as_it_was(model, pair, tokenizer):
    batch = build_batch()
    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    acd = ACDLogitsProcessor(model, pair, ALPHA, BETA)
    explanation = acd.explain(**batch, tokenizer=tokenizer, max_new_tokens=NEW)[0]
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), plain)
    assert json.loads(explanation.to_json())["tokens"][0]["token_id"] == explanation.tokens[0].token_id
    acd.detach()
    with pytest.raises(RuntimeError, match="keep it attached"):
        acd.explain(**batch, tokenizer=tokenizer, max_new_tokens=2)
