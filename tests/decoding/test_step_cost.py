"""What ACD adds to a decode step: operations on the device, and nothing that the host has to wait for.

The counts are those of PyTorch's dispatcher, so they need no GPU. An operation here is a kernel or a copy: views, and
memory without content, are none. Twice the rows are the same operations.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria

from acd_logits import ACDLogitsProcessor
from conftest import _DECODER, DEVICE, build_batch, build_key_value_pair, build_pair

LAYERS, HEADS, NEW, HORIZON = 32, 4, 8, 3
EVEN, PADDED = (9, 9), (9, 6)  # lengths of the prompts
STRENGTHS = torch.tensor([0.3, 0.5])
NO_OPERATIONS = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# A value, or a size that depends on values
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim", "_unique2"}


class Case:
    """One way to decode, beside plain generation with the same `options`."""

    def __init__(self, more, make_pair=build_pair, lengths=EVEN, pair=(), acd=(), options=()):
        self.more, self.make_pair, self.lengths = more, make_pair, lengths
        self.pair, self.acd, self.options = dict(pair), dict(acd), dict(options)

    def inputs(self):
        """The prompts, and a pair."""
        return build_batch(self.lengths), self.make_pair(beta=0.1, **self.pair)


ALIKE, SHARED = {"n_s": 7, "n_a": 7}, {"share_instruction_kv": True}
KEY_VALUE = {"make_pair": build_key_value_pair, "pair": {"sizes": (LAYERS, HEADS, 8)}}
# How many operations more than plain a decode step may have; at most 25 if paired, and 40 if shared
CASES = {
    "paired": Case(10, pair=ALIKE),
    "paired, one row": Case(10, pair=ALIKE, lengths=(9,)),
    "paired, prompts of two lengths": Case(10),
    "paired, padded": Case(15, lengths=PADDED),
    "paired, alpha per row": Case(15, pair=ALIKE, acd={"alpha": STRENGTHS}),
    "paired, beams": Case(13, pair=ALIKE, options={"num_beams": 3}),
    "paired, padded beams": Case(20, lengths=PADDED, options={"num_beams": 3}),
    "paired, past the horizon": Case(1, acd={"horizon": HORIZON}),
    "shared": Case(6, pair=SHARED),
    "shared, padded": Case(12, lengths=PADDED, pair=SHARED),
    "shared, alpha per row": Case(11, pair=SHARED, acd={"alpha": STRENGTHS}),
    "shared, beams": Case(13, pair=SHARED, options={"num_beams": 3}),
    "shared, past the horizon": Case(0, pair=SHARED, acd={"horizon": HORIZON}),
    "key-value prompts": Case(6, **KEY_VALUE),
    "key-value prompts, padded": Case(12, **KEY_VALUE, lengths=PADDED),
    "key-value prompts, past the horizon": Case(0, **KEY_VALUE, acd={"horizon": HORIZON}),
}


class Steps(TorchDispatchMode, StoppingCriteria):
    """Counts what each step does: `generate` asks whether to stop at the end of each."""

    def __init__(self):
        super().__init__()
        self.steps = [Counter()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if waits(func, name, args):
            self.steps[-1]["waits"] += 1
        elif launches(func, name):
            self.steps[-1]["operations"] += 1
        return self.call(func, name, args, kwargs)

    def call(self, func, name, args, kwargs):
        return func(*args, **kwargs)

    def __call__(self, input_ids, scores, **kwargs):
        self.steps.append(Counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def decoding(self):
        """The steps behind the prefill."""
        return self.steps[1:-1]


def waits(func, name, args):
    if name == "repeat_interleave":
        return func._overloadname == "Tensor"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name in WAITS


def launches(func, name):
    view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
    return not view and name not in NO_OPERATIONS


@pytest.fixture(scope="module")
def model():
    """With as many key-value heads as heads: how attention treats groups of them is not what is counted."""
    torch.manual_seed(0)
    config = LlamaConfig(**_DECODER | {"num_hidden_layers": LAYERS, "num_key_value_heads": HEADS})
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    model.generation_config.eos_token_id = None
    return model


def count(steps, model, case, batch, processors=()):
    with steps:
        model.generate(
            **batch,
            logits_processor=processors,
            stopping_criteria=[steps],
            do_sample=False,
            max_new_tokens=NEW,
            **case.options,
        )
    return steps


def run_both(model, case, batch, pair, make_steps=Steps):
    """What ACD counts, and what plain generation does."""
    acd = ACDLogitsProcessor(model, pair, **case.acd)
    got = count(make_steps(), model, case, batch, [acd])
    acd.detach()
    return got, count(make_steps(), model, case, batch)


@pytest.fixture(scope="module", params=CASES)
def counted(request, model):
    """A case, what ACD counts in it, and what plain generation does."""
    case = CASES[request.param]
    return case, *run_both(model, case, *case.inputs())


def test_a_decode_step_adds_few_operations_and_waits_for_nothing(counted):
    case, got, plain = counted
    assert len(got.decoding) == len(plain.decoding) == NEW - 1
    # The step that goes past the horizon as well
    assert all(ours["waits"] <= theirs["waits"] for ours, theirs in zip(got.decoding, plain.decoding, strict=True))
    settled = slice(HORIZON + 1, None)  # what is made once per call is there
    for ours, theirs in zip(got.decoding[settled], plain.decoding[settled], strict=True):
        assert ours["operations"] - theirs["operations"] <= case.more


def test_a_prefill_waits_for_three_values_more_at_most(counted):
    """Whether anything is padded, how long the padding is, and whether it gave NaN."""
    _, got, plain = counted
    assert got.steps[0]["waits"] <= plain.steps[0]["waits"] + 3
