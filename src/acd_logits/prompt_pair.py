"""The prompt pair: the two soft prompts of ACD, in memory, on disk and on the Hub.

A saved pair is a folder (or a Hub repository):

    acd_config.json                                          `PairConfig` below
    safeguarding/adapter_config.json, adapter_model.safetensors   SP, a stock peft prompt-tuning adapter
    adversarial/adapter_config.json, adapter_model.safetensors    AP, likewise
    README.md                                                the model card

Weights are read from safetensors only, since loading a pickle runs the code in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import numbers
import os
import reprlib
import shutil
import tempfile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this version uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel, PromptTuningConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from . import __version__
from .model_card import CARD_NAME, generate_card, own_card
from .prompts import OPPOSITE_PROMPT, SAFE_PROMPT, system_prompt_ids
from .ranges import check_alpha, check_beta

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
CONFIG_NAME = "acd_config.json"
STREAMS = ("safeguarding", "adversarial")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHT = "prompt_embeddings"  # peft's name for the tensor of a prompt-tuning adapter
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch stores float8 but cannot compute in it
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
        format_version: version of this layout.
        acd_logits_version: version of this package that wrote the pair.
        base_model_name_or_path: the model the pair belongs to.
        base_model_revision: its revision, if one was pinned.
        hidden_size: width of the model's embeddings.
        vocab_size: size of the model's vocabulary.
        alpha: strength of the contrast (eq. 5) chosen by measurement.
        beta: plausibility threshold chosen by measurement.
        chat_template_sha256: hash of the chat template seen in training.
        share_instruction_kv: whether the instruction did not see the soft prompt in training (see `shared.py`).
        training: settings the pair was trained with.
        results: measured results, with sample sizes; `model_card` says in which form it shows them.

    `training` and `results` are kept as JSON gives them back: tuples as lists, NaN and infinity as `None`.

    Raises:
        ValueError: for a value of another type, or out of its range.
    """

    format_version: int = FORMAT_VERSION
    acd_logits_version: str = __version__
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    alpha: float = 0.5
    beta: float = 0.1
    chat_template_sha256: str | None = None
    share_instruction_kv: bool = False
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _checked_field(field.name, str(field.type), getattr(self, field.name)))
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {self.format_version}.")
        for name in ("hidden_size", "vocab_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.alpha, self.beta = float(check_alpha(self.alpha)), check_beta(self.beta)
        for name in ("harmless_rate", "over_refusal"):
            _check_rows(name, self.results.get(name))

    @classmethod
    def from_json_file(cls, path: Path) -> PairConfig:
        """Read `acd_config.json`; raise ValueError for what this version cannot read."""
        values = _read_json(path)
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            version = values.get("format_version") if isinstance(values, dict) else None
            raise ValueError(
                f"{path} has format_version {version!r}, this acd-logits ({__version__}) reads {FORMAT_VERSION}: "
                "install the version that wrote it."
            )
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path} has an unknown key {unknown[0]!r}: correct it or upgrade acd-logits.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


class PromptPair:
    """The Safeguarding Prompt (SP) and the Adversarial Prompt (AP) of one model.

    Args:
        safeguarding: SP, `[n_s, hidden_size]`, in the space of the embedding layer's output (eq. 2). An empty one
            (n_s = 0) is the null prompt.
        adversarial: AP, `[n_a, hidden_size]`, likewise; n_a may differ from n_s.
        config: what is known about the pair; `hidden_size` is filled in.

    Raises:
        ValueError: if a prompt is not a finite `[n, hidden_size]` tensor of float16, bfloat16, float32 or float64, or
            the two differ in hidden size.
    """

    def __init__(
        self, safeguarding: torch.Tensor, adversarial: torch.Tensor, config: PairConfig | None = None
    ) -> None:
        self.safeguarding = _checked("safeguarding", safeguarding)
        self.adversarial = _checked("adversarial", adversarial)
        hidden_size = self.safeguarding.shape[1]
        if self.adversarial.shape[1] != hidden_size:
            raise ValueError(
                f"the safeguarding prompt has hidden size {hidden_size}, the adversarial one "
                f"{self.adversarial.shape[1]}: both must come from the same model."
            )
        config = PairConfig() if config is None else config
        if not isinstance(config, PairConfig):
            raise ValueError(f"config must be a PairConfig, got {type(config).__name__}.")
        if config.hidden_size not in (None, hidden_size):
            raise ValueError(f"{CONFIG_NAME} says hidden_size {config.hidden_size}, the prompts have {hidden_size}.")
        self.config = dataclasses.replace(config, hidden_size=hidden_size)

    def __repr__(self) -> str:
        return (
            f"PromptPair(safeguarding={list(self.safeguarding.shape)}, adversarial={list(self.adversarial.shape)}, "
            f"alpha={self.alpha}, beta={self.beta}, base_model={self.config.base_model_name_or_path!r})"
        )

    @property
    def alpha(self) -> float:
        """Strength of the contrast chosen for this pair."""
        return self.config.alpha

    @property
    def beta(self) -> float:
        """Plausibility threshold chosen for this pair."""
        return self.config.beta

    @classmethod
    def from_text(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        safe: str = SAFE_PROMPT,
        adversarial: str = OPPOSITE_PROMPT,
    ) -> PromptPair:
        """A pair that needs no training: the embeddings of two system prompts (eq. 1).

        With the defaults this is the paper's oID baseline; with `adversarial=""` (the null prompt) its nID.

        Args:
            model: the model whose embeddings to take.
            tokenizer: its tokenizer.
            safe: text of the safeguarding prompt.
            adversarial: text of the adversarial prompt.
        """
        model = base_model(model)
        sp, ap = (_embed(model, system_prompt_ids(tokenizer, text)) for text in (safe, adversarial))
        return cls(sp, ap, PairConfig(**_model_facts(model)))

    @property
    def digest(self) -> str:
        """Tells whether two pairs hold the same prompts, wherever they lie."""
        prompts = (self.safeguarding, self.adversarial)
        return hashlib.sha256(b"".join(p.float().cpu().contiguous().numpy().tobytes() for p in prompts)).hexdigest()[
            :16
        ]

    def check(self, model: PreTrainedModel) -> None:
        """Check that the pair fits a model.

        Raises:
            ValueError: if hidden size or vocabulary differ. A differing base model name only warns.
        """
        facts = _model_facts(base_model(model))
        for key, what in (("hidden_size", "hidden size"), ("vocab_size", "a vocabulary of")):
            ours, theirs = getattr(self.config, key), facts[key]
            if ours is not None and ours != theirs:
                raise ValueError(
                    f"this prompt pair was made for {what} {ours}, the model has {theirs}: use a pair made for "
                    f"{facts['base_model_name_or_path'] or 'this model'}."
                )
        ours, theirs = self.config.base_model_name_or_path, facts["base_model_name_or_path"]
        # A folder and a Hub id of the same model share the last part of their names
        if ours and theirs and Path(ours).name.lower() != Path(theirs).name.lower():
            logger.warning(f"This prompt pair was made for {ours}, the model is {theirs}: it may protect less.")

    def check_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn if the tokenizer writes conversations in another form than the pair has seen in training."""
        ours = self.config.chat_template_sha256
        if ours is not None and ours != chat_template_digest(tokenizer):
            logger.warning("This prompt pair was trained with another chat template: it may protect less.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> PromptPair:
        """Load a pair from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            revision: branch, tag or commit on the Hub.
            subfolder: where in the folder or repository the pair lies, such as "pairs/short".
            token: Hub token; `None` takes the one stored by `hf auth login`.
            cache_dir: where downloads are kept.
            local_files_only: use what is in the cache, ask nobody.

        Raises:
            OSError: if the pair, or a file of it, is missing or unreadable.
            ValueError: if a file holds what this version cannot use, or no folder or Hub id is named.
        """
        folder = _named_path("pretrained_model_name_or_path", pretrained_model_name_or_path, "a folder or a Hub id")
        inside = PurePath() if subfolder in (None, "") else _named_path("subfolder", subfolder, "a folder's path")
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"subfolder must lie inside of the folder or repository, got {str(subfolder)!r}.")
        if not folder.is_dir():
            prefix = "" if inside == PurePath() else f"{inside.as_posix()}/"
            folder = _download(
                str(pretrained_model_name_or_path),
                allow_patterns=[prefix + CONFIG_NAME, *(f"{prefix}{s}/{f}" for s in STREAMS for f in ADAPTER_FILES)],
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        folder = folder / inside
        if not (folder / CONFIG_NAME).is_file():
            raise OSError(f"{pretrained_model_name_or_path} holds no prompt pair: {CONFIG_NAME} is missing.")
        config = PairConfig.from_json_file(folder / CONFIG_NAME)
        safeguarding, adversarial = (_load_adapter(folder / stream) for stream in STREAMS)
        return cls(safeguarding, adversarial, config)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the pair to a folder: `acd_config.json`, two stock peft adapters and a model card.

        A reader finds the whole pair or none: `acd_config.json`, without which nothing loads, comes last.

        Args:
            save_directory: the folder; made if missing. Other files in it stay, and so does a README.md that is not
                marked as generated.

        Raises:
            ValueError: for a null prompt, which peft has no adapter for, or a pair that was changed to what cannot be
                loaded.
        """
        target = _named_path("save_directory", save_directory, "a folder")
        config = PromptPair(self.safeguarding, self.adversarial, self.config).config  # checks them once more
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            for stream in STREAMS:
                _save_adapter(temporary / stream, getattr(self, stream), config.base_model_name_or_path)
            text = json.dumps(vars(config), indent=2, ensure_ascii=False) + "\n"
            (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")
            (temporary / CARD_NAME).write_text(generate_card(self), encoding="utf-8")
            (target / CONFIG_NAME).unlink(missing_ok=True)
            for stream in STREAMS:
                (target / stream).mkdir(parents=True, exist_ok=True)
                for name in ADAPTER_FILES:
                    (temporary / stream / name).replace(target / stream / name)
            if own_card(target) is None:
                (temporary / CARD_NAME).replace(target / CARD_NAME)
            (temporary / CONFIG_NAME).replace(target / CONFIG_NAME)
        finally:
            shutil.rmtree(temporary)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str = "Upload prompt pair",
        token: str | bool | None = None,
        create_pr: bool = False,
        license: str | None = None,
        model_card: str | None = None,
    ) -> CommitInfo:
        """Upload the pair to the Hub, in one commit: what was there before stays until all of it has arrived.

        The adversarial prompt is a jailbreak for its model. So the repository is made private, and one that is already
        public is refused, unless `private=False` is said.

        Args:
            repo_id: the pair's id on the Hub, such as "org/acd-llama-3-8b"; made if missing.
            private: whether the pair must stay private. `False` makes a public repository; the visibility of one that
                exists is not changed.
            revision: branch to commit to; made if missing (default: main).
            commit_message: message of the commit.
            token: Hub token; `None` takes the one stored by `hf auth login`.
            create_pr: open a pull request with the commit.
            license: identifier of the pair's licence on the Hub, for the model card.
            model_card: a README.md of your own, in place of the generated one.

        Returns:
            What the Hub says about the commit.

        Raises:
            OSError: if the Hub cannot be reached, or refuses.
            ValueError: for a public repository without `private=False`, or a null prompt.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            with _hub_errors(repo_id, revision):
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                visibly_private = api.model_info(repo_id).private
            if private and not visibly_private:
                raise ValueError(
                    f"{repo_id} is public, and the adversarial prompt is a jailbreak for its model: choose a private "
                    "repository, or publish the pair with private=False (acd-logits push --public)."
                )
            card = generate_card(self, repo_id, license) if model_card is None else model_card
            (folder / CARD_NAME).write_text(card, encoding="utf-8")
            files = [path for path in folder.rglob("*") if path.is_file()]
            with _hub_errors(repo_id, revision):
                if revision and not create_pr and not revision.startswith("refs/"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                # Not upload_folder, which may spread the files over several commits
                return api.create_commit(
                    repo_id,
                    [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                )


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel or a `torch.compile(model)`.

    Raises:
        ValueError: for a PeftModel without an active adapter, or with a learned prompt or prefix, which would stand
            between ACD's and the input, or an activated LoRA, which peft places before there are two streams.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        active = model.peft_config.get(model.active_adapter)
        if active is None:  # it was deleted, and peft does not go on without
            raise ValueError("this PeftModel has no active adapter left: pass its unload() instead.")
        if active.is_prompt_learning:
            kind = active.peft_type.value
            raise ValueError(f"this PeftModel brings a {kind} prompt of its own: pass its get_base_model() instead.")
        model = model.get_base_model()
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if getattr(adapter, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {name!r} is an activated LoRA (aLoRA), which peft cannot place in ACD's two streams: "
                "load the model without it, or train a LoRA without alora_invocation_tokens."
            )
    return model


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the tokenizer's chat template; `None` if it has none."""
    if not tokenizer.chat_template:
        return None
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()


def _model_facts(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    return {
        "base_model_name_or_path": model.name_or_path or None,
        "hidden_size": _embed(model, [0]).shape[-1],  # of any embedding layer, wrapped by peft or not
        "vocab_size": config.vocab_size,
    }


@torch.no_grad()
def _embed(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """What the embedding layer gives for tokens, `[len(ids), hidden_size]`."""
    device = "cpu" if model.device.type == "meta" else model.device  # accelerate's hooks bring it to offloaded weights
    return model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=device))[0]


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or save the pair again.") from None


def _named_path(argument: str, value: Any, wanted: str) -> Path:
    if not isinstance(value, str | os.PathLike) or not value:
        raise ValueError(f"{argument} must be {wanted}, got {reprlib.repr(value)}.")
    return Path(value)


def _checked(name: str, prompt: torch.Tensor) -> torch.Tensor:
    plain = isinstance(prompt, torch.Tensor) and prompt.layout == torch.strided and not prompt.is_meta
    if not plain or prompt.ndim != 2 or not prompt.shape[1] or prompt.dtype not in _DTYPES:
        got = type(prompt).__name__
        if isinstance(prompt, torch.Tensor):
            got = f"{list(prompt.shape)} of {prompt.dtype} ({prompt.layout}, {prompt.device})"
        raise ValueError(
            f"the {name} prompt must be a float tensor [num_virtual_tokens, hidden_size] (float16, bfloat16, float32 "
            f"or float64), got {got}."
        )
    if not prompt.isfinite().all():
        raise ValueError(f"the {name} prompt holds NaN or infinite values: its training diverged, train it again.")
    return prompt.detach().clone()  # later changes to the caller's tensor are not ours


def _download(repo_id: str, **kwargs: Any) -> Path:
    with _hub_errors(repo_id, kwargs["revision"]):
        try:
            return Path(snapshot_download(repo_id, **kwargs))
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise error.__cause__ from None
            raise OSError(
                f"{repo_id} is not a folder, not in the local cache, and the Hub was not asked or could not be "
                "reached: check the name and the connection (HF_HUB_OFFLINE and local_files_only keep it offline)."
            ) from None


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence what went wrong on the way to or from the Hub."""
    try:
        yield
    except RevisionNotFoundError:
        raise OSError(f"{repo_id} has no revision {revision!r} on the Hub.") from None
    except RepositoryNotFoundError:
        raise OSError(
            f"{repo_id} is neither a folder nor a repository on the Hub that you can read: check the name, or pass a "
            "token for a private one."
        ) from None
    except HFValidationError:
        raise OSError(f"{repo_id} is neither a folder nor a valid Hub id: check the path.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {401: "your token is missing or not valid", 403: "your token does not allow it"}
        reason = reasons.get(status) or " ".join((error.server_message or error.response.reason_phrase).split())
        raise OSError(f"the Hub refused {repo_id} with status {status}: {reason}.") from None
    except (ConnectionError, HTTPError, RuntimeError) as error:
        # huggingface_hub wraps what stops an upload in a RuntimeError. Only the names of these errors are shown:
        # some messages quote the request's headers, and the token with them
        name = type(error.__cause__ or error).__name__
        raise OSError(f"the connection to the Hub failed at {repo_id} ({name}): try again.") from None


def _load_adapter(folder: Path) -> torch.Tensor:
    config_file, weights = (folder / name for name in ADAPTER_FILES)
    if not weights.is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise OSError(f"{pickled} is pickled, which can run code when loaded: save the adapter as safetensors.")
        raise OSError(f"the pair has no {folder.name}/{weights.name} (weights are read from safetensors only).")
    if not config_file.is_file():
        raise OSError(f"the pair has no {folder.name}/{config_file.name}.")
    config = _read_json(config_file)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{config_file} names no peft_type: save the adapter with peft again.")
    if config["peft_type"] != "PROMPT_TUNING":
        kind = " ".join(config["peft_type"].split())
        raise ValueError(f"{config_file} is a {kind} adapter, not a prompt-tuning one.")
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{weights} is damaged ({error}): download or save the pair again.") from None
    if set(tensors) != {_WEIGHT}:
        raise ValueError(f"{weights} holds {sorted(tensors)}, expected one tensor {_WEIGHT!r}.")
    try:
        prompt = _checked(folder.name, tensors[_WEIGHT])
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    length = config.get("num_virtual_tokens")
    if type(length) is not int or length != len(prompt) or not length:
        raise ValueError(
            f"{weights} holds {len(prompt)} virtual tokens, its adapter_config.json says {reprlib.repr(length)}."
        )
    return prompt


def _save_adapter(folder: Path, prompt: torch.Tensor, base_model_name: str | None) -> None:
    if not len(prompt):
        raise ValueError(f"the {folder.name} prompt is the null prompt, which peft has no adapter for.")
    # The model's shape is left open, as in a config before get_peft_model: peft fills it from the base model
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file({_WEIGHT: prompt.contiguous().cpu()}, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
