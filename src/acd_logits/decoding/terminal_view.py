"""An explanation as text: one line for each new token, in the colours of a terminal if wished."""

from __future__ import annotations

import unicodedata
from typing import Any

_STREAMS = ("plain", "safeguarding", "adversarial", "acd")
_COLORS = {"raised": "32", "lowered": "33", "cut": "31", "parts": "1;35", "faint": "2"}
_TOKEN = 16  # cells of the column of tokens
_LEAD = 45 + _TOKEN  # cells of a line in front of the remarks


def quoted(text: str) -> str:
    """A token in quotes, in which no character commands the terminal or hides."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f'"{shown}"'


def percent(probability: float | None) -> str:
    """A probability in per cent, short; nothing where there is none."""
    if probability is None:
        return ""
    return "<0.1" if 0 < probability < 0.0005 else f"{100 * probability:.1f}"


def parting(record: dict[str, Any]) -> str:
    """A sentence on where the plain model would part from this answer."""
    if record["parts_at"] is None:
        return "Every token is the plain model's first choice."
    token = record["tokens"][record["parts_at"]]
    chosen = chosen_of(token)
    plain = first_of(token, "plain")
    return (
        f"The answers part at token {record['parts_at'] + 1}: the plain model's first choice is "
        f"{quoted(plain['text'])} ({percent(plain['plain'])} %), and not {quoted(chosen['text'])} "
        f"({percent(chosen['plain'])} %)."
    )


def settings(record: dict[str, Any]) -> str:
    """The strength of the contrast, in words."""
    horizon = "" if record["horizon"] is None else f", horizon {record['horizon']}"
    alone = "" if record["keep_temperature"] else ", equation 5 alone"
    return f"alpha {record['alpha']:g}, beta {record['beta']:g}{horizon}{alone}"


def chosen_of(token: dict[str, Any]) -> dict[str, Any]:
    """The candidate that was chosen."""
    return next(entry for entry in token["candidates"] if entry["token_id"] == token["token_id"])


def first_of(token: dict[str, Any], stream: str) -> dict[str, Any]:
    """The likeliest candidate of a stream."""
    return max(token["candidates"], key=lambda entry: entry[stream] or 0.0)


def to_text(record: dict[str, Any], color: bool, width: int | None) -> str:
    """The text of an explanation.

    Args:
        record: what `Explanation.to_dict` gives.
        color: whether to use colours.
        width: cells of a line of the table; `None` for as many as it takes.
    """

    def painted(text: str, name: str) -> str:
        return f"\x1b[{_COLORS[name]}m{text}\x1b[0m" if color and name in _COLORS else text

    lines = [f"Prompt: {_lines(record['prompt'])}", f"Answer: {_lines(record['answer'])}", "", parting(record), ""]
    lines.append(f"Probabilities in per cent, at temperature 1 ({settings(record)}):")
    head = f"{'':>5} {'token':<{_TOKEN}}" + "".join(f"{name:>7}" for name in ("plain", "S", "A", "ACD"))
    lines.append(painted(head, "faint"))
    for number, token in enumerate(record["tokens"], 1):
        chosen = chosen_of(token)
        mark = painted(">", "parts") if token["parts"] else " "
        numbers = "".join(f"{percent(chosen[stream]):>7}" for stream in _STREAMS)
        change = "no A" if chosen["adversarial"] is None else chosen["change"]
        cells = f"{number:>4} {_fit(quoted(chosen['text']), _TOKEN)}"
        remarks = _remarks(token)
        if width is not None:
            remarks = _fit(remarks, max(0, width - _LEAD))
        lines.append(f"{mark}{cells}{numbers}  {painted(f'{change:<9}', change)}{remarks}".rstrip())
    return "\n".join(lines)


def _remarks(token: dict[str, Any]) -> str:
    """What the streams would rather have said, and what the contrast took from stream S."""
    parts = []
    for stream, name in zip(_STREAMS, ("plain", "S", "A", "ACD"), strict=True):
        first = first_of(token, stream)
        if first["token_id"] != token["token_id"] and first[stream]:
            parts.append(f"{name}: {quoted(first['text'])} {percent(first[stream])}")
    others = [entry for entry in token["candidates"] if entry["token_id"] != token["token_id"]]
    for change in ("lowered", "cut"):
        found = sorted((e for e in others if e["change"] == change), key=lambda entry: -entry["safeguarding"])
        names = [f"{quoted(e['text'])} {percent(e['safeguarding'])}" for e in found[:2] if e["safeguarding"] >= 0.01]
        if names:
            parts.append(f"{change}: {', '.join(names)}")
    return "; ".join(parts)


def _lines(text: str) -> str:
    """A text of several lines without characters that command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _fit(text: str, cells: int) -> str:
    """The text in exactly so many cells, cut off or filled up; Chinese characters and emoji take two."""
    if _cells(text) > cells:
        end = next(n for n in range(len(text)) if _cells(text[: n + 1]) >= cells)
        text = text[:end] + "…" * (cells > 0)
    return text + " " * (cells - _cells(text))


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)
