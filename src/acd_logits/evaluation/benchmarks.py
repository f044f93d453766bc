"""The requests of a comparison: the known benchmarks by short name, and files of your own.

A request is harmful (refusing it is right) or safe (refusing it is over-refusal). Some benchmarks hold both kinds,
such as XSTest with its 250 safe and 200 unsafe prompts. Files are CSV, JSON, JSONL or TXT, told apart by their
endings; a line of a TXT file, or a string in a JSON list, is a request by itself, and everything else has a named
column.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import shipped_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Label = Literal["harmful", "safe"]
ENDINGS = (".csv", ".json", ".jsonl", ".txt")
COLUMNS = ("prompt", "instruction", "request", "question", "query", "goal", "text")  # where none is named
_TIMEOUT = 60


@dataclass(frozen=True)
class Request:
    """A request, and what is known of it.

    Args:
        text: what is asked.
        label: whether refusing it is right.
        category: what it is about.
        answer: of a problem, a number or a short text.
        choices: a better and a worse answer, of which a model should find the first one likelier. Such a request is
            scored, and not answered.
    """

    text: str
    label: Label
    category: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Benchmark:
    """Requests under one name."""

    name: str
    title: str
    requests: tuple[Request, ...]

    @property
    def digest(self) -> str:
        """Tells whether two runs asked the same."""
        asked = [[r.text, r.label, *filter(None, (r.answer, r.choices))] for r in self.requests]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Where requests come from.

    Args:
        location: a Hub dataset's id, a file of one (`hf://datasets/org/name/file`), a URL, or a local file.
        column: the column of the requests.
        label: their kind, or a function of a row.
        split: of a Hub dataset.
        config: of a Hub dataset.
        category: the column of the categories.
        answer: the column of a problem's answer.
        choices: the columns of a better and a worse answer.
    """

    location: str
    column: str | None
    label: Label | Callable[[dict[str, Any]], Label]
    split: str = "train"
    config: str | None = None
    category: str | None = None
    answer: str | None = None
    choices: tuple[str, str] | None = None


def _xstest_label(row: dict[str, Any]) -> Label:
    if "type" not in row:
        raise ValueError('XSTest tells its safe and unsafe prompts apart by a column "type", which is missing')
    return "harmful" if str(row["type"]).startswith("contrast_") else "safe"


def _shipped(kind: str) -> str:
    return str(shipped_folder("evaluation") / f"{kind}.jsonl")


# Name: title, sources. Those of walledai ask for your consent on the Hub before they can be loaded
_DANGEROUS_QA = (
    "https://raw.githubusercontent.com/SALT-NLP/chain-of-thought-bias/main/data/dangerous-q/toxic_outs.json"
)
_TRUTHFUL_QA = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
KNOWN: dict[str, tuple[str, tuple[Source, ...]]] = {
    "starter": (
        "Starter",
        (
            Source(_shipped("harmful"), "instruction", "harmful"),
            Source(_shipped("near_miss"), "instruction", "safe"),
        ),
    ),
    "advbench": ("AdvBench", (Source("walledai/AdvBench", "prompt", "harmful"),)),
    "malicious_instruct": ("MaliciousInstruct", (Source("walledai/MaliciousInstruct", "prompt", "harmful"),)),
    "harmful_qa": ("HarmfulQA", (Source("declare-lab/HarmfulQA", "question", "harmful"),)),
    "dangerous_qa": ("DangerousQA", (Source(_DANGEROUS_QA, None, "harmful"),)),
    "beavertails": (
        "BeaverTails-Evaluation",
        (Source("PKU-Alignment/BeaverTails-Evaluation", "prompt", "harmful", split="test"),),
    ),
    "xstest": ("XSTest", (Source("Paul/XSTest", "prompt", _xstest_label),)),
    "jbb_behaviors": (
        "JBB-Behaviors",
        (
            Source("JailbreakBench/JBB-Behaviors", "Goal", "harmful", split="harmful", config="behaviors"),
            Source("JailbreakBench/JBB-Behaviors", "Goal", "safe", split="benign", config="behaviors"),
        ),
    ),
    "strongreject": ("StrongREJECT", (Source("walledai/StrongREJECT", "prompt", "harmful"),)),
    "harmbench": ("HarmBench", (Source("walledai/HarmBench", "prompt", "harmful", config="standard"),)),
    "alpaca_eval": (
        "AlpacaEval",
        # The repository brings a loading script, which `datasets` no longer runs
        (Source("hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json", "instruction", "safe"),),
    ),
    "edge_domains": (
        "Edge domains",
        (Source(_shipped("edge_domains"), "instruction", "safe", category="category"),),
    ),
    "problems": (
        "Problems",
        (Source(_shipped("problems"), "problem", "safe", category="level", answer="answer"),),
    ),
    "truthfulqa": ("TruthfulQA", (Source(_TRUTHFUL_QA, "Question", "safe"),)),
    "truthfulqa_choice": (
        "TruthfulQA, best answer against best incorrect one",
        (Source(_TRUTHFUL_QA, "Question", "safe", choices=("Best Answer", "Best Incorrect Answer")),),
    ),
}


def load_benchmark(spec: str, label: Label | None = None, limit: int | None = None, seed: int = 0) -> Benchmark:
    """Load the requests that a user's few words mean.

    Args:
        spec: a known benchmark's name, or `NAME=FILE` for a local copy of one, or, with `label`, a FILE or a Hub
            dataset's id. `:COLUMN` behind a file or an id names the column of the requests, if it is not one of
            `COLUMNS`.
        label: the kind of the requests in a file or dataset of the user's own.
        limit: keep this many requests of each kind, drawn at random, in their order.
        seed: of the draw.

    Returns:
        The benchmark. A request that occurs twice is kept once.

    Raises:
        ImportError: a Hub dataset needs the extra.
        OSError: a file or dataset cannot be read.
        ValueError: there is no such benchmark or column, or no request in it.
    """
    name, title, sources = _parse(spec, label)
    requests: dict[str, Request] = {}
    for source in sources:
        for request in _load_source(source):
            requests.setdefault(request.text, request)
    return Benchmark(name, title, tuple(_draw(list(requests.values()), limit, seed)))


def hub_dataset(name: str) -> str | None:
    """The Hub dataset that a known benchmark comes from; `None` for any other."""
    _, sources = KNOWN.get(name, ("", ()))
    location = sources[0].location.removeprefix("hf://datasets/") if sources else ""
    id = re.match(r"[\w.-]+/[\w.-]+(?=$|/)", location)
    return id[0] if id else None


def _parse(spec: str, label: Label | None) -> tuple[str, str, tuple[Source, ...]]:
    if label is not None:
        location, column = _split_column(spec)
        name = Path(location).stem if _is_file(location) else location
        return name, name, (Source(location, column, label),)
    name, _, location = spec.partition("=")
    if name not in KNOWN:
        raise ValueError(
            f"there is no benchmark {name!r}: choose from {', '.join(KNOWN)}, or pass a file of your own as harmful "
            "or safe requests"
        )
    title, sources = KNOWN[name]
    if location:
        if len(sources) > 1:
            raise ValueError(f"{title} has {len(sources)} parts: pass local copies as harmful and as safe requests")
        location, column = _split_column(location)
        sources = (replace(sources[0], location=location, column=column or sources[0].column),)
    return name, title, sources


def _split_column(location: str) -> tuple[str, str | None]:
    head, colon, column = location.rpartition(":")
    # A path may hold colons itself
    return (head, column) if colon and "/" not in column and not Path(location).exists() else (location, None)


def _is_file(location: str) -> bool:
    return location.lower().endswith(ENDINGS)


def _load_source(source: Source) -> list[Request]:
    if source.location.startswith(("https://", "http://")):
        rows: Iterable[Any] = _parse_rows(_download(source.location), source.location)
    elif source.location.startswith("hf://datasets/"):
        rows = _parse_rows(_hub_file(source.location), source.location)
    elif _is_file(source.location) or Path(source.location).exists():
        rows = _read_file(Path(source.location))
    else:
        rows = _hub_dataset(source)
    requests = [_request(row, source, number) for number, row in enumerate(rows, start=1)]
    if not requests:
        raise ValueError(f"{source.location} holds no request")
    return requests


def _request(row: Any, source: Source, number: int) -> Request:
    if isinstance(row, str):
        row = {source.column or "text": row}
    if not isinstance(row, dict):
        raise ValueError(f"{source.location}, entry {number}: expected an object or a text, not {row!r:.40}")
    column = source.column or next((name for name in COLUMNS if name in row), None)
    if column is None or column not in row:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(COLUMNS)}"
        raise ValueError(f"{source.location} has {wanted}: name one of {', '.join(map(str, row))} as FILE:COLUMN")
    turns = row[column]
    text = _text(turns[0] if isinstance(turns, list) and turns else turns, source, number, column)
    label = source.label if isinstance(source.label, str) else source.label(row)
    category, answer = (
        _text(row.get(name), source, number, name) if name else None for name in (source.category, source.answer)
    )
    choices = source.choices and tuple(_text(row.get(name), source, number, name) for name in source.choices)
    return Request(text, label, category, answer, choices)


def _text(value: Any, source: Source, number: int, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{source.location}, entry {number}: the column {column!r} holds no text")
    return value.strip()


def _read_file(path: Path) -> list[Any]:
    if not _is_file(str(path)):
        raise ValueError(f"{path} must end in one of {', '.join(ENDINGS)}")
    return _parse_rows(path.read_bytes(), str(path))


def _parse_rows(content: bytes, name: str) -> list[Any]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{name} is not a text file in UTF-8 ({error})") from None
    ending = Path(name).suffix.lower()
    if ending == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if ending == ".json":
        rows = _json(text, name) if text.strip() else []
        if not isinstance(rows, list):
            raise ValueError(f"{name} must hold a JSON list")
        return rows
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if ending == ".jsonl":
        return [_json(line, f"{name}, line {number}") for number, line in lines]
    return [line for _, line in lines]


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None


def _download(url: str) -> bytes:
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            content: bytes = response.read()
            return content
    except OSError as error:
        raise OSError(f"{url} could not be downloaded ({error}): pass a local copy as NAME=FILE") from None


def _hub_file(location: str) -> bytes:
    from huggingface_hub import hf_hub_download

    organisation, name, file = location.removeprefix("hf://datasets/").split("/", 2)
    try:
        return Path(hf_hub_download(f"{organisation}/{name}", file, repo_type="dataset")).read_bytes()
    except OSError as error:
        raise OSError(_unreachable(location, error)) from None


def _hub_dataset(source: Source) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise ImportError('Hub datasets need the datasets package: pip install "acd-logits[eval]"') from None
    try:
        return datasets.load_dataset(source.location, source.config, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise OSError(_unreachable(source.location, error)) from None


def _unreachable(location: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{location} is not a file here and could not be loaded from the Hub ({reason}): check the name, the "
        "connection and whether the dataset asks for your consent, or pass a local copy as NAME=FILE"
    )


def _draw(requests: Sequence[Request], limit: int | None, seed: int) -> list[Request]:
    """At most `limit` requests of each label, in their order."""
    if limit is None:
        return list(requests)
    kept: set[int] = set()
    for label in ("harmful", "safe"):
        places = [i for i, request in enumerate(requests) if request.label == label]
        kept.update(random.Random(seed).sample(places, min(limit, len(places))))
    return [request for i, request in enumerate(requests) if i in kept]
