"""Is a response correct? For problems whose answer is a number or a short text."""

from __future__ import annotations

import re

# Neither the 2 of "H2O" nor the minus of "9-4"
_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?<![^\W_])\d+(?:,\d{3})*(?:\.\d+)?")
_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip


def is_correct(response: str, answer: str) -> bool:
    """Whether a response gives an answer.

    Args:
        response: the text.
        answer: a number, which must be the last one in the response (up to twenty also in words, where the response
            has no digits); or a short text, whose words the response must hold, in any case of letters.
    """
    if _NUMBER.fullmatch(answer):
        numbers = [_value(number) for number in _NUMBER.findall(response)]
        words = re.findall(r"[a-z]+", response.lower())
        numbers = numbers or [float(_WORDS.index(word)) for word in words if word in _WORDS]
        return bool(numbers) and numbers[-1] == _value(answer)
    return bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", response, re.IGNORECASE))


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("\u2212", "-"))
