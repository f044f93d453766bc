"""A folder of rivals, which `scripts/train_rivals.py` writes and `acd-logits evaluate --rivals` reads.

rivals.json           `model`, which they were made for, and `rivals`, the settings of each by its arm's name
steering.safetensors  `steering`, its direction: `[hidden_size]`
cast.safetensors      `cast` and `condition`, both directions of CAST: `[hidden_size]` each
lora/                 a stock peft adapter
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from .arms import ARMS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .benchmarks import Benchmark
    from .rivals import Rival

FORMAT_VERSION = 1
SETTINGS_NAME, LORA_NAME = "rivals.json", "lora"
STEERING_NAME, CAST_NAME = "steering.safetensors", "cast.safetensors"
_ADAPTER = (f"{LORA_NAME}/adapter_config.json", f"{LORA_NAME}/adapter_model.safetensors")
_FILES = {"steering": (STEERING_NAME,), "cast": (CAST_NAME,), "lora": _ADAPTER, "safedecoding": _ADAPTER}


class RivalFolder:
    """A folder of rivals, checked; nothing in it is loaded yet.

    Args:
        path: the folder.
        model: the model that answers, by the name that the user gives it.

    Raises:
        OSError: there is no such folder, or a file is missing.
        ValueError: it is damaged, or was made for another model.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        if not (path / SETTINGS_NAME).is_file():
            raise FileNotFoundError(
                f"{path} holds no rivals: {SETTINGS_NAME} is missing, which scripts/train_rivals.py writes"
            )
        content = read_settings(path)
        if content["model"] != model:
            raise ValueError(
                f"the rivals in {path} were made for {content['model']}, not for {model}: make them for this model"
            )
        self.settings: dict[str, dict[str, Any]] = content["rivals"]
        for name in self.names:
            for file in _FILES.get(name, ()):
                if not (path / file).is_file():
                    raise FileNotFoundError(f"{path / file} is missing, which the arm {name!r} needs")

    @property
    def names(self) -> list[str]:
        """The arms that it has the rivals of."""
        return [name for name, arm in ARMS.items() if arm.rival and name in self.settings]

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """What tells rivals apart, by arm; of these arms, those that are rivals.

        Raises:
            ValueError: one of them is not in the folder.
        """
        found = {}
        for name in (name for name in names if ARMS[name].rival):
            if name not in self.settings:
                raise ValueError(f"{self.path} has no {name!r}, but {', '.join(self.names)}: leave the arm out")
            parts = [json.dumps(self.settings[name], sort_keys=True).encode()]
            parts += [(self.path / file).read_bytes() for file in _FILES.get(name, ())]
            found[name] = hashlib.sha256(b"\n".join(parts)).hexdigest()
        return found

    def load(self, names: Sequence[str], device: str | None = None, batch_size: int = 16) -> dict[str, Rival]:
        """The rivals of these arms.

        Args:
            names: arms; those that are no rivals are left out.
            device: of a guard.
            batch_size: of a guard.

        Raises:
            OSError: there is no such guard, or a file is damaged.
            ValueError: the folder is damaged, or a guard cannot be used.
        """
        found = {}
        for name in self.digests(names):
            for file in _FILES.get(name, ()):
                _check_tensors(self.path / file)
            try:
                found[name] = _make_rival(self.path, name, self.settings[name], device, batch_size)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.path} has damaged settings of {name!r} ({error}): make it again") from None
        return found


def read_settings(path: Path) -> dict[str, Any]:
    """What a folder's rivals.json says, with `model` and `rivals` at least.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another version.
    """
    file = path / SETTINGS_NAME
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): make the rivals again") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file} was not written by this version of scripts/train_rivals.py: make the rivals again")
    for name, kind in (("model", str), ("rivals", dict)):
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{file} is damaged, since it names no {name}: make the rivals again")
    return content


def _check_tensors(path: Path) -> None:
    """Raise OSError if a safetensors file is cut off or something else."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{path} is damaged ({error}): make the rivals again") from None


def _make_rival(path: Path, name: str, settings: dict[str, Any], device: str | None, batch_size: int) -> Rival:
    from safetensors.torch import load_file

    from .judges import ClassifierJudge
    from .rivals import AdaCD, Guard, LoRA, SafeDecoding
    from .steering import Condition, Steering

    if name == "lora":
        return LoRA(path / LORA_NAME)
    if name == "safedecoding":
        return SafeDecoding(path / LORA_NAME, **settings)
    if name == "adacd":
        return AdaCD(**settings)
    if name == "guard":
        return Guard(ClassifierJudge(settings["model"], settings["harmless_label"], batch_size, device))
    directions = load_file(path / _FILES[name][0])
    condition = Condition(directions["condition"], **settings["condition"]) if name == "cast" else None
    return Steering(directions[name], settings["layer"], settings["strength"], condition)


def check_scoring(arms: Sequence[str], benchmarks: Sequence[Benchmark]) -> None:
    """Check that every arm can score the choices of a benchmark.

    Raises:
        ValueError: a rival cannot: it writes answers, and gives texts no likelihood.
    """
    choices = [benchmark.name for benchmark in benchmarks if any(r.choices for r in benchmark.requests)]
    unable = [name for name in arms if ARMS[name].rival and name not in ("lora", "steering")]
    if choices and unable:
        raise ValueError(f"the arm {unable[0]!r} cannot score the choices of {choices[0]}: leave one of them out")
