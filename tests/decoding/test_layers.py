"""The cache layer with room behind: the same keys and values as the stock one, whatever is done to it."""

import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from acd_logits.decoding import layers
from acd_logits.decoding.layers import GrowingLayer
from conftest import DEVICE

HEADS, HEAD_DIM = 2, 4


def states(rows, tokens):
    return [torch.randn(rows, HEADS, tokens, size, device=DEVICE) for size in (HEAD_DIM, HEAD_DIM + 2)]


def pick(rows, count):
    return torch.tensor(random.choices(range(rows), k=count), device=DEVICE)


@pytest.mark.parametrize("spare", [0, 1 << 20])
@pytest.mark.parametrize("seed", range(20))
def test_it_holds_what_the_stock_layer_holds(seed, spare, monkeypatch):
    monkeypatch.setattr(layers, "SPARE", spare)
    random.seed(seed), torch.manual_seed(seed)
    ours, stock, rows = GrowingLayer(), DynamicLayer(), 3
    for _ in range(40):
        what = random.choice(["update"] * 4 + ["crop", "reorder_cache", "batch_select_indices", "expect"])
        if what == "expect":  # a new call
            least = ours.get_seq_length() + random.randint(0, 3)
            ours.expect(least, least + random.randint(0, 20))
            continue
        if what == "update":
            arguments = states(rows, random.randint(1, 3))
        elif what == "crop":
            arguments = [-random.randint(0, stock.get_seq_length())]
        else:
            arguments = [pick(rows, rows)]
        for layer in (ours, stock):
            getattr(layer, what)(*arguments)
        assert ours.get_seq_length() == stock.get_seq_length()
        if stock.get_seq_length():
            assert torch.equal(ours.keys, stock.keys)
            assert torch.equal(ours.values, stock.values)


def test_what_was_cropped_or_reordered_is_not_copied_again():
    layer = GrowingLayer()
    layer.expect(4, 20)
    layer.update(*states(3, 4))
    layer.crop(-1)
    for _ in range(2):
        place = layer.keys.data_ptr()
        layer.update(*states(3, 1))
        assert layer.keys.data_ptr() == place
        layer.reorder_cache(torch.tensor([2, 0, 1], device=DEVICE))


def test_a_large_cache_grows_by_a_quarter(monkeypatch):
    monkeypatch.setattr(layers, "SPARE", 0)
    layer = GrowingLayer()
    layer.expect(100, 1000)
    layer.update(*states(1, 60))  # the first of two chunks
    assert layer._buffers[0].shape[-2] == 125
    layer.update(*states(1, 66))
    assert layer._buffers[0].shape[-2] == 126 + 31


def test_keys_of_inference_mode_are_left_behind():
    layer = GrowingLayer()
    layer.expect(2, 9)
    with torch.inference_mode():
        layer.update(*states(1, 2))
    layer.expect(2, 9)  # as the next call does
    layer.update(*states(1, 1))
    assert layer.get_seq_length() == 3


def test_slots_in_between_stand_in_front_of_the_last_tokens():
    layer, (keys, values), (more_keys, more_values) = GrowingLayer(), states(3, 5), states(1, 4)
    layer.put_between((more_keys, more_values), 2)
    for got, new, more in zip(layer.update(keys, values), (keys, values), (more_keys, more_values), strict=True):
        assert torch.equal(got, torch.cat([new[:, :, :3], more.expand(3, -1, -1, -1), new[:, :, 3:]], 2))
    assert layer.update(*states(3, 1))[0].shape[-2] == 10  # once


def test_slots_in_between_for_other_heads():
    layer = GrowingLayer()
    layer.put_between(tuple(kv[:, :1] for kv in states(1, 4)), 1)
    with pytest.raises(
        ValueError, match="keys and values of 2 heads of size 4, the prompt pair has 1 heads of size 4"
    ):
        layer.update(*states(3, 5))
