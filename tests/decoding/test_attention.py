"""Attention over shared keys: nothing is copied for it, and no other call notices."""

import copy
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from acd_logits import ACDLogitsProcessor
from acd_logits.decoding.attention import FoldedAttention, mark
from conftest import ARCHITECTURES, DEVICE, assert_same, build_batch, build_key_value_pair, build_model, build_pair

ROTARY = ["llama", "qwen3", "mixtral", "phi3"]
BUILD = {"embedding": build_pair, "key_value": build_key_value_pair}
LAYERS, NEW = 3, 6
SCORES = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": NEW}
PLAIN = {
    "padded": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


def sdpa():
    return AttentionInterface()["sdpa"]


OWN = sdpa()


@pytest.fixture(autouse=True)
def _no_other_user():
    gc.collect()  # processors of other tests
    AttentionInterface.register("sdpa", OWN)
    yield
    AttentionInterface.register("sdpa", OWN)


@pytest.fixture(params=BUILD)
def pair(request):
    return BUILD[request.param]()


@pytest.fixture
def attended(monkeypatch):
    """Queries, keys and masks of all calls of PyTorch's attention."""
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, **kwargs):
        calls.append((query, key, attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    return calls


def shapes_of(attended):
    """The shapes of the queries and keys of all calls, which are then forgotten."""
    shapes = [(queries.shape, keys.shape) for queries, keys, _ in attended]
    attended.clear()
    return shapes


def shared(model, pair, **options):
    return ACDLogitsProcessor(model, pair, share_instruction_kv=True, **options)


def generate(model, *processors, **options):
    return model.generate(**build_batch((9, 6)), logits_processor=list(processors), **SCORES | options)


def drawn(rows, heads, kv_heads, queries, slots, size=16, value_size=16):
    """Arguments of an attention function: random queries, keys, values, and a marked mask that hides a half."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, queries, size), (kv_heads, slots, size), (kv_heads, slots, value_size)
    tensors = [torch.randn(rows, *shape, generator=generator).to(DEVICE) for shape in shapes]
    hidden = torch.rand(rows, 1, queries, slots, generator=generator) < 0.5
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return SimpleNamespace(num_key_value_groups=heads // kv_heads), *tensors, mark(mask.to(DEVICE))


class TestOneCall:
    @pytest.mark.parametrize(
        "sizes",
        [(1, 9, 3, 2, 40), (4, 8, 2, 2, 37), (2, 4, 1, 7, 33), (3, 4, 2, 1, 9), (2, 8, 4, 2, 24, 16, 8)],
        ids=str,
    )
    @pytest.mark.parametrize("scaling", [None, 0.3])
    def test_it_is_the_models_own_attention(self, sizes, scaling, attended):
        call = drawn(*sizes)
        expected, _ = OWN(*call, scaling=scaling)
        attended.clear()
        got, weights = FoldedAttention(OWN)(*call, scaling=scaling, position_ids=torch.zeros(1), use_cache=True)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert got.is_contiguous()
        assert weights is None
        [(_, keys, _)] = attended
        assert keys is call[2]

    def test_the_mask_is_folded_once_for_all_layers(self, attended):
        call = drawn(1, 9, 3, 2, 37)
        for _ in range(2):
            FoldedAttention(OWN)(*call)
        first, second = (mask for _, _, mask in attended)
        assert first is second
        assert first.stride()[-2:] == (48, 1)  # aligned, as the kernels of a GPU want it

    @pytest.mark.parametrize(
        "asked",
        [
            {"dropout": 0.5},
            {"softcap": 30.0},
            {"s_aux": torch.zeros(9)},
            {"position_bias": torch.zeros(1, 9, 2, 40)},
            {"output_attentions": True},
            {"sliding_window": 4},
            {"cache": object()},
        ],
        ids=lambda asked: next(iter(asked)),
    )
    def test_what_asks_for_more_is_left_to_the_model(self, asked):
        self.assert_own(drawn(1, 9, 3, 2, 40), **asked)

    @pytest.mark.parametrize("sizes", [(1, 9, 9, 2, 40), (1, 9, 3, 97, 97)], ids=["no groups", "a larger mask"])
    def test_what_gains_nothing_is_left_to_the_model(self, sizes):
        self.assert_own(drawn(*sizes))

    @pytest.mark.parametrize("change", [torch.clone, lambda mask: mask[:], lambda mask: None])
    def test_another_mask_is_left_to_the_model(self, change):
        *call, mask = drawn(1, 9, 3, 2, 40)
        self.assert_own((*call, change(mask)))

    @staticmethod
    def assert_own(call, **asked):
        calls = []
        FoldedAttention(lambda *args, **kwargs: calls.append((args, kwargs)))(*call, **asked)
        [(args, kwargs)] = calls
        assert all(got is given for got, given in zip(args, call, strict=True))
        assert kwargs == asked


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("horizon", [None, 2])
def test_no_step_copies_keys(name, horizon, options, pair, attended):
    model = build_model(name)
    generate(model, shared(model, pair, horizon=horizon), **options)
    # The masks of the two streams are the only ones to be added
    heads = [
        (queries.shape[1], keys.shape[1])
        for queries, keys, mask in attended
        if mask is not None and mask.is_floating_point()
    ]
    assert heads == [(2, 2)] * LAYERS * NEW


class TestOtherCalls:
    """They go to the model's own attention with what they were given."""

    @pytest.mark.parametrize("way", PLAIN)
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3"])
    def test_plain_calls_are_the_same_bit_for_bit(self, name, way, pair, attended):
        plain, other = build_model(name), build_model()
        inputs = build_batch((9,) if way == "lookup" else (9, 6))
        expected, shapes = plain.generate(**inputs, **SCORES | PLAIN[way]), shapes_of(attended)
        acd = shared(other if name in ("gpt2", "gemma3") else plain, pair)
        assert sdpa() is not OWN
        attended.clear()  # the constructor tries what padding does
        got = plain.generate(**inputs, **SCORES | PLAIN[way])
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
        assert shapes_of(attended) == shapes  # on a CPU, folding might not change a bit
        acd.detach()

    def test_paired_calls_are_the_same_bit_for_bit(self, model):
        paired = ACDLogitsProcessor(model, build_pair())
        expected = generate(model, paired)
        acd = shared(model, build_pair())
        got = generate(model, paired)
        assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
        acd.detach()

    def test_other_attention_is_not_touched(self, model, pair, attended):
        model.set_attn_implementation("eager")
        generate(model, shared(model, pair))
        assert not attended

    def test_threads(self, model, pair):
        other = build_model("qwen3")
        acd, second = shared(model, pair), shared(other, pair)
        calls = [(model, acd), (other,), (model,), (other, second)]
        expected = [generate(*call) for call in calls]
        with ThreadPoolExecutor(4) as pool:
            for got, alone in zip(pool.map(lambda call: generate(*call), calls * 4), expected * 4, strict=True):
                assert_same(got, alone)
        assert acd.streams is not second.streams

    @pytest.mark.newest
    def test_a_compiled_model(self, pair):
        """The function is traced through, and a compiled plain model gives the same as before."""
        torch._dynamo.reset()
        model = build_model()
        expected = generate(model)
        acd = shared(model, pair)
        streams = generate(model, acd)
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=True)
        assert_same(generate(model), expected)
        assert_same(generate(model, acd), streams)


class TestInstalling:
    def test_it_goes_with_the_last_user(self, model):
        paired = ACDLogitsProcessor(model, build_pair())
        assert sdpa() is OWN
        first, second = shared(model, build_pair()), shared(build_model("qwen3"), build_key_value_pair())
        ours = sdpa()
        paired.detach()
        first.detach()
        assert sdpa() is ours is not OWN
        second.detach()
        second.detach()
        assert sdpa() is OWN

    def test_a_processor_that_could_not_be_made(self, pair):
        with pytest.raises(ValueError, match=r"no rotary|use a pair made for this model"):
            shared(build_model("gpt2"), pair)
        assert sdpa() is OWN

    def test_a_function_registered_later_stays(self, model, pair):
        acd = shared(model, pair)
        expected, inner, calls = generate(model, acd), sdpa(), []

        def later(*args, **kwargs):
            calls.append(args)
            return inner(*args, **kwargs)

        AttentionInterface.register("sdpa", later)
        assert_same(generate(model, acd), expected)
        assert calls
        acd.detach()
        assert sdpa() is later
        generate(model)

    def test_without_it_a_step_is_exact_all_the_same(self, model, pair):
        acd = shared(model, pair)
        expected = generate(model, acd)
        AttentionInterface.register("sdpa", OWN)
        assert_same(generate(model, acd), expected)

    def test_an_error_leaves_nothing_behind(self, model, pair):
        acd, expected = shared(model, pair), generate(model)

        def fail(*_):
            raise KeyError("stopped")

        with pytest.raises(KeyError, match="stopped"):
            generate(model, acd, stopping_criteria=[fail])
        assert all(torch.equal(a, b) for a, b in zip(generate(model).scores, expected.scores, strict=True))
        acd.detach()
        assert sdpa() is OWN

    def test_the_config_stays_as_it_is(self, model, pair, tmp_path):
        before = model.config.to_dict()
        acd = shared(model, pair)
        generate(model, acd)
        assert model.config._attn_implementation == "sdpa"
        assert model.config.to_dict() == before
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads(model.config.to_json_string())
        again, copied = AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)
        acd.detach()
        for other in (again, copied):
            assert_same(generate(other, shared(other, pair)), generate(model, shared(model, pair)))

    def test_two_models_of_one_config(self, pair):
        config = copy.deepcopy(ARCHITECTURES["llama"])
        models = [AutoModelForCausalLM.from_config(config).eval().to(DEVICE) for _ in range(2)]
        acds = [shared(model, pair) for model in models]
        expected = generate(models[1], acds[1], eos_token_id=None)
        acds[0].detach()
        assert_same(generate(models[1], acds[1], eos_token_id=None), expected)

    def test_adapters(self, pair):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(build_model(), peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
        acd = shared(model, pair)
        expected = generate(model, acd)
        AttentionInterface.register("sdpa", OWN)
        assert_same(generate(model, acd), expected)
