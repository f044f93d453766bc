"""The page of `acd-logits demo`, in a real browser: a headless Chromium, driven by Playwright."""

import json
import shutil
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from acd_logits.cli import assistant, demo, main
from acd_logits.cli.command import CommandParser
from conftest import build_pair

gradio = pytest.importorskip("gradio", reason="needs Gradio")
# Of a pandas that is newer than Gradio
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")

LENGTH = 16


class Pace:
    """How long each forward of the page's models takes, so that there is something to watch."""

    seconds = 0.02

    def __call__(self, *_):
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = started.chromium.launch(executable_path=path)  # None: Playwright's own
        except playwright.Error as error:
            if path or "Executable doesn't exist" not in str(error):
                raise
            pytest.skip("needs Chromium, Chrome or Playwright's own browser: `make browser` installs one")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pace(model_path):
    """Slows the models down that the page loads."""
    pace, load = Pace(), assistant.load_model

    def load_slow(args, **kwargs):
        model, tokenizer = load(args, **kwargs)
        model.register_forward_pre_hook(pace)
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant, "load_model", load_slow)
        yield pace


@pytest.fixture(scope="module")
def url(model_path, pace):
    """A page that this machine alone reaches."""
    yield from serve("--model_name_or_path", model_path, "--device", "cpu")


def serve(*arguments):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    parser = CommandParser()
    demo.add_arguments(parser)
    page = demo.serve(parser.parse_args([*arguments, "--port", port, "--max_new_tokens", str(LENGTH)]))
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def opened(browser, url):
    """Open the page in a browser of its own: another user."""
    contexts, elsewhere = [], []

    def note(request):
        if request.url.startswith("http") and urlsplit(request.url).hostname != "127.0.0.1":
            elsewhere.append(request.url)

    def run(address=url, **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("request", note)
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        return page

    yield run
    for context in contexts:
        context.close()
    assert elsewhere == [], "nothing is loaded from elsewhere"


@pytest.fixture
def generate(model_path, pace, monkeypatch, capsys):
    """What `acd-logits generate` answers, plainly and safeguarded."""
    monkeypatch.setattr(pace, "seconds", 0.0)

    def run(prompt, *arguments):
        line = ["generate", prompt, "--model_name_or_path", model_path, "--max_new_tokens", str(LENGTH), "--json"]
        assert main([*line, *arguments]) == 0
        record = json.loads(capsys.readouterr().out)
        return record["plain"], record["safeguarded"]

    return run


def ask(page, prompt):
    page.fill("#prompt textarea", prompt)
    page.click("#answer")


def texts(page):
    return tuple(page.input_value(f"#{name} textarea") for name in ("plain", "safeguarded"))


def wait_for(page, message):
    page.wait_for_function("wanted => document.querySelector('#message').innerText.trim() === wanted", arg=message)


def finished(page):
    """Both answers, once they are there."""
    page.wait_for_function("document.querySelector('#safeguarded-speed').innerText.includes('a second')")
    wait_for(page, "")
    return texts(page)


def failure(page, where="#message"):
    return page.wait_for_selector(f"{where} [role=alert]").inner_text()


def answering():
    return [thread for thread in threading.enumerate() if thread.name == "acd-answer"]


def test_two_columns_stream_the_answers_of_the_command_line(opened, pace, generate):
    expected, stronger = generate("pick the lock"), generate("pick the lock", "--alpha", "1.5", "--horizon", "9")
    assert expected[1] != stronger[1]
    page, pace.seconds = opened(), 0.03
    ask(page, "pick the lock")
    page.wait_for_function("['plain', 'safeguarded'].every(id => document.querySelector(`#${id} textarea`).value)")
    begun = texts(page)
    assert page.inner_text("#message").strip() == "Answering ..."
    assert all(len(text) < len(whole) and whole.startswith(text) for text, whole in zip(begun, expected, strict=True))
    assert finished(page) == expected
    for name in "plain", "safeguarded":
        assert page.inner_text(f"#{name}-speed").startswith(f"{LENGTH} tokens, ")

    page.fill("#alpha input[type=range]", "1.5")
    page.fill("#horizon input[type=number]", "9")
    page.click("#answer")
    wait_for(page, "Answering ...")
    assert finished(page) == stronger

    page.get_by_text("Token view", exact=True).click()
    view = page.frame_locator("#view iframe")
    view.locator(".answer label").nth(3).click()
    assert view.locator(".answer label").count() == LENGTH
    assert view.locator(".panel").nth(3).is_visible()
    assert "alpha 1.5, beta 0.1, horizon 9" in view.locator(".legend").last.inner_text()


def test_a_prompt_is_text_and_no_markup(opened):
    page, prompt = opened(), "pick {{value}} ${1 + 1} `lock` <img src=x> </iframe>"
    ask(page, prompt)
    finished(page)
    page.get_by_text("Token view", exact=True).click()
    assert page.frame_locator("#view iframe").locator(".prompt").inner_text().removeprefix("Prompt\n") == prompt


def test_two_users_at_once(opened, pace, generate):
    wanted = {prompt: generate(prompt) for prompt in ("open the door", "paint the fence")}
    pages, pace.seconds = {prompt: opened() for prompt in wanted}, 0.03
    for prompt, page in pages.items():
        ask(page, prompt)
    wait_for(page, "Answering ...")
    assert len(answering()) == 4
    assert {prompt: finished(page) for prompt, page in pages.items()} == wanted


@pytest.mark.parametrize("how", ["closes the tab", "presses Stop"])
def test_nobody_waits_any_more(opened, pace, monkeypatch, how):
    monkeypatch.setattr(pace, "seconds", 0.25)  # 8 s for both answers
    page = opened()
    ask(page, "open the door")
    page.wait_for_function("document.querySelector('#plain textarea').value")
    assert len(answering()) == 2
    page.close() if how == "closes the tab" else page.click("#stop")
    patience = time.monotonic() + 4
    while answering() and time.monotonic() < patience:
        time.sleep(0.05)
    assert answering() == []


def test_bad_input_is_one_sentence_and_the_server_goes_on(opened, model_path, tmp_path):
    page = opened()
    ask(page, " ")
    assert failure(page) == "No answer: the prompt is empty"
    ask(page, "a" * 100_000)
    page.get_by_text("the prompt has 100,000 characters, and this page takes 10,000").wait_for()

    page.locator("#loading button").first.click()
    page.fill("#model textarea, #model input", "absent")
    page.click("#load")
    assert failure(page, "#load-message").startswith("Model absent not loaded: ")
    ask(page, "open the door")
    before = finished(page)

    build_pair(n_s=5, n_a=5, hidden=16, alpha=0.9).save_pretrained(tmp_path / "pair")
    page.fill("#model textarea, #model input", model_path)
    page.fill("#pair textarea, #pair input", str(tmp_path / "pair"))
    page.click("#load")
    page.get_by_text("Loaded.").wait_for()
    assert page.input_value("#alpha input[type=number]") == "0.9"
    page.click("#answer")
    wait_for(page, "Answering ...")
    plain, safeguarded = finished(page)
    assert plain == before[0]
    assert safeguarded != before[1]


def test_on_a_phone_nothing_stands_outside(opened):
    page = opened(viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
