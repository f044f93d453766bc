"""Examples: a prompt with its response, as tokens, alone and in a batch.

The text is what inference sees. A batch is `[pad | x | response | pad]`: prompts are padded on the left and responses
on the right. So all responses start in the same column, and the language-model head is computed for them alone.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..anchors import SPLITS, load_anchor_data, split_held_out
from ..files import digest
from ..responses import as_messages, encode_messages
from .instructions import common_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .arguments import OPOArguments

IGNORED = -100  # a label that is padding

# Of one example: `input_ids` of the prompt; `response` tokens; the range of them that L_n is about, from `opening`
# (the tokens that the opposite split's response begins with too) to `avoid_until`; `split` as an index into SPLITS;
# `instruction`, `kind` and `mirror` as of the anchor data; `begun`, whether the prompt ends in an answer begun;
# `texts` that the prompt is made of: the turns so far, the instruction, and the answer begun
Example = dict[str, Any]
Batch = dict[str, torch.Tensor]


@dataclass
class AnchorExamples:
    """The training part and the held-out part of an anchor set, as of [`encode_anchors`]; the latter may be empty."""

    train: list[Example]
    held_out: list[Example]

    def __iter__(self) -> Iterator[Example]:
        return itertools.chain(self.train, self.held_out)

    def counts(self) -> dict[str, dict[str, int]]:
        """Examples per split."""
        return {
            part: {split: sum(SPLITS[e["split"]] == split for e in getattr(self, part)) for split in SPLITS}
            for part in ("train", "held_out")
        }


def load_examples(options: OPOArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> AnchorExamples:
    """Read, split and encode an anchor set.

    Args:
        options: where it lies, what is held out and how it is encoded.
        tokenizer: the model's tokenizer.
        seed: chooses what is held out.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: there is no such file.
        ValueError: it cannot be trained with; the message says what to do.
    """
    chat = options.uses_chat(tokenizer)
    rows = load_anchor_data(options.train_file)
    parts = split_held_out(rows, options.held_out_fraction, seed) if options.held_out_fraction else (rows, [])
    limits = options.max_response_tokens, options.max_refusal_tokens
    examples = AnchorExamples(*(encode_anchors(part, tokenizer, chat, *limits) for part in parts))
    # Prompts of like length in a batch save padding, and L_m needs those that mirror each other in one batch
    longest: dict[str, int] = defaultdict(int)
    for example in examples.held_out:
        longest[example["mirror"]] = max(longest[example["mirror"]], len(example["input_ids"]))
    examples.held_out.sort(key=lambda e: (longest[e["mirror"]], e["mirror"], len(e["input_ids"])))
    _check_splits(examples)
    return examples


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    response: str,
    *,
    chat: bool,
    finished: bool,
    history: Sequence[str] = (),
    begun: str = "",
) -> tuple[list[int], list[int]]:
    """Tokens of the user's prompt as inference sees it, and of the response as the model would write it.

    Args:
        tokenizer: the model's tokenizer.
        instruction: what the user says.
        response: what the model answers.
        chat: use the chat template, as in `apply_chat_template(..., add_generation_prompt=True)`.
        finished: whether the response ended by itself; then the model's end-of-turn token closes it.
        history: earlier turns, of the user and the assistant in turn.
        begun: what stands in the answer before `response`: a part of the prompt.

    Returns:
        Prompt tokens and response tokens.
    """

    def tokens(text: str, **kwargs: bool) -> list[int]:
        return tokenizer(text, **kwargs)["input_ids"]

    if chat:
        prompt = encode_messages(tokenizer, as_messages((*history, instruction)))
    else:
        prompt = tokens("\n\n".join((*history, instruction)))
    # The response is tokenised on its own: the model writes it token by token, from the generation prompt on
    written = tokens(response, add_special_tokens=False)
    end = end_of_turn(tokenizer, chat) if finished else None
    prompt = [*prompt, *(tokens(begun, add_special_tokens=False) if begun else [])]
    return prompt, written if end is None else [*written, end]


def end_of_turn(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The token a model ends its turn with: the first special one that the chat template puts behind an answer."""
    if chat:
        answer = "an-answer"
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in special:
                return token
    return tokenizer.eos_token_id


def encode_anchors(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    max_response_tokens: int,
    max_refusal_tokens: int | None = None,
) -> list[Example]:
    """Tokens of the rows of an anchor set; responses are cut off after `max_response_tokens`.

    Refusals (D_HR) are cut off after `max_refusal_tokens`, if it is given, and L_n avoids no more than the first
    `max_response_tokens` of them. A refusal and an answer to one instruction may begin alike ("I'm ..."). `opening`
    counts these tokens, and L_n leaves them out: eq. 3 and 4 would avoid in L_n what they follow in L_p.
    """

    def encode(row: dict[str, Any]) -> Example:
        more = {name: row[name] for name in ("history", "begun") if row.get(name)}
        prompt, response = encode_example(
            tokenizer, row["instruction"], row["response"], chat=chat, finished=row["finished"], **more
        )
        limit = max_refusal_tokens if row["split"] == "D_HR" and max_refusal_tokens else max_response_tokens
        parts = {"input_ids": prompt, "response": response[:limit], "split": SPLITS.index(row["split"])}
        parts |= {"avoid_until": max_response_tokens, "begun": bool(row.get("begun"))}
        parts["texts"] = [list(row.get("history") or ()), row["instruction"], row.get("begun") or ""]
        return parts | {name: row[name] for name in ("instruction", "kind", "mirror")}

    examples = [encode(row) for row in rows]
    responses = defaultdict(list)
    for example in examples:
        responses[tuple(example["input_ids"]), SPLITS[example["split"]]].append(example["response"])
    opposite = {"D_HR": "D_HA", "D_HA": "D_HR"}
    for example in examples:
        others = responses.get((tuple(example["input_ids"]), opposite.get(SPLITS[example["split"]], "")), [])
        example["opening"] = max((common_length((example["response"], other)) for other in others), default=0)
    return examples


def refusal_openings(examples: Iterable[Example]) -> list[int]:
    """The first tokens of refusals, save of those behind an answer that has begun, which begin as any text goes on."""
    return sorted({e["response"][0] for e in examples if SPLITS[e["split"]] == "D_HR" and not e["begun"]})


def leave_out_apologies(examples: Iterable[Example], openings: Sequence[int]) -> list[Example]:
    """Examples without the answers that begin as refusals do: where a model apologises, there is nothing to follow.

    Those of D_HA are left out. Those of D_S keep their first token, at which the model may still say something else,
    and are marked as `apology`. What goes on with an answer that has begun is no apology.
    """
    kept = []
    for example in examples:
        if example["begun"] or SPLITS[example["split"]] == "D_HR" or example["response"][0] not in openings:
            kept.append(example)
        elif SPLITS[example["split"]] == "D_S":
            kept.append(example | {"response": example["response"][:1], "apology": True})
    return kept


def collate(examples: Sequence[Example]) -> Batch:
    """A batch `[pad | x | response | pad]`.

    Returns:
        `input_ids` and `attention_mask` `[B, T]`; `labels` `[B, R]`, the response tokens, which end every row;
        `avoided` `[B, R]`, those of them that L_n is about; `splits` `[B]`; `begun` `[B]`, 1 where the prompt ends in
        an answer that has begun; `mirrors` `[B]`, the same number for instructions that mirror each other.
    """
    prompt_length, response_length = (max(len(e[part]) for e in examples) for part in ("input_ids", "response"))
    ids, labels, avoided, mask = [], [], [], []
    for example in examples:
        left = [0] * (prompt_length - len(example["input_ids"]))
        right = [0] * (response_length - len(example["response"]))
        ids.append([*left, *example["input_ids"], *example["response"], *right])
        mask.append([*left, *[1] * (len(ids[-1]) - len(left) - len(right)), *right])
        labels.append([*example["response"], *[IGNORED] * len(right)])
        counted = range(example["opening"], min(example["avoid_until"], len(example["response"])))
        avoided.append([token if i in counted else IGNORED for i, token in enumerate(labels[-1])])
    batch: dict[str, list[Any]] = {"input_ids": ids, "attention_mask": mask, "labels": labels, "avoided": avoided}
    batch |= {"splits": [e["split"] for e in examples], "begun": [int(e["begun"]) for e in examples]}
    batch["mirrors"] = [int(digest(e["mirror"])[:15], 16) for e in examples]
    return {name: torch.tensor(values) for name, values in batch.items()}


def check_mirrors(examples: AnchorExamples) -> None:
    """Raise ValueError if no harmful instruction of the training part has a safe one that mirrors it."""
    of_split = {split: {e["mirror"] for e in examples.train if SPLITS[e["split"]] == split} for split in SPLITS}
    if not of_split["D_HR"] & of_split["D_S"]:
        raise ValueError(
            "--mirror_weight is about instructions that mirror each other, and no two in the training file do: give "
            "its rows a column `mirror`, the same for both, or leave it out"
        )


def _check_splits(examples: AnchorExamples) -> None:
    for part, counts in examples.counts().items():
        for split, count in counts.items():
            if getattr(examples, part) and not count:
                raise ValueError(
                    f"the {part.replace('_', '-')} pairs have no {split} ({counts}): add some to the training file, "
                    "or choose another --held_out_fraction or --seed"
                )


def check_context(config: PretrainedConfig, examples: AnchorExamples, num_virtual_tokens: int) -> None:
    """Raise ValueError if the soft prompt and the longest example do not fit into the model's context."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(e["input_ids"]) + len(e["response"]) for e in examples)
    if limit is not None and num_virtual_tokens + longest > limit:
        raise ValueError(
            f"{num_virtual_tokens} virtual tokens and the longest pair's {longest} do not fit into the model's "
            f"context of {limit}: lower --num_virtual_tokens or --max_response_tokens, or shorten the instructions"
        )
