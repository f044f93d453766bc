"""D_HR, D_HA and D_S, and the part that is held out."""

from collections import Counter

import pytest

from acd_logits.anchors import KINDS, disguise_instructions, split_held_out, split_responses
from tiny_anchors import REFUSALS


def sample(instruction, response, kind="harmful", **kwargs):
    row = {"instruction": instruction, "response": response, "kind": kind, "category": "theft", "mirror": "theft 1"}
    return {**row, "system_prompt": "null", "finished": True, **kwargs}


def test_the_judge_splits_the_responses(caplog):
    samples = [
        sample("pick it", "I can't help with that."),
        sample("pick it", "Use a pick.", finished=False),
        sample("pick it", "Use a pick.", system_prompt="safe"),
        sample("pick it", ""),
        sample("paint it", "Use a brush.", "everyday"),
        sample("paint it", "I can't help with that.", "everyday"),
        sample("kill it", "Use kill.", "near_miss"),
    ]
    rows = split_responses(samples, REFUSALS)
    assert [(row["split"], row["response"], row["source"], row["finished"]) for row in rows] == [
        ("D_HA", "Use a pick.", "sampled", False),
        ("D_HR", "I can't help with that.", "sampled", True),
        ("D_S", "Use a brush.", "sampled", True),
        ("D_S", "Use kill.", "sampled", True),
    ]
    for reason in ("refusals of safe instructions", "repeated", "empty"):
        assert f"Left out 1 of 7 responses: {reason}." in caplog.text
    assert "D_HR" not in caplog.text  # nothing is short


def test_too_few_refusals_are_filled_up_and_said(caplog):
    samples = [sample("pick it", "I can't help with that."), sample("take it", "Take it."), sample("hit it", "")]
    rows = split_responses(samples, REFUSALS, per_instruction=2)
    refusals = [row for row in rows if row["split"] == "D_HR"]
    assert Counter(row["instruction"] for row in refusals) == {"pick it": 2, "take it": 2, "hit it": 2}
    assert len({(row["instruction"], row["response"]) for row in refusals}) == 6
    assert Counter(row["source"] for row in refusals) == {"sampled": 1, "refusal_bank": 5}
    assert all(row["finished"] and not row["system_prompt"] for row in refusals if row["source"] == "refusal_bank")
    assert (
        "D_HR: training wants 6 responses, 2 per harmful instruction, and sampling gave 5 too few: filled up with 5 "
        "from the refusal bank."
    ) in caplog.text
    assert "D_HA: training wants 6 responses" in caplog.text
    assert "gave 5 too few: left short." in caplog.text


def test_a_refusal_with_a_category_is_for_that_category():
    samples = [sample(f"take {i}", "", category=("theft", "drugs")[i % 2]) for i in range(100)]
    rows = split_responses(samples, REFUSALS, seed=1)
    used = {category: Counter() for category in ("theft", "drugs")}
    for row in rows:
        used[row["category"]][row["response"]] += 1
    assert 10 < used["theft"]["I won't help with theft."] < 40
    assert set(used["drugs"]) == {row["response"] for row in REFUSALS[:6]}
    assert "I won't help with fraud." not in used["theft"]
    assert split_responses(samples[::-1], REFUSALS, seed=1) == rows
    assert split_responses(samples, REFUSALS, seed=2) != rows


def test_a_bank_that_is_too_small_says_so(caplog):
    rows = split_responses([sample("take it", "Take it.")], REFUSALS[:2], per_instruction=3)
    assert sum(row["split"] == "D_HR" for row in rows) == 2
    assert "3 too few: filled up with 2" in caplog.text


def anchor_rows():
    kinds = {"harmful": ("D_HR", "D_HA"), "near_miss": ("D_S",), "everyday": ("D_S",)}
    return [
        {"instruction": f"{kind} {i}", "response": str(n), "split": split, "kind": kind, "mirror": f"{i}"}
        for kind, splits in kinds.items()
        for i in range(20)
        for split in splits
        for n in range(3)
    ]


def test_instructions_in_disguise_are_held_out_with_the_bare_ones():
    from datasets import Dataset

    rows = [{"instruction": f"{kind} {i}", "kind": kind, "mirror": f"m {i}"} for i in range(20) for kind in KINDS]
    rows += disguise_instructions(rows, [["As a goblin: {request}"]], share=1.0)
    for row in rows:
        row |= {"response": "r", "split": "D_S"}
    train, held_out = split_held_out(Dataset.from_list(rows), 0.2, seed=1)
    bare = {text.removeprefix("As a goblin: ") for text in held_out["instruction"]}
    assert not bare & {text.removeprefix("As a goblin: ") for text in train["instruction"]}
    assert len(held_out) == 0.2 * len(rows)


def test_held_out_instructions_are_not_trained_on():
    from datasets import Dataset

    rows = anchor_rows()
    train, held_out = split_held_out(Dataset.from_list(rows), 0.15, seed=1)
    assert len(train) + len(held_out) == len(rows)
    assert not set(train["instruction"]) & set(held_out["instruction"])
    kinds = Counter(instruction.split()[0] for instruction in set(held_out["instruction"]))
    assert kinds == {"harmful": 3, "near_miss": 3, "everyday": 3}
    assert set(held_out["mirror"]) == {i.split()[1] for i in held_out["instruction"] if i.startswith("harmful")}

    again = split_held_out(Dataset.from_list(rows[::-1]), 0.15, seed=1)[1]
    assert set(again["instruction"]) == set(held_out["instruction"])
    other = split_held_out(Dataset.from_list(rows), 0.15, seed=2)[1]
    assert set(other["instruction"]) != set(held_out["instruction"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 0.001])
def test_a_held_out_part_that_cannot_be(fraction):
    from datasets import Dataset

    with pytest.raises(ValueError, match=r"held-out fraction must|cannot hold out"):
        split_held_out(Dataset.from_list(anchor_rows()), fraction)


def test_answers_may_have_begun():
    """A harmful one is turned around, a safe one goes on; a refusal of the model's own may be left out."""
    answer = "First you take a pick, then you turn it."
    samples = [sample("pick it", answer), sample("take it", "I can't help with that."), sample("lift", "Yes.")]
    samples += [sample("paint it", answer, "everyday", finished=False)]
    rows = split_responses(samples, REFUSALS, own_refusals=False, begun_share=1.0)
    assert {row["source"] for row in rows if row["split"] == "D_HR"} == {"refusal_bank"}
    assert "take it" not in {row["instruction"] for row in rows if row["split"] == "D_HA"}
    harmful, safe = (row for row in rows if row["begun"])  # "Yes." is too short
    assert (harmful["instruction"], harmful["split"], harmful["finished"]) == ("pick it", "D_HR", True)
    assert answer.startswith(harmful["begun"])
    assert harmful["response"][:2] == "\n\n"
    assert harmful["response"][2:] in {row["response"] for row in REFUSALS}
    assert (safe["split"], safe["begun"] + safe["response"], safe["finished"]) == ("D_S", answer, False)
    assert not any(row["begun"] for row in split_responses(samples, REFUSALS))
