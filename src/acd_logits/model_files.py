"""The files of a model's folder, for commands that write a new folder around the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

if TYPE_CHECKING:
    import os

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


def model_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of a model, fetched from the Hub where the name is not that of a folder.

    Raises:
        OSError: there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    AutoConfig.from_pretrained(name)  # says plainly if there is no such model
    return Path(
        snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    )


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a base model says, without a way to code of the model's own.

    Raises:
        OSError: there is none.
        ValueError: it names several architectures or none, or the folder was written by an export.
    """
    if not (folder / CONFIG).is_file():
        raise OSError(f"{folder} holds no model: {CONFIG} is missing.")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise ValueError(f"{folder / CONFIG} names {len(architectures)} architectures, an export needs one.")
    if "acd" in config:
        raise ValueError(f"{folder} was exported already: start from its base model.")
    config.pop("auto_map", None)
    return config


def link_weights(base: Path, folder: Path) -> dict[str, Any] | None:
    """Put the model's safetensors files into another folder, without copying where the file system allows it.

    Args:
        base: the folder of the model.
        folder: where the links go.

    Returns:
        What the index of several files says, for the caller to write; `None` where there is one file.

    Raises:
        OSError: a file is missing.
    """
    index = json.loads((base / INDEX).read_text(encoding="utf-8")) if (base / INDEX).is_file() else None
    for name in [SINGLE] if index is None else sorted(set(index["weight_map"].values())):
        if Path(name).name != name or not (base / name).is_file():
            raise OSError(f"{base} has no {name}: an export reads weights from safetensors only.")
        file = (base / name).resolve()  # the Hub's cache holds links itself
        try:
            (folder / name).hardlink_to(file)
        except OSError:  # another file system, or one without hard links
            (folder / name).symlink_to(file)
    return index


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
