"""The command `acd-logits anchors`."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from acd_logits.cli import main
from tiny_anchors import INSTRUCTIONS, REFUSALS, build_anchor_model, build_anchor_tokenizer, read_lines, write_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_anchor_tokenizer()
    build_anchor_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_the_command_samples(model_path, tmp_path, capsys):
    instructions = write_lines(tmp_path / "mine.jsonl", INSTRUCTIONS)
    refusals = write_lines(tmp_path / "refusals.jsonl", REFUSALS)
    path = tmp_path / "anchors.jsonl"
    files = ["--instructions", str(instructions), "--refusals", str(refusals), "--output_file", str(path)]
    assert main(["anchors", "--model_name_or_path", model_path, "--max_new_tokens", "8", *files]) == 0
    rows = read_lines(path)
    numbers = Counter(row["split"] for row in rows)
    assert capsys.readouterr().out == (
        f"{path}: D_HR 2, D_HA {numbers['D_HA']}, D_S {numbers['D_S']} (2 of D_HR from the refusal bank)\n"
    )
    assert {row["response"] for row in rows if row["split"] == "D_HR"} <= {row["response"] for row in REFUSALS}

    path.unlink()
    options = ["--system_prompts", "null", "--bank_refusals", "--begun_share", "1", "--answer_safe"]
    assert main(["anchors", "--model_name_or_path", model_path, "--max_new_tokens", "8", *files, *options]) == 0
    rows = read_lines(path)
    assert len(os.listdir(tmp_path)) == 3, "nothing is left of the partial files"
    assert all(row["source"] == "refusal_bank" for row in rows if row["split"] == "D_HR")
    assert {row["split"] for row in rows if row["begun"]} == {"D_HR", "D_S"}

    path.unlink()
    disguises = write_lines(tmp_path / "disguises.jsonl", [{"texts": ["open the door :", "close", "{request} safe"]}])
    options = ["--system_prompts", "null", "--disguised_share", "1", "--disguises", str(disguises)]
    assert main(["anchors", "--model_name_or_path", model_path, "--max_new_tokens", "8", *files, *options]) == 0
    rows = read_lines(path)
    asked = {row["instruction"] for row in INSTRUCTIONS if row["kind"] == "harmful"}
    assert {row["instruction"] for row in rows if row["split"] == "D_HR"} == asked | {f"{text} safe" for text in asked}
    assert all(bool(row["history"]) == row["instruction"].endswith(" safe") for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "harmful"], "--kind needs --generate"),
        (["--generate", "3"], "--generate needs --kind and --generator"),
        (["--instructions", "absent.jsonl"], "absent.jsonl"),
        (["--refusals", "absent.jsonl"], "absent.jsonl"),
        (["--disguised_share", "0.5", "--disguises", "absent.jsonl"], "absent.jsonl"),
        (["--disguises", "absent.jsonl"], "--disguises needs --disguised_share"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("acd_logits.cli.anchors.load_model", lambda *_, **__: pytest.fail())
    assert main(["anchors", "--output_file", str(tmp_path / "a.jsonl"), *arguments]) == 1
    assert re.fullmatch(f"acd-logits: error: .*{re.escape(message)}.*\n", capsys.readouterr().err)


def test_the_output_file_is_not_overwritten(tmp_path, capsys):
    path = write_lines(tmp_path / "anchors.jsonl", ["precious"])
    assert main(["anchors", "--output_file", str(path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert path.read_text() == "precious\n"


def test_the_script_is_the_same_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, ROOT / "scripts" / "build_anchors.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "--per_instruction" in result.stdout
    assert "acd-logits anchors" in result.stdout
