"""What `acd_config.json` says about a pair, checked field by field."""

from __future__ import annotations

import dataclasses
import json
import numbers
import reprlib
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import read_json
from ..ranges import check_alpha, check_beta

if TYPE_CHECKING:
    from pathlib import Path

# The layout of each kind of prompts. A package from before key-value prompts reads 1, and refuses 2
FORMAT_VERSIONS = {"embedding": 1, "key_value": 2}
CONFIG_NAME = "acd_config.json"
# What a model and the prompts made for it have in common, as an error names it
SIZES = {
    "hidden_size": "hidden size {}",
    "vocab_size": "a vocabulary of {}",
    "num_layers": "{} layers",
    "num_key_value_heads": "{} key-value heads",
    "head_dim": "heads of size {}",
}
KEY_VALUE_SIZES = ("num_layers", "num_key_value_heads", "head_dim")
# What a field of the config takes, by its annotation
_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "text"),
    "dict[str, Any]": (dict, "a dict"),
}


@dataclasses.dataclass(kw_only=True)
class PairConfig:
    """What `acd_config.json` says about a pair.

    Args:
        format_version: version of this layout; follows from `prompt_type`.
        acd_logits_version: version of this package that wrote the pair.
        base_model_name_or_path: the model the pair belongs to.
        base_model_revision: its revision, if one was pinned.
        prompt_type: "embedding" or "key_value", as [`PromptPair`] tells them apart.
        hidden_size: width of the model's embeddings.
        vocab_size: size of the model's vocabulary.
        num_layers: layers of the model; of key-value prompts only, as the next two.
        num_key_value_heads: key-value heads of a layer.
        head_dim: size of a head.
        alpha: strength of the contrast (eq. 5) chosen by measurement.
        beta: plausibility threshold chosen by measurement.
        chat_template_sha256: hash of the chat template seen in training.
        share_instruction_kv: whether the instruction did not see the soft prompt in training (see `shared.py`); always
            so for key-value prompts. Default: only for them.
        training: settings the pair was trained with.
        results: measured results, with sample sizes; `model_card` says in which form it shows them.

    `training` and `results` are kept as JSON gives them back: tuples as lists, NaN and infinity as `None`.

    Raises:
        ValueError: for a value of another type, or out of its range.
    """

    format_version: int | None = None
    acd_logits_version: str = __version__
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    prompt_type: str = "embedding"
    hidden_size: int | None = None
    vocab_size: int | None = None
    num_layers: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    alpha: float = 0.5
    beta: float = 0.1
    chat_template_sha256: str | None = None
    share_instruction_kv: bool | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _checked_field(field.name, str(field.type), getattr(self, field.name)))
        self._check_kind()
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.alpha, self.beta = float(check_alpha(self.alpha)), check_beta(self.beta)
        for name in ("harmless_rate", "over_refusal"):
            _check_rows(name, self.results.get(name))

    def _check_kind(self) -> None:
        """Check, or fill in, what follows from the kind of prompts."""
        if self.prompt_type not in FORMAT_VERSIONS:
            kinds = " or ".join(map(repr, FORMAT_VERSIONS))
            raise ValueError(f"prompt_type must be {kinds}, got {reprlib.repr(self.prompt_type)}.")
        version, key_value = FORMAT_VERSIONS[self.prompt_type], self.prompt_type == "key_value"
        if self.format_version not in (None, version):
            raise ValueError(
                f"format_version must be {version}, got {self.format_version}, for prompt_type {self.prompt_type!r}."
            )
        if key_value and self.share_instruction_kv is False:
            raise ValueError(
                "share_instruction_kv must be true for key-value prompts, which are made for a shared instruction."
            )
        for name in KEY_VALUE_SIZES:
            if not key_value and getattr(self, name) is not None:
                raise ValueError(f"{name} must be null for embedding prompts: it is a size of key-value prompts.")
        self.format_version = version
        if self.share_instruction_kv is None:
            self.share_instruction_kv = key_value

    def as_json(self) -> dict[str, Any]:
        """What `acd_config.json` holds; for embedding prompts nothing that an older package does not know."""
        later = () if self.prompt_type == "key_value" else ("prompt_type", *KEY_VALUE_SIZES)
        return {name: value for name, value in vars(self).items() if name not in later}

    @classmethod
    def from_json_file(cls, path: Path) -> PairConfig:
        """Read `acd_config.json`; raise ValueError for what this version cannot read."""
        values = read_json(path)
        readable = list(FORMAT_VERSIONS.values())
        if not isinstance(values, dict) or values.get("format_version") not in readable:
            version = values.get("format_version") if isinstance(values, dict) else None
            raise ValueError(
                f"{path} has format_version {version!r}, this acd-logits ({__version__}) reads "
                f"{' and '.join(map(str, readable))}: "
                "install the version that wrote it."
            )
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path} has an unknown key {unknown[0]!r}: correct it or upgrade acd-logits.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _checked_field(name: str, annotation: str, value: Any) -> Any:
    """A field of the config, in the form that JSON gives back."""
    kind, optional = annotation.removesuffix(" | None"), annotation.endswith(" | None")
    if value is None and optional:
        return None
    accepted, wanted = _KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        got = "null" if value is None else " ".join(reprlib.repr(value).split())
        raise ValueError(f"{name} must be {wanted}{' or null' if optional else ''}, got {got}.")
    if kind in ("bool", "int"):
        return value
    try:
        if kind == "float":
            return float(value)
        text = json.dumps(value, indent=2, ensure_ascii=False)
        text.encode()  # lone surrogates cannot be
        return json.loads(text, parse_constant=lambda _: None)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must hold what JSON can hold (texts, numbers, lists, dicts): {error}.") from None


def _check_rows(name: str, rows: Any) -> None:
    """Check one of the lists of measured results that a model card shows."""
    if not isinstance(rows or [], list):
        raise ValueError(f"results must hold a list of rows under {name!r}, got {reprlib.repr(rows)}.")
    for row in rows or []:
        if not isinstance(row, dict):
            raise ValueError(f"a row of the pair's measured results must be a dict, got {reprlib.repr(row)}.")
        missing = {"benchmark", "method", "rate", "n"} - set(row)
        if missing:
            raise ValueError(f"a row of the pair's measured results has no {sorted(missing)[0]!r}: {row}.")
        interval = row.get("interval") or []
        shares: list[Any] = [row["rate"], *interval] if isinstance(interval, list) else [None]
        if not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares):
            raise ValueError(
                f"a row of the pair's measured results must have a rate, and an interval of rates, from 0 to 1: {row}."
            )
