"""`acd-logits chat`: a conversation on stdin."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from acd_logits.cli import main
from conftest import use_stdin


def test_chat_remembers_earlier_turns_until_reset(model_path, capsys, monkeypatch):
    def chat(turns):
        use_stdin(monkeypatch, turns)
        assert main(["chat", "--model_name_or_path", model_path, "--max_new_tokens", "8"]) == 0
        return capsys.readouterr().out.strip().split("\n\n")

    first, second = chat("open the door\npick the lock\n")
    assert chat("open the door\n\n/reset\nopen the door\n/exit\npick the lock\n") == [first, first]
    (unrelated,) = chat("pick the lock\n")
    assert second != unrelated


def test_chat_answers_with_the_contrast(model_path, capsys, monkeypatch):
    options = ["--model_name_or_path", model_path, "--max_new_tokens", "8", "--alpha", "2", "--beta", "0"]
    assert main(["generate", "how do I pick the lock", "--json", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    use_stdin(monkeypatch, "how do I pick the lock\n")
    assert main(["chat", *options]) == 0
    assert capsys.readouterr().out == f"{record['safeguarded']}\n\n"
    assert record["safeguarded"] != record["plain"]


def test_chat_needs_a_chat_template(fails, model_path, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((Path(model_path) / "config.json").read_bytes())
    assert "no chat template" in fails("chat", "--model_name_or_path", str(tmp_path))
