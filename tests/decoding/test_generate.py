"""Every decoding mode of `generate()` under ACD, token by token against the slow reference."""

import copy
import functools
import os
import threading

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    set_seed,
)

from acd_logits import ACDLogitsProcessor
from conftest import DEVICE, HIDDEN, VOCAB, assert_same, build_batch, build_key_value_pair, build_model, build_pair
from reference import ReferenceProcessor

ALPHA, BETA, NEW = 0.6, 0.05, 14
newest = functools.partial(pytest.param, marks=pytest.mark.newest)
SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": NEW}


def run_both(model, pair, batch, reference=None, acd=None, seed=0, **kwargs):
    """The same generate call with the reference on an untouched copy, and with ACD."""
    plain = copy.deepcopy(model)
    kwargs = {"do_sample": False} | SCORES | kwargs
    kwargs |= {"disable_compile": "compile_config" not in kwargs}  # on a GPU a static cache is compiled otherwise
    rows = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    mask = batch.get("attention_mask")
    options = {"alpha": ALPHA, "beta": BETA, "mask": None if mask is None else mask.repeat_interleave(rows, dim=0)}
    processor = ReferenceProcessor(plain, pair, **options | (reference or {}))
    if kwargs.get("num_beams", 1) > 1:
        processor.beams = True
    # What ours lets act on the safe stream first, the reference runs itself
    handled = ("min_new_tokens", "bad_words_ids", "repetition_penalty", "prefill_chunk_size", "cache_implementation")
    handled += ("compile_config",)
    theirs = {key: value for key, value in kwargs.items() if key not in (*handled, "assistant_model")}
    theirs.pop("prompt_lookup_num_tokens", None)
    set_seed(seed)
    expected = plain.generate(**batch, logits_processor=[processor], **theirs)
    ours = ACDLogitsProcessor(model, pair, **{"alpha": ALPHA, "beta": BETA} | (acd or {}))
    set_seed(seed)
    return model.generate(**batch, logits_processor=[ours], **kwargs), expected


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95},
    "beam": {"num_beams": 3},
    "beam_early_stopping": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "beam_sample": {"num_beams": 3, "do_sample": True, "top_k": 40},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam_return_sequences": {"num_beams": 4, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
    "no_cache_beam": {"use_cache": False, "num_beams": 2},
    "static": {"cache_implementation": "static"},
    "static_beam": {"cache_implementation": "static", "num_beams": 2},
    "chunked_prefill": {"prefill_chunk_size": 4},
    "chunked_static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


def long_prompt(name="llama", rows=2, **pair):
    return build_model(name), build_pair(2, 2, **pair), build_batch((120,) * rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "lengths"),
    [("llama", (11,)), ("llama", (11, 6, 9)), ("mistral_sliding", (11, 6, 9))],
    ids=["llama-one", "llama-padded", "mistral_sliding-padded"],
)
def test_modes(name, mode, lengths):
    got, expected = run_both(build_model(name), build_pair(), build_batch(lengths), **MODES[mode])
    assert_same(got, expected)


@pytest.mark.parametrize("horizon", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_modes_behind_a_long_prompt(mode, horizon):
    """So long that it runs with its soft prompts and without a mask, or its first chunk does."""
    horizon, options = {"horizon": horizon}, dict(MODES[mode])
    if "prefill_chunk_size" in options:
        options["prefill_chunk_size"] = 115
    got, expected = run_both(*long_prompt(), reference=horizon, acd=horizon, **options)
    assert_same(got, expected)


@pytest.mark.parametrize("name", ["bloom", "mamba2", "bamba", "lfm2", "gpt2", "gemma3"])
@pytest.mark.parametrize("mode", ["sampling", "beam", "no_cache", "static"])
def test_modes_of_other_architectures(name, mode):
    got, expected = run_both(build_model(name), build_pair(), build_batch(), **MODES[mode])
    assert_same(got, expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs a GPU")
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="they are refused")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(implementation):
    batch = {key: value.cuda() for key, value in build_batch().items()}
    pair, model = build_pair(), build_model().cuda()
    pair.safeguarding, pair.adversarial = pair.safeguarding.cuda(), pair.adversarial.cuda()
    got, expected = run_both(model, pair, batch, cache_implementation=implementation)
    assert_same(got, expected)


def test_offloaded_caches_of_older_transformers(model, pair, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.19.2")
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with pytest.raises(ValueError, match=r"offloaded caches of transformers 5.19.2 .* upgrade to 5.20"):
        model.generate(**build_batch(), past_key_values=cache, logits_processor=[ACDLogitsProcessor(model, pair)])


def agreeing_draft(model):
    """The same weights; without a sliding window, since older transformers cannot draft once one is full."""
    config = copy.deepcopy(model.config)
    config.sliding_window = None
    draft = type(model)(config).eval().to(DEVICE)
    draft.load_state_dict(model.state_dict())
    return draft


@pytest.mark.parametrize("name", ["llama", "mistral_sliding"])
class TestAssisted:
    def test_draft_model(self, name):
        draft = build_model("llama", seed=5)
        got, expected = run_both(build_model(name), build_pair(), build_batch((11,)), assistant_model=draft)
        assert_same(got, expected)

    def test_draft_model_that_agrees_often(self, name):
        model = build_model(name)
        got, expected = run_both(
            model, build_pair(scale=0.3), build_batch((11,)), assistant_model=agreeing_draft(model), max_new_tokens=30
        )
        assert_same(got, expected)

    def test_long_prompt(self, name):
        draft = agreeing_draft(build_model(name))
        got, expected = run_both(*long_prompt(name, rows=1, scale=0.3), assistant_model=draft)
        assert_same(got, expected)

    def test_prompt_lookup(self, name):
        ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]], device=DEVICE)
        got, expected = run_both(build_model(name), build_pair(), {"input_ids": ids}, prompt_lookup_num_tokens=4)
        assert_same(got, expected)

    def test_horizon_inside_a_draft(self, name):
        got, expected = run_both(
            build_model(name),
            build_pair(scale=0.3),
            build_batch((11,)),
            reference={"horizon": 5},
            acd={"horizon": 5},
            assistant_model=agreeing_draft(build_model(name)),
        )
        assert_same(got, expected)


def test_sampled_drafts_keep_the_contrasted_distribution(model, pair):
    """400 sampled first tokens, drafted and verified, follow the reference's distribution."""
    plain, batch, assistant = copy.deepcopy(model), build_batch((11,)), build_model("llama", seed=5)
    scores = ReferenceProcessor(plain, pair, ALPHA, BETA)(batch["input_ids"], None)
    probabilities = scores.softmax(-1)[0].cpu()
    acd = ACDLogitsProcessor(model, pair, ALPHA, BETA)
    set_seed(0)
    counts = torch.zeros(VOCAB)
    for _ in range(400):
        out = model.generate(
            **batch, logits_processor=[acd], assistant_model=assistant, do_sample=True, max_new_tokens=2, top_k=0
        )
        counts[out[0, 11].item()] += 1
    assert counts[probabilities == 0].sum() == 0
    assert 0.5 * (counts / 400 - probabilities).abs().sum() < 0.15  # total variation


@pytest.mark.parametrize("lengths", [(11,), (11, 6, 9)], ids=["one", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "mamba2"])
@pytest.mark.parametrize("mode", ["greedy", "beam", "no_cache", "static"])
def test_horizon(name, mode, lengths):
    horizon = {"horizon": 4}
    got, expected = run_both(
        build_model(name), build_pair(), build_batch(lengths), reference=horizon, acd=horizon, **MODES[mode]
    )
    assert_same(got, expected)


def test_horizon_drops_the_adversarial_rows():
    model, batch = build_model(), build_batch()
    acd = ACDLogitsProcessor(model, build_pair(), horizon=4)
    out = model.generate(**batch, logits_processor=[acd], do_sample=False, **SCORES)
    assert out.past_key_values.layers[0].keys.shape[0] == 3
    rows = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    model.generate(**batch, logits_processor=[acd], do_sample=False, max_new_tokens=7)
    assert rows[-7:] == [6] * 4 + [3] * 3


PROCESSED = {
    "min_new_tokens": (
        {"min_new_tokens": 8, "eos_token_id": 51},
        lambda: MinNewTokensLengthLogitsProcessor(11, 8, 51, device=DEVICE),
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[4], [40, 41], *[[i] for i in range(60, 80)]]},
        lambda: NoBadWordsLogitsProcessor([[4], [40, 41], *[[i] for i in range(60, 80)]]),
    ),
    "repetition_penalty": ({"repetition_penalty": 1.7}, lambda: RepetitionPenaltyLogitsProcessor(1.7)),
}


@pytest.mark.parametrize("what", PROCESSED)
@pytest.mark.parametrize("beams", [1, 3])
def test_built_in_processors_act_on_the_safe_stream(what, beams):
    if what == "repetition_penalty" and beams > 1:
        pytest.skip("the penalty scales log-probabilities under beams, and logits without")
    kwargs, make = PROCESSED[what]
    extra = {"pad_token_id": 0} if what == "min_new_tokens" else {}
    got, expected = run_both(
        build_model(),
        build_pair(),
        build_batch((11,)),
        reference={"first": [make()]},
        num_beams=beams,
        **kwargs,
        **extra,
    )
    assert_same(got, expected)


def test_output_logits_are_the_safe_stream(model, pair):
    batch = build_batch((9,))
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    out = model.generate(**batch, logits_processor=[acd], do_sample=False, **SCORES)
    reference = ReferenceProcessor(copy.deepcopy(model), pair, 0.0)
    torch.testing.assert_close(out.logits[0], reference(batch["input_ids"], None), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("length", "pair"), [(9, build_pair()), (120, build_pair(2, 2))])
def test_inputs_embeds(model, length, pair):
    batch = build_batch((length,))
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    got, expected = run_both(
        model, pair, {"inputs_embeds": embeds}, reference={"prompt": embeds, "mask": None}, num_beams=1
    )
    assert_same(got, expected)


@pytest.mark.parametrize("user_made", [False, True], ids=["returned", "made by the user"])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "bamba"])
def test_second_turn_from_a_cache(name, user_made):
    model, pair, batch = build_model(name), build_pair(), build_batch()
    plain = copy.deepcopy(model)
    acd = ACDLogitsProcessor(model, pair, ALPHA, BETA)
    given = {"past_key_values": DynamicCache(config=model.config)} if user_made else {}
    first = model.generate(**batch, **given, logits_processor=[acd], do_sample=False, **SCORES)
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]], device=DEVICE).repeat(3, 1)], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW + 3), value=1)
    turn = {"input_ids": ids, "attention_mask": mask}
    cache = given.get("past_key_values", first.past_key_values)
    second = model.generate(**turn, past_key_values=cache, logits_processor=[acd], do_sample=False, **SCORES)
    reference = ReferenceProcessor(plain, pair, ALPHA, BETA, mask=mask)
    assert_same(second, plain.generate(**turn, logits_processor=[reference], do_sample=False, **SCORES))


def test_second_turn_with_only_the_new_tokens(model, pair):
    batch, plain = build_batch((9,)), copy.deepcopy(model)
    acd = ACDLogitsProcessor(model, pair, ALPHA, BETA)
    first = model.generate(**batch, logits_processor=[acd], do_sample=False, **SCORES)
    new = torch.tensor([[7, 8, 9]], device=DEVICE)
    whole = torch.cat([first.sequences, new], dim=1)
    # The last token of a turn is not in the cache yet, so it is among the new ones
    second = model.generate(
        whole[:, -4:],
        attention_mask=torch.ones_like(whole),
        past_key_values=first.past_key_values,
        logits_processor=[acd],
        do_sample=False,
        **SCORES,
    )
    reference = ReferenceProcessor(plain, pair, ALPHA, BETA)
    expected = plain.generate(whole, logits_processor=[reference], do_sample=False, **SCORES)
    assert second.sequences[0, 4:].tolist() == expected.sequences[0, whole.shape[1] :].tolist()


def test_streamer_gets_the_contrasted_tokens(model, pair):
    class Collect:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    collect, acd = Collect(), ACDLogitsProcessor(model, pair)
    out = model.generate(
        **build_batch((9,)), logits_processor=[acd], streamer=collect, do_sample=False, max_new_tokens=5
    )
    assert collect.tokens == [*out[0].tolist(), "end"]


def test_stopping_criteria_and_recovery_from_one_that_raises(model, pair):
    class StopAt(StoppingCriteria):
        def __init__(self, length, error=None):
            self.length, self.error = length, error

        def __call__(self, input_ids, scores, **kwargs):
            if self.error and input_ids.shape[1] >= self.length:
                raise self.error
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=DEVICE)

    acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
    kwargs = {"logits_processor": [acd], "do_sample": False, "max_new_tokens": NEW}
    expected = model.generate(**batch, **kwargs)
    stopped = model.generate(**batch, **kwargs, stopping_criteria=[StopAt(12)])
    assert stopped.tolist() == expected[:, :12].tolist()
    plain = copy.deepcopy(model).generate(**batch, do_sample=False, max_new_tokens=NEW)
    with pytest.raises(KeyError, match="my own"):
        model.generate(**batch, **kwargs, stopping_criteria=[StopAt(12, KeyError("my own"))])
    assert model.generate(**batch, **kwargs).tolist() == expected.tolist()
    assert model.generate(**batch, do_sample=False, max_new_tokens=NEW).tolist() == plain.tolist()


def test_custom_generate_callable(model, pair):
    def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        while True:
            step = None if not model_kwargs["past_key_values"].get_seq_length() else 1
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **model_kwargs)
            outputs = model(**inputs)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            token = logits_processor(input_ids, outputs.logits[:, -1].float()).argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
            if stopping_criteria(input_ids, None).all():
                return input_ids

    acd, batch = ACDLogitsProcessor(model, pair), build_batch()
    kwargs = {"logits_processor": [acd], "do_sample": False, "max_new_tokens": NEW}
    expected = model.generate(**batch, **kwargs)
    assert model.generate(**batch, **kwargs, custom_generate=greedy).tolist() == expected.tolist()


def test_minimal_loop_in_a_custom_generate_callable(model, pair):
    """A loop that leaves masks and positions to the model."""

    def greedy(model, input_ids, logits_processor, past_key_values, **kwargs):
        token = input_ids
        for _ in range(NEW):
            logits = model(token, past_key_values=past_key_values).logits[:, -1].float()
            token = logits_processor(input_ids, logits).argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=-1)
        return input_ids

    acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
    kwargs = {"logits_processor": [acd], "do_sample": False, "max_new_tokens": NEW}
    expected = model.generate(**batch, **kwargs)
    assert model.generate(**batch, **kwargs, custom_generate=greedy).tolist() == expected.tolist()


class TestLora:
    @pytest.fixture
    def peft_model(self, model):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, lora).eval()

    def expected(self, model, pair, batch):
        reference = ReferenceProcessor(model, pair, ALPHA, BETA, mask=batch["attention_mask"])
        return model.generate(**batch, logits_processor=[reference], do_sample=False, **SCORES)

    def test_adapter_on_off_and_on_again(self, peft_model, pair):
        batch, merged = build_batch(), copy.deepcopy(peft_model).merge_and_unload()
        bare = copy.deepcopy(peft_model).unload()
        acd = ACDLogitsProcessor(peft_model, pair, ALPHA, BETA)
        run = lambda: peft_model.generate(**batch, logits_processor=[acd], do_sample=False, **SCORES)  # noqa: E731
        assert_same(run(), self.expected(merged, pair, batch))
        with peft_model.disable_adapter():
            assert_same(run(), self.expected(bare, pair, batch))
        assert_same(run(), self.expected(merged, pair, batch))

    def test_an_activated_lora_that_came_later_is_refused(self, model, pair):
        config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        peft_model = get_peft_model(model, LoraConfig(**config))
        acd = ACDLogitsProcessor(peft_model, pair)
        peft_model.add_adapter("late", LoraConfig(**config, alora_invocation_tokens=[5]))
        with pytest.raises(ValueError, match="'late' is an activated LoRA"):
            peft_model.generate(**build_batch(), logits_processor=[acd], max_new_tokens=2)

    def test_prompt_learning_is_refused(self, model, pair):
        from peft import PromptTuningConfig

        peft_model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match="PROMPT_TUNING prompt of its own"):
            ACDLogitsProcessor(peft_model, pair)


@pytest.mark.parametrize(
    "device_map",
    [{"": "cpu"}, {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}],
    ids=["cpu", "layers on disk"],
)
@pytest.mark.parametrize("name", ["llama", "mistral_sliding"])
def test_accelerate_device_map(tmp_path, name, device_map):
    model, pair, batch = build_model(name), build_pair(), build_batch()
    acd = ACDLogitsProcessor(model, pair)
    expected = model.generate(**batch, logits_processor=[acd], do_sample=False, max_new_tokens=NEW)
    model.save_pretrained(tmp_path / "model")
    if len(device_map) > 1:
        device_map = device_map | {f"model.layers.{i}": "disk" for i in range(model.config.num_hidden_layers)}
    placed = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk")
    acd = ACDLogitsProcessor(placed, pair)
    out = placed.generate(**batch, logits_processor=[acd], do_sample=False, max_new_tokens=NEW)
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("how", ["forward", newest("module"), newest("in place")])
def test_compiled_forward(model, pair, how):
    """`backend="eager"` compiles nothing, but traces and guards like any other backend."""
    torch._dynamo.reset()
    batch, plain = build_batch(), copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, ALPHA, BETA, mask=batch["attention_mask"])
    expected = plain.generate(**batch, logits_processor=[reference], do_sample=False, **SCORES)
    caller = model
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "module":
        caller = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    acd = ACDLogitsProcessor(caller, pair, ALPHA, BETA)
    assert_same(caller.generate(**batch, logits_processor=[acd], do_sample=False, **SCORES), expected)


def counting_backend():
    """A backend that compiles nothing, and how many graphs it was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def graphs_at_each_token(model, batch, graphs, processors, **options):
    """How many graphs there were after each of the new tokens of a call."""
    counts = []

    def note(input_ids, scores, **kwargs):
        counts.append(len(graphs))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=DEVICE)

    model.generate(**batch, logits_processor=processors, stopping_criteria=[note], do_sample=False, **options)
    return counts


@pytest.mark.newest
@pytest.mark.parametrize("pair", [build_pair(), build_key_value_pair()], ids=["paired", "shared"])
def test_a_compiled_forward_stays_compiled(pair):
    """However many tokens are made, nothing is compiled again."""
    torch._dynamo.reset()
    model, (backend, graphs) = build_model(), counting_backend()
    model.forward = torch.compile(model.forward, backend=backend)
    counts = graphs_at_each_token(model, build_batch(), graphs, [ACDLogitsProcessor(model, pair)], max_new_tokens=80)
    assert counts[5] == counts[-1] > 0


class TestCompiledDecoding:
    """Where generate() compiles by itself: a static cache, here on a CPU as it does on a GPU."""

    # Each way with a short and with a long prompt, and so nearly each architecture
    @pytest.mark.parametrize(
        ("name", "how", "long"),
        [
            ("llama", {}, False),
            ("llama", {"prefill_chunk_size": 115}, True),
            newest("mistral_sliding", {}, True),  # of nine layers, which take long
            newest("gemma3", {}, False),
            ("gemma3", {"prefill_chunk_size": 115}, True),
            newest("gpt2", {"prefill_chunk_size": 4}, False),
            newest("gpt2", {"do_sample": True}, True),
            ("lfm2", {"do_sample": True}, False),
            newest("lfm2", {}, True),
        ],
        ids=lambda part: next(iter(part), "greedy") if isinstance(part, dict) else None,
    )
    def test_equals_the_reference(self, name, how, long):
        compiled, graphs = self.config()
        setup = long_prompt(name) if long else (build_model(name), build_pair(), build_batch())
        got, expected = run_both(*setup, cache_implementation="static", compile_config=compiled, **how)
        assert_same(got, expected)
        assert graphs

    @pytest.mark.newest
    @pytest.mark.parametrize("name", ["gemma3", "lfm2"])
    def test_horizon(self, name):
        compiled, graphs = self.config()
        got, expected = run_both(
            build_model(name),
            build_pair(),
            build_batch(),
            reference={"horizon": 5},
            acd={"horizon": 5},
            cache_implementation="static",
            compile_config=compiled,
        )
        assert_same(got, expected)
        assert graphs

    @pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
    def test_past_the_horizon_the_cache_stays_where_graphs_look_for_it(self, name):
        acd = ACDLogitsProcessor(model := build_model(name), build_pair(), horizon=3)
        options = {"disable_compile": True, "cache_implementation": "static"}
        cache = model.generate(**build_batch(), logits_processor=[acd], **SCORES | options).past_key_values
        assert cache.alone
        held = [layer.keys if hasattr(layer, "keys") else layer.conv_states[0] for layer in cache.layers]
        assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in held)

    def test_alibi_is_not_compiled(self):
        """Its distances come from a mask as long as the text."""
        compiled, graphs = self.config()
        got, expected = run_both(
            build_model("bloom"), build_pair(), build_batch(), cache_implementation="static", compile_config=compiled
        )
        assert_same(got, expected)
        assert not graphs

    @pytest.mark.newest
    @pytest.mark.parametrize(("name", "chunk"), [("llama", None), ("gemma3", 115)])
    def test_as_many_graphs_as_without_acd_at_any_length(self, name, chunk):
        def counts(processors):
            model, pair, batch = long_prompt(name)
            compiled, graphs = self.config()
            acd = [ACDLogitsProcessor(model, pair)] if processors else []
            options = {"cache_implementation": "static", "compile_config": compiled, "prefill_chunk_size": chunk}
            return graphs_at_each_token(
                model, batch if chunk else build_batch(), graphs, acd, max_new_tokens=40, **options
            )

        ours, plain = counts(True), counts(False)
        assert ours[3] == ours[-1] == plain[-1] > 0

    @pytest.mark.newest
    def test_a_compiled_prefill_finds_the_cache_in_place(self):
        """CUDA graphs need tensors whose address is marked as static, which cannot be done within them."""
        model, pair, batch = long_prompt("gemma3")  # with layers of both kinds
        marked = []
        for processors in ([], [ACDLogitsProcessor(model, pair)]):
            options = {"compile_config": self.config()[0], "cache_implementation": "static", "prefill_chunk_size": 115}
            out = model.generate(**batch, logits_processor=processors, **SCORES | options)
            marked.append([hasattr(layer.keys, "_dynamo_static_input_type") for layer in out.past_key_values.layers])
        assert marked[0] == marked[1]

    @staticmethod
    def config():
        torch._dynamo.reset()
        backend, graphs = counting_backend()
        config = CompileConfig(backend=backend, mode="default")
        config._compile_all_devices = True
        return config, graphs


def test_pipeline(model, pair, tokenizer):
    from transformers import pipeline

    acd = ACDLogitsProcessor(model, pair)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    kwargs = {"do_sample": False, "max_new_tokens": 6}
    out = generator("w5 w6 w7", logits_processor=[acd], return_tensors=True, **kwargs)
    direct = model.generate(**tokenizer("w5 w6 w7", return_tensors="pt"), logits_processor=[acd], **kwargs)
    assert out[0]["generated_token_ids"] == direct[0].tolist()


def test_guidance_scale_acts_on_the_safe_stream(model):
    """Built-in guidance runs passes of its own on the same model, which must stay plain."""
    batch, plain = build_batch((9,)), copy.deepcopy(model)
    kwargs = {"guidance_scale": 1.5, "do_sample": False, "max_new_tokens": 4}
    none = ACDLogitsProcessor(model, build_pair(0, 0), alpha=0.0, beta=0.0)
    assert (
        model.generate(**batch, logits_processor=[none], **kwargs).tolist()
        == plain.generate(**batch, **kwargs).tolist()
    )


class TestIsolation:
    def test_calls_without_the_processor_are_bit_identical(self, pair):
        model, untouched, batch = build_model(), build_model(), build_batch()
        kwargs = {"do_sample": False} | SCORES
        expected = untouched.generate(**batch, **kwargs)

        def check():
            got = model.generate(**batch, **kwargs)
            assert torch.equal(got.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))

        acd = ACDLogitsProcessor(model, pair)
        check()
        running = threading.Event()
        done = threading.Event()

        class Signal(StoppingCriteria):
            def __call__(self, input_ids, scores, **kw):
                running.set()
                return torch.full((len(input_ids),), done.is_set(), device=DEVICE)

        thread = threading.Thread(
            target=model.generate,
            kwargs=batch
            | {"logits_processor": [acd], "stopping_criteria": [Signal()], "max_new_tokens": 200, "do_sample": False},
        )
        thread.start()
        assert running.wait(30)
        check()
        assert thread.is_alive()  # it really ran meanwhile
        done.set()
        thread.join()
        check()

    def test_four_threads_with_four_alphas(self, pair):
        model, plain, batch = build_model(), build_model(), build_batch()
        alphas, results = [0.0, 0.3, 0.6, 1.0], {}
        processors = {alpha: ACDLogitsProcessor(model, pair, alpha, 0.0) for alpha in alphas}

        def run(alpha):
            results[alpha] = [
                model.generate(**batch, logits_processor=[processors[alpha]], do_sample=False, **SCORES)
                for _ in range(3)
            ]

        threads = [threading.Thread(target=run, args=(alpha,)) for alpha in alphas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for alpha in alphas:
            reference = ReferenceProcessor(plain, pair, alpha, mask=batch["attention_mask"])
            expected = plain.generate(**batch, logits_processor=[reference], do_sample=False, **SCORES)
            for got in results[alpha]:
                assert_same(got, expected)

    def test_one_processor_in_four_threads(self, model, pair):
        acd = ACDLogitsProcessor(model, pair)
        batches = [build_batch(seed=seed) for seed in range(4)]
        run = lambda b: model.generate(**b, logits_processor=[acd], do_sample=False, max_new_tokens=NEW)  # noqa: E731
        expected = [run(batch).tolist() for batch in batches]
        results = [None] * 4

        def work(index):
            results[index] = run(batches[index]).tolist()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == expected

    def test_300_calls_leak_nothing(self, pair):
        """Live tensors and resident memory stay level from the 50th call to the 300th."""
        import gc

        import psutil

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2000, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).eval()
        acd, process = ACDLogitsProcessor(model, pair), psutil.Process(os.getpid())
        batch = build_batch((60, 40, 60, 30))

        def measure(calls):
            for _ in range(calls):
                model.generate(**batch, logits_processor=[acd], do_sample=False, max_new_tokens=4)
            live = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            return live, process.memory_info().rss / 2**20

        gc.collect()
        gc.disable()  # what a call leaves behind must not wait for the collector
        try:
            tensors, memory = measure(50)
            tensors_after, memory_after = measure(250)
        finally:
            gc.enable()
        assert tensors_after == tensors
        assert memory_after - memory < 20  # a call's caches alone are 2 MiB
