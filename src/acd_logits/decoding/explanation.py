"""What the contrast did to an answer, token by token: the object, as JSON, and by two views as text and as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .html_view import to_fragment, to_page
from .terminal_view import to_text

Stream = Literal["plain", "safeguarding", "adversarial", "acd"]
Change = Literal["raised", "lowered", "cut", "same"]


@dataclass(frozen=True)
class Candidate:
    """A token that could have been chosen, with its probability in each stream, at temperature 1.

    Args:
        token_id: the token.
        text: what it adds to the text in front of it.
        plain: its probability under the model alone, behind the same text.
        safeguarding: its probability in stream S, as the contrast takes it: behind the processors that act first.
        adversarial: its probability in stream A; `None` past the horizon.
        acd: its probability in the distribution that was sampled from, before temperature, top-k and top-p.
        change: what the contrast made of `safeguarding`. A token is cut by `beta`; then `acd` is 0.
    """

    token_id: int
    text: str
    plain: float
    safeguarding: float
    adversarial: float | None
    acd: float
    change: Change


@dataclass(frozen=True)
class NewToken:
    """One token of the answer.

    Args:
        token_id: the token that was chosen.
        text: what it adds to the text in front of it.
        candidates: the likeliest tokens of each stream and the chosen one, by `acd`, then by `safeguarding`.
        num_kept: how many tokens of the vocabulary `beta`, and the processors that act first, have left.
        cut_probability: what the tokens cut by `beta` had in stream S together.
    """

    token_id: int
    text: str
    candidates: tuple[Candidate, ...]
    num_kept: int
    cut_probability: float

    @property
    def chosen(self) -> Candidate:
        """The candidate that was chosen."""
        return next(candidate for candidate in self.candidates if candidate.token_id == self.token_id)

    @property
    def parts(self) -> bool:
        """Whether the plain model's first choice is another token."""
        return self.chosen.plain < self.first("plain").plain

    def first(self, stream: Stream) -> Candidate:
        """The likeliest token of a stream (past the horizon, where stream A is silent, any)."""
        return max(self.candidates, key=lambda candidate: getattr(candidate, stream) or 0.0)


@dataclass(frozen=True)
class Explanation:
    """What the contrast did to one answer. It prints as a table, and notebooks show it as a page.

    Args:
        prompt: the text of the prompt, special tokens included.
        answer: the text of the new tokens, without special tokens.
        tokens: the new tokens, up to the end of the answer.
        alpha: strength of the contrast for this prompt.
        beta: plausibility threshold.
        horizon: how many tokens were contrasted; `None` for all.
        keep_temperature: whether the contrast was divided by `1 - alpha`.
    """

    prompt: str
    answer: str
    tokens: tuple[NewToken, ...]
    alpha: float
    beta: float
    horizon: int | None
    keep_temperature: bool

    @property
    def parts_at(self) -> int | None:
        """Index of the first new token that is not the plain model's first choice; `None` if all are.

        Under greedy search, this is where plain generation would go on with another text.
        """
        return next((index for index, token in enumerate(self.tokens) if token.parts), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python types, with `parts_at`, and `parts` for each token."""
        record = asdict(self) | {"parts_at": self.parts_at}
        for entry, token in zip(record["tokens"], self.tokens, strict=True):
            entry["parts"] = token.parts
        return record

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)

    def to_text(self, color: bool = False, width: int | None = None) -> str:
        """A table with a line for each new token.

        Args:
            color: whether to use the colours of a terminal.
            width: cut lines off at this many cells; `None` leaves them as long as they are.
        """
        return to_text(self.to_dict(), color, width)

    def to_html(self) -> str:
        """A page that needs nothing from outside: no script, no font, no picture."""
        return to_page([self.to_dict()])

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return to_fragment([self.to_dict()])
