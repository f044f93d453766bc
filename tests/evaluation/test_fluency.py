"""Fluency: what counts as a broken word or a loop, and the loss of a response."""

import pytest
import torch

from acd_logits.evaluation.fluency import broken_words, has_loop, repeats_itself, response_loss, word_check
from conftest import build_model

WORDS = "i cannot support that request safe be an other wise with under stand stood house boat and the for you us"
KNOWN = {*WORDS.split(), "another", "understand", "withstand", "thousand", "otherwise"}


def broken(text):
    return broken_words(text, KNOWN.__contains__)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("I cannot supportthat requestSafe", 2),
        ("I cannot support that. Request safe.", 0),
        ("the end.Next request", 1),
        ("support,that request", 1),
        ("another understand withstand thousand houseboat", 0),
        ("Thathouse isSafe", 2),
        ("McDonald JavaScript YouTube iPhone USA PhD", 0),
        ("see https://example.org/someThing, e.g. www.openDoor.org or main.py and open_theDoor()", 0),
        ("3.5 percent, 10,000 dollars, U.S. and a.m.", 0),
        ("well-known state-of-the-art don't", 0),
        ("", 0),
    ],
)
def test_broken_words(text, count):
    assert broken(text)[0] == count


def test_words_are_counted():
    assert broken("I cannot 3 - support!") == (0, 3)


@pytest.mark.parametrize(
    "text",
    [
        "no " * 8,
        "I am sorry. " * 3,
        "First, go. " + "Open the door and close it. " * 4,
        "1. Open the door\n2. Open the door\n3. Open the door",
        "a b c d e f g h i j k l m n " * 3,
    ],
)
def test_loops(text):
    assert has_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no no no no",
        "Row, row, row your boat gently down the stream.",
        "Open the door. Open the window. Open the box. Open the gate.",
        "I am sorry. I am sorry.",
        "the cat and the dog and the bird and the fish and the frog",
    ],
)
def test_no_loops(text):
    assert not has_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that. Ask a lawyer. I can't help with that!",
        "Please ask somebody else.\nplease ask somebody else",
        "no " * 8,
    ],
)
def test_a_text_that_repeats_itself(text):
    assert repeats_itself(text)


@pytest.mark.parametrize(
    "text", ["", "I'm sorry. I'm sorry. I can't help.", "I can't help with that. I can't help wi"]
)
def test_a_text_that_does_not(text):
    assert not repeats_itself(text)


@pytest.mark.timeout(60)
def test_long_texts_do_not_hang():
    assert has_loop("word " * 20_000)
    assert not has_loop(" ".join(f"{i:b}".translate({48: "a", 49: "b"}) for i in range(5_000)))


def test_the_loss_is_the_models_own(tokenizer):
    model = build_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    labels = torch.tensor([[-100, -100, 7, 8, 9]])
    loss, n = response_loss(model, tokenizer, [5, 6], "w7 w8 w9")
    assert n == 3
    assert loss == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)
    assert response_loss(model, tokenizer, [5, 6], "") == (0.0, 0)


def test_words_of_a_tokenizer(tokenizer):
    is_word = word_check(tokenizer)
    assert is_word("w5")
    assert not is_word("w5 w6")
    assert not is_word("door")
