"""Record what the contrast did in one ordinary `generate()` call.

The contrast has the logits of both streams in its hands at every token, so a record of them costs next to nothing
while `generate()` runs. The plain model is no part of the paired forward. Its logits come from one forward over the
finished text, which gives them behind every token at once: the same logits that plain decoding of this text gives one
by one, for the price of a prefill. All probabilities are computed afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerationMode

from .attach import BoundProcessor, ContrastProcessor
from .explanation import Candidate, Explanation, NewToken

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .explanation import Change

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_ONE_ROW = "explain() records one row per prompt, under greedy search or sampling"


class RecordingProcessor(ContrastProcessor):
    """An ACD processor that keeps what it saw. For one call.

    Args:
        acd: the processor that contrasts.
    """

    def __init__(self, acd: ContrastProcessor) -> None:
        self.acd, self.model = acd, acd.model
        self.record: Record

    def bind(
        self, generation_config: GenerationConfig, ids_length: int, prompts: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> Record:
        """See the base class."""
        mode = generation_config.get_generation_mode()
        if mode not in _MODES:
            raise ValueError(f"{_ONE_ROW}, not under {mode.value.replace('_', ' ')}.")
        if (generation_config.num_return_sequences or 1) > 1:
            raise ValueError(f"{_ONE_ROW}: leave out num_return_sequences, or repeat the prompt.")
        mask = model_kwargs.get("attention_mask")
        bound = self.acd.bind(generation_config, ids_length, prompts, model_kwargs)
        if bound.cache.offset:
            raise ValueError("explain() needs the whole text as input_ids: leave out inputs_embeds.")
        limit = bound.cache.streams.long_from
        if limit is not None and bound.cache.max_length > limit:
            raise ValueError(
                f"beyond {limit} tokens {type(self.model).__name__} has other rotary frequencies, so one forward over "
                f"the finished text is not what the plain model says token by token: let prompt and new tokens fit "
                f"into {limit} tokens."
            )
        ends = _ids(generation_config._eos_token_tensor)
        pads = _ids(generation_config._pad_token_tensor) if ends else []  # without an end token, nothing is filled up
        self.record = Record(bound, mask, ids_length, len(prompts), ends, pads)
        return self.record


class Record(BoundProcessor):
    """The logits of one `generate` call, kept step by step.

    Args:
        bound: what contrasts in this call.
        mask: the prompts' attention mask `[B, ids_length]`, or `None` where nothing is padded.
        start: length of the prompts.
        rows: B.
        ends: ids of tokens that end an answer.
        pads: ids of tokens that fill a row up behind its end.
    """

    def __init__(
        self,
        bound: BoundProcessor,
        mask: torch.Tensor | None,
        start: int,
        rows: int,
        ends: list[int],
        pads: list[int],
    ) -> None:
        self.bound, self.cache, self.ones = bound, bound.cache, bound.ones
        self.mask, self.start, self.rows, self.ends, self.pads = mask, start, rows, ends, pads
        self.safeguarding: list[torch.Tensor] = []  # one [B, vocab] a step
        self.adversarial: list[torch.Tensor | None] = []  # None past the horizon
        self.contrasted: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Contrast `[B, vocab]` scores, and keep what was contrasted and the result."""
        if input_ids.shape != (self.rows, self.start + len(self.safeguarding)):
            raise RuntimeError(f"{_ONE_ROW}, and this decoding loop goes on in another way.")
        adversarial = self.cache.owed.adversarial  # [B, kept, vocab], before the contrast takes it
        result = self.bound(input_ids, scores)
        self.safeguarding.append(scores)
        # A copy: a view would keep the whole output alive
        self.adversarial.append(None if adversarial is None else adversarial[:, -1].clone())
        self.contrasted.append(result)
        return result

    def prompt(self, sequences: torch.Tensor, row: int) -> list[int]:
        """The ids of a row's prompt, without its padding."""
        ids = sequences[row, : self.start]
        return ids.tolist() if self.mask is None else ids[self.mask[row].bool()].tolist()

    def answer(self, sequences: torch.Tensor, row: int) -> list[int]:
        """The ids of a row's answer, up to the token that ends it."""
        ids = sequences[row, self.start :].tolist()
        end = next((index for index, token in enumerate(ids) if token in self.ends), None)
        if end is not None:
            return ids[: end + 1]
        while self.rows > 1 and ids and ids[-1] in self.pads:  # something else ended it, such as stop_strings
            ids.pop()
        return ids


def explain(
    acd: ContrastProcessor,
    settings: dict[str, Any],
    inputs: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    kwargs: dict[str, Any],
) -> list[Explanation]:
    """See [`ACDLogitsProcessor.explain`].

    Args:
        acd: the processor that contrasts.
        settings: its `alpha`, `beta`, `horizon` and `keep_temperature`, of which `alpha` may be a `[B]` tensor.
        inputs: what `generate` takes first.
        tokenizer: the model's.
        num_candidates: how many of the likeliest tokens of each stream to show.
        kwargs: the other arguments of `generate`.
    """
    if isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates must be a whole number of at least 1, got {num_candidates!r}.")
    for name in ("logits_processor", "assistant_model", "custom_generate", "position_ids"):
        if kwargs.get(name) is not None:
            raise ValueError(f"explain() records what its own processor does in an ordinary call: leave out {name}.")
    recording = RecordingProcessor(acd)
    output = acd.model.generate(
        inputs,
        **kwargs | {"return_dict_in_generate": True, "tokenizer": tokenizer},
        logits_processor=[recording],
    )
    record, sequences = recording.record, output.sequences
    answers = [record.answer(sequences, row) for row in range(record.rows)]
    prompts = [record.prompt(sequences, row) for row in range(record.rows)]
    plain = _plain_logits(acd.model, sequences, record)
    tokens = _tokens(record, plain, answers, prompts, num_candidates, _Pieces(tokenizer))
    alpha = settings["alpha"]
    return [
        Explanation(
            prompt=tokenizer.decode(prompts[row]),
            answer=tokenizer.decode(answers[row], skip_special_tokens=True),
            tokens=tuple(tokens[row]),
            **settings | {"alpha": float(alpha[row] if isinstance(alpha, torch.Tensor) else alpha)},
        )
        for row in range(record.rows)
    ]


@torch.no_grad()
def _plain_logits(model: PreTrainedModel, sequences: torch.Tensor, record: Record) -> torch.Tensor:
    """Logits `[B, new, vocab]` of the plain model in front of each new token, from one forward."""
    text, new = sequences[:, :-1], sequences.shape[1] - record.start
    mask = torch.ones_like(text[:, : record.start]) if record.mask is None else record.mask
    mask = torch.nn.functional.pad(mask, (0, new - 1), value=1)
    call = {"input_ids": text, "attention_mask": mask, "use_cache": False}
    if record.cache.streams.takes_positions:
        call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if model._supports_logits_to_keep():
        call["logits_to_keep"] = new
    return model(**call).logits[:, -new:]


@torch.no_grad()
def _tokens(
    record: Record,
    plain: torch.Tensor,
    answers: list[list[int]],
    prompts: list[list[int]],
    num_candidates: int,
    pieces: _Pieces,
) -> list[list[NewToken]]:
    """The new tokens of each row."""
    tokens: list[list[NewToken]] = [[] for _ in answers]
    for step in range(max(map(len, answers))):
        # Behind its end, a row has no token
        chosen = [answer[step] if step < len(answer) else 0 for answer in answers]
        rows = _rows(record, step, plain[:, step], chosen, num_candidates)
        for row, (candidates, kept, cut) in enumerate(rows):
            if step < len(answers[row]):
                before = (answers[row][:step] or prompts[row])[-1:]
                found = _candidates(candidates, before, pieces)
                tokens[row].append(NewToken(chosen[row], pieces(before, chosen[row]), found, kept, cut))
    return tokens


def _rows(record: Record, step: int, plain: torch.Tensor, chosen: list[int], num_candidates: int) -> Iterator[Any]:
    """For each row the candidates of one step, how many tokens were kept, and what the cut ones had in stream S.

    A candidate is (id, whether a stream finds it likely, probability in each stream, whether it is cut).
    """
    safe, adversarial, result = record.safeguarding[step], record.adversarial[step], record.contrasted[step]
    logits = [plain, safe, result] + ([] if adversarial is None else [adversarial])
    probabilities = torch.stack([each.to(safe).softmax(-1) for each in logits], 1)  # [B, streams, vocab]
    tops = probabilities.topk(min(num_candidates, probabilities.shape[-1]))
    ids = torch.cat([torch.tensor(chosen, device=safe.device)[:, None], tops.indices.flatten(1)], 1)
    likely = torch.cat([torch.ones_like(ids[:, :1]), (tops.values > 0).flatten(1)], 1)
    values = probabilities.gather(2, ids[:, None].expand(-1, len(logits), -1)).transpose(1, 2)
    is_cut = result.isneginf() & ~safe.isneginf()
    kept, cut = (~result.isneginf()).sum(-1), (probabilities[:, 1] * is_cut).sum(-1)
    columns = (column.tolist() for column in (ids, likely, values, is_cut.gather(1, ids)))
    candidates = (zip(*row, strict=True) for row in zip(*columns, strict=True))
    return zip(candidates, kept.tolist(), cut.tolist(), strict=True)


def _candidates(rows: Any, before: list[int], pieces: _Pieces) -> tuple[Candidate, ...]:
    """Each candidate of `_rows` once, with its text."""
    found: dict[int, Candidate] = {}
    for token, likely, (plain, safe, acd, *adversarial), is_cut in rows:
        if likely and token not in found:
            change: Change = "cut" if is_cut else "raised" if acd > safe else "lowered" if acd < safe else "same"
            text = pieces(before, token)
            found[token] = Candidate(token, text, plain, safe, adversarial[0] if adversarial else None, acd, change)
    return tuple(sorted(found.values(), key=lambda candidate: (-candidate.acd, -candidate.safeguarding)))


class _Pieces:
    """What a token adds to the text, spaces included, which some tokenizers drop from a token alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, before: list[int], token: int) -> str:
        text, shown = self._decode(*before, token), self._decode(*before)
        return text.removeprefix(shown) if text.startswith(shown) else self._decode(token)

    def _decode(self, *ids: int) -> str:
        if ids not in self._known:
            self._known[ids] = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) if ids else ""
        return self._known[ids]


def _ids(tokens: torch.Tensor | None) -> list[int]:
    return [] if tokens is None else tokens.flatten().tolist()
