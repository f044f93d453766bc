"""`acd-logits explain`: what it prints and writes, and what it says when something is wrong."""

import io
import json
import os
import re
import shutil

import pytest
from transformers import GenerationConfig

from acd_logits.cli import main
from acd_logits.cli.explain import _shows_colors


@pytest.fixture
def explain(model_path, capsys):
    """Run `acd-logits explain` on the tiny model; return what it printed."""

    def run(*arguments):
        code = main(["explain", "--model_name_or_path", model_path, "--max_new_tokens", "6", *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def test_json_is_the_answer_of_generate_token_by_token(explain, model_path, capsys):
    arguments = ["pick the lock", "paint the fence", "--alpha", "1.5", "--json"]
    lines = [json.loads(line) for line in explain(*arguments).splitlines()]
    assert main(["generate", "--model_name_or_path", model_path, "--max_new_tokens", "6", *arguments]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for record, answer in zip(lines, answers, strict=True):
        assert record["answer"] == answer["safeguarded"]
        assert all(record[name] == answer[name] for name in ("prompt", "model", "pair", "alpha", "beta"))
        assert len(record["tokens"]) == 6
        parts = [token["parts"] for token in record["tokens"]]
        assert record["parts_at"] == (parts.index(True) if True in parts else None)


def test_candidates_and_sampling(explain):
    few, many = (
        json.loads(explain("open the door", "--json", "--do_sample", "--seed", "1", "--num_candidates", number))
        for number in ("1", "8")
    )
    assert few["answer"] == many["answer"]
    assert len(few["tokens"][0]["candidates"]) < len(many["tokens"][0]["candidates"])


def test_outside_a_terminal_there_are_no_colours(explain):
    shown = explain("open the door")
    record = json.loads(explain("open the door", "--json"))
    assert shown.startswith(f"Prompt: open the door\nAnswer: {record['answer']}\n")
    assert "\x1b" not in shown
    assert len(re.findall(r"^>? +\d+ \"", shown, re.MULTILINE)) == 6


@pytest.mark.parametrize(
    ("terminal", "variables", "colors"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_colours(explain, monkeypatch, terminal, variables, colors):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((70, 20)))
    assert _shows_colors() is colors
    explain("open the door")
    assert ("\x1b[" in screen.getvalue()) is colors
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    table = [line for line in lines if re.match(r">? +\d+ ", line)]
    assert len(table) == 6
    assert not terminal or max(map(len, table)) <= 70


def test_html_of_several_prompts(explain, tmp_path):
    page = tmp_path / "page.html"
    assert explain("open the door", "pick the lock", "--html", str(page)) == ""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.count('<section class="acd">') == 2
    assert "open the door" in text
    assert "pick the lock" in text


def test_failures(fails, tmp_path):
    assert "absent is not a folder" in fails("explain", "open", "--html", str(tmp_path / "absent" / "page.html"))
    assert "not allowed with" in fails("explain", "open", "--html", "page.html", "--json", code=2)
    assert "at least 1" in fails("explain", "open", "--num_candidates", "0", code=2)
    assert "the prompt is empty" in fails("explain", " ")


def test_a_model_that_searches_beams_by_itself(fails, model_path, tmp_path):
    shutil.copytree(model_path, tmp_path / "beams")
    GenerationConfig(num_beams=2).save_pretrained(tmp_path / "beams")
    message = fails("explain", "open", "--model_name_or_path", str(tmp_path / "beams"), loads=True)
    assert "not under beam search" in message
