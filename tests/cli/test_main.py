"""The process: exit codes, and what it imports before it knows that there is work."""

import subprocess
import sys

import pytest

from acd_logits.cli import main
from conftest import ENVIRONMENT


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["explain", "--help"],
        ["evaluate", "--help"],
        ["--version"],
        ["generate", "--alpha", "x"],
    ],
)
def test_help_and_usage_errors_do_not_import_torch(arguments):
    code = (
        "import sys, acd_logits.cli\n"
        f"try: acd_logits.cli.main({arguments})\n"
        "except SystemExit: print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert result.stdout.endswith("set()\n")


def test_a_reader_that_goes_away_is_no_error(model_path):
    command = [sys.executable, "-m", "acd_logits.cli", "generate", "open the door", "--model_name_or_path"]
    command.append(model_path)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert "Broken" not in errors
    assert "Traceback" not in errors


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("acd_logits.cli.generate.load_assistant", interrupt)
    assert main(["generate", "open the door"]) == 130
    assert capsys.readouterr().err == ""


def test_a_transformers_that_acd_does_not_know_is_one_line(monkeypatch, fails):
    def moved(*_, **__):
        raise ImportError("transformers 9.0 has no GenerationMixin.x, which ACD hooks into", name="transformers")

    monkeypatch.setattr("acd_logits.cli.generate.load_assistant", moved)
    assert "has no GenerationMixin.x" in fails("generate", "hello")
    monkeypatch.setattr("acd_logits.cli.generate.load_assistant", lambda *_, **__: __import__("acd_logits.nothing"))
    with pytest.raises(ImportError, match="nothing"):
        main(["generate", "hello"])
