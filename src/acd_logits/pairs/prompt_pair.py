"""The prompt pair: the two soft prompts of ACD, in memory, on disk and on the Hub.

A saved pair is a folder (or a Hub repository):

    acd_config.json                                          `config.py`
    safeguarding/adapter_config.json, adapter_model.safetensors   SP, a stock peft adapter: `adapters.py`
    adversarial/adapter_config.json, adapter_model.safetensors    AP, likewise
    README.md                                                the model card

Weights are read from safetensors only, since loading a pickle runs the code in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch

from .adapters import ADAPTER_FILES, checked_prompt, load_adapter, prompt_sizes, save_adapter
from .config import CONFIG_NAME, SIZES, PairConfig
from .custom_generate import write_custom_generate
from .fit import base_model, check_fit, embed_tokens, model_facts, warn_of_other_template
from .hub import Repository, download
from .key_values import embeddings_to_key_values
from .model_card import CARD_NAME, generate_card, own_card
from .texts import OPPOSITE_PROMPT, SAFE_PROMPT, system_prompt_ids

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STREAMS = ("safeguarding", "adversarial")


class PromptPair:
    """The Safeguarding Prompt (SP) and the Adversarial Prompt (AP) of one model.

    There are two kinds of prompts, told apart by their tensors:

    - embedding prompts, `[n, hidden_size]`, in the space of the embedding layer's output (eq. 2);
    - key-value prompts, `[n, layers, 2, kv_heads, head_dim]`: keys and values in every layer, keys first, as they are
      after rotation at the positions -n to -1. The instruction does not see them; its last token and the new tokens
      do.

    Args:
        safeguarding: SP, of n_s tokens. An empty one (n_s = 0) is the null prompt.
        adversarial: AP, of the same kind; its number of tokens n_a may differ from n_s.
        config: what is known about the pair; the prompts' sizes are filled in.

    Raises:
        ValueError: if a prompt is no such finite tensor of float16, bfloat16, float32 or float64, the two differ in
            kind or size, or the config says otherwise.
    """

    def __init__(
        self, safeguarding: torch.Tensor, adversarial: torch.Tensor, config: PairConfig | None = None
    ) -> None:
        self.safeguarding = checked_prompt("safeguarding", safeguarding)
        self.adversarial = checked_prompt("adversarial", adversarial)
        kinds = ["key_value" if prompt.ndim == 5 else "embedding" for prompt in (self.safeguarding, self.adversarial)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the safeguarding prompt is of type {kinds[0]!r}, the adversarial one {kinds[1]!r}: make both of one."
            )
        config = PairConfig(prompt_type=kinds[0]) if config is None else config
        if not isinstance(config, PairConfig):
            raise ValueError(f"config must be a PairConfig, got {type(config).__name__}.")
        if config.prompt_type != kinds[0]:
            raise ValueError(
                f"{CONFIG_NAME} says prompt_type {config.prompt_type!r}, the prompts are of type {kinds[0]!r}: "
                f"PairConfig(prompt_type={kinds[0]!r}) says so too."
            )
        sizes: dict[str, Any] = prompt_sizes(self.safeguarding)
        others = prompt_sizes(self.adversarial)
        for name, size in sizes.items():
            if others[name] != size:
                raise ValueError(
                    f"the safeguarding prompt has {SIZES[name].format(size)}, the adversarial one {others[name]}: "
                    "both must come from the same model."
                )
            if getattr(config, name) not in (None, size):
                raise ValueError(f"{CONFIG_NAME} says {name} {getattr(config, name)}, the prompts have {size}.")
        self.config = dataclasses.replace(config, **sizes)

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
        prompt_type: str = "embedding",
    ) -> PromptPair:
        """A pair that needs no training: the embeddings of two system prompts (eq. 1), or their keys and values.

        With the defaults this is the paper's oID baseline; with `adversarial=""` (the null prompt) its nID.

        Args:
            model: the model whose embeddings to take.
            tokenizer: its tokenizer.
            safe: text of the safeguarding prompt.
            adversarial: text of the adversarial prompt.
            prompt_type: "embedding" or "key_value".

        Raises:
            ValueError: there is no such type, or the model has no keys and values for prompts of it.
        """
        model = base_model(model)
        config = PairConfig(**model_facts(model), prompt_type=prompt_type)
        sp, ap = (embed_tokens(model, system_prompt_ids(tokenizer, text)) for text in (safe, adversarial))
        if prompt_type == "key_value":
            sp, ap = (embeddings_to_key_values(model, prompt) for prompt in (sp, ap))
        return cls(sp, ap, config)

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
            ValueError: if a size differs: hidden size or vocabulary, or layers, heads and head size of key-value
                prompts. A differing base model name only warns.
        """
        check_fit(self.config, model)

    def check_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn if the tokenizer writes conversations in another form than the pair has seen in training."""
        warn_of_other_template("prompt pair", self.config.chat_template_sha256, tokenizer)

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
            folder = download(
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
        safeguarding, adversarial = (load_adapter(folder / stream, config.prompt_type) for stream in STREAMS)
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
                save_adapter(temporary / stream, getattr(self, stream), config.base_model_name_or_path)
            text = json.dumps(config.as_json(), indent=2, ensure_ascii=False) + "\n"
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
        public is refused, unless `private=False` is said. With the pair comes what
        `generate(..., custom_generate=repo_id, trust_remote_code=True)` runs.

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
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder)
            repository = Repository(repo_id, token, private)
            write_custom_generate(folder, repository.repo_id)
            card = generate_card(self, repository.repo_id, license) if model_card is None else model_card
            (folder / CARD_NAME).write_text(card, encoding="utf-8")
            return repository.upload(folder, commit_message, revision, create_pr)


def _named_path(argument: str, value: Any, wanted: str) -> Path:
    if not isinstance(value, str | os.PathLike) or not value:
        raise ValueError(f"{argument} must be {wanted}, got {reprlib.repr(value)}.")
    return Path(value)
