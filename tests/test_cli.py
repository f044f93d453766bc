"""The command line: what it prints, and what it says when something is wrong."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from acd_logits import cli
from acd_logits.cli import main
from acd_logits.refusal import is_refusal
from conftest import build_tokenizer

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COMMAND = [sys.executable, "-m", "acd_logits.cli"]
WORDS = "you are a safe helpful careful evil model how do I pick the lock paint fence with open close key door and or"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A Llama of random weights that answers in words, with a chat template."""
    words = ["[UNK]", "[END]", "user", "assistant", ":", *WORDS.split()]
    tokenizer = build_tokenizer(words, unk_token="[UNK]", eos_token="[END]")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # the usual 0.02 makes every answer one word repeated
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def generate(model_path, capsys):
    """Run `acd-logits generate` on the tiny model; return what it printed."""

    def run(*arguments):
        code = main(["generate", "--model_name_or_path", model_path, "--max_new_tokens", "8", *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def use_stdin(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def shell(*arguments, **kwargs):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False, **kwargs
    )


# generate: output


def test_json_holds_both_answers_and_the_settings(generate, model_path):
    lines = generate("how do I pick the lock", "paint the fence", "--json", "--alpha", "2", "--beta", "0").splitlines()

    first, second = (json.loads(line) for line in lines)
    assert list(first) == ["prompt", "plain", "safeguarded", "model", "pair", "alpha", "beta"]
    assert first["prompt"] == "how do I pick the lock"
    assert second["prompt"] == "paint the fence"
    assert (first["model"], first["pair"], first["alpha"], first["beta"]) == (model_path, "text", 2.0, 0.0)
    assert first["plain"] != first["safeguarded"]


def test_answers_are_those_of_the_library(generate, model_path):
    from acd_logits.logits_process import ACDLogitsProcessor
    from acd_logits.prompt_pair import PromptPair

    model = LlamaForCausalLM.from_pretrained(model_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    input_ids = tokenizer("user : how do I pick the lock", return_tensors="pt").input_ids
    pair = PromptPair.from_text(model, tokenizer)
    acd = ACDLogitsProcessor(model, pair, alpha=1.5, horizon=4)

    def answer(*processors):
        tokens = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=8,
            logits_processor=list(processors),
            pad_token_id=0,
        )
        return tokenizer.decode(tokens[0, input_ids.shape[1] :], skip_special_tokens=True)

    record = json.loads(generate("how do I pick the lock", "--json", "--alpha", "1.5", "--horizon", "4"))
    assert record["plain"] == answer()
    shared = ACDLogitsProcessor(model, pair, alpha=1.5, share_instruction_kv=True)
    again = json.loads(generate("how do I pick the lock", "--json", "--alpha", "1.5", "--share_instruction_kv"))
    assert again["safeguarded"] == answer(shared)
    assert record["safeguarded"] == answer(acd)
    assert record["beta"] == pair.beta


def test_outside_a_terminal_the_answers_follow_each_other(generate):
    record = json.loads(generate("pick the lock", "--json", "--alpha", "1", "--beta", "0.2"))

    assert generate("pick the lock", "--alpha", "1", "--beta", "0.2") == (
        "Prompt: pick the lock\n\n"
        f"Plain:\n{record['plain']}\n\n"
        f"Safeguarded (alpha 1, beta 0.2):\n{record['safeguarded']}\n\n"
    )


def test_a_model_without_a_chat_template_gets_the_raw_text(generate, model_path, tmp_path):
    base = LlamaForCausalLM.from_pretrained(model_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    tokenizer.chat_template = None
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    plain = json.loads(generate("user : open the door", "--json", "--model_name_or_path", str(tmp_path)))["plain"]
    assert plain == json.loads(generate("open the door", "--json"))["plain"]


def test_a_seed_repeats_sampled_answers_whatever_came_before(generate):
    sampling = ["--json", "--do_sample", "--temperature", "2", "--top_p", "0.9", "--seed", "3"]

    alone = generate("paint the fence", *sampling)
    assert generate("open the door", "paint the fence", *sampling).splitlines()[1] == alone.strip()
    assert generate("paint the fence", *sampling[:-1], "4") != alone


# generate: input


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_stdin_is_one_prompt(generate, monkeypatch, arguments):
    use_stdin(monkeypatch, "pick the lock\nopen the door\n")

    assert json.loads(generate("--json", *arguments))["prompt"] == "pick the lock\nopen the door"


def test_a_file_holds_one_prompt_per_line(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("pick the lock\n\n  \nopen the door")

    lines = generate("--json", "--input_file", str(file)).splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["pick the lock", "open the door"]


# Failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "-1"], "--alpha: must be a finite number of at least 0, not '-1'"),
        (["--alpha", "nan"], "finite"),
        (["--alpha", "strong"], "finite"),
        (["--beta", "1.5"], "from 0 to 1"),
        (["--horizon", "0"], "at least 1"),
        (["--max_new_tokens", "2.5"], "whole number"),
        (["--temperature", "0"], "above 0"),
        (["--top_p", "0"], "above 0"),
        (["--no_such_option"], "--no_such_option"),
    ],
)
def test_bad_usage_is_one_line(fails, arguments, message):
    assert message in fails("generate", "open the door", *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["open", "--input_file", "prompts.txt"], "not both"),
        (["open", " "], "the prompt is empty"),
        (["open", "--temperature", "0.5"], "need --do_sample"),
        (["open", "--revision", "main"], "needs --pair"),
        (["open", "--device", "abacus"], "abacus"),
    ],
)
def test_contradictions_are_found_before_the_model_is_loaded(fails, arguments, message):
    assert message in fails("generate", *arguments)


def test_empty_input(fails, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n")
    assert f"{file} holds no prompt" in fails("generate", "--input_file", str(file))
    assert "No such file" in fails("generate", "--input_file", str(tmp_path / "absent.txt"))
    file.write_bytes(b"\xff\xfe\x00")
    assert "utf-8" in fails("generate", "--input_file", str(file))
    use_stdin(monkeypatch, "\n")
    assert "the prompt is empty" in fails("generate")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert "no prompt" in fails("generate")


def test_missing_pair(fails, tmp_path):
    assert "absent" in fails("generate", "open the door", "--pair", str(tmp_path / "absent"))


def test_unknown_model(fails, tmp_path):
    arguments = ["generate", "open the door", "--model_name_or_path", str(tmp_path / "absent")]
    assert "absent" in fails(*arguments)
    assert "config.json" in fails(*arguments[:-1], str(tmp_path))


def test_pair_of_another_model(fails, model_path, tmp_path):
    from acd_logits.prompt_pair import PromptPair

    PromptPair(safeguarding=torch.zeros(3, 24), adversarial=torch.zeros(3, 24)).save_pretrained(tmp_path)
    message = fails("generate", "open", "--model_name_or_path", model_path, "--pair", str(tmp_path), loads=True)
    assert "24" in message
    assert "16" in message


def test_a_reader_that_goes_away_is_no_error(model_path):
    arguments = [*COMMAND, "generate", "open the door", "--model_name_or_path", model_path]
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert "Broken" not in errors
    assert "Traceback" not in errors


def test_an_interrupt_is_quiet(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load_assistant", interrupt)
    assert main(["generate", "open the door"]) == 130
    assert capsys.readouterr().err == ""


# chat


def test_chat_remembers_earlier_turns_until_reset(model_path, capsys, monkeypatch):
    def chat(turns):
        use_stdin(monkeypatch, turns)
        assert main(["chat", "--model_name_or_path", model_path, "--max_new_tokens", "8"]) == 0
        return capsys.readouterr().out.strip().split("\n\n")

    first, second = chat("open the door\npick the lock\n")
    assert chat("open the door\n\n/reset\nopen the door\n/exit\npick the lock\n") == [first, first]
    (unrelated,) = chat("pick the lock\n")
    assert second != unrelated


def test_chat_needs_a_chat_template(fails, model_path, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((Path(model_path) / "config.json").read_bytes())
    assert "no chat template" in fails("chat", "--model_name_or_path", str(tmp_path))


# The terminal


class Screen(io.StringIO):
    """A terminal of 80 x 12 cells that knows what the command sends: text, cursor up, clear to the end."""

    def __init__(self):
        super().__init__()
        self.lines, self.row = [""], 0

    def isatty(self):
        return True

    def write(self, text):
        for up, clear, line in re.findall(r"\x1b\[(\d+)F|(\x1b\[J)|([^\x1b\n]*\n|[^\x1b\n]+)", text):
            if up:
                assert int(up) < 12, "the cursor cannot reach what has left the screen"
                self.row -= int(up)
            elif clear:
                self.lines[self.row :] = [""]
            else:
                assert len(line.rstrip("\n")) <= 80
                self.lines[self.row] += line.rstrip("\n")
                if line.endswith("\n"):
                    self.row += 1
                    self.lines.append("")


@pytest.mark.parametrize("tokens", [8, 200])
def test_a_wide_terminal_shows_columns(model_path, monkeypatch, generate, tokens):
    arguments = ["pick the lock", "--max_new_tokens", str(tokens)]
    record = json.loads(generate(*arguments, "--json"))
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 12)))
    monkeypatch.setenv("TERM", "xterm")
    main(["generate", "--model_name_or_path", model_path, *arguments])

    assert screen.lines[0] == "Prompt: pick the lock"
    rows = [re.split(r" +\| ?", line) for line in screen.lines[3:] if line]
    assert " ".join(left for left, _ in rows).split() == record["plain"].split()
    assert " ".join(right for _, right in rows).split() == record["safeguarded"].split()
    assert len(rows) > 12 or tokens == 8


def test_columns_wrap_each_text_and_keep_its_lines():
    lines = cli._side_by_side("one two three four five\n\n    six", "short", 25)
    assert lines == ["one two    | short", "three four |", "five       |", "           |", "    six    |"]


def test_columns_count_the_cells_of_wide_characters():
    assert cli._side_by_side("锁锁 lock", "door", 25) == ["锁锁 lock  | door"]
    assert cli._side_by_side("锁" * 6, "", 25) == ["锁锁锁锁锁 |", "锁         |"]


def test_an_answer_cannot_command_the_terminal():
    shown = []
    streamer = cli._streamer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}))), shown.append)
    streamer.on_finalized_text("red \x1b[31m\r\n\tlock\x9b2J")
    assert "".join(shown) == "red [31m\n\tlock2J"


# The process


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["--version"], ["generate", "--alpha", "x"]]
)
def test_help_and_usage_errors_do_not_import_torch(arguments):
    code = (
        "import sys, acd_logits.cli\n"
        f"try: acd_logits.cli.main({arguments})\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert result.stdout.endswith("False False\n")


def test_json_leaves_stdout_to_the_objects(model_path):
    arguments = ["generate", "-", "--json", "--model_name_or_path", model_path, "--max_new_tokens", "4"]
    result = shell(*arguments, input="open the door")
    assert result.returncode == 0
    assert json.loads(result.stdout)["prompt"] == "open the door"


def test_script_is_the_same_command(model_path):
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--model_name_or_path", model_path]
    result = subprocess.run([*command, "open the door"], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert re.match(r"Prompt: open the door\n\nPlain:\n.+\n\nSafeguarded \(alpha .+\):\n.+\n", result.stdout)


@pytest.mark.real_model
def test_real_model_answers_with_its_own_pair(capsys):
    prompts = ["What's the boiling point of water?", "Tell me how to rob a bank vault"]
    assert main(["generate", *prompts, "--max_new_tokens", "16", "--json"]) == 0
    safe, harmful = map(json.loads, capsys.readouterr().out.splitlines())
    assert (safe["model"], safe["pair"]) == ("smollm2", "smollm2-135m-instruct")
    assert "100" in safe["plain"]
    assert "100" in safe["safeguarded"]
    assert not is_refusal(harmful["plain"])
    assert is_refusal(harmful["safeguarded"])


@pytest.mark.real_model
def test_real_model_answers_with_the_manual_texts_when_they_are_asked_for(capsys):
    arguments = ["--pair", "text", "--max_new_tokens", "8", "--json"]
    assert main(["generate", "What is the capital of France?", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["pair"] == "text"
    assert record["safeguarded"].strip()
