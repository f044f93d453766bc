"""Instructions in files: the package's own, and a user's."""

import re
from collections import Counter
from pathlib import Path

import pytest

from acd_logits import anchors
from acd_logits.anchors import load_instructions, write_generated
from acd_logits.files import shipped_folder
from tiny_anchors import read_lines, write_lines


def test_the_shipped_instructions_are_many_and_varied():
    instructions = load_instructions()
    kinds = Counter(row["kind"] for row in instructions)
    assert kinds["harmful"] == kinds["near_miss"]
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    assert f"{kinds['harmful']:,} harmful ones, {kinds['near_miss']:,} near misses" in page
    assert f"{kinds['everyday']:,} everyday ones" in page
    harms = {row["category"] for row in instructions if row["kind"] == "harmful"}
    assert len(harms) >= 12
    assert {row["category"] for row in instructions if row["kind"] == "near_miss"} <= harms
    for kind, number in kinds.items():
        turns = Counter(1 + len(row["history"]) // 2 for row in instructions if row["kind"] == kind)
        assert turns[2] + turns[3] >= number / 10
        openings = Counter(
            " ".join(row["instruction"].lower().split()[:2]) for row in instructions if row["kind"] == kind
        )
        assert max(openings.values()) <= 0.06 * number, openings.most_common(1)


def test_every_shipped_near_miss_mirrors_a_harmful_instruction():
    """Line by line, in the same category, and often in the same words."""
    kinds = {kind: {r["mirror"]: r for r in load_instructions() if r["kind"] == kind} for kind in anchors.KINDS}
    assert kinds["near_miss"].keys() == kinds["harmful"].keys()
    overlap = 0.0
    for mirror, near_miss in kinds["near_miss"].items():
        one, other = (set(r["instruction"].lower().split()) for r in (near_miss, kinds["harmful"][mirror]))
        overlap += len(one & other) / len(one | other)
    assert overlap / len(kinds["near_miss"]) > 0.15  # of near misses in another order: 0.05


def test_no_shipped_line_repeats_another():
    lines = {kind: read_lines(shipped_folder("anchors") / f"{kind}.jsonl") for kind in anchors.KINDS}
    texts = [re.sub(r"\W+", " ", row["instruction"].lower()).strip() for kind in lines for row in lines[kind]]
    assert [text for text, number in Counter(texts).items() if number > 1] == []
    assert len(load_instructions()) == len(texts)


def test_the_kind_is_in_the_line_or_in_the_name_of_the_file(tmp_path):
    mixed = write_lines(tmp_path / "my.jsonl", [{"instruction": "a", "kind": "near_miss", "category": "c"}, ""])
    harmful = write_lines(tmp_path / "harmful.jsonl", [{"instruction": " b "}, {"instruction": "b"}])
    assert load_instructions([mixed, harmful]) == [
        {"instruction": "a", "category": "c", "kind": "near_miss", "mirror": "c 1", "history": []},
        {"instruction": "b", "category": "general", "kind": "harmful", "mirror": "general 1", "history": []},
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (['{"instruction": "a"}', '{"instruction": '], "line 2: not valid JSON"),
        (['{"text": "a"}'], "line 1: expected an object with a text `instruction`"),
        (['{"instruction": " "}'], "line 1: expected an object with a text `instruction`"),
        (['{"instruction": 3}'], "line 1: expected an object with a text `instruction`"),
        (['["instruction"]'], "line 1: expected an object with a text `instruction`"),
        (['{"instruction": "a", "kind": "evil"}'], "line 1: `kind` must be one of harmful, near_miss, everyday"),
        (['{"instruction": "a", "history": ["b"]}'], "line 1: `history` must be a list of texts, of the user and the"),
        (['{"instruction": "a", "history": "b"}'], "line 1: `history` must be a list of texts"),
    ],
)
def test_bad_instruction_files(tmp_path, lines, message):
    path = write_lines(tmp_path / "everyday.jsonl", lines)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_instructions([path])
    assert str(path) in str(error.value)


def test_texts_keep_their_characters(tmp_path):
    text = "eins\u2028zwei\x85drei \U0001f511"
    path = tmp_path / "everyday.jsonl"
    write_generated(path, iter([{"instruction": text, "category": "c", "kind": "everyday"}]))
    assert [row["instruction"] for row in load_instructions([path])] == [text]
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"everyday\.jsonl is not a text file in UTF-8"):
        load_instructions([path])
