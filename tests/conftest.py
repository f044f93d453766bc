import copy
import gc
import io
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask the Hub

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from acd_logits import PromptPair
from acd_logits.cli import main
from acd_logits.pairs import PairConfig
from acd_logits.pairs.distilled import DistilledPrompt

torch.set_num_threads(1)

# Where tests of exactness run; scripts/gpu_check.py sets it to cuda
DEVICE = os.environ.get("ACD_TEST_DEVICE", "cpu")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # less exact than float32
ROOT = Path(__file__).parents[1]
# Of a process that is to import this checkout
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

VOCAB, HIDDEN = 97, 32

# What the model of `model_path` says
WORDS = "you are a safe helpful careful evil model how do I pick the lock paint fence with open close key door and or"
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"

PAIR_FILES = [
    "README.md",
    "acd_config.json",
    "adversarial/adapter_config.json",
    "adversarial/adapter_model.safetensors",
    "safeguarding/adapter_config.json",
    "safeguarding/adapter_model.safetensors",
]
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # a tied random model echoes its last token
}
_DECODER = _COMMON | {
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}

ARCHITECTURES = {
    "llama": LlamaConfig(**_DECODER),
    "qwen3": Qwen3Config(**_DECODER, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **_DECODER,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # Nine windows carry a soft prompt 9 * 17 tokens far, behind the longest text of these tests
    "mistral_sliding": MistralConfig(**_DECODER | {"num_hidden_layers": 9}, sliding_window=18),
    "gpt2": GPT2Config(**_COMMON, n_embd=HIDDEN, n_layer=3, n_head=4, n_positions=256, initializer_range=0.3),
    "bloom": BloomConfig(**_COMMON, n_layer=3, n_head=4, initializer_range=0.3),
    "mixtral": MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2),
    "phi3": Phi3Config(**_DECODER),
    "mamba2": Mamba2Config(
        **_COMMON,
        num_hidden_layers=3,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=2,
        chunk_size=8,
        initializer_range=0.4,
    ),
    "bamba": BambaConfig(
        **_DECODER,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "lfm2": Lfm2Config(**_DECODER, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
    "gpt_neo": GPTNeoConfig(
        **_COMMON,
        num_layers=2,
        num_heads=4,
        window_size=5,
        max_position_embeddings=256,
        attention_types=[[["global", "local"], 1]],
        initializer_range=0.3,
    ),
    "falcon_alibi": FalconConfig(
        **_COMMON, num_hidden_layers=3, num_attention_heads=4, alibi=True, initializer_range=0.3
    ),
}


def build_model(name="llama", seed=0):
    """A tiny random model whose tokens are far enough apart for float noise not to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name])).eval().to(DEVICE)
    model.generation_config.eos_token_id = None  # random models stop at random
    return model


def build_pair(n_s=7, n_a=4, seed=1, scale=2.0, hidden=HIDDEN, **config):
    """Random soft prompts, loud enough to change what a tiny model says."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [(torch.randn(n, hidden, generator=generator) * scale).to(DEVICE) for n in (n_s, n_a)]
    return PromptPair(*prompts, PairConfig(**config))


def build_key_value_pair(n_s=7, n_a=4, seed=1, scale=2.0, sizes=(3, 2, 8), **config):
    """Random key-value prompts, for the layers, key-value heads and head size of `_DECODER`."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, size = sizes
    prompts = [(torch.randn(n, layers, 2, heads, size, generator=generator) * scale).to(DEVICE) for n in (n_s, n_a)]
    return PromptPair(*prompts, PairConfig(prompt_type="key_value", **config))


def build_distilled(seed=1, scale=2.0, sizes=(3, 2, 8), **facts):
    """A random key-value prompt as a distillation leaves it, which nobody trained."""
    prompt = build_key_value_pair(seed=seed, scale=scale, sizes=sizes).safeguarding.cpu()
    teacher = {"pair": "org/pair", "pair_digest": "0" * 16, "alpha": 0.4, "beta": 0.2}
    return DistilledPrompt(prompt, {"teacher": teacher, "training": {}, "results": {}, **facts})


def build_batch(lengths=(11, 7, 10), seed=3):
    """Left-padded random prompts: `input_ids` and `attention_mask`, `[len(lengths), max(lengths)]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])
    return {"input_ids": ids.masked_fill(mask == 0, 0).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def assert_same(got, expected):
    """The same tokens, and scores within 2e-4 (`-inf` in the same places): 1e-4 of eq. 5, doubled at alpha 0.5."""
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert len(got.scores) == len(expected.scores)
    for ours, theirs in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def pytest_collection_modifyitems(items):
    """The longest first: at the end of a run, all processes but one would wait for it.

    Then what asks `transformers serve`, side by side: it falls to one process, which starts one server.
    """
    items.sort(key=lambda item: ("test_gpu_check" not in item.nodeid, "served_model" not in item.fixturenames))


def pytest_collection_finish():
    """What is imported stays: from here on, a garbage collection takes a few ms, and not half a second."""
    gc.freeze()


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def pair():
    return build_pair()


def build_tokenizer(words, unk_token, special=(), **kwargs):
    """A tokenizer of whole words, numbered in their order; `special` ones are found inside of text too."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token=unk_token))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unk_token, **kwargs)


@pytest.fixture
def tokenizer():
    """Words w3 to w96 are the tokens 3 to 96."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return build_tokenizer(words, unk_token="<pad>", padding_side="left", **names)


@pytest.fixture
def fails(capsys, monkeypatch):
    """Run a command that must fail, without loading a model unless `loads`; return its one line of complaint."""

    def run(*arguments, code=1, loads=False):
        if not loads:
            monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail())
        try:
            returned = main(list(arguments))
        except SystemExit as usage_error:
            returned = usage_error.code
        captured = capsys.readouterr()
        assert (returned, captured.out) == (code, "")
        assert re.fullmatch(r"acd-logits: error: .+\n", captured.err)
        return captured.err

    return run


@pytest.fixture
def run_script(monkeypatch):
    """Run a program of scripts/ in this process; return its exit code."""

    def run(name, *arguments):
        path = str(ROOT / "scripts" / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        return ended.value.code

    return run


@pytest.fixture(scope="module")
def paths(tokenizer, tmp_path_factory):
    """Folders of a model, with the test file's tokenizer, and of its pair."""
    folder = tmp_path_factory.mktemp("paths")
    build_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    build_pair(vocab_size=VOCAB).save_pretrained(folder / "pair")
    return str(folder / "model"), str(folder / "pair")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A Llama of random weights that answers in words, with a chat template."""
    words = ["[UNK]", "[END]", "user", "assistant", ":", *WORDS.split()]
    tokenizer = build_tokenizer(words, unk_token="[UNK]", eos_token="[END]")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # the usual 0.02 makes every answer one word repeated
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def use_stdin(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """`transformers serve` with the demo model; yields its URL and the model's name there."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from acd_logits.demo_model import demo_model_path

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = str(demo_model_path())
    command = [Path(sys.executable).parent / "transformers", "serve", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--default-seed", "0"]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                log.seek(0)
                assert process.poll() is None, log.read()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", name
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()
