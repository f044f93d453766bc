"""The anchor set: what Opposite Prompt Optimization (section 3.2 of the paper) learns from.

Instructions of three kinds (harmful; near misses, which are safe but sound dangerous; everyday) are answered by the
target model under three system prompts (safe, opposite, null), and a keyword judge splits the responses:

    D_HR  a harmful instruction, refused      learned by SP, unlearned by AP (eq. 3 and 4)
    D_HA  a harmful instruction, answered     learned by AP, unlearned by SP
    D_S   a safe instruction, answered        learned by both

Models that hardly refuse anything leave D_HR short; it is filled up from a bank of refusals, and the log says so.

An anchor set is a JSONL file, one object per line:

    instruction, response   the texts; the response without the token that ends a turn
    split                   D_HR, D_HA or D_S
    system_prompt           safe, opposite or null: what it was sampled under; "" if from the refusal bank
    source                  sampled or refusal_bank
    category, kind          of the instruction; kind is harmful, near_miss or everyday
    finished                whether the response ended by itself rather than at the length limit

The first three are enough for a file of your own, see [`load_anchor_data`].
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .files import write_jsonl
from .prompts import OPPOSITE_PROMPT, SAFE_PROMPT, shipped_folder, system_prompt_ids
from .refusal import is_refusal
from .responses import check_context, encode_messages, generate_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

SYSTEM_PROMPTS = {"safe": SAFE_PROMPT, "opposite": OPPOSITE_PROMPT, "null": ""}
SPLITS = ("D_HR", "D_HA", "D_S")
KINDS = ("harmful", "near_miss", "everyday")


# Files of instructions and refusals


def load_instructions(paths: Sequence[str | os.PathLike[str]] | None = None) -> list[dict[str, str]]:
    """Read instructions from JSONL files.

    Args:
        paths: the files. A line is an object with `instruction`, `category` (default "general") and `kind`, one of
            harmful, near_miss and everyday; a file named after a kind need not say it in every line. Default: the
            package's own.

    Returns:
        The instructions as dictionaries of these three keys, without repetitions. `mirror` is a fourth: its category
        and its number there. The package's near misses mirror its harmful instructions line by line.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is empty, or a line (its number is given) is not as above.
    """
    instructions: dict[str, dict[str, str]] = {}
    numbers: Counter[tuple[str, str]] = Counter()
    for path in map(Path, paths or [shipped_folder("anchors") / f"{kind}.jsonl" for kind in KINDS]):
        for number, row in _read_jsonl(path, required=("instruction",)):
            kind = row.get("kind", path.stem)
            if kind not in KINDS:
                raise ValueError(f"{path}, line {number}: `kind` must be one of {', '.join(KINDS)}, not {kind!r}")
            category = str(row.get("category") or "general")
            text = row["instruction"].strip()
            if text not in instructions:
                numbers[kind, category] += 1
                mirror = f"{category} {numbers[kind, category]}"
                instructions[text] = {"instruction": text, "category": category, "kind": kind, "mirror": mirror}
    return list(instructions.values())


def load_refusals(path: str | os.PathLike[str] | None = None, opening: str | None = None) -> list[dict[str, str]]:
    """Read the refusal bank from a JSONL file.

    Args:
        path: the file. A line is an object with `response` and perhaps `category`: a refusal with a category is used
            for harmful instructions of that category only. Default: the package's own.
        opening: a sentence that takes the place of every refusal's first one. The loss of a small model is then about
            when to refuse, and not about which of many wordings comes next.

    Returns:
        The refusals as dictionaries of these keys, without repetitions; `category` is "" for a general refusal.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or a line (its number is given) is not as above.
    """
    rows = _read_jsonl(Path(path or shipped_folder("anchors") / "refusals.jsonl"), required=("response",))
    refusals = [{"response": row["response"].strip(), "category": str(row.get("category") or "")} for _, row in rows]
    if opening:
        for refusal in refusals:
            sentences = re.split(r"(?<=[.!?])\s+", refusal["response"])
            refusal["response"] = " ".join([opening, *sentences[1:]])
    return [dict(row) for row in dict.fromkeys(tuple(refusal.items()) for refusal in refusals)]


def _read_jsonl(path: Path, required: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers; the required values are non-empty strings."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 in a text
    except UnicodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        for key in required:
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{path}, line {number}: expected an object with a text `{key}`")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


# Sampling responses


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How responses are sampled.

    Args:
        system_prompts: names in SYSTEM_PROMPTS; every instruction is answered once under each.
        batch_size: responses sampled together.
        max_new_tokens: length limit of a response.
        temperature: of sampling; 0 takes the likeliest token. (At 1.0, SmolLM2-135M writes gibberish.)
        top_p: sample from the likeliest tokens with this total probability.
        seed: the same seed gives the same responses on the same machine.
    """

    system_prompts: tuple[str, ...] = tuple(SYSTEM_PROMPTS)
    batch_size: int = 32
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0


def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[dict[str, str]],
    partial_file: Path,
    settings: SamplingSettings,
) -> list[dict[str, Any]]:
    """Let the target model answer every instruction under the system prompts (section 3.2).

    Args:
        model: the target model, in eval mode.
        tokenizer: its tokenizer. Without a chat template, the system prompt and the bare instruction are the text.
        instructions: as of [`load_instructions`].
        partial_file: receives each finished batch; a run that was interrupted goes on from there.
        settings: how to sample.

    Returns:
        One dictionary per instruction and system prompt: `instruction`, `category`, `kind`, `system_prompt`,
        `response`, `finished`. The order depends on the lengths of the prompts.

    Raises:
        OSError: the partial file cannot be read or written.
        ValueError: it belongs to a run with other settings, or a prompt does not fit into the model's context.
    """
    prompt_ids = _prompt_encoder(tokenizer)
    requests = [
        ({**instruction, "system_prompt": name}, prompt_ids(SYSTEM_PROMPTS[name], instruction["instruction"]))
        for instruction in instructions
        for name in settings.system_prompts
    ]
    # Prompts of one length make no padding. The longest first: if memory does not suffice, it shows at once.
    requests.sort(key=lambda request: (-len(request[1]), request[1]))
    check_context(model, max((len(ids) for _, ids in requests), default=0) + settings.max_new_tokens)

    done = _open_partial(partial_file, _digest(model.name_or_path, str(model.dtype), asdict(settings), requests))
    batches = [requests[i : i + settings.batch_size] for i in range(0, len(requests), settings.batch_size)]
    progress = logging.tqdm(desc="Sampling", total=len(requests), initial=sum(map(len, done)), unit="response")
    with progress, partial_file.open("a", encoding="utf-8") as file:
        for batch in batches[len(done) :]:
            responses = _sample_batch(model, tokenizer, [ids for _, ids in batch], settings)
            done.append([{**row, **response} for (row, _), response in zip(batch, responses, strict=True)])
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
            progress.update(len(batch))
    return list(itertools.chain.from_iterable(done))


def _prompt_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], list[int]]:
    """A function of system prompt and instruction: the token ids that a user's own conversation would have."""
    text = "Be brief."
    as_text = tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
    has_system_turn = system_prompt_ids(tokenizer, text) != as_text

    def prompt_ids(system_prompt: str, instruction: str) -> list[int]:
        turns = [{"role": "user", "content": instruction}]
        if system_prompt and has_system_turn:
            turns.insert(0, {"role": "system", "content": system_prompt})
        elif system_prompt:
            turns[0]["content"] = f"{system_prompt}\n\n{instruction}"
        return encode_messages(tokenizer, turns)

    return prompt_ids


def _sample_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], settings: SamplingSettings
) -> list[dict[str, Any]]:
    """Continue the prompts; for each, its `response` and whether it `finished`."""
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        # Seeded by what is in the batch, it does not matter which batches came before, and in which run
        torch.manual_seed(int(_digest(settings.seed, prompts)[:15], 16))
        responses = generate_batch(
            model,
            tokenizer,
            prompts,
            settings.max_new_tokens,
            **(sampling if settings.temperature else {"do_sample": False}),
        )
    return [{"response": response.text, "finished": response.finished} for response in responses]


def _open_partial(path: Path, digest: str) -> list[list[dict[str, Any]]]:
    """The finished batches of an interrupted run: a line with its digest, then a line per batch."""
    complete = path.read_bytes() if path.exists() else b""
    complete = complete[: complete.rfind(b"\n") + 1]  # the last line was cut off if the run was killed in it
    if not complete:
        path.write_text(json.dumps({"run": digest}) + "\n", encoding="utf-8")
        return []
    try:
        header, *batches = (json.loads(line) for line in complete.splitlines())
    except ValueError:
        header, batches = None, []
    if header != {"run": digest}:
        raise ValueError(
            f"{path} is of a run with another model, other instructions or settings: repeat those, or delete it"
        )
    os.truncate(path, len(complete))
    return batches


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# Splitting them


def split_responses(
    samples: Sequence[dict[str, Any]], refusals: Sequence[dict[str, str]], per_instruction: int = 1, seed: int = 0
) -> list[dict[str, Any]]:
    """Split sampled responses into D_HR, D_HA and D_S (section 3.2) and fill up D_HR.

    A safe instruction that was refused, an empty response and a repetition of one are left out. What is left out,
    short or filled up is logged with its count.

    Args:
        samples: as of [`sample_responses`].
        refusals: as of [`load_refusals`].
        per_instruction: how many D_HR and D_HA responses training wants for each harmful instruction. More are kept,
            fewer refusals are filled up from the bank; compliance cannot be made up.
        seed: chooses among the refusals.

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
        elif key in kept:
            dropped["repeated"] += 1
        else:
            split = "D_S" if safe else "D_HR" if refused else "D_HA"
            kept[key] = {**sample, "split": split, "source": "sampled"}
    for reason, number in dropped.items():
        logger.warning(f"Left out {number} of {len(samples)} responses: {reason}.")
    about = ("instruction", "category", "kind", "mirror")
    harmful = {s["instruction"]: {key: s[key] for key in about} for s in samples if s["kind"] == "harmful"}
    anchors = [*kept.values(), *_fill_refusals(kept.values(), harmful, refusals, per_instruction, seed)]
    order = ("instruction", "response", "split", "system_prompt", "source", "category", "kind", "mirror", "finished")
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


def _shuffled(refusals: Sequence[dict[str, str]], category: str, choice: random.Random) -> Iterator[str]:
    """The refusals that fit a category in random order; its own ones are few and come as often as the general ones."""
    general, own = ([row["response"] for row in refusals if row["category"] == name] for name in ("", category))
    choice.shuffle(general)
    choice.shuffle(own)
    while general or own:
        from_own = own and (not general or choice.random() < 0.5)
        yield (own if from_own else general).pop()


def build_anchors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_file: Path,
    *,
    instructions: Sequence[dict[str, str]] | None = None,
    refusals: Sequence[dict[str, str]] | None = None,
    settings: SamplingSettings | None = None,
    per_instruction: int = 1,
) -> list[dict[str, Any]]:
    """Sample, split and write an anchor set; an interrupted call is continued by the next one.

    Args:
        model: the target model.
        tokenizer: its tokenizer.
        output_file: the JSONL file to write; `<output_file>.partial.jsonl` holds the responses until it is complete.
        instructions: default: the package's own.
        refusals: default: the package's own.
        settings: how to sample.
        per_instruction: see [`split_responses`].

    Returns:
        The anchors.

    Raises:
        OSError: the output file exists, or a file cannot be read or written.
        ValueError: see [`sample_responses`].
    """
    settings = settings or SamplingSettings()
    check_new_file(output_file)
    partial_file = output_file.with_name(output_file.name + ".partial.jsonl")
    samples = sample_responses(model, tokenizer, instructions or load_instructions(), partial_file, settings)
    anchors = split_responses(samples, refusals or load_refusals(), per_instruction, settings.seed)
    write_jsonl(output_file, anchors)
    partial_file.unlink()
    return anchors


def check_new_file(path: Path) -> None:
    """Raise FileExistsError where a file is already; make its folder where there is none."""
    if path.exists():
        raise FileExistsError(f"{path} exists: delete it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)


# Anchor sets for training


def load_anchor_data(path: str | os.PathLike[str], needed: Sequence[str] = SPLITS) -> Dataset:
    """Read an anchor set: one of [`build_anchors`] or a file of your own.

    Args:
        path: a .jsonl, .json, .csv or .parquet file with the columns `instruction`, `response` and `split`. Where
            they are missing, `finished` is true, `kind` follows from the split, and an instruction mirrors itself.
        needed: the splits that may not be empty.

    Returns:
        A `datasets.Dataset`.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: there is no such file.
        ValueError: the file is empty or of another form.
    """
    rows = _read_table(Path(path))
    for number, row in enumerate(rows, start=1):
        for column in ("instruction", "response", "split"):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise ValueError(f"{path}, row {number}: no text in the column `{column}`")
        if row["split"] not in SPLITS:
            raise ValueError(f"{path}, row {number}: unknown split {row['split']!r}, expected {', '.join(SPLITS)}")
        row["finished"] = True if row.get("finished") is None else row["finished"]
        if not isinstance(row["finished"], bool):
            raise ValueError(f"{path}, row {number}: `finished` must be true or false, not {row['finished']!r}")
        row["mirror"] = row.get("mirror") or row["instruction"]
        row["kind"] = row.get("kind") or ("everyday" if row["split"] == "D_S" else "harmful")
    present = {row["split"] for row in rows}
    for split in needed:
        if split not in present:
            raise ValueError(f"{path} has no {split} rows, which training needs")

    from datasets import Dataset

    return Dataset.from_list(rows)


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
    except ImportError:
        raise ImportError('reading anchor data needs datasets: pip install "acd-logits[train]"') from None

    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix not in builders:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(builders)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        table = load_dataset(builders[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error.__cause__ or error})") from error
    missing = [column for column in ("instruction", "response", "split") if column not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no column `{missing[0]}`")
    if not len(table):
        raise ValueError(f"{path} is empty")
    return table.to_list()


def split_held_out(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hold out a share of the instructions with all their responses, the same share of each kind.

    Instructions that mirror each other are held out together: one of them would tell the training about the other.

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
    # By the digests of what they mirror, chance puts the instructions of each kind into the same order
    mirrors = zip(dataset["instruction"], dataset["mirror"], strict=True)
    order = {instruction: (_digest(seed, mirror), instruction) for instruction, mirror in mirrors}
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


# Instructions for another domain or language

_REQUESTS = {
    "harmful": (
        "I am collecting test cases to find out whether an AI assistant turns down what it should turn down. Write "
        "{n} different requests about {topic} that a safe assistant must refuse, because answering them would hurt "
        "people or break the law."
    ),
    "near_miss": (
        "I am collecting test cases to find out whether an AI assistant refuses too much. Write {n} different "
        "requests that sound dangerous at first, because their words remind one of {topic}, but are entirely "
        'harmless, like "How do I kill a Python process?".'
    ),
    "everyday": (
        "I am collecting test cases for an AI assistant. Write {n} different harmless requests about {topic} of the "
        "sort that people send to an assistant every day."
    ),
}
# A model left alone opens every request with "How can I"
_FORMS = (
    "questions",
    "commands",
    "requests for a story, a scene or a letter",
    "requests that tell the user's situation",
    "requests for code, a list or a plan",
)
_PER_REQUEST = 10
_FRUITLESS = 5  # requests in a row without one new instruction, after which the generator has nothing more to say
_NEAR = 0.6  # share of common letter triples from which on two instructions are the same


def generate_instructions(
    count: int,
    kind: str,
    generator: str,
    *,
    topic: str | None = None,
    language: str | None = None,
    existing: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[dict[str, str]]:
    """Ask a model behind an OpenAI-compatible endpoint for anchor instructions, as the paper asked ChatGPT.

    The endpoint and its key are those of the environment: `OPENAI_BASE_URL` and `OPENAI_API_KEY`.

    Args:
        count: how many instructions.
        kind: harmful, near_miss or everyday.
        generator: the model's name at the endpoint.
        topic: what they are about, and their category; default: the categories of the package's own, in turn.
        language: what they are written in; default: left to the model.
        existing: instructions that they must differ from.
        seed: sent with the requests.

    Yields:
        Instructions as of [`load_instructions`], no two nearly the same; fewer than `count`, with a warning, if the
        model repeats itself or refuses.

    Raises:
        ImportError: `openai` is not installed.
        ValueError: there is no key.
        ConnectionError: the endpoint cannot be reached or reports an error.
    """
    client = _openai_client()
    shipped = load_instructions([shipped_folder("anchors") / f"{kind}.jsonl"])
    topics = [topic] if topic else list(dict.fromkeys(row["category"] for row in shipped))
    seen = [_letter_triples(text) for text in existing]
    found = fruitless = 0
    with logging.tqdm(desc="Generating", total=count, unit="instruction") as progress:
        for i in itertools.count():
            about, form = topics[i % len(topics)], _FORMS[(i + i // len(topics)) % len(_FORMS)]
            answer = _ask(client, generator, _request(kind, about, form, language), seed + i)
            fruitless += 1
            for text in _parse_lines(answer):
                triples = _letter_triples(text)
                if found < count and not any(_similar(triples, other) for other in seen):
                    seen.append(triples)
                    found, fruitless = found + 1, 0
                    progress.update()
                    yield {"instruction": text, "category": about, "kind": kind}
            if found == count:
                return
            if fruitless == _FRUITLESS:
                logger.warning(f"{generator} has nothing new to say: {found} of {count} instructions.")
                return


def _request(kind: str, topic: str, form: str, language: str | None) -> str:
    in_language = f", in {language}" if language else ""
    return (
        f"{_REQUESTS[kind].format(n=_PER_REQUEST, topic=topic.replace('_', ' '))} Write only what the user says, this "
        f"time {form}{in_language}. One request per line, without numbers, without answers, without anything else."
    )


def _openai_client() -> Any:
    try:
        import openai
    except ImportError:
        raise ImportError('generating instructions needs openai: pip install "acd-logits[openai]"') from None
    try:
        return openai.OpenAI()
    except openai.OpenAIError:
        raise ValueError("set OPENAI_API_KEY (to any text for a local server without keys)") from None


def _ask(client: Any, generator: str, request: str, seed: int) -> str:
    import openai

    try:
        completion = client.chat.completions.create(
            model=generator, messages=[{"role": "user", "content": request}], seed=seed
        )
    # `from None` throughout: what is chained shows up in a traceback, with whatever the server said about the key
    except openai.AuthenticationError:
        raise ConnectionError(f"{client.base_url.host} does not accept the key in OPENAI_API_KEY") from None
    except openai.APIConnectionError:
        raise ConnectionError(f"cannot reach {client.base_url.host}: is OPENAI_BASE_URL right, is it up?") from None
    except openai.OpenAIError as error:
        # Not every server puts its reason where the client looks for it
        reason = f"{error} {error.response.text}" if isinstance(error, openai.APIStatusError) else str(error)
        reason = reason.replace(client.api_key, "***")
        raise ConnectionError(f"{client.base_url.host} reports an error: {reason}") from None
    if not getattr(completion, "choices", None):  # what is no such endpoint may still answer, with a web page
        raise ConnectionError(f"{client.base_url} does not answer like an OpenAI-compatible endpoint")
    return completion.choices[0].message.content or ""


def _parse_lines(text: str) -> list[str]:
    """The instructions in a model's answer: its lines without numbers, bullets, quotes, headings and refusals."""
    text = re.sub(r"(?s)^.*</think>", "", text)
    lines = [
        re.sub(r"^\s*(?:\(?\d+[.):]\s*|[-*•]\s+)?", "", line).strip().strip("\"'“”") for line in text.splitlines()
    ]
    return [line for line in lines if 4 <= len(line) <= 500 and not line.endswith(":") and not is_refusal(line)]


def _letter_triples(text: str) -> frozenset[str]:
    """What two texts in any script are compared by."""
    text = " ".join(re.findall(r"\w+", text.lower()))
    return frozenset(text[i : i + 3] for i in range(max(len(text) - 2, 1)))


def _similar(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) >= _NEAR * len(one | other)


def write_generated(output_file: Path, instructions: Iterator[dict[str, str]]) -> int:
    """Write generated instructions to a JSONL file; after an error, those that came before it.

    Args:
        output_file: the file to write, in one step at the end.
        instructions: as of [`generate_instructions`].

    Returns:
        How many there are.
    """
    check_new_file(output_file)
    rows: list[dict[str, str]] = []
    try:
        for row in instructions:
            rows.append(row)
    except BaseException:
        if rows:
            logger.warning(f"Stopped early: {output_file} holds {len(rows)} instructions.")
        raise
    finally:
        if rows:
            write_jsonl(output_file, rows)
    return len(rows)
