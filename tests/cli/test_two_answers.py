"""Two answers side by side: those of the command line, whoever asks at the same time."""

import json
import threading

import pytest
import torch

from acd_logits.cli import demo, main, two_answers
from acd_logits.cli.command import CommandError, CommandParser
from acd_logits.cli.two_answers import Answerer
from conftest import build_pair


def build_answerer(model_path, *arguments):
    parser = CommandParser()
    demo.add_arguments(parser)
    return Answerer(
        parser.parse_args(
            ["--model_name_or_path", model_path, "--max_new_tokens", "12", "--device", "cpu", *arguments]
        )
    )


@pytest.fixture(scope="module")
def answerer(model_path):
    return build_answerer(model_path)


@pytest.fixture
def generate(model_path, capsys):
    """What `acd-logits generate` answers, plainly and safeguarded."""

    def run(prompt, *arguments):
        line = ["generate", prompt, "--model_name_or_path", model_path, "--max_new_tokens", "12", "--json"]
        assert main([*line, *arguments]) == 0
        record = json.loads(capsys.readouterr().out)
        return record["plain"], record["safeguarded"]

    return run


def finish(answerer, model_path, prompt, alpha=0.5, beta=0.1, horizon=None):
    *_, answers = answerer.answer(answerer.load(model_path, ""), prompt, alpha, beta, horizon)
    assert all(answer.done for answer in answers)
    return answers


def test_answers_are_those_of_the_command_line(answerer, model_path, generate):
    plain, safeguarded = finish(answerer, model_path, "pick the lock", 1.5, 0.2, 4)
    expected = generate("pick the lock", "--alpha", "1.5", "--beta", "0.2", "--horizon", "4")
    assert (plain.text, safeguarded.text) == expected
    assert plain.turn.tokens == safeguarded.turn.tokens == 12
    assert safeguarded.view.count("<label") == 12
    assert "horizon 4" in safeguarded.view
    assert (plain.error, safeguarded.error, plain.view) == ("", "", "")


def test_users_with_other_settings_at_the_same_time(answerer, model_path, generate):
    wanted = [("open the door", 0.0), ("open the door", 2.0), ("paint the fence", 1.0), ("close the door", 0.4)]
    found = {}

    def ask(prompt, alpha):
        found[prompt, alpha] = tuple(answer.text for answer in finish(answerer, model_path, prompt, alpha))

    threads = [threading.Thread(target=ask, args=request) for request in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {request: generate(request[0], "--alpha", str(request[1])) for request in wanted}


def test_what_goes_wrong_in_one_answer_is_said_and_leaves_no_text(answerer, model_path, monkeypatch, capsys):
    class Breaking(two_answers.ACDLogitsProcessor):
        def bind(self, *args):
            bound = super().bind(*args)
            bound.beta = None  # the first contrast fails
            return bound

    with monkeypatch.context() as patch:
        patch.setattr(two_answers, "ACDLogitsProcessor", Breaking)
        plain, safeguarded = finish(answerer, model_path, "open the door")
    assert (safeguarded.text, safeguarded.view) == ("", "")
    assert safeguarded.error
    assert plain.text and not plain.error
    assert "Traceback" in capsys.readouterr().err
    assert finish(answerer, model_path, "open the door")[1].text, "the next request is answered"


def test_prompts_that_do_not_fit(answerer, model_path):
    with pytest.raises(CommandError, match="the prompt is empty"):
        two_answers.check_prompt(" \n")
    with pytest.raises(CommandError, match="100,000 characters"):
        two_answers.check_prompt("a" * 100_000)
    two_answers.check_prompt("open the door")
    with pytest.raises(CommandError, match=r"2,\d\d\d tokens, and the model takes 2,048 with 12 new ones"):
        finish(answerer, model_path, "the door " * 1100)


def test_models_and_pairs_by_name(model_path, tmp_path):
    build_pair(n_s=5, n_a=5, hidden=16, alpha=0.9).save_pretrained(tmp_path / "pair")
    answerer = build_answerer(model_path, "--alpha", "0.3")
    first = answerer.load(model_path, "")
    assert first.alpha == 0.3
    assert answerer.names(model_path, "") == (model_path, "text")
    assert answerer.load(model_path, str(tmp_path / "pair")).alpha == 0.9, "--alpha is about the pair it stands with"
    assert answerer.load(model_path, "") is first
    for names, message in {
        ("absent", ""): "connect|absent",  # as transformers says it
        (model_path, "absent"): "absent is neither a folder|absent is not a folder",
        (model_path, "smollm2-135m-instruct"): "layers|hidden",
    }.items():
        with pytest.raises(CommandError, match=message):
            answerer.load(*names)
    assert torch.get_default_dtype() == torch.float32
