"""`acd-logits demo`: what it refuses. The page is in test_demo_page.py."""

import importlib.util
import socket

import pytest

from acd_logits.cli import demo
from acd_logits.cli.address import is_loopback
from acd_logits.cli.command import CommandParser

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs Gradio")


@needs_gradio
@pytest.mark.parametrize("arguments", [["--share"], ["--host", "0.0.0.0"]])
def test_strangers_get_no_adversarial_prompt_that_was_not_reviewed(fails, arguments):
    message = fails("demo", "--pair", "org/pair", *arguments)
    assert "org/pair, which is a jailbreak" in message
    assert "--public" in message


@needs_gradio
def test_what_is_wrong_is_said_before_the_model_is_loaded(fails):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        reviewed = ["--pair", "org/pair", "--public", "--share"]
        for arguments in [], reviewed, ["--share"]:  # the address is checked last
            assert f"cannot listen at 127.0.0.1:{port}" in fails("demo", "--port", port, *arguments)
    fails("demo", "--model_name_or_path", "absent")
    assert "at least 1" in fails("demo", "--horizon", "0", code=2)


@needs_gradio
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
@pytest.mark.parametrize(("more", "named"), [([], True), (["--share"], False), (["--host", "0.0.0.0"], False)])
def test_strangers_name_no_model(model_path, monkeypatch, more, named):
    """Neither in a field, nor by the API."""
    pages, parser = [], CommandParser()
    monkeypatch.setattr("acd_logits.cli.demo_page.launch", lambda page, *_: pages.append(page) or "address")
    demo.add_arguments(parser)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    line = ["--model_name_or_path", model_path, "--pair", "text", "--device", "cpu", "--port", port]
    demo.serve(parser.parse_args([*line, *more]))
    ids = {block.elem_id for block in pages[0].blocks.values()}
    assert ("model" in ids) is ("pair" in ids) is named
    names = [function.api_name for function in pages[0].fns.values()]
    assert ("load" in names) is named
    assert "answer" in names


def test_without_gradio_it_says_what_to_install(fails, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert 'pip install "acd-logits[demo-ui]"' in fails("demo")


@pytest.mark.parametrize(
    ("host", "wanted"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(host, wanted):
    assert is_loopback(host) is wanted
