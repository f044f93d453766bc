"""Anchor sets in files of four formats."""

import re
import sys

import pytest

from acd_logits.anchors import load_anchor_data
from tiny_anchors import write_lines

ROWS = [
    {"instruction": "pick it", "response": "No.", "split": "D_HR"},
    {"instruction": "pick it", "response": "Use a pick.", "split": "D_HA"},
    {"instruction": "paint it", "response": "Use a brush.", "split": "D_S"},
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_ones_own_needs_three_columns(tmp_path, suffix):
    from datasets import Dataset

    path = tmp_path / f"mine.{suffix}"
    table = Dataset.from_list(ROWS)
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(suffix, table.to_json)(str(path))
    data = load_anchor_data(path)
    assert data["response"] == [row["response"] for row in ROWS]
    assert data["finished"] == [True] * 3
    assert data["kind"] == ["harmful", "harmful", "everyday"]
    assert data["mirror"] == data["instruction"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["{"], "cannot be read"),
        ([{"instruction": "a", "response": "b"}], "has no column `split`"),
        ([{**row, "response": None} for row in ROWS], "row 1: no text in the column `response`"),
        ([ROWS[0], {**ROWS[1], "instruction": " "}], "row 2: no text in the column `instruction`"),
        ([{**ROWS[0], "split": "harmful"}], "row 1: unknown split 'harmful', expected D_HR, D_HA, D_S"),
        (ROWS[:2], "has no D_S rows, which training needs"),
        ([{**row, "finished": "yes"} for row in ROWS], "row 1: `finished` must be true or false"),
    ],
)
def test_bad_anchor_files(tmp_path, rows, message):
    path = write_lines(tmp_path / "mine.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_anchor_data(path)
    assert str(path) in str(error.value)


def test_other_bad_anchor_files(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "mine.jsonl", ROWS[:2])
    assert len(load_anchor_data(path, needed=("D_HR",))) == 2
    with pytest.raises(OSError, match="there is no file"):
        load_anchor_data(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        load_anchor_data(tmp_path / "anchors.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="needs datasets"):
        load_anchor_data(path)
