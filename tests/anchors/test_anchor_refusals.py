"""The refusal bank."""

from acd_logits.anchors import load_instructions, load_refusals


def test_the_shipped_refusals_suit_the_shipped_categories():
    refusals = load_refusals()
    texts = [row["response"] for row in refusals]
    assert len(set(texts)) == len(texts)
    harms = {row["category"] for row in load_instructions() if row["kind"] == "harmful"}
    assert {row["category"] for row in refusals} <= harms | {""}
    assert all(text.endswith(".") for text in texts)
    general = [row["response"] for row in refusals if not row["category"]]
    assert sum(text.count(". ") == 0 for text in general) == len(general) / 2, "half of them are one sentence"
