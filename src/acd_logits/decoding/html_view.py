"""Explanations as HTML: an answer whose tokens open the table of their candidates.

There is no script, so that notebooks and web pages which drop scripts show it too: each token is a radio button, and
one rule of CSS for each place in an answer shows the table that belongs to the one that is checked. Arrow keys move
from token to token. Nothing is loaded from outside.
"""

from __future__ import annotations

from html import escape
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import digest
from .terminal_view import chosen_of, parting, percent, quoted, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

_STYLE = (Path(__file__).parent / "html_view.css").read_text(encoding="utf-8")
_STREAMS = ("plain", "safeguarding", "adversarial", "acd")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the contrast did</title>
<style>
:root {{ color-scheme: light dark; background: #fff; }}
@media (prefers-color-scheme: dark) {{ :root {{ background: #14171c; }} }}
body {{ margin: 0; padding: 1.25rem 1rem; }}
</style>
</head>
<body>
<main>
{content}
</main>
</body>
</html>
"""
_LEGEND = """<p class="legend">
<span><i style="background: var(--raised)"></i>raised by the contrast</span>
<span><i style="background: var(--lowered)"></i>lowered by the contrast</span>
<span><i style="border-bottom-color: var(--parts)"></i>not the plain model's first choice</span>
<span>Choose a token to see its candidates.</span>
</p>"""
_HEAD = (
    "<thead><tr><th scope='col'>token</th><th scope='col'>plain</th><th scope='col'>S</th><th scope='col'>A</th>"
    "<th scope='col'>ACD</th><th scope='col'>change</th></tr></thead>"
)


def to_page(records: Sequence[dict[str, Any]]) -> str:
    """A page of its own.

    Args:
        records: what `Explanation.to_dict` gives, one for each answer.
    """
    return _PAGE.format(content=to_fragment(records))


def to_fragment(records: Sequence[dict[str, Any]]) -> str:
    """The same, to be put into another page."""
    longest = max((len(record["tokens"]) for record in records), default=0)
    shown = ",\n".join(
        f".acd:has(> .answer > input:nth-of-type({n}):checked) > .panels > :nth-child({n})"
        for n in range(1, longest + 1)
    )
    rule = f"{shown} {{ display: block; }}\n" if shown else ""
    return f"<style>\n{_STYLE}{rule}</style>\n" + "\n".join(starmap(_answer, enumerate(records)))


def _answer(number: int, record: dict[str, Any]) -> str:
    tokens = record["tokens"]
    name = f"acd-{digest(record)[:12]}-{number}"  # two answers may be alike
    opened = record["parts_at"] or 0
    labels = "".join(_label(token, f"{name}-{n}", name, n == opened) for n, token in enumerate(tokens))
    return f"""<section class="acd">
<p class="prompt"><b>Prompt</b>
{_readable(record["prompt"])}</p>
<p class="parting">{escape(parting(record))}</p>
<div class="answer" role="radiogroup" aria-label="The safeguarded answer, token by token">{labels}</div>
{_LEGEND}
<div class="panels">{"".join(_panel(token, n) for n, token in enumerate(tokens, 1))}</div>
<p class="legend">S and A are the streams behind the Safeguarding and the Adversarial Prompt. Probabilities are in per
cent, at temperature 1 ({escape(settings(record))}).</p>
</section>"""


def _label(token: dict[str, Any], identity: str, name: str, checked: bool) -> str:
    chosen = chosen_of(token)
    classes = [chosen["change"], *["parts"] * token["parts"]]
    strength = abs(chosen["acd"] - chosen["safeguarding"])
    text = chosen["text"]
    space, breaks = " " * text.startswith(" "), "<br>" * text.count("\n")  # lines break between labels
    shown = escape(quoted(text.replace("\n", "↵").removeprefix(" "))[1:-1]) or "␣"
    return (
        f'{space}<input type="radio" name="{name}" id="{identity}"{" checked" * checked}>'
        f'<label for="{identity}" class="{" ".join(classes)}" style="--d: {strength:.3f}">{shown}</label>{breaks}'
    )


def _panel(token: dict[str, Any], number: int) -> str:
    chosen = chosen_of(token)
    if chosen["adversarial"] is None:
        note = "Behind the horizon, stream S decides alone."
    else:
        note = (
            f"Tokens left to choose from: {token['num_kept']}. Those cut by beta had "
            f"{percent(token['cut_probability'])} % in stream S."
        )
    rows = "".join(_row(entry, entry["token_id"] == token["token_id"]) for entry in token["candidates"])
    return (
        f'<div class="panel"><h2>Token {number}: {_word(chosen["text"])}</h2><p>{note}</p>'
        f"<table>{_HEAD}<tbody>{rows}</tbody></table></div>"
    )


def _row(entry: dict[str, Any], is_chosen: bool) -> str:
    cells = "".join(
        f'<td class="p" style="--p: {entry[stream] or 0:.3f}">{escape(percent(entry[stream])) or "-"}</td>'
        for stream in _STREAMS
    )
    change = entry["change"]
    return (
        f'<tr class="{change}{" chosen" * is_chosen}"><th scope="row">{_word(entry["text"])}</th>{cells}'
        f'<td class="change {change}">{change}</td></tr>'
    )


def _word(text: str) -> str:
    return escape(quoted(text))


def _readable(text: str) -> str:
    """Text of several lines, in which no character hides."""
    return "\n".join(escape(quoted(line)[1:-1]) for line in text.split("\n"))
