"""`acd-logits export`: a folder that transformers loads as a safeguarded model (layout: `safeguarded`)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from string import Template
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import __version__
from ..model_files import CONFIG, INDEX, link_weights, model_folder, read_config, write_json
from ..pairs.model_card import CARD_NAME, card_metadata, is_hub_id
from ..pairs.prompt_pair import PromptPair
from .logits_process import ACDLogitsProcessor
from .safeguarded import FORMAT_VERSION, MODEL_FOLDER, PAIR_FOLDER, SafeguardedModel

_MODULE = "safeguarded"
_SCRIPT = f'''"""This model's generate() is safeguarded by the package acd-logits, which must be installed."""

try:
    from acd_logits.decoding.safeguarded import SafeguardedModel
except ImportError as error:
    raise ImportError(
        "this model's generate() is safeguarded by acd-logits {__version__} or later, which is not here ({{error}}): "
        "pip install 'acd-logits>={__version__}'."
    ) from None
'''
_CARD = Template((Path(__file__).parent / "safeguarded_card.md").read_text(encoding="utf-8"))


def export(
    model_name_or_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    pair: PromptPair | None = None,
    *,
    alpha: float | None = None,
    beta: float | None = None,
) -> None:
    """Write the folder. It appears in one step, or not at all.

    The base model is loaded once, on the CPU, to see that the pair fits it.

    Args:
        model_name_or_path: folder or Hub id of the base model.
        output_dir: the folder to write; must not exist.
        pair: the prompt pair; default: the manual texts.
        alpha: strength of the contrast; default: the pair's.
        beta: plausibility threshold; default: the pair's.

    Raises:
        OSError: a file is missing or cannot be written.
        ValueError: the model was exported already, ACD cannot run on it, or the pair does not fit.
    """
    target = Path(output_dir)
    if target.exists():
        raise ValueError(f"{target} exists: choose a new folder.")
    base = model_folder(model_name_or_path)
    config = read_config(base)
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype="auto").eval()
    pair = PromptPair.from_text(model, tokenizer) if pair is None else pair
    name = str(model_name_or_path) if is_hub_id(str(model_name_or_path)) else base.resolve().name
    chosen: dict[str, Any] = {k: v for k, v in {"alpha": alpha, "beta": beta}.items() if v is not None}
    if chosen.items() - {"alpha": pair.alpha, "beta": pair.beta}.items():
        chosen["results"] = {}  # they were measured at another strength
    made_for = pair.config.base_model_name_or_path
    if made_for and Path(made_for).is_dir():  # the rest of a folder's path is nobody's business
        chosen["base_model_name_or_path"] = Path(made_for).resolve().name
    pair = PromptPair(pair.safeguarding, pair.adversarial, dataclasses.replace(pair.config, **chosen))
    ACDLogitsProcessor(model, pair).detach()  # checks everything

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    (temporary / MODEL_FOLDER).mkdir(parents=True)
    try:
        _write_model(base, temporary / MODEL_FOLDER, config)
        pair.save_pretrained(temporary / PAIR_FOLDER)
        tokenizer.save_pretrained(temporary)
        config["architectures"] = [f"Safeguarded{config['architectures'][0]}"]
        config["auto_map"] = {"AutoModelForCausalLM": f"{_MODULE}.{SafeguardedModel.__name__}"}
        config["acd"] = {"format_version": FORMAT_VERSION, "base_model_name_or_path": name}
        write_json(temporary / CONFIG, config)
        (temporary / f"{_MODULE}.py").write_text(_SCRIPT, encoding="utf-8")
        (temporary / CARD_NAME).write_text(_card(name, pair), encoding="utf-8")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(base: Path, folder: Path, config: dict[str, Any]) -> None:
    """The base model's own files."""
    index = link_weights(base, folder)
    if index is not None:
        write_json(folder / INDEX, index)
    write_json(folder / CONFIG, config)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def _card(name: str, pair: PromptPair) -> str:
    metadata = card_metadata("transformers", name, ["custom_code"], results=pair.config.results, method="ACD")
    settings = {"alpha": f"{pair.alpha:g}", "beta": f"{pair.beta:g}", "version": __version__}
    return _CARD.substitute(settings, metadata=metadata, base=name)
