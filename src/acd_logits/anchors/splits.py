"""The three splits of an anchor set, D_HR, D_HA and D_S, and the part of them that is held out.

A keyword judge (`refusal.py`) tells whether a response refuses. Models that hardly refuse anything leave D_HR short.
It is then filled up from the refusal bank, and the log says so.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..files import digest
from ..refusal import is_refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from datasets import Dataset

logger = logging.get_logger(__name__)

SPLITS = ("D_HR", "D_HA", "D_S")
IN_DISGUISE = " in disguise"  # behind a mirror's name: instructions in disguise mirror each other, not the bare ones
BEGUN_WORDS = 30  # at most, in an answer that has begun


def split_responses(
    samples: Sequence[dict[str, Any]],
    refusals: Sequence[dict[str, str]],
    per_instruction: int = 1,
    seed: int = 0,
    own_refusals: bool = True,
    begun_share: float = 0.0,
) -> list[dict[str, Any]]:
    """Split sampled responses into D_HR, D_HA and D_S (section 3.2) and fill up D_HR.

    Refusals of safe instructions, empty responses and repetitions are left out. The log counts what is left out, what
    is short and what is filled up.

    A pair trained on first tokens protects no deeper than those. So some rows have an answer that has `begun`: a few
    words of a harmful one, then a refusal (D_HR), and a few words of a safe one, then the rest of it (D_S).

    Args:
        samples: as of [`sample_responses`].
        refusals: as of [`load_refusals`].
        per_instruction: how many D_HR and D_HA responses training wants for each harmful instruction. More are kept,
            fewer refusals are filled up from the bank; compliance cannot be made up.
        seed: chooses among the refusals, and what has begun.
        own_refusals: keep the model's own refusals of harmful instructions, rather than filling up all from the bank.
        begun_share: for this share of the sampled answers, add a row in which it has begun.

    Returns:
        The anchors, sorted by split and instruction.
    """
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    dropped: Counter[str] = Counter()
    for sample in samples:
        refused = is_refusal(sample["response"])
        safe = sample["kind"] != "harmful"
        key = sample["instruction"], sample["response"]
        if not sample["response"]:
            dropped["empty"] += 1
        elif safe and refused:
            dropped["refusals of safe instructions"] += 1
        elif refused and not own_refusals:
            dropped["refusals, for those of the bank"] += 1
        elif key in kept:
            dropped["repeated"] += 1
        else:
            split = "D_S" if safe else "D_HR" if refused else "D_HA"
            kept[key] = {"history": [], **sample, "split": split, "source": "sampled", "begun": ""}
    for reason, number in dropped.items():
        logger.warning(f"Left out {number} of {len(samples)} responses: {reason}.")
    about = ("instruction", "category", "kind", "mirror")
    harmful = {
        s["instruction"]: {"history": s.get("history", []), "begun": ""} | {key: s[key] for key in about}
        for s in samples
        if s["kind"] == "harmful"
    }
    anchors = [*kept.values(), *_fill_refusals(kept.values(), harmful, refusals, per_instruction, seed)]
    anchors += _begin_answers(kept.values(), refusals, begun_share, seed)
    order = ["instruction", "response", "split", "system_prompt", "source", "category", "kind", "mirror", "finished"]
    order += ["history", "begun"]
    anchors.sort(key=lambda row: [row[key] for key in ("split", "kind", "category", "instruction", "response")])
    return [{key: row[key] for key in order} for row in anchors]


def _fill_refusals(
    sampled: Iterable[dict[str, Any]],
    harmful: dict[str, dict[str, str]],
    refusals: Sequence[dict[str, str]],
    per_instruction: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Refusals from the bank for the harmful instructions that have too few."""
    filled = []
    numbers = Counter((row["split"], row["instruction"]) for row in sampled)
    for instruction, about in sorted(harmful.items()):
        missing = per_instruction - numbers["D_HR", instruction]
        choice = random.Random(f"{seed} {instruction}")
        for refusal in itertools.islice(_shuffled(refusals, about["category"], choice), max(missing, 0)):
            row = {**about, "response": refusal}
            filled.append({**row, "split": "D_HR", "system_prompt": "", "source": "refusal_bank", "finished": True})
    for split in ("D_HR", "D_HA"):
        wanted = per_instruction * len(harmful)
        missing = sum(max(per_instruction - numbers[split, instruction], 0) for instruction in harmful)
        if missing:
            cure = f"filled up with {len(filled)} from the refusal bank" if split == "D_HR" else "left short"
            logger.warning(
                f"{split}: training wants {wanted} responses, {per_instruction} per harmful instruction, and sampling "
                f"gave {missing} too few: {cure}."
            )
    return filled


def _begin_answers(
    sampled: Iterable[dict[str, Any]], refusals: Sequence[dict[str, str]], share: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows in which an answer has begun: a harmful one, which is turned around, or a safe one, which goes on."""
    for row in sampled:
        choice = random.Random(f"begun {seed} {row['instruction']}")
        ends = [word.end() for word in re.finditer(r"\S+", row["response"])][:-1]
        if row["split"] == "D_HR" or not ends or choice.random() >= share:
            continue
        cut = choice.choice(ends[:BEGUN_WORDS])
        begun, rest = row["response"][:cut], row["response"][cut:]
        if row["split"] == "D_S":
            yield {**row, "begun": begun, "response": rest}
        else:
            refusal = next(_shuffled(refusals, row["category"], choice))
            row = {**row, "begun": begun, "response": f"\n\n{refusal}", "split": "D_HR", "finished": True}
            yield {**row, "source": "refusal_bank"}


def _shuffled(refusals: Sequence[dict[str, str]], category: str, choice: random.Random) -> Iterator[str]:
    """The refusals that fit a category in random order; its own ones are few and come as often as the general ones."""
    general, own = ([row["response"] for row in refusals if row["category"] == name] for name in ("", category))
    choice.shuffle(general)
    choice.shuffle(own)
    while general or own:
        from_own = own and (not general or choice.random() < 0.5)
        yield (own if from_own else general).pop()


def split_held_out(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hold out a share of the instructions with all their responses, the same share of each kind.

    Instructions that mirror each other are held out together, in disguise and without it: one of them would tell the
    training about the other.

    Args:
        dataset: as of [`load_anchor_data`].
        fraction: the share, above 0 and below 1.
        seed: chooses the instructions; the order of the rows does not matter.

    Returns:
        The training part and the held-out part.

    Raises:
        ValueError: if the fraction is out of range, or one part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must be above 0 and below 1, not {fraction}")
    kinds = dict(zip(dataset["instruction"], dataset["kind"], strict=True))
    # The digest of what an instruction mirrors decides its place: chance, but the same place in every kind
    mirrors = zip(dataset["instruction"], dataset["mirror"], strict=True)
    order = {
        instruction: (digest(seed, mirror.removesuffix(IN_DISGUISE)), instruction) for instruction, mirror in mirrors
    }
    held_out: set[str] = set()
    for kind in set(kinds.values()):
        of_kind = sorted((instruction for instruction in kinds if kinds[instruction] == kind), key=order.__getitem__)
        held_out.update(of_kind[: round(len(of_kind) * fraction)])
    if len(held_out) in (0, len(kinds)):
        raise ValueError(f"cannot hold out {fraction} of {len(kinds)} instructions: one part would be empty")
    sides: tuple[list[int], list[int]] = ([], [])
    for i, instruction in enumerate(dataset["instruction"]):
        sides[instruction in held_out].append(i)
    return dataset.select(sides[0]), dataset.select(sides[1])
