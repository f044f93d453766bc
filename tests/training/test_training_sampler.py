"""The order of an epoch."""

from collections import Counter

from acd_logits.anchors import SPLITS
from acd_logits.training import BalancedSampler


def example(split, kind, mirror, length=5):
    return {
        "input_ids": [3] * length,
        "response": [4],
        "opening": 0,
        "split": SPLITS.index(split),
        "kind": kind,
        "mirror": mirror,
    }


def uneven_examples():
    """12 harmful instructions, refused and answered, 10 near misses of which 8 mirror them, 30 everyday requests."""
    rows = [example(split, "harmful", f"m{i}", 5 + i) for split in ("D_HR", "D_HA") for i in range(12)]
    rows += [example("D_S", "near_miss", f"m{i}", 5 + i) for i in range(4, 14)]
    return rows + [example("D_S", "everyday", f"e{i}", 5 + i % 15) for i in range(30)]


def test_every_batch_is_balanced():
    examples = uneven_examples()
    sampler = BalancedSampler(examples, batch_size=9, seed=0)  # two of each of the four groups, and one left over
    order = list(sampler)
    assert len(order) == len(sampler) == 4 * 10
    assert len(set(order)) == len(order)
    for i in range(0, 40, 8):
        groups = Counter((examples[k]["split"], examples[k]["kind"]) for k in order[i : i + 8])
        assert list(groups.values()) == [2, 2, 2, 2]


def test_what_mirrors_each_other_comes_together():
    examples = uneven_examples()
    order = list(BalancedSampler(examples, batch_size=8, seed=0))
    together = 0
    for i in range(0, 40, 4):
        near, *others = (examples[k] for k in order[i : i + 4])  # the smallest group comes first
        harmful = [e["mirror"] for e in others if e["kind"] == "harmful"]
        together += [near["mirror"]] * 2 == harmful
        if near["mirror"] in ("m12", "m13"):  # which mirror nothing
            assert set(harmful) <= {f"m{k}" for k in (0, 1, 2, 3)}
    assert together == 8


def test_mirrors_come_together_where_there_are_few_everyday_requests():
    examples = [example(split, "harmful", f"m{i}", 5 + i) for split in ("D_HR", "D_HA") for i in range(12)]
    examples += [example("D_S", "near_miss", f"m{i}", 5 + i) for i in range(12)]
    examples += [example("D_S", "everyday", f"e{i}") for i in range(5)]
    sampler = BalancedSampler(examples, batch_size=8, seed=0)
    order = [examples[k] for k in sampler]
    assert len(order) == len(sampler) == 4 * 5
    assert {e["mirror"] for e in order if e["kind"] == "everyday"} == {f"e{i}" for i in range(5)}
    for i in range(0, 20, 4):
        assert len({e["mirror"] for e in order[i : i + 4] if e["kind"] != "everyday"}) == 1


def test_an_apology_is_in_every_epoch():
    examples = uneven_examples()
    apologies = {k for k, e in enumerate(examples) if e["mirror"] in ("e4", "e17", "e29")}
    sampler = BalancedSampler([e | {"apology": k in apologies} for k, e in enumerate(examples)], batch_size=8, seed=0)
    everyday = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        chosen = {k for k in sampler if examples[k]["kind"] == "everyday"}
        assert apologies < chosen and len(chosen) == 10
        everyday.append(chosen)
    assert len(set.union(*everyday)) == 30


def test_every_epoch_has_its_own_order_and_choice():
    sampler = BalancedSampler(uneven_examples(), batch_size=8, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert set(first) != set(second)
    sampler.set_epoch(0)  # as where a run goes on
    assert list(sampler) == first
    assert list(BalancedSampler(uneven_examples(), batch_size=8, seed=1)) != first


def test_batches_are_of_like_length():
    rows = [example(split, "harmful", f"m{i}", 5 + i) for split in ("D_HR", "D_HA") for i in range(40)]
    rows += [example("D_S", "everyday", f"e{i}", 5 + i) for i in range(40)]
    order = list(BalancedSampler(rows, batch_size=12, seed=0))
    spread = [[len(rows[k]["input_ids"]) for k in order[i : i + 12]] for i in range(0, 120, 12)]
    assert all(max(lengths) - min(lengths) < 12 for lengths in spread)
    assert [lengths[0] for lengths in spread] != sorted(lengths[0] for lengths in spread)


def test_a_rare_group_is_named(caplog):
    rows = uneven_examples()
    BalancedSampler(rows, batch_size=8, seed=0)
    assert not caplog.text
    BalancedSampler([*rows, example("D_S", "rare", "r")], batch_size=8, seed=0)
    assert "A balanced epoch has 1 examples of each group" in caplog.text
    assert "'D_S rare': 1" in caplog.text
