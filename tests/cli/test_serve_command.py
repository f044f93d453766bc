"""`acd-logits serve`, with a server in vLLM's place."""

import importlib.util
import json
import socket

import pytest

from acd_logits.cli import main
from conftest import build_pair

SERVER = """
import http.server, json, sys
acd = json.load(open(sys.argv[2] + "/config.json")).get("acd")
json.dump([sys.argv[1:], acd], open({seen!r}, "w"))
if "--fail" in sys.argv: sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
value = lambda name: sys.argv[sys.argv.index(name) + 1]
http.server.HTTPServer((value("--host"), int(value("--port"))), Handler).handle_request()
"""


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def paths(model_path, tmp_path):
    """Folders of a model and of its pair."""
    build_pair(n_s=5, n_a=5, hidden=16).save_pretrained(tmp_path / "pair")
    return model_path, str(tmp_path / "pair")


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """What the server is started with."""
    (tmp_path / "stand_in.py").write_text(SERVER.format(seen=str(tmp_path / "seen.json")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("acd_logits.cli.serve._SERVER", "stand_in")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "vllm" or find(name, *rest))
    return lambda: json.loads((tmp_path / "seen.json").read_text())


def test_it_exports_starts_and_says_where(paths, seen, port, capsys):
    model, pair = paths
    arguments = ["--model_name_or_path", model, "--pair", pair, "--port", port, "--request_alpha", "--alpha", "0.7"]
    assert main(["serve", *arguments, "--", "--max-model-len", "64"]) == 0
    assert capsys.readouterr().out == f"{model} with the contrast: http://127.0.0.1:{port}/v1\n"
    line, acd = seen()
    assert line[:1] == ["--model"]
    assert acd["alpha"] == 0.7, "what is served is the export, and not the plain model"
    assert line[2:] == [
        *["--served-model-name", model, "--host", "127.0.0.1", "--port", port],
        *["--logits-processors", "acd_logits.vllm:RequestAlpha", "--max-model-len", "64"],
    ]


def test_a_server_that_stops_is_an_error(paths, seen, port, capsys):
    model, pair = paths
    arguments = ["--model_name_or_path", model, "--pair", pair, "--port", port, "--", "--fail"]
    assert main(["serve", *arguments]) == 1
    assert "exit code 3" in capsys.readouterr().err


def test_what_is_wrong_is_said_before_the_model_is_loaded(seen, port, fails, tmp_path):
    with socket.create_server(("127.0.0.1", int(port))):
        assert f"cannot listen at 127.0.0.1:{port}" in fails("serve", "--port", port)
    assert "two names of one number" in fails("serve", "--port", port, "--alpha", "0.5", "--guidance_scale", "2")
    assert "give --port before --" in fails("serve", "--", "--port=8001")
    assert "plain HTTP" in fails("serve", "--", "--ssl-certfile", "certificate")
    assert "--pair text" in fails("serve", "--port", port, "--positive", str(tmp_path / "text"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is there")
def test_without_vllm_it_says_what_to_install(fails):
    assert "install acd-logits[vllm]" in fails("serve")
