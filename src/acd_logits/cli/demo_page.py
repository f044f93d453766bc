"""The page of `acd-logits demo`, in Gradio: what stands where, and what a click does."""

from __future__ import annotations

import contextlib
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from .command import CommandError
from .two_answers import Answerer, check_prompt

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from .assistant import Assistant
    from .two_answers import Answer

_AT_ONCE = 4  # users who are answered at the same time; more wait in line
_IN_LINE = 32
_MAX_ALPHA = 1.5
_EXAMPLES = (
    "How can I break into a bank vault?",
    "What should I pack for a weekend in the mountains?",
    "How do I shoot a good portrait?",
    "Name three rivers.",
)
_INTRODUCTION = """# One prompt, two answers

The same model answers twice: on its own, and with *Adversarial Contrastive Decoding*, which chooses each token from a
safeguarded stream of the model minus a share of an adversarial one. The weights are the same."""
_SPEEDS = """The answers take turns on the model, token by token. A speed counts the turns of its own answer, the
reading of the prompt included. Decoding is greedy, and an answer ends after {length} tokens at the latest."""
_VIEW = """What the contrast did to each token of the safeguarded answer. The plain answer has no contrast to show.
What the plain model would have said in each of these places stands in the column *plain*."""
_LATER = "It appears when the safeguarded answer is finished."
_CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto; --block-info-text-color: var(--neutral-500); }
.dark .gradio-container { --block-info-text-color: var(--neutral-400); }
.gradio-container .html-container { padding: 0; }
.note, .note p, .note em, .speed { font-size: .85rem !important; margin: 0; opacity: .85; }
.speed { min-height: 1.4em; font-variant-numeric: tabular-nums; }
#message { min-height: 1.5em; }
#message [role=alert] { color: var(--error-text-color); font-weight: 600; overflow-wrap: anywhere; }
#loading > button span { text-align: left; }
#view iframe { width: 100%; height: 42rem; border: 1px solid var(--border-color-primary); border-radius: .5rem; }
"""


def build_page(answerer: Answerer, args: argparse.Namespace, *, for_strangers: bool) -> gr.Blocks:
    """The page, for `launch`.

    Args:
        answerer: what answers.
        args: the arguments of `acd-logits demo`, where the page starts.
        for_strangers: leave out the fields that name another model or pair.
    """
    first = answerer.load(args.model_name_or_path, args.pair or "")
    with gr.Blocks(title="acd-logits", analytics_enabled=False) as page:
        gr.Markdown(_INTRODUCTION)
        names = gr.State((args.model_name_or_path, args.pair or ""))  # kept here, where no visitor sets it
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=12, autofocus=True, elem_id="prompt")
        gr.Examples([[example] for example in _EXAMPLES], prompt, label="Examples", cache_examples=False)
        alpha, beta, horizon = _sliders(first, args)
        if for_strangers:
            gr.Markdown(_named(*answerer.names(*names.value)), elem_classes="note")
        else:
            _add_loading(answerer, names, alpha, beta)
        with gr.Row():
            start = gr.Button("Answer", variant="primary", min_width=120, scale=3, elem_id="answer")
            stop = gr.Button("Stop", min_width=80, scale=1, elem_id="stop")
        message = gr.HTML(elem_id="message")
        with gr.Row():
            plain = _column("plain", "Plain")
            safeguarded = _column("safeguarded", "Safeguarded")
        gr.Markdown(_SPEEDS.format(length=args.max_new_tokens), elem_classes="note")
        with gr.Accordion("Token view", open=False, elem_id="token-view"):
            gr.Markdown(_VIEW, elem_classes="note")
            view = gr.HTML(_LATER, elem_id="view")

        answering = gr.on(
            [start.click, prompt.submit],
            _answering(answerer),
            [names, prompt, alpha, beta, horizon],
            [message, *plain, *safeguarded, view],
            show_progress="hidden",
            concurrency_limit=_AT_ONCE,
            api_name="answer",
        )
        stop.click(lambda: "Stopped.", None, message, cancels=[answering], api_visibility="private")
    return page


def launch(page: gr.Blocks, host: str, port: int, share: bool) -> str:
    """Start a server in the background; returns where the page is.

    Raises:
        CommandError: the page was to be shared, and Gradio's servers cannot be reached.
    """
    page.queue(max_size=_IN_LINE)
    _, local, shared = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        run_history=False,
        footer_links=["gradio"],
        theme=gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=_CSS,
    )
    if share and not shared:
        page.close()
        raise CommandError("Gradio's servers made no link to share: check the connection")
    return shared or local


def _sliders(assistant: Assistant, args: argparse.Namespace) -> tuple[gr.Slider, gr.Slider, gr.Slider]:
    length = assistant.generation_settings["max_new_tokens"]
    with gr.Row():
        return (
            gr.Slider(
                0,
                max(_MAX_ALPHA, assistant.alpha),
                assistant.alpha,
                step=0.01,
                label="alpha",
                info="Strength. 0 is the safeguarding prompt alone.",
                min_width=260,
                elem_id="alpha",
            ),
            gr.Slider(
                0,
                1,
                assistant.beta,
                step=0.01,
                label="beta",
                info="Keep only tokens with this share of the top probability.",
                min_width=260,
                elem_id="beta",
            ),
            gr.Slider(
                0,
                max(length, args.horizon or 0),
                args.horizon or 0,
                step=1,
                precision=0,
                label="horizon",
                info="Contrast only so many new tokens. 0 contrasts all.",
                min_width=260,
                elem_id="horizon",
            ),
        )


def _column(name: str, label: str) -> tuple[gr.Textbox, gr.HTML]:
    with gr.Column():
        return (
            gr.Textbox(label=label, lines=8, max_lines=24, interactive=False, buttons=["copy"], elem_id=name),
            gr.HTML(elem_id=f"{name}-speed", elem_classes="speed"),
        )


def _add_loading(answerer: Answerer, names: gr.State, alpha: gr.Slider, beta: gr.Slider) -> None:
    """The fields that name another model or pair, and what loads them."""
    model_name, pair_name = answerer.names(*names.value)
    with gr.Accordion(_named(model_name, pair_name), open=False, elem_id="loading") as fields:
        with gr.Row():
            model = gr.Textbox(model_name, label="Model", info="A folder or a Hub id", elem_id="model")
            pair = gr.Textbox(pair_name, label="Pair", info="Likewise, or empty for the default", elem_id="pair")
        button = gr.Button("Load", size="sm", elem_id="load")
        message = gr.HTML(elem_id="load-message")

    def load(model: str, pair: str) -> list[Any]:
        wanted = model.strip(), pair.strip()
        try:
            assistant = answerer.load(*wanted)
        except CommandError as error:
            return [*[gr.skip()] * 4, _failure(f"Model {wanted[0]} not loaded", error)]
        strength = gr.update(value=assistant.alpha, maximum=max(_MAX_ALPHA, assistant.alpha))
        label = gr.update(label=_named(*answerer.names(*wanted)))
        return [wanted, strength, assistant.beta, label, "Loaded."]

    outputs = [names, alpha, beta, fields, message]
    gr.on([button.click, model.submit, pair.submit], load, [model, pair], outputs, show_progress_on=message)


def _answering(answerer: Answerer) -> Any:
    def answer(
        names: tuple[str, str], prompt: str, alpha: float, beta: float, horizon: int
    ) -> Iterator[tuple[str, ...]]:
        yield "Waiting for the model ...", "", "", "", "", ""
        try:
            check_prompt(prompt)
            growing = answerer.answer(answerer.load(*names), prompt, alpha, beta, horizon or None)
            with contextlib.closing(growing):  # with the tab, so do the answers end
                for plain, safeguarded in growing:
                    yield _shown(plain, safeguarded)
        except CommandError as error:
            yield _failure("No answer", error), "", "", "", "", ""

    return answer


def _shown(plain: Answer, safeguarded: Answer) -> tuple[str, ...]:
    error = plain.error or safeguarded.error
    done = plain.done and safeguarded.done
    message = _failure("No answer", error) if error else "" if done else "Answering ..."
    view = _framed(safeguarded.view) if safeguarded.view else _LATER
    return message, plain.text, _speed(plain), safeguarded.text, _speed(safeguarded), view


def _speed(answer: Answer) -> str:
    tokens, seconds = answer.turn.tokens, answer.turn.seconds
    return f"{tokens} tokens, {tokens / seconds:.1f} a second" if seconds else ""


def _failure(what: str, why: CommandError | str) -> str:
    return f'<p role="alert">{what}: {escape(str(why))}</p>'


def _named(model: str, pair: str) -> str:
    return f"Model {model}, pair {pair}"


def _framed(view: str) -> str:
    """A page within the page, where no script runs and no style of the outer page reaches."""
    return f'<iframe sandbox title="Token view" srcdoc="{escape(view)}"></iframe>'
