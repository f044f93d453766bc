"""Whatever a model's owner does to it, a processor built earlier decodes like one built at that moment.

`Owner` holds a model and all that may change between two calls. A parametrised test applies each change by itself; a
state machine mixes them with calls in every mode. `STATE_MACHINE_EXAMPLES=300` runs so many random lives of each
model, in place of a few that are always the same.
"""

import copy
import functools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from transformers import set_seed

from acd_logits import ACDLogitsProcessor
from conftest import assert_same, build_batch, build_key_value_pair, build_model, build_pair
from reference import ReferenceProcessor, SharedReference

NAMES = ["llama", "gpt2", "mixtral"]
ROTARY = {"llama", "mixtral"}
NEW = 5
SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
GREEDY = {"do_sample": False, "max_new_tokens": NEW}

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 40},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "draft": {"assistant_model": build_model(seed=5)},
}
# What says how to reach the tokens, and not which, is not for the reference
SPEED = {"use_cache", "cache_implementation", "disable_compile", "prefill_chunk_size", "prompt_lookup_num_tokens"}
SPEED |= {"assistant_model"}
ONE_ROW = {"lookup", "draft"}
CONTEXTS = {"autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16), "inference": torch.inference_mode}

LONG = int(os.environ.get("STATE_MACHINE_EXAMPLES", 0))
LIVES = settings(
    max_examples=LONG or 4,
    stateful_step_count=40 if LONG else 20,
    derandomize=not LONG,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink] if LONG else [Phase.generate],  # shrinking takes minutes
)


@dataclass(eq=False)
class Options:
    """All that a processor is built from, but for its model."""

    prompt_lengths: tuple[int, int] = (7, 4)
    alpha: float | tuple[float, ...] = 0.6
    beta: float = 0.0
    horizon: int | None = None
    share: bool = False
    key_value: bool = False  # if shared

    def __post_init__(self):
        if self.share and self.key_value:
            self.pair = build_key_value_pair(*self.prompt_lengths)
        else:
            self.pair = build_pair(*self.prompt_lengths, share_instruction_kv=self.share)

    @property
    def per_row(self):
        return isinstance(self.alpha, tuple)

    def refusal(self, mode):
        """What a call in this mode is refused with, if it is."""
        if self.share and mode == "static":
            return "works with a dynamic cache only"
        return "alpha has 3 entries" if self.per_row and mode in ONE_ROW else None

    def build(self, model, **kwargs):
        alpha = torch.tensor(self.alpha) if self.per_row else self.alpha
        return ACDLogitsProcessor(model, self.pair, alpha, self.beta, self.horizon, **kwargs)

    def reference(self, model, mask, rows=1, beams=False):
        """The slow reference, for `rows` rows of the decoding loop per prompt."""
        alpha = torch.tensor(self.alpha).repeat_interleave(rows) if self.per_row else self.alpha
        slow = SharedReference if self.share else ReferenceProcessor
        mask = mask.repeat_interleave(rows, 0)
        return slow(model, self.pair, alpha, self.beta, self.horizon, beams=beams, mask=mask)


def generate(model, processor, batch, seed=0, **kwargs):
    set_seed(seed)
    return model.generate(**batch, logits_processor=[processor], **SCORES | GREEDY | kwargs)


def assert_identical(got, expected):
    """The same tokens, and scores within float noise of the same computation."""
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-5, rtol=0)


def check(
    model, options, processor, batch, context=nullcontext, copied=True, slow=False, frozen=False, seed=0, **mode
):
    """A call equals the same call of a processor built afresh (for a copy of the model), and the reference if `slow`.

    `context` makes what to call generate in; `frozen` says what the processor was promised.
    """
    with context():
        got = generate(model, processor, batch, seed, **mode)
    twin = copy.deepcopy(model) if copied else model
    fresh = options.build(twin, frozen_model=frozen)
    with context():
        assert_identical(got, generate(twin, fresh, batch, seed, **mode))
    fresh.detach()
    if slow:
        beams, plain = mode.get("num_beams", 1), copy.deepcopy(model)
        rows = max(beams, mode.get("num_return_sequences", 1))
        reference = options.reference(plain, batch["attention_mask"], rows, beams > 1)
        usual = {key: value for key, value in mode.items() if key not in SPEED}
        assert_same(got, generate(plain, reference, batch, seed, **usual))
    return got


def check_contrast(model, options, output, batch):
    """The first scores are neither those of the model alone nor those of the safeguarding prompt alone."""
    with torch.no_grad():
        plain = model(**batch).logits[:, -1].float().log_softmax(-1)
    safe, scores = (x[0].float().log_softmax(-1) for x in (output.logits, output.scores))
    contrasted = torch.tensor(options.alpha).expand(len(plain)) > 0
    for other in (plain, safe) if options.prompt_lengths[0] else (plain,):
        difference = (scores - other).abs()
        difference = difference.masked_fill(scores.isneginf(), 0)  # implausible
        assert (difference.amax(-1) > 0.01)[contrasted].all()


def make_at(address, locate, make):
    """Make things until one lies where one lay that is gone, as happens by chance too; 100 at most."""
    made = [make()]
    while locate(made[-1]) != address and len(made) < 100:
        made.append(make())
    return made[-1]


def scaling_hook(factor, module, args, output):
    return output * factor


def patched_forward(layer, factor, *args, **kwargs):
    return type(layer).forward(layer, *args, **kwargs) * factor


class Owner:
    """A model, and what its owner may do to it; `seed`, a number of at least 0, makes one time differ from another."""

    def __init__(self, name):
        self.name, self.model, self.pairs = name, build_model(name), []
        self.hook = None

    @property
    def base(self):
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def layers(self):
        return self.base.transformer.h if self.name == "gpt2" else self.base.model.layers

    @property
    def weights(self):
        """Matrices of the first layer: the second layer's keys and values depend on all of them."""
        return [parameter for parameter in self.layers[0].parameters() if parameter.ndim > 1]

    @property
    def noisy(self):
        """Whether two equal calls may differ, by dropout."""
        return self.model.training and self.name == "gpt2"

    @property
    def precise(self):
        """Whether scores can be compared with those of another way to compute them."""
        return not self.noisy and self.base.dtype == torch.float32

    def change(self, how, seed):
        if how != "write_under_inference_mode":  # such weights cannot be written to elsewhere
            for module in self.base.modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_inference():
                        module._parameters[key] = nn.Parameter(parameter.clone())
        getattr(self, how)(seed)

    # ----- weights -----

    def load_state_dict(self, seed):
        weights = {
            key: value * factor(seed) if value.ndim > 1 else value for key, value in self.base.state_dict().items()
        }
        self.base.load_state_dict(weights, assign=seed % 2 == 1)

    def sgd_step(self, seed):
        self.train_one_step(seed, torch.optim.SGD, lr=0.5)

    def adamw_step(self, seed):
        self.train_one_step(seed, torch.optim.AdamW, lr=0.03)

    def fused_adamw_step(self, seed):
        self.train_one_step(seed, torch.optim.AdamW, lr=0.03, fused=True)

    def train_one_step(self, seed, optimizer, **kwargs):
        self.model.float().requires_grad_(True)
        steps = optimizer(self.model.parameters(), **kwargs)
        batch = build_batch((9,), seed=seed)
        self.model(**batch, labels=batch["input_ids"]).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    def write_in_place(self, seed):
        with torch.no_grad():
            for weight in self.weights:
                weight.mul_(factor(seed))

    def write_through_data(self, seed):
        for weight in self.weights:
            weight.data.mul_(factor(seed))

    def replace_data_twice(self, seed):
        """The second time brings the first storage's address back."""
        weight = self.weights[-1]
        address = weight.data_ptr()
        weight.data = weight.data.clone()
        weight.data = make_at(address, torch.Tensor.data_ptr, lambda: weight.data * factor(seed))

    def write_under_inference_mode(self, seed):
        """Torch counts no versions of such weights."""
        with torch.inference_mode():
            for module in self.layers[0].modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_inference():
                        parameter.mul_(factor(seed))
                    elif parameter is not None:
                        module._parameters[key] = nn.Parameter(parameter * factor(seed), requires_grad=False)

    def replace_a_module(self, seed):
        self.layers[0].mlp = copy.deepcopy(self.layers[0].mlp)
        with torch.no_grad():
            for parameter in self.layers[0].mlp.parameters():
                parameter.mul_(factor(seed))

    def write_prompts(self, seed):
        for pair in self.pairs:
            pair.safeguarding.data.mul_(factor(seed))
            pair.adversarial.data.mul_(factor(seed))

    # ----- code -----

    def patch_forward(self, seed):
        self.layers[0].forward = functools.partial(patched_forward, self.layers[0], factor(seed))

    def change_an_attribute(self, seed):
        norm = self.layers[1].ln_1 if self.name == "gpt2" else self.layers[1].input_layernorm
        key = "eps" if self.name == "gpt2" else "variance_epsilon"
        setattr(norm, key, 0.5 * factor(seed))

    def swap_hooks(self, seed):
        """The new hook gets the address of the old one."""
        make = functools.partial(functools.partial, scaling_hook, factor(seed))
        address = self.remove_hook(seed)
        hook = make() if address is None else make_at(address, id, make)
        self.hook = self.layers[0].register_forward_hook(hook), id(hook)

    def remove_hook(self, seed):
        if self.hook is None:
            return None
        handle, address = self.hook
        handle.remove()
        self.hook = None
        return address

    def switch_attention(self, seed):
        self.base.set_attn_implementation("eager" if seed % 2 else "sdpa")

    # ----- adapters -----

    @property
    def adapter(self):
        """The name of the active adapter; adds one to a bare model."""
        if not isinstance(self.model, PeftModel):
            self.add_adapter(0)
        return self.model.active_adapter

    @property
    def lora_layers(self):
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def add_adapter(self, seed):
        torch.manual_seed(seed)
        name, training = f"lora{seed}", self.model.training
        if not isinstance(self.model, PeftModel):
            self.model = get_peft_model(self.model, lora(self.name), adapter_name=name)
        elif name not in self.model.peft_config:
            self.unmerge()
            self.model.add_adapter(name, lora(self.name))
        self.model.train(training)
        self.model.set_adapter(name)

    def merge_or_unmerge(self, seed):
        if not self.unmerge():
            self.model.merge_adapter()

    def unmerge(self):
        merged = bool(self.adapter) and any(layer.merged for layer in self.lora_layers)
        if merged:
            self.model.unmerge_adapter()
        return merged

    def toggle_adapters(self, seed):
        if self.adapter and self.lora_layers[0].disable_adapters:
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.base_model.disable_adapter_layers()

    def hotswap(self, seed):
        self.unmerge()
        weights = {
            key: value * factor(seed) for key, value in self.model.state_dict().items() if f".{self.adapter}." in key
        }
        hotswap_adapter_from_state_dict(self.model, weights, self.adapter, lora(self.name))

    def scale_adapter(self, seed):
        self.unmerge()
        for layer in self.lora_layers:
            layer.scaling[self.adapter] *= factor(seed)

    def unload(self, seed):
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload() if seed % 2 else self.model.merge_and_unload()

    # ----- the whole model -----

    def half(self, seed):
        self.model.half()

    def bfloat16(self, seed):
        self.model.bfloat16()

    def float(self, seed):
        self.model.float()

    def to(self, seed):
        self.model.to("cpu", (torch.float32, torch.bfloat16)[seed % 2])

    def train(self, seed):
        self.model.train()

    def eval(self, seed):
        self.model.eval()


def factor(seed):
    return (0.8, 1.3, 0.9, 1.15)[seed]


def lora(name):
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    return LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2"
    )


WEIGHTS = [
    "load_state_dict",
    "sgd_step",
    "adamw_step",
    "fused_adamw_step",
    "write_in_place",
    "write_through_data",
    "replace_data_twice",
    "write_under_inference_mode",
    "replace_a_module",
    "write_prompts",
]
CODE = ["patch_forward", "change_an_attribute", "swap_hooks", "remove_hook", "switch_attention"]
ADAPTERS = [
    "add_adapter",
    "merge_or_unmerge",
    "toggle_adapters",
    "hotswap",
    "scale_adapter",
    "unload",
]
WHOLE = ["half", "bfloat16", "float", "to", "train", "eval"]
QUIET = {"remove_hook", "switch_attention", "merge_or_unmerge", "float", "train", "eval"}  # change no score


@pytest.mark.parametrize("how", [*WEIGHTS, *CODE, *ADAPTERS, *WHOLE])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_change_takes_effect(name, how):
    owner, options, batch = Owner(name), Options(), build_batch()
    owner.pairs.append(options.pair)
    if how in ADAPTERS:
        owner.add_adapter(0)
    acd = options.build(owner.model)
    output, moved = generate(owner.model, acd, batch), []
    for seed in (1, 0):
        before = output.scores[0]
        owner.change(how, seed)
        if owner.noisy:
            continue
        output = check(owner.model, options, acd, batch, slow=owner.precise)
        moved.append((output.scores[0] - before).abs().max() > 1e-3)
    assert any(moved) == (how not in QUIET)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_does_not_stay(model, context, share, frozen):
    options, batch = Options(share=share), build_batch()
    acd = options.build(model, frozen_model=frozen)
    check(model, options, acd, batch, CONTEXTS[context], frozen=frozen)
    check(model, options, acd, batch, slow=True, frozen=frozen)
    if not frozen:
        check(model, options, acd, batch, CONTEXTS[context])


@dataclass(eq=False)
class Held:
    """A processor that outlives changes, and one that was promised none; the latter is built anew after each."""

    options: Options
    acd: ACDLogitsProcessor
    frozen: ACDLogitsProcessor | None = None

    def promised(self, model):
        if self.frozen is None:
            self.frozen = self.options.build(model, frozen_model=True)
        return self.frozen


SEEDS = st.integers(0, 3)
BATCHES = {"one": (9,), "padded": (11, 7, 10), "long padding": (13, 2, 1), "long": (114,)}
OPTIONS = st.builds(
    Options,
    prompt_lengths=st.sampled_from([(7, 4), (2, 2), (0, 4), (5, 0)]),
    alpha=st.sampled_from([0.6, 1.0, (0.0, 0.5, 1.0)]),
    beta=st.sampled_from([0.0, 0.1]),
    horizon=st.sampled_from([None, 2]),
    share=st.booleans(),
    key_value=st.booleans(),
)


class Decoder(RuleBasedStateMachine):
    """Changes and calls in any order; after each, every processor must decode like one built at that moment."""

    name = "llama"

    @initialize()
    def start(self):
        self.owner, self.held, self.steps = Owner(self.name), [], 0
        self.attach(Options())

    @precondition(lambda self: len(self.held) < 2)
    @rule(options=OPTIONS)
    def attach(self, options):
        options = replace(options, share=options.share and self.name in ROTARY)
        self.owner.pairs.append(options.pair)
        self.held.append(Held(options, options.build(self.owner.model)))

    @rule(which=SEEDS, options=OPTIONS)
    def detach_and_attach(self, which, options):
        held = self.held.pop(which % len(self.held))
        held.acd.detach()
        self.assert_raises(held.acd)
        self.attach(options)

    def assert_raises(self, acd):
        with pytest.raises((ValueError, RuntimeError), match=r"was detached|outside generate|another model"):
            generate(self.owner.model, acd, build_batch())

    def change(self, how, seed):
        self.owner.change(how, seed)
        if how not in ("train", "eval"):
            for held in self.held:
                held.frozen = None

    @rule(how=st.sampled_from([*WEIGHTS, *WHOLE]), seed=SEEDS)
    def change_weights(self, how, seed):
        self.change(how, seed)

    @rule(how=st.sampled_from([*CODE, *ADAPTERS]), seed=SEEDS)
    def change_layers(self, how, seed):
        self.change(how, seed)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), go_on_with_the_copy=st.booleans())
    def copy_the_model(self, how, go_on_with_the_copy):
        model = self.owner.model
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        if not go_on_with_the_copy:
            return
        self.owner.model, self.owner.hook = twin, None  # its hooks stay
        for held in self.held:
            self.assert_raises(held.acd)
            held.acd, held.frozen = held.options.build(twin), None

    @rule(
        which=SEEDS,
        promise=st.sampled_from(["none", "given", "given now"]),
        mode=st.sampled_from(list(MODES)),
        lengths=st.sampled_from(list(BATCHES)),
        context=st.sampled_from(["none", *CONTEXTS]),
        seed=SEEDS,
    )
    def call(self, which, promise, mode, lengths, context, seed):
        model, held, frozen = self.owner.model, self.held[which % len(self.held)], promise != "none"
        if promise == "given now":  # the first call of its processor is this one
            held.frozen = None
        if context == "autocast" and (mode == "static" or not self.owner.precise):
            context = "none"  # a static cache raises there in plain generate() too, and half weights inside of torch
        acd = held.promised(model) if frozen else held.acd
        rows = (9,) if mode in ONE_ROW else BATCHES["padded"] if held.options.per_row else BATCHES[lengths]
        batch = build_batch(rows, seed)
        if mode in ONE_ROW:  # something to find in the prompt
            batch["input_ids"] = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]]) + seed
        refusal = held.options.refusal(mode)
        autocast, how = context == "autocast", CONTEXTS.get(context, nullcontext)
        # Keys and values of before are those of a frozen model, whatever this call is made in
        if refusal or self.owner.noisy or (frozen and autocast):
            with how(), pytest.raises(ValueError, match=refusal) if refusal else nullcontext():
                generate(model, acd, batch, seed, **MODES[mode])
            return
        slow = self.owner.precise and not autocast
        check(model, held.options, acd, batch, how, slow=slow, frozen=frozen, seed=seed, **MODES[mode])

    @precondition(lambda self: not self.owner.noisy)
    @rule(which=SEEDS, another=st.booleans(), frozen=st.booleans(), seed=SEEDS)
    def two_turns(self, which, another, frozen, seed):
        """The second turn may go on under another processor of the same options."""
        model, held = self.owner.model, self.held[which % len(self.held)]
        acd = held.promised(model) if frozen else held.acd
        fresh, batch = held.options.build(model, frozen_model=frozen), build_batch(seed=seed)
        first, expected = (generate(model, processor, batch) for processor in (acd, fresh))
        assert_identical(first, expected)
        turn = {
            "input_ids": torch.cat([first.sequences, torch.tensor([[7, 8, 9]] * 3)], 1),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, NEW + 3), value=1),
        }
        go_on = functools.partial(generate, model, fresh if another else acd, turn)
        if held.options.horizon is not None:
            with pytest.raises(ValueError, match="went past the horizon"):
                go_on(past_key_values=first.past_key_values)
            return
        second = go_on(past_key_values=first.past_key_values)
        assert_identical(second, generate(model, fresh, turn, past_key_values=expected.past_key_values))
        if self.owner.precise:
            plain = copy.deepcopy(model)
            reference = held.options.reference(plain, turn["attention_mask"])
            reference.start = batch["input_ids"].shape[1]
            assert_same(second, generate(plain, reference, turn))

    @precondition(lambda self: not self.owner.noisy)
    @rule(frozen=st.booleans(), seed=SEEDS)
    def two_threads(self, frozen, seed):
        model = self.owner.base  # PEFT patches its model for the time of a call
        helds = self.held if len(self.held) == 2 else self.held * 2
        acds = [held.promised(model) if frozen else held.acd for held in helds]
        batches = [build_batch(seed=seed), build_batch(seed=seed + 1)]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(functools.partial(generate, model), acds, batches))
        for held, batch, got in zip(helds, batches, results, strict=True):
            fresh = held.options.build(model, frozen_model=frozen)
            assert_identical(got, generate(model, fresh, batch))

    @invariant()
    def every_processor_decodes_as_if_built_now(self):
        self.steps += 1
        model, batch, short = self.owner.model, build_batch(), {"max_new_tokens": 3}
        slow = self.owner.precise and self.steps % 3 == 0
        for held in self.held:
            promised = generate(model, held.promised(model), batch, **short)
            if self.owner.noisy:
                generate(model, held.acd, batch, **short)
                continue
            got = check(model, held.options, held.acd, batch, copied=self.steps % 2 == 0, slow=slow, **short)
            check_contrast(model, held.options, got, batch)
            if self.owner.precise:  # with stored keys and values, there may be another way to compute the same
                assert_same(promised, got)


@pytest.mark.parametrize("name", NAMES)
def test_any_life_of_a_model(name):
    machine = type(f"{name.title()}Decoder", (Decoder,), {"name": name})
    run_state_machine_as_test(machine, settings=LIVES)
