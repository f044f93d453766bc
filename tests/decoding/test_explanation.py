"""What an explanation looks like: JSON, text, and a page."""

import html.parser
import json
import re

import pytest

from acd_logits.decoding import Candidate, Explanation, NewToken
from acd_logits.decoding.html_view import to_page
from acd_logits.decoding.terminal_view import _fit, percent, quoted

NASTY = '<script>alert("x")</script>\x1b[31m\x9b\u202e'
YES = Candidate(5, " Yes", 0.61, 0.05, 0.9, 0.0, "cut")
NO = Candidate(6, " No", 0.02, 0.8, 0.01, 0.985, "raised")
MAYBE = Candidate(7, NASTY, 0.3, 0.15, 0.05, 0.015, "lowered")
END = Candidate(2, "\n", 0.9, 0.99, None, 0.99, "same")
EXPLANATION = Explanation(
    prompt="Can I?\x1b[2J\nPlease.",
    answer=" No\n",
    tokens=(NewToken(6, " No", (NO, MAYBE, YES), 2, 0.05), NewToken(2, "\n", (END,), 97, 0.0)),
    alpha=0.5,
    beta=0.1,
    horizon=1,
    keep_temperature=True,
)


def test_json_holds_all_of_it():
    record = json.loads(EXPLANATION.to_json())
    assert record == EXPLANATION.to_dict() | {"tokens": record["tokens"]}
    assert list(record) == [
        "prompt", "answer", "tokens", "alpha", "beta", "horizon", "keep_temperature", "parts_at"
    ]  # fmt: skip
    assert record["parts_at"] == 0
    assert [token["parts"] for token in record["tokens"]] == [True, False]
    cut = record["tokens"][0]["candidates"][2]
    assert (cut["text"], cut["plain"], cut["adversarial"], cut["acd"], cut["change"]) == (" Yes", 0.61, 0.9, 0, "cut")


def test_text():
    lines = str(EXPLANATION).splitlines()
    assert lines[:3] == ["Prompt: Can I?\\x1b[2J", "Please.", "Answer:  No"]
    parting = 'The answers part at token 1: the plain model\'s first choice is " Yes" (61.0 %), and not " No" (2.0 %).'
    assert parting in lines
    assert "Probabilities in per cent, at temperature 1 (alpha 0.5, beta 0.1, horizon 1):" in lines
    assert lines[-3].split() == ["token", "plain", "S", "A", "ACD"]
    assert re.split(r" {2,}", lines[-2])[:7] == [">", '1 " No"', "2.0", "80.0", "1.0", "98.5", "raised"]
    assert lines[-2].endswith(f'plain: " Yes" 61.0; A: " Yes" 90.0; lowered: {quoted(NASTY)} 15.0; cut: " Yes" 5.0')
    assert lines[-1].split() == ["2", '"\\n"', "90.0", "99.0", "99.0", "no", "A"]


def test_text_in_a_terminal_keeps_to_its_width_and_colours():
    plain = EXPLANATION.to_text(width=80).splitlines()
    assert max(map(len, plain[-3:])) == 80
    assert plain[-2].endswith("…")
    colored = EXPLANATION.to_text(color=True, width=80)
    assert "\x1b[32mraised" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == "\n".join(plain)
    assert "\x1b" not in EXPLANATION.to_text()


def test_wide_characters_take_two_cells():
    assert _fit("锁锁锁", 8) == "锁锁锁  "
    assert _fit("锁锁锁", 6) == "锁锁锁"
    assert _fit("锁锁锁", 5) == "锁锁…"
    assert _fit("锁锁锁", 4) == "锁… "
    assert _fit("lock", 0) == ""


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(0.0, "0.0"), (1e-9, "<0.1"), (0.0005, "0.1"), (0.999, "99.9"), (1.0, "100.0"), (None, "")],
)
def test_percent(probability, shown):
    assert percent(probability) == shown


class Tree(html.parser.HTMLParser):
    """Checks that every tag is closed in order, and notes what is loaded and run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.foreign, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        foreign = {"src", "href", "action", "data", "poster", "srcset", "background"}
        self.foreign += [name for name, _ in attributes if name in foreign or name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return Tree(EXPLANATION.to_html())


def test_page_needs_nothing_from_outside(page):
    assert page.foreign == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    text = EXPLANATION.to_html()
    assert not re.search(r"https?:|//\w|url\(|@import|@font-face", text)


def test_page_is_for_phones_and_for_dark_rooms(page):
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in EXPLANATION.to_html()


def test_each_token_opens_its_table(page):
    inputs = [attributes for tag, attributes in page.tags if tag == "input"]
    labels = [attributes["for"] for tag, attributes in page.tags if tag == "label"]
    panels = [attributes for tag, attributes in page.tags if attributes.get("class") == "panel"]
    assert [attributes["id"] for attributes in inputs] == labels
    assert len(labels) == len(panels) == 2
    assert ["checked" in attributes for attributes in inputs] == [True, False]
    for n in (1, 2):
        rule = f".acd:has(> .answer > input:nth-of-type({n}):checked) > .panels > :nth-child({n})"
        assert rule in EXPLANATION.to_html()


def test_page_shows_every_candidate_and_hides_no_character(page):
    text = "".join(page.text)
    for candidate in (YES, NO, MAYBE, END):
        assert quoted(candidate.text) in text
        assert percent(candidate.acd) in text
    assert NASTY not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    rows = [attributes["class"] for tag, attributes in page.tags if tag == "tr" and "class" in attributes]
    assert rows == ["raised chosen", "lowered", "cut", "same chosen"]


def test_several_answers_share_a_page():
    other = Explanation("?", "", (), 0.5, 0.1, None, False)
    tree = Tree(to_page([EXPLANATION.to_dict(), other.to_dict()]))
    assert sum(attributes.get("class") == "acd" for _, attributes in tree.tags) == 2
    assert "equation 5 alone" in "".join(tree.text)
    assert Tree(to_page([])).foreign == []
