"""The anchor set: what Opposite Prompt Optimization (section 3.2 of the paper) learns from.

The target model answers instructions of three kinds (harmful; near misses, which are safe but sound dangerous;
everyday) under three system prompts (safe, opposite, null). A keyword judge splits the responses:

    D_HR  a harmful instruction, refused      learned by SP, unlearned by AP (eq. 3 and 4)
    D_HA  a harmful instruction, answered     learned by AP, unlearned by SP
    D_S   a safe instruction, answered        learned by both

An anchor set is a JSONL file with one object per line:

    instruction, response   the texts; the response does not hold the token that ends a turn
    split                   D_HR, D_HA or D_S
    system_prompt           the prompt it was sampled under: safe, opposite or null; "" if from the refusal bank
    source                  sampled or refusal_bank
    category, kind          of the instruction; kind is harmful, near_miss or everyday
    mirror                  the same for an instruction and the one that mirrors it, see [`load_instructions`]
    finished                whether the response ended by itself rather than at the length limit

The first three are enough for a file of your own, see [`load_anchor_data`].

    instructions.py   what the model is asked
    disguises.py      the same inside a story, rules for the reply, earlier turns
    generation.py     more instructions, written by another model
    sampling.py       what the model answers
    refusals.py       the bank that fills up D_HR
    splits.py         D_HR, D_HA and D_S, and what is held out
    build.py          all of it in one call
    tables.py         reading the files
"""

from __future__ import annotations

from ..files import check_new_file
from .build import build_anchors
from .disguises import disguise_instructions, load_disguises
from .generation import generate_instructions, write_generated
from .instructions import KINDS, load_instructions
from .refusals import load_refusals
from .sampling import SYSTEM_PROMPTS, SamplingSettings, sample_responses
from .splits import SPLITS, split_held_out, split_responses
from .tables import load_anchor_data

__all__ = [
    "KINDS",
    "SPLITS",
    "SYSTEM_PROMPTS",
    "SamplingSettings",
    "build_anchors",
    "check_new_file",
    "disguise_instructions",
    "generate_instructions",
    "load_anchor_data",
    "load_disguises",
    "load_instructions",
    "load_refusals",
    "sample_responses",
    "split_held_out",
    "split_responses",
    "write_generated",
]
