"""What a distillation leaves behind: one stock peft cartridge, which needs nothing of this package to run.

adapter_config.json, adapter_model.safetensors    the prompt, for `PeftModel.from_pretrained`
acd_distilled.json                                the teacher, the settings, and what was measured
README.md                                         the model card, from `distilled_card.md`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_text
from .adapters import ADAPTER_FILES, checked_prompt, load_adapter, prompt_sizes, save_adapter
from .config import SIZES
from .fit import base_model, warn_of_other_model, warn_of_other_template
from .hub import Repository, download
from .key_values import check_shareable, key_value_sizes
from .model_card import CARD_NAME, MARKER, card_metadata, is_hub_id, own_card, results_table, settings_table

if TYPE_CHECKING:
    import os

    import torch
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTS_NAME = "acd_distilled.json"
_TEMPLATE = Template((Path(__file__).parent / "distilled_card.md").read_text(encoding="utf-8"))
# Of the tokens of a continuation, as they are measured apart: in words, and which they are
TOKEN_RANGES = {
    "": ("all tokens", slice(None)),
    "_first": ("the first token", slice(1)),
    "_2_to_8": ("tokens 2 to 8", slice(1, 8)),
    "_9_on": ("tokens 9 and later", slice(8, None)),
}


@dataclasses.dataclass(frozen=True)
class DistilledPrompt:
    """One key-value prompt in front of the whole input, and what is known about it.

    Args:
        prompt: keys and values, `[n, layers, 2, kv_heads, head_dim]`, keys first.
        facts: what `acd_distilled.json` says: `base_model_name_or_path`, `base_model_revision`,
            `chat_template_sha256`, `teacher`, `training` and `results`.
    """

    prompt: torch.Tensor
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Tells whether two hold the same prompt."""
        return hashlib.sha256(self.prompt.float().contiguous().numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> DistilledPrompt:
        """Read one from a folder or the Hub.

        Raises:
            OSError: there is none, or a file is missing or damaged.
            ValueError: a file holds something else.
        """
        folder = Path(name)
        if not folder.is_dir():
            files = [*ADAPTER_FILES, FACTS_NAME]
            folder = download(str(name), allow_patterns=files, revision=None)
        if not (folder / FACTS_NAME).is_file():
            raise OSError(f"{name} holds no distilled adapter: {FACTS_NAME} is missing.")
        facts = read_json(folder / FACTS_NAME)
        if not isinstance(facts, dict) or not {"teacher", "training", "results"} <= set(facts):
            raise ValueError(f"{folder / FACTS_NAME} does not say what was distilled: download or distil it again.")
        return cls(load_adapter(folder, "key_value"), facts)

    def check(self, model: PreTrainedModel) -> None:
        """Check that it fits a model.

        Raises:
            ValueError: the model has no plain keys and values, or a size differs. A differing base model name only
                warns.
        """
        model = base_model(model)
        check_shareable(model, key_value=True)
        theirs = key_value_sizes(model.config)
        for name, size in prompt_sizes(self.prompt).items():
            if theirs.get(name) != size:
                raise ValueError(
                    f"this adapter was distilled for {SIZES[name].format(size)}, the model has {theirs.get(name)}: "
                    "use one of this model."
                )
        warn_of_other_model("adapter", self.facts.get("base_model_name_or_path"), model)

    def check_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Warn if the tokenizer writes conversations in another form than the adapter has seen in training."""
        warn_of_other_template("adapter", self.facts.get("chat_template_sha256"), tokenizer)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a folder, which is made if it is missing; a README.md of the user's own stays.

        Raises:
            ValueError: it is no prompt that can be loaded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        prompt = checked_prompt("distilled", self.prompt)
        if own_card(folder) is None:
            write_text(folder / CARD_NAME, self.card())
        write_text(folder / FACTS_NAME, json.dumps(self.facts, indent=2) + "\n")
        save_adapter(folder, prompt, self.facts.get("base_model_name_or_path"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str = "Upload distilled adapter",
        token: str | bool | None = None,
        create_pr: bool = False,
        license: str | None = None,
        model_card: str | None = None,
    ) -> CommitInfo:
        """Upload it in one commit; the arguments are those of `PromptPair.push_to_hub`.

        Raises:
            OSError: the Hub cannot be reached, or refuses.
            ValueError: the repository is public, and `private` is set.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            repository = Repository(repo_id, token, private, why="an adapter is pushed to a private one by default")
            self.save_pretrained(folder)
            card = self.card(repository.repo_id, license) if model_card is None else model_card
            write_text(folder / CARD_NAME, card)
            return repository.upload(folder, commit_message, revision, create_pr)

    def card(self, repo_id: str | None = None, license: str | None = None) -> str:
        """The model card.

        Args:
            repo_id: the adapter's Hub id, for the example.
            license: identifier of its licence on the Hub; left out if not given.
        """
        facts, teacher = self.facts, self.facts["teacher"]
        model = facts.get("base_model_name_or_path")
        shown = model if is_hub_id(model) else f"path/to/{Path(model or 'model').name}"
        kept = facts["training"].get("held_out_loss", {}).get("kept", {})
        rows = [
            f"| {words} | {kept[f'KL{where}']:.3f} | {100 * kept[f'agreement{where}']:.1f} % |"
            for where, (words, _) in TOKEN_RANGES.items()
            if f"KL{where}" in kept
        ]
        table = ["| Tokens | KL | Same top token |", "| --- | --- | --- |", *rows]
        return _TEMPLATE.substitute(
            metadata=card_metadata("peft", model, ["cartridge"], license, facts["results"], "Distilled"),
            marker=MARKER,
            model=shown,
            repo=repo_id or "path/to/this/folder",
            tokens=len(self.prompt),
            pair=teacher["pair"],
            alpha=f"{teacher['alpha']:g}",
            beta=f"{teacher['beta']:g}",
            agreement="\n".join(table) if rows else "Not measured.",
            harmless_rate=results_table(facts["results"].get("harmless_rate")),
            over_refusal=results_table(facts["results"].get("over_refusal")),
            training=settings_table(facts["training"], "data (`prompts`: how many)"),
        )
