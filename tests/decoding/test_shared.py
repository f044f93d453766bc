"""The shared instruction: exact against a slow reference with the same mask, and stored once."""

import copy

import pytest
import torch
from transformers.utils import logging

from acd_logits import ACDLogitsProcessor
from conftest import DEVICE, assert_same, build_batch, build_model, build_pair
from reference import SharedReference

ALPHA = 0.7
ROTARY = ["llama", "qwen3", "mixtral", "phi3"]
NEW = 6


def generate(model, inputs, processor, **kwargs):
    options = {"max_new_tokens": NEW, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    return model.generate(**inputs, logits_processor=[processor], **{**options, **kwargs})


def both(model, pair, inputs, beta=0.0, horizon=None, alpha=ALPHA, **kwargs):
    """The same call with the shared cache, and with the reference on a model of its own."""
    acd = ACDLogitsProcessor(model, pair, alpha=alpha, beta=beta, horizon=horizon, share_instruction_kv=True)
    got = generate(model, inputs, acd, **kwargs)
    acd.detach()
    beams = kwargs.get("num_beams", 1)
    mask = inputs["attention_mask"].repeat_interleave(beams, 0)
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.repeat_interleave(beams)
    reference = SharedReference(model, pair, alpha, beta, horizon, beams=beams > 1, mask=mask)
    assert_same(got, generate(model, inputs, reference, **kwargs))
    return got


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("lengths", [(9,), (11, 7, 10), (5, 1)])
def test_shared_is_the_masked_reference(name, lengths):
    both(build_model(name), build_pair(), build_batch(lengths))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention(attention):
    model = build_model()
    model.set_attn_implementation(attention)
    both(model, build_pair(), build_batch())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"beta": 0.2},
        {"alpha": torch.tensor([0.0, 0.5, 1.0])},
    ],
    ids=str,
)
@pytest.mark.parametrize("horizon", [None, 1, 3, NEW])
def test_every_way_to_decode(model, pair, options, horizon):
    single = "prompt_lookup_num_tokens" in options
    inputs = build_batch((9,) if single else (11, 7, 10))
    if single:  # something to find in the prompt
        inputs["input_ids"] = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]], device=DEVICE)
    both(model, pair, inputs, horizon=horizon, **options)


def test_an_assistant_drafts(model, pair):
    acd = ACDLogitsProcessor(model, pair, alpha=ALPHA, share_instruction_kv=True)
    inputs = build_batch((9,))
    plain = generate(model, inputs, acd)
    assert_same(generate(model, inputs, acd, assistant_model=copy.deepcopy(build_model())), plain)


def test_a_prompt_of_embeddings(model, pair):
    acd = ACDLogitsProcessor(model, pair, alpha=ALPHA, share_instruction_kv=True)
    inputs = build_batch()
    expected = generate(model, inputs, acd).sequences[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(generate(model, {**inputs, "inputs_embeds": embeds}, acd).sequences, expected)


def test_prompts_of_any_length(model):
    for n_s, n_a in ((0, 4), (4, 0), (1, 9)):
        both(model, build_pair(n_s=n_s, n_a=n_a), build_batch())


def test_a_second_turn_goes_on(model, pair):
    """What is shared is the first prompt; what comes later is in both streams."""
    acd = ACDLogitsProcessor(model, pair, alpha=ALPHA, beta=0.0, share_instruction_kv=True)
    inputs = build_batch((9,))
    first = generate(model, inputs, acd, max_new_tokens=4)
    ids = torch.cat([first.sequences, torch.tensor([[12, 13, 14]], device=DEVICE)], 1)
    second = generate(model, {"input_ids": ids}, acd, past_key_values=first.past_key_values)
    reference = SharedReference(model, pair, ALPHA)
    reference.start = 9
    acd.detach()
    assert_same(second, generate(model, {"input_ids": ids}, reference))


def test_the_instruction_is_stored_once(model, pair):
    acd = ACDLogitsProcessor(model, pair, alpha=ALPHA, share_instruction_kv=True)
    inputs = build_batch((200, 180))
    cache = generate(model, inputs, acd, max_new_tokens=3).past_key_values
    # x but for its last token, both soft prompts, and the last token and two new ones in each stream
    assert [tuple(layer.keys.shape[::2]) for layer in cache.layers] == [(2, 199 + 7 + 4 + 2 * 3)] * 3


def test_past_the_horizon_one_stream_is_left(model, pair):
    acd = ACDLogitsProcessor(model, pair, alpha=ALPHA, share_instruction_kv=True, horizon=2)
    cache = generate(model, build_batch((20,)), acd, max_new_tokens=5).past_key_values
    assert cache.layers[0].keys.shape[-2] == 19 + 7 + 5


def test_the_prompt_runs_once_without_a_soft_prompt(model, pair, monkeypatch):
    acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True, frozen_model=True)
    sizes = []
    model.model.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.last_hidden_state.shape[:2])))
    generate(model, build_batch((11, 7)), acd, max_new_tokens=3)
    assert sizes == [(2, 10), (1, 7), (1, 4), (2, 2), (2, 2), (2, 2)]  # the soft prompts in between, once for ever
    sizes.clear()
    generate(model, build_batch((11, 7)), acd, max_new_tokens=1)
    assert sizes == [(2, 10), (2, 2)]


def test_hidden_states_and_attentions_are_of_what_was_contrasted(pair):
    model = build_model()
    model.set_attn_implementation("eager")
    acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
    out = generate(model, build_batch((9,)), acd, output_hidden_states=True, output_attentions=True)
    assert [states[-1].shape[1] for states in out.hidden_states] == [1] * NEW
    assert [a[-1].shape[-2:] for a in out.attentions] == [(1, 9 + i) for i in range(NEW)]


def test_it_differs_from_not_sharing(model, pair):
    shared, exact = (
        generate(model, build_batch(), ACDLogitsProcessor(model, pair, share_instruction_kv=share))
        for share in (True, False)
    )
    assert not torch.equal(shared.scores[0], exact.scores[0])


class TestRefusals:
    @pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon_alibi", "mistral_sliding", "gemma3", "mamba2"])
    def test_other_architectures(self, name):
        with pytest.raises(ValueError, match="no rotary embeddings over full attention"):
            ACDLogitsProcessor(build_model(name), build_pair(), share_instruction_kv=True)

    def test_other_attention(self, model, pair, monkeypatch):
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
        with pytest.raises(ValueError, match="which flex_attention attention does not take"):
            ACDLogitsProcessor(model, pair, share_instruction_kv=True)

    def test_static_caches(self, model, pair):
        acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
        with pytest.raises(ValueError, match="works with a dynamic cache only"):
            generate(model, build_batch(), acd, cache_implementation="static")

    def test_cropping_the_instruction(self, model, pair):
        acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
        cache = generate(model, build_batch((9,)), acd).past_key_values
        cache.crop(-2)
        with pytest.raises(ValueError, match="a shared instruction cannot be cropped"):
            cache.crop(-20)

    def test_the_cache_of_the_other_way(self, model, pair):
        inputs = build_batch((9,))
        acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
        first = generate(model, inputs, acd)
        other = ACDLogitsProcessor(model, pair)
        with pytest.raises(ValueError, match="filled under another share_instruction_kv"):
            generate(model, {"input_ids": first.sequences}, other, past_key_values=first.past_key_values)


@pytest.mark.parametrize("trained", [True, False])
def test_the_way_a_pair_was_trained_is_the_default(model, trained, caplog):
    logging.enable_propagation()
    pair = build_pair(share_instruction_kv=trained)
    acd = ACDLogitsProcessor(model, pair)
    assert type(acd.streams).__name__ == ("SharedStreams" if trained else "PairedStreams")
    assert not caplog.text
    ACDLogitsProcessor(model, pair, share_instruction_kv=not trained)
    assert "it may protect less" in caplog.text
