"""Random shapes and options against the slow reference."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acd_logits import ACDLogitsProcessor
from conftest import assert_same, build_batch, build_model, build_pair
from reference import ReferenceProcessor, SharedReference

NAMES = ("llama", "mistral_sliding", "bloom", "gpt2")
MODELS = {name: build_model(name) for name in NAMES}
UNTOUCHED = copy.deepcopy(MODELS)


@pytest.mark.newest
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_call_equals_the_reference(data):
    name = data.draw(st.sampled_from(NAMES), "architecture")
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=4), "lengths")
    pair = build_pair(data.draw(st.integers(0, 9), "n_s"), data.draw(st.integers(0, 9), "n_a"))
    beams = data.draw(st.integers(1, 3), "beams")
    beta = data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.5]), "beta")
    horizon = data.draw(st.one_of(st.none(), st.integers(1, 9)), "horizon")
    # Just below 1, the division by 1 - alpha makes rounding errors large too
    strengths = st.one_of(st.floats(0, 0.75, width=32), st.floats(1, 1.5, width=32))
    if data.draw(st.booleans(), "alpha per row"):
        size = len(lengths)
        alpha = torch.tensor(data.draw(st.lists(strengths, min_size=size, max_size=size), "alpha"))
        per_row = alpha.repeat_interleave(beams)
    else:
        alpha = per_row = data.draw(strengths, "alpha")
    extra = {}
    if data.draw(st.booleans(), "no cache"):
        extra["use_cache"] = False
    elif data.draw(st.booleans(), "chunked"):
        extra["prefill_chunk_size"] = data.draw(st.integers(1, 6), "chunk")

    share = name == "llama" and data.draw(st.booleans(), "shared instruction")
    batch = build_batch(lengths, seed=data.draw(st.integers(0, 99), "seed"))
    kwargs = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 7}
    mask = batch["attention_mask"].repeat_interleave(beams, dim=0)
    slow = SharedReference if share else ReferenceProcessor
    reference = slow(UNTOUCHED[name], pair, per_row, beta, horizon, beams=beams > 1, mask=mask)
    expected = UNTOUCHED[name].generate(**batch, logits_processor=[reference], num_beams=beams, **kwargs)
    acd = ACDLogitsProcessor(MODELS[name], pair, alpha, beta, horizon, share_instruction_kv=share)
    try:
        got = MODELS[name].generate(**batch, logits_processor=[acd], num_beams=beams, **kwargs, **extra)
    finally:
        acd.detach()
    assert_same(got, expected)
