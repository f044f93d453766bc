"""The shared instruction: exact against a slow reference with the same mask, and stored once."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.utils import logging

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.decoding import shared
from acd_logits.pairs.key_values import embeddings_to_key_values, key_value_sizes
from conftest import (
    _DECODER,
    ARCHITECTURES,
    DEVICE,
    assert_same,
    build_batch,
    build_key_value_pair,
    build_model,
    build_pair,
)
from reference import SharedReference

ALPHA = 0.7
ROTARY = ["llama", "qwen3", "mixtral", "phi3"]
NEW = 6
BUILD = {"embedding": build_pair, "key_value": build_key_value_pair}


@pytest.fixture(params=BUILD)
def build(request):
    """Makes a pair of either kind."""
    return BUILD[request.param]


@pytest.fixture
def pair(build):
    return build()


@pytest.fixture(params=[True, False], ids=["at once", "x first"])
def _prefill(request, monkeypatch):
    """Prompts run in one forward with what is contrasted behind them, as short ones do, or before it."""
    if not request.param:
        monkeypatch.setattr(shared, "_SHORT", 0)


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


@pytest.mark.usefixtures("_prefill")
@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("lengths", [(9,), (11, 7, 10), (5, 1), (1,)])
def test_shared_is_the_masked_reference(name, lengths, pair):
    both(build_model(name), pair, build_batch(lengths))


@pytest.mark.usefixtures("_prefill")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention(attention, pair):
    model = build_model()
    model.set_attn_implementation(attention)
    both(model, pair, build_batch())


@pytest.mark.usefixtures("_prefill")
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


@pytest.mark.usefixtures("_prefill")
def test_prompts_of_any_length(model, build):
    for n_s, n_a in ((0, 4), (4, 0), (1, 9)):
        both(model, build(n_s=n_s, n_a=n_a), build_batch())


@pytest.mark.usefixtures("_prefill")
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


def test_the_prompt_runs_once_without_a_soft_prompt(model):
    acd = ACDLogitsProcessor(model, build_pair(), share_instruction_kv=True, frozen_model=True)
    sizes = []
    model.model.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.last_hidden_state.shape[:2])))
    generate(model, build_batch((11, 7)), acd, max_new_tokens=3)
    assert sizes == [(1, 7), (1, 4), (2, 12), (2, 2), (2, 2)]  # the soft prompts first, once for ever
    sizes.clear()
    generate(model, build_batch((11, 7)), acd, max_new_tokens=1)
    assert sizes == [(2, 12)]
    sizes.clear()
    generate(model, build_batch((257, 7)), acd, max_new_tokens=1)
    assert sizes == [(2, 256), (2, 2)]  # a long prompt without the mask


@pytest.mark.usefixtures("_prefill")
def test_hidden_states_and_attentions_are_of_what_was_contrasted(pair):
    model = build_model()
    model.set_attn_implementation("eager")
    acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
    out = generate(model, build_batch((9,)), acd, output_hidden_states=True, output_attentions=True)
    assert [states[-1].shape[1] for states in out.hidden_states] == [1] * NEW
    assert [a[-1].shape[-2:] for a in out.attentions] == [(1, 9 + i) for i in range(NEW)]


@pytest.mark.usefixtures("_prefill")
@pytest.mark.parametrize("length", [8, 9])
@pytest.mark.parametrize("keeps", [1, 3, None])
def test_however_many_logits_the_model_returns(length, keeps, pair):
    """Those in front of what is contrasted are of no stream, and must not change which is which."""
    model = build_model()
    expected = generate(model, build_batch((length,)), ACDLogitsProcessor(model, pair, share_instruction_kv=True))
    forward = model.forward

    def keep_all(
        input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **more
    ):
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        return forward(*given, **more | {"logits_to_keep": 0})

    if keeps is None:
        model.forward = keep_all
    acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
    got = generate(model, build_batch((length,)), acd, **({"logits_to_keep": keeps} if keeps else {}))
    assert_same(got, expected)


def test_it_differs_from_not_sharing(model):
    pair = build_pair()
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

    def test_the_cache_of_the_other_way(self, model):
        pair, inputs = build_pair(), build_batch((9,))
        acd = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
        first = generate(model, inputs, acd)
        other = ACDLogitsProcessor(model, pair)
        with pytest.raises(ValueError, match="filled under another share_instruction_kv"):
            generate(model, {"input_ids": first.sequences}, other, past_key_values=first.past_key_values)


class TestKeyValuePrompts:
    def test_no_forward_computes_them(self, model):
        acd = ACDLogitsProcessor(model, build_key_value_pair())
        sizes = []
        model.model.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.last_hidden_state.shape[:2])))
        generate(model, build_batch((11, 7)), acd, max_new_tokens=3)
        assert sizes == [(2, 12), (2, 2), (2, 2)]

    @pytest.mark.parametrize("name", ROTARY)
    def test_those_of_an_embedding_pair_decode_as_it_does(self, name):
        model, pair = build_model(name), build_pair(share_instruction_kv=True)
        expected = generate(model, build_batch(), ACDLogitsProcessor(model, pair))
        made = (embeddings_to_key_values(model, prompt) for prompt in (pair.safeguarding, pair.adversarial))
        assert_same(generate(model, build_batch(), ACDLogitsProcessor(model, PromptPair(*made))), expected)

    @pytest.mark.usefixtures("_prefill")
    @pytest.mark.parametrize("lengths", [(11, 7, 10), (1,)])
    def test_they_take_the_dtype_of_the_models_keys(self, lengths):
        model, inputs = build_model().to(torch.bfloat16), build_batch(lengths)
        pair = build_key_value_pair()
        half = PromptPair(pair.safeguarding.bfloat16(), pair.adversarial.bfloat16())
        mixed = PromptPair(pair.safeguarding.bfloat16(), pair.adversarial)
        expected = generate(model, inputs, ACDLogitsProcessor(model, half))
        for other in (pair, mixed):
            out = generate(model, inputs, ACDLogitsProcessor(model, other))
            assert_same(out, expected)
        assert {layer.keys.dtype for layer in out.past_key_values.layers} == {torch.bfloat16}

    def test_a_promise_about_the_model_changes_nothing(self, model):
        pair, inputs = build_key_value_pair(), build_batch()
        results = [generate(model, inputs, ACDLogitsProcessor(model, pair, frozen_model=f)) for f in (True, False)]
        assert_same(*results)

    def test_decoding_them_without_a_shared_instruction(self, model):
        with pytest.raises(ValueError, match="key-value prompts are decoded with a shared instruction: leave out"):
            ACDLogitsProcessor(model, build_key_value_pair(), share_instruction_kv=False)

    @pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon_alibi", "mistral_sliding", "gemma3", "mamba2", "bamba"])
    def test_architectures_without_plain_keys(self, name, tokenizer):
        model, message = build_model(name), "no rotary embeddings over full attention, .*: use embedding prompts"
        sizes = key_value_sizes(model.config) or {"num_layers": 3, "num_key_value_heads": 2, "head_dim": 8}
        with pytest.raises(ValueError, match=message):
            ACDLogitsProcessor(model, build_key_value_pair(sizes=tuple(sizes.values())))
        with pytest.raises(ValueError, match=message):
            PromptPair.from_text(model, tokenizer, "w5", "w6", prompt_type="key_value")

    def test_compressed_keys(self, tokenizer):
        latent = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        config = DeepseekV3Config(**_DECODER, **latent, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1)
        model = AutoModelForCausalLM.from_config(config)
        for make in (
            lambda: ACDLogitsProcessor(model, build_key_value_pair()),
            lambda: PromptPair.from_text(model, tokenizer, "w5", "w6", prompt_type="key_value"),
        ):
            with pytest.raises(
                ValueError, match="no keys and values of one size in every layer, which key-value prompts need"
            ):
                make()

    def test_texts_with_other_frequencies(self):
        config = copy.deepcopy(ARCHITECTURES["llama"])
        config.max_position_embeddings = 12
        config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model = AutoModelForCausalLM.from_config(config).eval()
        acd = ACDLogitsProcessor(model, build_key_value_pair())
        generate(model, build_batch((6,)), acd)
        with pytest.raises(
            ValueError, match=r"beyond 12 tokens .* frequencies: let prompt and new tokens fit into 12"
        ):
            generate(model, build_batch((7,)), acd)

    def test_a_config_that_says_otherwise_than_the_model(self, model):
        """Nothing is copied to more heads than it was made for."""
        inputs, pair = build_batch(), build_key_value_pair(sizes=(3, 1, 8))
        model.config.num_key_value_heads = 1
        acd = ACDLogitsProcessor(model, pair)
        with pytest.raises(ValueError, match=r"keeps keys and values of 2 heads of size 8, .* has 1 heads of size 8"):
            generate(model, inputs, acd)
        with pytest.raises(ValueError, match=r"keeps keys and values of \[\(3, 2, 8\)\], .* has \[\(3, 1, 8\)\]"):
            generate(model, build_batch((300,)), acd)

    def test_the_cache_of_an_embedding_pair(self, model):
        inputs = build_batch((9,))
        first = generate(model, inputs, ACDLogitsProcessor(model, build_pair(), share_instruction_kv=True))
        acd = ACDLogitsProcessor(model, build_key_value_pair())
        with pytest.raises(ValueError, match="filled under another model or prompt pair"):
            generate(model, {"input_ids": first.sequences}, acd, past_key_values=first.past_key_values)


@pytest.mark.parametrize("trained", [True, False])
def test_the_way_a_pair_was_trained_is_the_default(model, trained, caplog):
    logging.enable_propagation()
    pair = build_pair(share_instruction_kv=trained)
    acd = ACDLogitsProcessor(model, pair)
    assert type(acd.streams).__name__ == ("SharedStreams" if trained else "PairedStreams")
    assert not caplog.text
    ACDLogitsProcessor(model, pair, share_instruction_kv=not trained)
    assert "it may protect less" in caplog.text
