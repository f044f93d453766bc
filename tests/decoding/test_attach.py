"""What is done to a model while a processor is attached: nothing that `generate()` is told gets lost on the way."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    Phi3Config,
    PhimoeConfig,
    RepetitionPenaltyLogitsProcessor,
)

from acd_logits import ACDLogitsProcessor
from conftest import _DECODER, DEVICE, assert_same, build_batch, build_model, build_pair
from reference import ReferenceProcessor

SCORES = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def acd(model, pair):
    return ACDLogitsProcessor(model, pair, alpha=0.9, beta=0.0)


def itself(item):
    return item


ITERABLES = {
    "tuple": tuple,
    "filter": lambda items: filter(None, items),
    "iter": iter,
    "map": lambda items: map(itself, items),
    "generator": lambda items: (item for item in items),
    "LogitsProcessorList": LogitsProcessorList,
}


def test_threads_attach_and_detach_at_once():
    model = build_model()

    def come_and_go(_):
        for _ in range(50):
            ACDLogitsProcessor(model, build_pair()).detach()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, range(4)))
    assert "_acd_attachment" not in model.__dict__
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ITERABLES)
def test_any_iterable_of_processors(model, acd, kind):
    items, batch = [RepetitionPenaltyLogitsProcessor(1.2), acd], build_batch()
    expected = model.generate(**batch, logits_processor=items, **SCORES)
    assert_same(model.generate(**batch, logits_processor=ITERABLES[kind](items), **SCORES), expected)


def test_processors_given_by_position(model, acd):
    batch = build_batch((9,))
    expected = model.generate(**batch, logits_processor=[acd], **SCORES)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert_same(model.generate(ids, None, iter([acd]), attention_mask=mask, **SCORES), expected)


def test_a_bare_processor(model, acd):
    with pytest.raises(ValueError, match=r"takes a list: pass logits_processor=\[acd\]"):
        model.generate(**build_batch((9,)), logits_processor=acd)


class TestNothingIsPlain:
    """A decoding method that leaves the processor out is found out, before or after it returns."""

    def test_a_loop_that_ignores_the_processors(self, model, acd):
        def careless(model, input_ids, logits_processor, past_key_values, **kwargs):
            for _ in range(3):
                ids = input_ids[:, past_key_values.get_seq_length() :]
                token = model(ids, past_key_values=past_key_values).logits[:, -1].argmax(-1)
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            return input_ids

        with pytest.raises(RuntimeError, match="its logits were never contrasted"):
            model.generate(**build_batch((9,)), logits_processor=[acd], custom_generate=careless)

    def test_a_loop_that_ignores_the_processors_for_its_only_token(self, model, acd):
        def careless(model, input_ids, logits_processor, past_key_values, **kwargs):
            return model(input_ids, past_key_values=past_key_values).logits[:, -1].argmax(-1)

        with pytest.raises(RuntimeError, match="its logits were never contrasted"):
            model.generate(**build_batch((9,)), logits_processor=[acd], custom_generate=careless)

    def test_a_loop_that_never_gets_as_far_as_the_processors(self, model, acd, tmp_path):
        (tmp_path / "custom_generate").mkdir()
        code = "def generate(model, input_ids, **kwargs):\n    return model.generate(input_ids, max_new_tokens=2)\n"
        (tmp_path / "custom_generate" / "generate.py").write_text(code)
        with pytest.raises(RuntimeError, match="without having used its ACDLogitsProcessor"):
            model.generate(
                **build_batch((9,)), logits_processor=[acd], custom_generate=str(tmp_path), trust_remote_code=True
            )

    def test_a_loop_that_hands_the_processors_on(self, model, acd, tmp_path):
        (tmp_path / "custom_generate").mkdir()
        code = (
            "def generate(model, input_ids, logits_processor, **kwargs):\n"
            "    return model.generate(input_ids, logits_processor=logits_processor, do_sample=False,\n"
            "                          max_new_tokens=3)\n"
        )
        (tmp_path / "custom_generate" / "generate.py").write_text(code)
        batch = build_batch((9,))
        expected = model.generate(**batch, logits_processor=[acd], do_sample=False, max_new_tokens=3)
        got = model.generate(**batch, logits_processor=[acd], custom_generate=str(tmp_path), trust_remote_code=True)
        assert got.tolist() == expected.tolist()

    def test_paged_past_the_override_of_generate(self, model, acd):
        with pytest.raises(ValueError, match="continuous batching"):
            type(model).generate(model, **build_batch(), logits_processor=[acd], cache_implementation="paged")

    def test_continuous_batching_after_the_processor_is_gone(self, model, pair, monkeypatch):
        monkeypatch.setattr(type(model), "generate_batch", lambda self, inputs: inputs)
        acd = ACDLogitsProcessor(model, pair)
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch([[3, 4, 5]])
        with pytest.raises(ValueError, match="continuous batching"):
            model.init_continuous_batching()
        del acd
        assert model.generate_batch([[3, 4, 5]]) == [[3, 4, 5]]

    def test_processes_that_keep_step(self, model, acd, monkeypatch):
        """One that has finished runs on, and is asked for no token."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        with pytest.raises(ValueError, match=r"several processes share the weights .* Load the whole model"):
            model.generate(**build_batch(), logits_processor=[acd], synced_gpus=True)

    def test_paged_by_a_generate_of_the_models_class(self, pair):
        model = build_model()

        class Paged(type(model)):
            def generate(self, *args, **kwargs):
                return super().generate(*args, **kwargs, cache_implementation="paged")

        model.__class__ = Paged
        acd = ACDLogitsProcessor(model, build_pair(4, 4))
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate(**build_batch(), logits_processor=[acd])

    def test_a_generate_of_the_models_class_without_processors(self, pair):
        model = build_model()

        class Plain(type(model)):
            def generate(self, inputs=None, logits_processor=None, **kwargs):
                return super().generate(inputs, **kwargs)

        model.__class__ = Plain
        acd = ACDLogitsProcessor(model, build_pair(4, 4))
        with pytest.raises(RuntimeError, match="without having used its ACDLogitsProcessor"):
            model.generate(**build_batch(), logits_processor=[acd], max_new_tokens=2)

    def test_a_forward_after_the_call(self, model, acd):
        out = model.generate(**build_batch((9,)), logits_processor=[acd], **SCORES)
        with pytest.raises(RuntimeError, match=r"is over.*logits_processor=\[acd\]"):
            model(out.sequences[:, -1:], past_key_values=out.past_key_values)
        again = model.generate(out.sequences, past_key_values=out.past_key_values, logits_processor=[acd], **SCORES)
        assert len(again.scores) == 8  # another call goes on

    def test_a_gradient_checkpointed_model_in_train_mode(self, pair):
        model = build_model()
        # The name in newer transformers, and in older ones
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        acd = ACDLogitsProcessor(model, pair)
        with pytest.raises(RuntimeError, match=r"did not fill the cache .* model.eval\(\)"):
            model.generate(**build_batch(), logits_processor=[acd], max_new_tokens=3)
        model.eval()
        acd = ACDLogitsProcessor(model, build_pair(5, 5))  # without a mask, whose size would not fit
        out = model.generate(**build_batch((9,)), logits_processor=[acd], **SCORES)
        model.train()  # between two turns the cache is full, and would stay as it is
        # Before transformers 5.20 there is a mask of ones, which does not fit the keys that are missing
        with pytest.raises(RuntimeError, match=r"did not fill the cache|doesn't match the broadcast shape"):
            model.generate(out.sequences, past_key_values=out.past_key_values, logits_processor=[acd], **SCORES)

    @pytest.mark.parametrize("share", [False, True])
    @pytest.mark.parametrize("user_made", [False, True])
    def test_a_cache_after_detach(self, model, pair, share, user_made):
        acd, batch = ACDLogitsProcessor(model, pair, share_instruction_kv=share), build_batch((9,))
        cache = {"past_key_values": DynamicCache(config=model.config)} if user_made else {}
        out = model.generate(**batch, **cache, logits_processor=[acd], **SCORES)
        acd.detach()
        with pytest.raises(RuntimeError, match="this cache belongs to ACD"):
            model.generate(out.sequences, past_key_values=cache.get("past_key_values", out.past_key_values))

    def test_tensors_inside_of_an_input(self, model, acd):
        def with_images(model, input_ids, past_key_values, **kwargs):
            features = {"image": {"hidden": [torch.zeros(1)]}, "video": None}
            return model(input_ids, past_key_values=past_key_values, mm_encoder_outputs=features)

        with pytest.raises(ValueError, match="'mm_encoder_outputs'"):
            model.generate(**build_batch((9,)), logits_processor=[acd], custom_generate=with_images)


# ----- models that drop their cache on the way -----

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}


def switching_model(kind, rope):
    """Its keys are computed anew where the text passes 32 tokens."""
    config = {"phi3": Phi3Config, "phimoe": PhimoeConfig}[kind]
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "phimoe" else {}
    if rope:
        more["rope_parameters"] = LONGROPE | {"original_max_position_embeddings": 32, "factor": 8.0}
        more["rope_parameters"] |= {"short_mscale": 1.0, "long_mscale": 1.0} if kind == "phimoe" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**_DECODER, original_max_position_embeddings=32, **more))
    model.generation_config.eos_token_id = None
    return model.eval().to(DEVICE)


@pytest.mark.parametrize("length", [20, 28, 31, 40])
@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"horizon": 2}], ids=str
)
@pytest.mark.parametrize(("kind", "rope"), [("phi3", False), ("phi3", True), ("phimoe", False)])
def test_a_text_past_the_length_where_the_cache_is_dropped(kind, rope, options, length):
    if rope and "prompt_lookup_num_tokens" in options and length == 20:
        pytest.skip("a draft that reaches past the length is verified under the frequencies behind it, plain too")
    model, pair, batch = switching_model(kind, rope), build_pair(5, 5), build_batch((length,))
    plain, options = copy.deepcopy(model), dict(options)
    horizon = options.pop("horizon", None)
    reference = ReferenceProcessor(plain, pair, 0.5, horizon=horizon)
    settings = SCORES | {"max_new_tokens": 14}
    expected = plain.generate(**batch, logits_processor=[reference], **settings, use_cache=False)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0, horizon=horizon)
    assert_same(model.generate(**batch, logits_processor=[acd], **settings, **options), expected)


def test_a_draft_model_past_the_length_where_the_cache_is_dropped():
    model, pair, batch = switching_model("phi3", rope=True), build_pair(5, 5), build_batch((28,))
    expected = model.generate(**batch, logits_processor=[ACDLogitsProcessor(model, pair)], use_cache=False, **SCORES)
    acd, draft = ACDLogitsProcessor(model, pair), build_model("llama", seed=5)
    assert_same(model.generate(**batch, logits_processor=[acd], assistant_model=draft, **SCORES), expected)


def test_a_part_of_the_text_that_cannot_be_run_again():
    model, pair = switching_model("phi3", rope=True), build_pair(5, 5)
    embeds = model.get_input_embeddings()(build_batch((25,))["input_ids"]).detach()
    acd = ACDLogitsProcessor(model, pair)
    with pytest.raises(ValueError, match="needs all keys anew"):
        model.generate(inputs_embeds=embeds, logits_processor=[acd], **SCORES)
