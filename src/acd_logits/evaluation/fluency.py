"""Fluency: whether the responses of an arm still read like text.

A contrast without a plausibility threshold can raise tokens that both streams find implausible, and garble words
("I cannot supportthat requestSafe"). Measures show it, for a comparison of arms rather than by themselves:

- perplexity of the responses under the plain model, which has no soft prompt in front;
- broken words: two words run together, with a capital in the middle ("requestSafe"), a missing space behind a full
  stop ("end.Next") or a function word stuck to a word that the tokenizer knows ("supportthat");
- repetition loops: the same words three times in a row or more, over at least eight words; of refusals, also a
  sentence that comes twice.
"""

from __future__ import annotations

import re
from inspect import signature
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOOP_WORDS, _LOOP_TURNS, _LOOP_PERIOD = 8, 3, 40
_SENTENCE_WORDS = 4  # shorter ones, such as "I'm sorry", may well come twice
_WORD = re.compile(r"[^\W\d_]+")
# A word, with what may stand inside of one
_TOKEN = re.compile(r"\S*[^\W\d_]\S*")
_ADDRESS = re.compile(r"://|^www\.|@|[\\/_<>={}()\[\]`|]|\.[a-z0-9]{1,4}\W*$|^(?:\w\.)+\w?\W*$")
_RUN_ON = re.compile(r"[a-z]{2}[.!?,;:][A-Z][a-z]|[a-z]{2}[!?,;][a-z]{2}")
_CAPITAL_INSIDE = re.compile(r"[a-z]{2}[A-Z][a-z]")
# Names that are written so
_NAMES = re.compile(
    r"^(?:Mac|Mc|Java|Type|You|Linked|Face|Whats|Pay|Git|Web|Micro|Open|Power|Tik|Snap|Word|Duck|Smol)[A-Z]"
)
_FUNCTION_WORDS = (
    "that", "with", "this", "from", "your", "they", "their", "will", "would", "cannot", "about", "which", "there",
    "these", "those", "when", "what", "have", "because", "should", "the", "you", "and", "are", "not",
)  # fmt: skip


def response_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: str
) -> tuple[float, int]:
    """The loss of a response under the plain model. One row at a time: exact for every architecture.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        prompt: the token ids in front of the response.
        response: the text.

    Returns:
        Mean negative log-likelihood per token, and the number of tokens; 0 and 0 for an empty response.
    """
    import torch

    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not ids:
        return 0.0, 0
    # The head is for the response alone, where the model can tell
    kept = {"logits_to_keep": len(ids) + 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with torch.no_grad():
        tokens = torch.tensor([prompt + ids], device=model.device)
        logits = model(tokens, use_cache=False, **kept).logits[0, -len(ids) - 1 : -1]
        targets = torch.tensor(ids, device=logits.device)
        return torch.nn.functional.cross_entropy(logits.float(), targets).item(), len(ids)


def word_check(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    """A function that tells whether the tokenizer has a lower-case word as one token."""
    unknown = tokenizer.unk_token_id

    def is_word(text: str) -> bool:
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return len(ids) == 1 and ids[0] != unknown

    return is_word


def broken_words(text: str, is_word: Callable[[str], bool]) -> tuple[int, int]:
    """Count the words that were run together.

    Args:
        text: a response.
        is_word: of a lower-case word, whether it is known.

    Returns:
        The number of broken words, and of all words.
    """
    tokens = [token for token in _TOKEN.findall(text) if not _ADDRESS.search(token)]
    return sum(_is_broken(token, is_word) for token in tokens), len(tokens)


def _is_broken(token: str, is_word: Callable[[str], bool]) -> bool:
    if _RUN_ON.search(token):
        return True
    return any(
        (_CAPITAL_INSIDE.search(word) and not _NAMES.match(word)) or _runs_together(word.lower(), is_word)
        for word in _WORD.findall(token)
    )


def _runs_together(word: str, is_word: Callable[[str], bool]) -> bool:
    """Whether an unknown word begins or ends with a function word, and the rest is known."""
    rests = [word.removesuffix(end) for end in _FUNCTION_WORDS if word.endswith(end)]
    rests += [word.removeprefix(start) for start in _FUNCTION_WORDS if word.startswith(start)]
    rests = [rest for rest in rests if len(rest) > 3]
    return bool(rests) and not is_word(word) and any(map(is_word, rests))


def has_loop(text: str) -> bool:
    """Whether a text repeats the same words three times in a row or more, over at least eight words.

    Numbers and punctuation do not count, so that a numbered list of one sentence is a loop.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    for period in range(1, min(_LOOP_PERIOD, len(words) // _LOOP_TURNS) + 1):
        wanted = max(_LOOP_TURNS * period, _LOOP_WORDS)
        run = period
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else period
            if run >= wanted:
                return True
    return False


def repeats_itself(text: str) -> bool:
    """Whether a text holds a loop, or a sentence of at least four words twice."""
    parts = (tuple(_WORD.findall(part.lower())) for part in re.split(r"[.!?\n]+", text))
    sentences = [words for words in parts if len(words) >= _SENTENCE_WORDS]
    return len(set(sentences)) < len(sentences) or has_loop(text)
