"""The refusal bank."""

from acd_logits.anchors import load_instructions, load_refusals
from tiny_anchors import write_lines


def test_the_shipped_refusals_suit_the_shipped_categories():
    refusals = load_refusals()
    assert len({row["response"] for row in refusals}) == len(refusals) >= 60
    harms = {row["category"] for row in load_instructions() if row["kind"] == "harmful"}
    assert {row["category"] for row in refusals} <= harms | {""}
    assert sum(not row["category"] for row in refusals) >= 20
    assert all(row["response"].endswith((".", "!", "?")) for row in refusals)


def test_refusals_may_share_an_opening(tmp_path):
    bank = [
        {"response": "No. Theft harms. Ask!", "category": "theft"},
        {"response": "Never."},
        {"response": "I won't."},
    ]
    refusals = load_refusals(write_lines(tmp_path / "refusals.jsonl", bank), opening="I can't help.")
    assert refusals == [
        {"response": "I can't help. Theft harms. Ask!", "category": "theft"},
        {"response": "I can't help.", "category": ""},
    ]
