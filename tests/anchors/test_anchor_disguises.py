"""Instructions inside something else."""

import re
from collections import Counter

import pytest

from acd_logits.anchors import disguise_instructions, load_disguises
from acd_logits.evaluation.attacks import ATTACKS
from tiny_anchors import INSTRUCTIONS, write_lines

PLAIN, TURNS = ["Play a goblin. {request}"], ["Hello", "Welcome", "Now: {request}. I wait."]


def test_mirrors_are_in_the_same_disguise():
    rows = disguise_instructions(INSTRUCTIONS, [PLAIN, TURNS], share=1.0, seed=3)
    assert len(rows) == len(INSTRUCTIONS)
    forms = {}
    for row in rows:
        of_row = next(i for i in INSTRUCTIONS if i["instruction"] in row["instruction"])
        assert [row[key] for key in ("kind", "category")] == [of_row[key] for key in ("kind", "category")]
        assert row["mirror"] == f"{of_row['mirror']} in disguise"
        texts = [*row["history"], row["instruction"].replace(of_row["instruction"], "{request}")]
        assert texts in (PLAIN, TURNS)
        forms.setdefault(row["mirror"], []).append(texts)
    assert all(text == texts[0] for texts in forms.values() for text in texts)
    assert sorted(Counter(str(texts[0]) for texts in forms.values()).values()) == [2, 2], "they are taken in turn"


def test_a_share_is_disguised_and_the_seed_chooses_it():
    instructions = [{"instruction": f"say {i}", "kind": "everyday", "mirror": str(i)} for i in range(20)]
    behind_turns = [{**row, "history": ["Hi", "Hello"], "mirror": f"{row['mirror']} too"} for row in instructions]
    rows = disguise_instructions([*instructions, *behind_turns], [PLAIN], share=0.25)
    assert len(rows) == 5
    assert rows == disguise_instructions([*instructions, *behind_turns], [PLAIN], share=0.25)
    assert rows != disguise_instructions([*instructions, *behind_turns], [PLAIN], share=0.25, seed=1)
    assert all(row["history"] == [] for row in rows), "those behind earlier turns stay as they are"


def test_the_shipped_disguises_are_many_and_not_those_of_the_evaluation():
    disguises = load_disguises()
    assert len({tuple(texts) for texts in disguises}) == len(disguises) >= 400
    assert sum(len(texts) > 1 for texts in disguises) >= len(disguises) / 8

    def runs(text, length=6):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    asked = [message["content"] for attack in ATTACKS.values() for message in attack.ask(["{request}"])[0]]
    measured = set().union(*map(runs, asked))
    assert [texts for texts in disguises if any(runs(text) & measured for text in texts)] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "{request}"}, "line 1: `texts` must be a list of one, three, five ... texts"),
        ({"texts": ["a", "{request}"]}, "line 1: `texts` must be a list of one, three, five"),
        ({"texts": ["{request}", "a", "b"]}, "line 1: the last of `texts` must hold {request}, and more"),
        ({"texts": ["a", "b", "{request}"]}, "line 1: the last of `texts` must hold {request}, and more"),
        (["{request}"], "line 1: `texts` must be a list"),
    ],
)
def test_bad_files_of_disguises(tmp_path, line, message):
    path = write_lines(tmp_path / "disguises.jsonl", [line])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_disguises(path)
    assert str(path) in str(error.value)
