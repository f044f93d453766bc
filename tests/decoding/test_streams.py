"""The soft prompts on one model: their keys are those of the model as it is, in every call."""

import copy
import io
import math
import tempfile

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    CTRLConfig,
    DeepseekV4Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    RecurrentGemmaConfig,
    RobertaConfig,
)

from acd_logits import ACDLogitsProcessor, PromptPair
from conftest import (
    _COMMON,
    _DECODER,
    DEVICE,
    HIDDEN,
    assert_same,
    build_batch,
    build_key_value_pair,
    build_model,
    build_pair,
)
from reference import ReferenceProcessor

SCORES = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 8}


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def check_fresh(model, acd, batch, **options):
    """The tokens of the processor, which has served the model before, are those of a new one."""
    got = model.generate(**batch, logits_processor=[acd], **SCORES)
    fresh = ACDLogitsProcessor(model, acd.pair, beta=0.0, **options)
    assert_same(got, model.generate(**batch, logits_processor=[fresh], **SCORES))


# ----- what happens to a model between two calls -----


def fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = build_batch((9,))["input_ids"]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def write_data(model):
    model.model.layers[0].mlp.up_proj.weight.data[3] = 7.0


def replace_data_twice(model):
    for scale in (0.5, 0.9):
        for parameter in model.parameters():
            parameter.data = parameter.data * scale


def replace_hook(model):
    """Under the name, and perhaps at the address, of another one."""
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, args, out: out).remove()
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 3
    layer.register_forward_hook(lambda module, args, out: out + vector)


def patch_forward(model):
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) + 1.0


def change_attribute(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
        layer.input_layernorm.variance_epsilon = 0.3


def weights_of_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.9


CHANGES = [
    fused_step,
    write_data,
    replace_data_twice,
    replace_hook,
    patch_forward,
    change_attribute,
    weights_of_inference_mode,
]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("lengths", [(9,), (9, 6)], ids=["one", "batch"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls(change, lengths, share):
    model, batch = build_model(), build_batch(lengths)
    acd = ACDLogitsProcessor(model, build_pair(), beta=0.0, share_instruction_kv=share)
    before = model.generate(**batch, logits_processor=[acd], **SCORES)
    change(model)
    check_fresh(model, acd, batch, share_instruction_kv=share)
    after = model.generate(**batch, logits_processor=[acd], **SCORES)
    assert not torch.allclose(before.scores[0], after.scores[0], atol=1e-3)


def test_a_call_under_dropout():
    model = build(GPT2Config(**_COMMON, n_embd=HIDDEN, n_layer=3, n_head=4, initializer_range=0.3))
    for frozen in (False, True):
        acd = ACDLogitsProcessor(model, build_pair(), beta=0.0, frozen_model=frozen)
        model.train()
        model.generate(**build_batch(), logits_processor=[acd], max_new_tokens=2)
        model.eval()
        check_fresh(model, acd, build_batch())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_call_under_autocast(model, pair, frozen):
    acd, batch = ACDLogitsProcessor(model, pair, beta=0.0, frozen_model=frozen), build_batch()
    with torch.autocast(DEVICE, torch.bfloat16):
        model.generate(**batch, logits_processor=[acd], **SCORES)
    check_fresh(model, acd, batch)


def test_a_hot_swapped_adapter(pair, tmp_path):
    def with_adapter(seed):
        base = build_model()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(base, config).eval().to(DEVICE)

    with_adapter(2).save_pretrained(tmp_path)
    model, batch = with_adapter(1), build_batch()
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    before = model.generate(**batch, logits_processor=[acd], **SCORES)
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device=DEVICE)
    check_fresh(model, acd, batch)
    assert not torch.allclose(before.scores[0], model.generate(**batch, logits_processor=[acd], **SCORES).scores[0])


def test_a_frozen_model_keeps_its_prompts(model, pair):
    """A promise that is broken is not noticed: this is what `frozen_model` means."""
    acd, batch = ACDLogitsProcessor(model, pair, beta=0.0, frozen_model=True), build_batch()
    stored = model.generate(**batch, logits_processor=[acd], **SCORES)
    assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), stored)
    change_attribute(model)
    kept = model.generate(**batch, logits_processor=[acd], **SCORES)
    fresh = model.generate(**batch, logits_processor=[ACDLogitsProcessor(model, pair, beta=0.0)], **SCORES)
    assert not torch.allclose(kept.scores[0], fresh.scores[0], atol=1e-3)


@pytest.mark.parametrize("make", [build_pair, build_key_value_pair])
def test_a_shared_pair_of_inference_mode(make, model):
    with torch.inference_mode():
        pair = make()
    expected, got = (
        model.generate(
            **build_batch(), logits_processor=[ACDLogitsProcessor(model, prompts, share_instruction_kv=True)], **SCORES
        )
        for prompts in (make(), pair)
    )
    assert_same(got, expected)


@pytest.mark.parametrize("share", [False, True])
def test_a_conversation_that_began_in_inference_mode(model, pair, share):
    acd = ACDLogitsProcessor(model, pair, share_instruction_kv=share)

    def answer(mode):
        with mode:
            first = model.generate(**build_batch((9,)), logits_processor=[acd], **SCORES)
        turn = torch.cat([first.sequences, torch.tensor([[5, 6]], device=DEVICE)], dim=1)
        return model.generate(turn, past_key_values=first.past_key_values, logits_processor=[acd], **SCORES)

    assert_same(answer(torch.inference_mode()), answer(torch.no_grad()))


def test_a_pair_of_inference_mode(model):
    with torch.inference_mode():
        pair = build_pair()
    reference = ReferenceProcessor(copy.deepcopy(model), build_pair(), 0.5, mask=build_batch()["attention_mask"])
    expected = copy.deepcopy(model).generate(**build_batch(), logits_processor=[reference], **SCORES)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0)
    assert_same(model.generate(**build_batch(), logits_processor=[acd], **SCORES), expected)


@pytest.mark.parametrize("n_a", [5, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_offloaded_to_disk(frozen, n_a):
    """Their versions change at every forward."""
    from accelerate import disk_offload

    plain, batch, pair = build_model(), build_batch(), build_pair(5, n_a)
    expected = plain.generate(**batch, logits_processor=[ACDLogitsProcessor(plain, pair)], **SCORES)
    model, calls = build_model(), []
    with tempfile.TemporaryDirectory() as folder:
        disk_offload(model, folder, execution_device=torch.device(DEVICE))
        acd = ACDLogitsProcessor(model, pair, frozen_model=frozen)
        model.model.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(8):
            assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), expected)
    forwards = 1 if n_a == 5 else 2  # of the soft prompts
    assert len(calls) == 8 * 8 + forwards * (1 if frozen else 8)


# ----- models that treat embeddings or positions in a way of their own -----


def check_reference(model, pair, batch, **options):
    plain = copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, 0.5, mask=batch["attention_mask"])
    expected = plain.generate(**batch, logits_processor=[reference], **SCORES)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0, **options)
    for _ in range(2):
        assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), expected)


def test_a_model_that_writes_into_its_embeddings():
    model = build(CTRLConfig(**_COMMON, n_embd=HIDDEN, dff=48, n_layer=2, n_head=4, initializer_range=0.3))
    pair = build_pair()
    before = copy.deepcopy(pair)
    check_reference(model, pair, build_batch((9,)))
    assert torch.equal(pair.safeguarding, before.safeguarding)
    assert torch.equal(pair.adversarial, before.adversarial)


@pytest.mark.parametrize("lengths", [(9,), (9, 9)], ids=["one", "batch"])
@pytest.mark.parametrize("n_a", [7, 4])
def test_a_model_that_counts_positions_from_its_padding_id(n_a, lengths):
    """RoBERTa does so where it is given none; generate() gives it positions from 0 on, and so do we."""
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
    model = build(RobertaConfig(**_COMMON, **shape, max_position_embeddings=64, is_decoder=True))
    pair, batch = build_pair(7, n_a), build_batch(lengths)

    def first_scores(prompt):  # plain generate() behind a prompt of embeddings
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds = torch.cat([prompt.expand(len(embeds), -1, -1), embeds], dim=1).detach()
        return model.generate(inputs_embeds=embeds, **SCORES).scores[0]

    expected = (first_scores(pair.safeguarding) - 0.5 * first_scores(pair.adversarial)) / (1 - 0.5)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0)
    got = model.generate(**batch, logits_processor=[acd], **SCORES).scores[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


UNPADDED = {
    "recurrent_gemma": RecurrentGemmaConfig(
        **_COMMON,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=HIDDEN,
        attention_window_size=64,
        w_init_variance_scale=9.0,
    ),
    "bart": BartConfig(
        vocab_size=97,
        d_model=HIDDEN,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.3,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
}


@pytest.mark.parametrize("name", UNPADDED)
def test_a_model_that_does_not_handle_left_padding(name):
    model, batch = build(UNPADDED[name]), build_batch((9,))
    for parameter in model.parameters():  # biases of 0 would hide what a convolution makes of padding
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    try:
        check_reference(model, build_pair(5, 5), batch)
    except RuntimeError as error:
        if Version(transformers.__version__) >= Version("5.23") or "keeps its state elsewhere" not in str(error):
            raise
        pytest.skip("older transformers keep this state in the modules")
    training = model.train().training
    before = set(model.__dict__)
    with pytest.raises(ValueError, match=r"does not handle left padding.*use prompts of one length"):
        ACDLogitsProcessor(model, build_pair(5, 3))
    assert model.training == training
    assert set(model.__dict__) == before


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length(kind, length):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
    config = _DECODER | {"rope_parameters": rope, "max_position_embeddings": 32 if kind == "dynamic" else 256}
    model, pair, batch = build(LlamaConfig(**config)), build_pair(5, 5), build_batch((length, length))
    one = SCORES | {"max_new_tokens": 1}
    expected = ReferenceProcessor(copy.deepcopy(model), pair, 0.5)(batch["input_ids"], None)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0, frozen_model=True)
    for _ in range(2):
        got = model.generate(**batch, logits_processor=[acd], **one).scores[0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    shared = ACDLogitsProcessor(model, pair, share_instruction_kv=True)
    if length > 32:
        with pytest.raises(ValueError, match=r"beyond 32 tokens .* leave it out"):
            model.generate(**batch, logits_processor=[shared], **one)
    else:
        model.generate(**batch, logits_processor=[shared], **one)


def test_positions_that_scale_queries_are_not_shared():
    model = build(Ministral3Config(**_DECODER, head_dim=8, sliding_window=None))
    check_reference(model, build_pair(5, 5), build_batch())
    with pytest.raises(ValueError, match=r"logarithm of the position.*leave it out"):
        ACDLogitsProcessor(model, build_pair(), share_instruction_kv=True)


def test_experts_that_are_chosen_by_token_ids():
    config = DeepseekV4Config(**_DECODER | {"num_key_value_heads": 1}, head_dim=16, q_lora_rank=16, qk_rope_head_dim=8)
    model = build_model()  # in place of a tiny DeepSeek V4: the config says it
    model.config.mlp_layer_types = config.mlp_layer_types
    with pytest.raises(ValueError, match="chooses experts by token ids"):
        ACDLogitsProcessor(model, build_pair())


# ----- texts that a soft prompt does not reach, or that leave it no room -----


def test_windows_that_leave_the_prompts_behind():
    model = build(MistralConfig(**_DECODER, sliding_window=6))
    acd = ACDLogitsProcessor(model, build_pair(), beta=0.0)
    model.generate(**build_batch((9,)), logits_processor=[acd], max_new_tokens=7)
    with pytest.raises(ValueError, match=r"carry a soft prompt 15 tokens far, .* up to 17"):
        model.generate(**build_batch((9,)), logits_processor=[acd], max_new_tokens=8)


def test_the_reach_of_windows_is_exact():
    """At the last token within reach, the two streams still differ; one further they do not."""
    model = build(MistralConfig(**_DECODER, sliding_window=6))
    acd, pair, ids = ACDLogitsProcessor(model, build_pair()), build_pair(), build_batch((16,))["input_ids"][0]
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        safe, adversarial = (
            model(inputs_embeds=torch.cat([prompt, embeds])[None], use_cache=False).logits[0, -16:]
            for prompt in (pair.safeguarding[:4], pair.adversarial)
        )
    differs = ((safe - adversarial).abs().amax(-1) > 1e-6).tolist()
    assert acd.streams.reach == 15
    assert differs == [True] * 15 + [False]


@pytest.mark.parametrize("kind", [GPT2Config, GPTJConfig, CTRLConfig])
def test_a_table_of_positions_that_is_too_short(kind):
    more = {"rotary_dim": 4} if kind is GPTJConfig else {"dff": 48} if kind is CTRLConfig else {}
    model = build(kind(**_COMMON, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=24, **more))
    acd = ACDLogitsProcessor(model, build_pair(7, 4))
    model.generate(**build_batch((9,)), logits_processor=[acd], max_new_tokens=9)  # the last one is never run
    with pytest.raises(ValueError, match=r"24 positions, of which the soft prompts take 7.* up to 19, shorten them"):
        model.generate(**build_batch((9,)), logits_processor=[acd], max_new_tokens=10)


# ----- what cannot be saved, and what is no number -----


def test_a_cache_cannot_be_saved(model, pair):
    out = model.generate(**build_batch(), logits_processor=[ACDLogitsProcessor(model, pair)], **SCORES)
    with pytest.raises(TypeError, match="cannot be saved: save the conversation's tokens"):
        torch.save(out.past_key_values, io.BytesIO())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("stream", ["safeguarding", "adversarial"])
def test_nan_in_a_stream(stream, alpha, share):
    model, prompts = (
        build_model().half(),
        {"safeguarding": torch.randn(5, HIDDEN), "adversarial": torch.randn(5, HIDDEN)},
    )
    prompts[stream] = prompts[stream] * 1e6  # beyond the range of float16
    acd = ACDLogitsProcessor(model, PromptPair(**prompts), alpha=alpha, share_instruction_kv=share)
    with pytest.raises(ValueError, match=f"NaN behind the .*{stream}.* prompt, in torch.float16"):
        model.generate(**build_batch(), logits_processor=[acd], **SCORES)


def test_scores_that_other_processors_ban_are_no_nan(model, pair):
    def ban(input_ids, scores):
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([5], device=DEVICE), 0.0)

    acd = ACDLogitsProcessor(model, pair)
    out = model.generate(**build_batch((9,)), logits_processor=[ban, acd], **SCORES)
    assert out.sequences[0, 9:].tolist() == [5] * 8
