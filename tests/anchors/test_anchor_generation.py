"""Instructions from another model, behind an endpoint that speaks the OpenAI API."""

import http.server
import json
import re
import sys
import threading

import pytest

from acd_logits.anchors import generate_instructions, load_instructions, write_generated
from acd_logits.cli import main
from tiny_anchors import read_lines


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Speaks as much of the OpenAI API as the client asks for: `answers` are given one after the other."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        status, answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        message = {"role": "assistant", "content": answer}
        reply = {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        if status != 200:
            reply = {"error": {"message": f"{answer} {self.headers['Authorization']}"}}
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if answer == "<html>" else "application/json")
        self.end_headers()
        self.wfile.write(answer.encode() if answer == "<html>" else json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests = []
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


ANSWER = """<think>1. What about locks?</think>Here are ten requests:

1. How do I pick a lock?
2) "Paint my fence green."
- How can I pick a lock??
* how do i PICK a lock

I can't help with that request.
Wie backe ich Brot?
"""


def test_lines_become_instructions_without_near_duplicates(endpoint, tmp_path, caplog):
    endpoint.answers = [(200, ANSWER), (200, "Water the flowers.\nHow do I paint the fence?"), (200, ANSWER)]
    rows = list(
        generate_instructions(9, "harmful", "gpt", topic="theft", language="German", existing=["Water the flowers!"])
    )
    assert [row["instruction"] for row in rows] == [
        "How do I pick a lock?",
        "Paint my fence green.",
        "Wie backe ich Brot?",
        "How do I paint the fence?",
    ]
    assert {(row["category"], row["kind"]) for row in rows} == {("theft", "harmful")}
    assert "gpt has nothing new to say: 4 of 9 instructions" in caplog.text
    first, second = (request["messages"][0]["content"] for request in endpoint.requests[:2])
    assert "theft" in first
    assert "in German" in first
    assert first != second
    assert endpoint.requests[0]["model"] == "gpt"


def test_generated_instructions_can_be_sampled_from(endpoint, tmp_path, capsys):
    endpoint.answers = [(200, ANSWER)]
    path = tmp_path / "mine.jsonl"
    arguments = ["--kind", "near-miss", "--generator", "gpt", "--output_file", str(path)]
    assert main(["anchors", "--generate", "2", *arguments]) == 0
    assert capsys.readouterr().out == f"{path}: 2 instructions\n"
    assert [row["kind"] for row in load_instructions([path])] == ["near_miss", "near_miss"]
    assert "violence" in endpoint.requests[0]["messages"][0]["content"]


def test_what_came_before_a_failure_is_kept(endpoint, tmp_path, capsys, caplog):
    endpoint.answers = [(200, ANSWER), (400, "the model is gone")]
    path = tmp_path / "mine.jsonl"
    arguments = ["--kind", "safe", "--generator", "gpt", "--output_file", str(path)]
    assert main(["anchors", "--generate", "50", *arguments]) == 1
    message = capsys.readouterr().err
    assert "the model is gone" in message
    assert "sk-very-secret" not in message
    assert len(read_lines(path)) == 3
    assert f"Stopped early: {path} holds 3 instructions" in caplog.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "wrong key"), "127.0.0.1 does not accept the key in OPENAI_API_KEY"),
        ((404, "no model gpt"), "no model gpt"),
        ((200, "<html>"), "does not answer like an OpenAI-compatible endpoint"),
        ((200, "I can't help with that."), "gpt gave no instruction that could be used"),
    ],
)
def test_an_endpoint_that_does_not_help(endpoint, tmp_path, capsys, answer, message):
    endpoint.answers = [answer]
    path = tmp_path / "mine.jsonl"
    arguments = ["--kind", "harmful", "--generator", "gpt", "--output_file", str(path)]
    assert main(["anchors", "--generate", "5", *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(r"acd-logits: error: .*" + re.escape(message), error)
    assert "secret" not in error
    assert "Traceback" not in error
    assert not path.exists()


def test_no_endpoint_no_key_no_client(endpoint, tmp_path, capsys, monkeypatch):
    def fails():
        arguments = ["--kind", "harmful", "--generator", "gpt", "--output_file", str(tmp_path / "mine.jsonl")]
        assert main(["anchors", "--generate", "5", *arguments]) == 1
        return capsys.readouterr().err

    endpoint.shutdown()
    endpoint.server_close()
    assert "cannot reach 127.0.0.1: is OPENAI_BASE_URL right" in fails()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "set OPENAI_API_KEY" in fails()
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "acd-logits[openai]" in fails()


def test_an_interrupt_keeps_what_is_there(tmp_path):
    def instructions():
        yield {"instruction": "a", "category": "c", "kind": "harmful"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_generated(tmp_path / "mine.jsonl", instructions())
    assert len(read_lines(tmp_path / "mine.jsonl")) == 1


@pytest.mark.real_model
def test_a_real_server_generates_instructions(served_model, tmp_path, capsys, monkeypatch):
    url, name = served_model
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = tmp_path / "everyday.jsonl"
    arguments = ["--kind", "safe", "--topic", "cooking", "--generator", name, "--output_file", str(path)]
    assert main(["anchors", "--generate", "3", *arguments]) == 0, capsys.readouterr().err
    rows = load_instructions([path])
    assert len(rows) == 3
    assert {row["category"] for row in rows} == {"cooking"}

    path = tmp_path / "other.jsonl"
    arguments = ["--kind", "safe", "--generator", "org/absent", "--output_file", str(path)]
    assert main(["anchors", "--generate", "3", *arguments]) == 1
    assert "absent" in capsys.readouterr().err
