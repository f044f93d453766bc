"""The decoder: eq. 5 of the paper in every decoding mode of `generate()`.

contrast.py         eq. 5
logits_process.py   the processor: its options, and what it does in one call
attach.py           all that is done to a model while a processor is attached
hooks.py            what it hooks into in transformers, checked at start-up
call.py             one call of the model's forward
owed.py             the contrasts that a decoding loop owes
explain.py          a record of what the contrast did in one call
explanation.py      what it did, token by token: object and JSON
terminal_view.py    the same as text
html_view.py        the same as a page
custom_generate.py  a pair from the Hub in one line
safeguarded.py      a model whose generate() uses the contrast by itself
export.py           the folder it is loaded from
paired.py           both streams as 2B rows of one forward
shared.py           both streams over one copy of the instruction
layout.py           where soft prompts and the text stand in a row, and the masks that follow
streams.py          the two soft prompts and their keys and values
layers.py           cache layers
"""

from __future__ import annotations

from .contrast import contrast
from .explanation import Candidate, Explanation, NewToken
from .logits_process import ACDLogitsProcessor

__all__ = ["ACDLogitsProcessor", "Candidate", "Explanation", "NewToken", "contrast"]
