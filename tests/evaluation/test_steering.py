"""Steering: a direction is added at one layer, everywhere or where the request meets a condition."""

import math

import pytest
import torch

from acd_logits.evaluation.steering import Condition, Steering, decoder_layers, mean_over_tokens, similarity
from acd_logits.responses import encode_messages, generate_responses
from conftest import HIDDEN, build_model

TEXTS = ["w5 w6 w7", "w10 w11 w12 w13 w14", "w15 w16", "w20"]
QUESTIONS = [([{"role": "user", "content": text}], []) for text in TEXTS]


@pytest.fixture
def direction():
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))


def plain_responses(model, tokenizer):
    prompts = [encode_messages(tokenizer, messages) for messages, _ in QUESTIONS]
    return generate_responses(model, tokenizer, prompts, max_new_tokens=5)


def answer(rival, model, tokenizer):
    return rival.answer(model, tokenizer, QUESTIONS, max_new_tokens=5, batch_size=4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_direction_is_added_to_the_input_of_its_layer(tokenizer, direction, name):
    """What is added to the input of a layer might as well have come out of the layer before."""
    model, other = build_model(name), build_model(name)
    before = plain_responses(model, tokenizer)
    answers = answer(Steering(direction, layer=2, strength=1.5), model, tokenizer)

    def add(_, __, output):
        return (output[0] + 1.5 * direction, *output[1:]) if isinstance(output, tuple) else output + 1.5 * direction

    decoder_layers(other)[1].register_forward_hook(add)
    assert answers == plain_responses(other, tokenizer)
    assert answers != before
    assert plain_responses(model, tokenizer) == before, "the model is as it was"


def test_similarity_is_the_cosine_with_the_projection():
    states = torch.tensor([[3.0, 4.0], [-3.0, 4.0], [0.0, 2.0]])
    got = similarity(states, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([0.6, 0.6, 0.0]))
    slanted = similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 1.0]))
    assert slanted.item() == pytest.approx(math.cos(math.pi / 4))


@pytest.mark.parametrize("larger", [True, False])
def test_only_requests_that_meet_the_condition_are_steered(model, tokenizer, direction, larger):
    """Each row of a padded batch by its own prompt, and not by what is answered to it."""
    alike = []
    for messages, _ in QUESTIONS:
        ids = torch.tensor([encode_messages(tokenizer, messages)])
        with torch.no_grad():
            state = model(ids, output_hidden_states=True).hidden_states[1]
        alike.append(similarity(mean_over_tokens(state, torch.ones_like(ids)), direction).item())
    threshold = sum(sorted(alike)[1:3]) / 2
    condition = Condition(direction, layer=1, threshold=threshold, larger=larger)
    rival = Steering(direction, 2, 3.0, condition)
    answers = answer(rival, model, tokenizer)
    alone = [rival.answer(model, tokenizer, [question], max_new_tokens=5) for question in QUESTIONS]
    assert answers == [response for (response,) in alone], "without padding too"
    plain, steered = plain_responses(model, tokenizer), answer(Steering(direction, 2, 3.0), model, tokenizer)
    met = [(value > threshold) == larger for value in alike]
    assert sum(met) == 2
    assert answers == [b if is_met else a for a, b, is_met in zip(plain, steered, met, strict=True)]
    assert all(a != b for a, b in zip(plain, steered, strict=True))


def test_the_hooks_go_with_an_error(model, direction):
    with pytest.raises(KeyError), Steering(direction, 1, 1.0).applied(model):
        raise KeyError
    assert not decoder_layers(model)[1]._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_a_condition_needs_a_cache(tokenizer, direction, name):
    model = build_model(name)
    model.generation_config.use_cache = name == "mamba2"
    condition = Condition(direction, layer=1, threshold=0.0, larger=True)
    with pytest.raises(ValueError, match=r"generates without one: set use_cache .+, or leave 'cast' out"):
        answer(Steering(direction, 1, 1.0, condition), model, tokenizer)
