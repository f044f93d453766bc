"""The artifact: saving, loading, checking, and every way it can be wrong."""

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OPTConfig
from transformers.utils import logging

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.pairs import PairConfig
from conftest import HIDDEN, PAIR_FILES, VOCAB, assert_same, build_batch, build_model, build_pair
from reference import ReferenceProcessor


@pytest.fixture
def saved(tmp_path):
    build_pair(alpha=0.4, beta=0.2, base_model_name_or_path="org/tiny", vocab_size=VOCAB).save_pretrained(
        tmp_path / "pair"
    )
    return tmp_path / "pair"


class TestRoundTrip:
    def test_tensors_and_config_come_back(self, saved):
        pair, loaded = build_pair(), PromptPair.from_pretrained(saved)
        assert torch.equal(loaded.safeguarding, pair.safeguarding)
        assert torch.equal(loaded.adversarial, pair.adversarial)
        assert (loaded.alpha, loaded.beta) == (0.4, 0.2)
        assert loaded.config.hidden_size == HIDDEN
        assert loaded.config.base_model_name_or_path == "org/tiny"

    def test_files(self, saved):
        files = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
        assert files == PAIR_FILES
        assert [path.name for path in saved.parent.iterdir()] == ["pair"]  # no temporary folder left

    def test_subfolder(self, saved):
        loaded = PromptPair.from_pretrained(saved.parent, subfolder="pair")
        assert loaded.alpha == 0.4

    def test_saving_again_replaces_the_pair_and_keeps_other_files(self, saved):
        (saved / "notes.txt").write_text("mine")
        build_pair(3, 2, seed=8).save_pretrained(saved)
        assert PromptPair.from_pretrained(saved).safeguarding.shape == (3, HIDDEN)
        assert (saved / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_is_kept(self, tmp_path, dtype):
        pair = PromptPair(torch.randn(3, 8).to(dtype), torch.randn(2, 8).to(dtype))
        pair.save_pretrained(tmp_path)
        assert PromptPair.from_pretrained(tmp_path).safeguarding.dtype == dtype

    @pytest.mark.parametrize("stream", ["safeguarding", "adversarial"])
    def test_stock_peft_loads_one_stream_and_gives_its_logits(self, saved, stream):
        model, pair = build_model(), PromptPair.from_pretrained(saved)
        ids = build_batch((9,))["input_ids"]
        embeds = torch.cat([getattr(pair, stream)[None], model.get_input_embeddings()(ids)], dim=1)
        expected = model(inputs_embeds=embeds).logits[:, -9:]
        peft_model = PeftModel.from_pretrained(model, saved / stream)
        torch.testing.assert_close(peft_model(ids).logits[:, -9:], expected, atol=1e-5, rtol=0)

    def test_settings_come_back_as_json_has_them(self, tmp_path):
        """Which has neither tuples nor NaN."""
        given = {"betas": (0.9, 0.95), "max_grad_norm": math.inf, "loss": {"first": math.nan}, "text": "\u00e9\n"}
        kept = {"betas": [0.9, 0.95], "max_grad_norm": None, "loss": {"first": None}, "text": "\u00e9\n"}
        pair = build_pair(alpha=np.float32(0.5), training=given)
        pair.save_pretrained(tmp_path)
        assert pair.config.training == PromptPair.from_pretrained(tmp_path).config.training == kept
        text = (tmp_path / "acd_config.json").read_text(encoding="utf-8")
        json.loads(text, parse_constant=lambda name: pytest.fail(name))

    def test_what_was_made_wrong_later_is_not_saved(self, tmp_path):
        pair = build_pair()
        pair.config.training = []
        with pytest.raises(ValueError, match="training must be a dict, got"):
            pair.save_pretrained(tmp_path / "pair")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("folder", ["", None, 3])
    def test_saving_to_no_folder(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="save_directory must be a folder, got"):
            build_pair().save_pretrained(folder)
        assert list(tmp_path.iterdir()) == []

    def test_failed_save_leaves_nothing_behind(self, tmp_path, monkeypatch):
        from acd_logits.pairs import adapters

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(adapters, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            build_pair().save_pretrained(tmp_path / "pair")
        assert list(tmp_path.iterdir()) == []

    def test_null_prompt_cannot_be_saved(self, tmp_path):
        with pytest.raises(ValueError, match="adversarial prompt is the null prompt"):
            build_pair(4, 0).save_pretrained(tmp_path / "pair")
        assert list(tmp_path.iterdir()) == []


class TestFromText:
    def test_default_texts_are_the_embedded_prompts(self, model, tokenizer):
        pair = PromptPair.from_text(model, tokenizer, safe="w5 w6", adversarial="w7")
        assert torch.equal(pair.safeguarding, model.get_input_embeddings()(torch.tensor([5, 6])))
        assert torch.equal(pair.adversarial, model.get_input_embeddings()(torch.tensor([7])))
        assert pair.config.vocab_size == VOCAB

    def test_empty_text_is_the_null_prompt(self, model, tokenizer):
        assert PromptPair.from_text(model, tokenizer, adversarial="").adversarial.shape == (0, HIDDEN)

    def test_embeddings_of_another_width_than_the_model(self, tokenizer):
        """OPT projects its embeddings to the model's width."""
        sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": 1}
        model = AutoModelForCausalLM.from_config(OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=16))
        pair = PromptPair.from_text(model, tokenizer, safe="w5 w6", adversarial="w7")
        assert pair.config.hidden_size == pair.safeguarding.shape[1] == 16
        pair.check(model)
        with pytest.raises(ValueError, match="hidden size 32, the model has 16"):
            build_pair().check(model)


EMBEDDING_ADAPTERS = {
    "LoRA": {"target_modules": ["embed_tokens"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "full copy": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


class TestAdapters:
    @pytest.mark.parametrize("kind", EMBEDDING_ADAPTERS)
    def test_adapted_embeddings(self, tokenizer, kind):
        lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **EMBEDDING_ADAPTERS[kind])
        model = get_peft_model(build_model(), lora).eval()
        adapted = [
            weight for name, weight in model.named_parameters() if "embed_tokens" in name and weight.requires_grad
        ]
        with torch.no_grad():
            for weight in adapted:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        embed = model.get_input_embeddings()
        pair = PromptPair.from_text(model, tokenizer, safe="w5 w6 w7", adversarial="w6 w8")
        assert torch.equal(pair.safeguarding, embed(torch.tensor([[5, 6, 7]]))[0].detach())
        assert not torch.equal(pair.safeguarding, build_model().get_input_embeddings()(torch.tensor([5, 6, 7])))
        assert pair.config.hidden_size == HIDDEN

        batch, options = build_batch(), {"max_new_tokens": 5, "do_sample": False}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        slow = ReferenceProcessor(copy.deepcopy(model), pair, 0.5, 0.1, mask=batch["attention_mask"])
        expected = copy.deepcopy(model).generate(**batch, logits_processor=[slow], **options)
        acd = ACDLogitsProcessor(model, pair, 0.5, 0.1)
        assert_same(model.generate(**batch, logits_processor=[acd], **options), expected)

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_an_activated_lora_is_refused(self, wrapped):
        """Its place is counted in the rows that generate() has, of which there are two streams here."""
        lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
        model = build_model()
        if wrapped:
            model = get_peft_model(model, lora)
        else:
            model.add_adapter(lora)
        with pytest.raises(ValueError, match=r"^the adapter 'default' is an activated LoRA \(aLoRA\), .*[^\n]$"):
            build_pair().check(model)
        model.delete_adapter("default")
        if wrapped:
            with pytest.raises(ValueError, match=r"no active adapter left: pass its unload\(\) instead"):
                build_pair().check(model)
            model = model.unload()
        build_pair().check(model)


class TestCheck:
    def test_wrong_hidden_size(self, model):
        with pytest.raises(ValueError, match="hidden size 16, the model has 32"):
            build_pair(hidden=16).check(model)

    def test_wrong_vocabulary(self, model):
        with pytest.raises(ValueError, match="a vocabulary of 5, the model has 97"):
            build_pair(vocab_size=5).check(model)

    def test_another_base_model_warns(self, model, caplog):
        logging.enable_propagation()
        model.config._name_or_path = model.name_or_path = "org/other"
        build_pair(base_model_name_or_path="org/tiny").check(model)
        assert "made for org/tiny, the model is org/other" in caplog.text

    def test_another_chat_template_warns(self, tokenizer, caplog):
        logging.enable_propagation()
        tokenizer.chat_template = "{{ messages[0].content }}"
        seen = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
        build_pair(chat_template_sha256=seen).check_chat_template(tokenizer)
        build_pair().check_chat_template(tokenizer)  # of manual texts, say
        assert not caplog.text
        for template in ("{{ messages }}", None):
            tokenizer.chat_template = template
            build_pair(chat_template_sha256=seen).check_chat_template(tokenizer)
            assert "trained with another chat template" in caplog.text
            caplog.clear()

    @pytest.mark.parametrize("name", ["org/tiny", "/models/Tiny"])
    def test_the_same_base_model_does_not_warn(self, model, caplog, name):
        logging.enable_propagation()
        model.name_or_path = name
        build_pair(base_model_name_or_path="org/tiny").check(model)
        assert not caplog.text


def edit_config(folder, **changes):
    path = folder / "acd_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder):
    path = folder / "safeguarding" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def pickle_weights(folder):
    path = folder / "adversarial" / "adapter_model.safetensors"
    torch.save({"prompt_embeddings": torch.zeros(4, HIDDEN)}, path.with_suffix(".bin"))
    path.unlink()


def poison(folder):
    tensors = {"prompt_embeddings": torch.full((7, HIDDEN), torch.nan)}
    save_file(tensors, folder / "safeguarding" / "adapter_model.safetensors")


def other_tensor(folder):
    save_file({"lora_A": torch.zeros(2, 2)}, folder / "safeguarding" / "adapter_model.safetensors")


def other_length(folder):
    save_file({"prompt_embeddings": torch.zeros(6, HIDDEN)}, folder / "safeguarding" / "adapter_model.safetensors")


def other_method(folder):
    path = folder / "safeguarding" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4}))


def weights_of(tensor):
    def damage(folder):
        save_file({"prompt_embeddings": tensor}, folder / "safeguarding" / "adapter_model.safetensors")

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


DEEP = "[" * 100_000 + "]" * 100_000
ADAPTER_CONFIG = "safeguarding/adapter_config.json"

DAMAGE = {
    "pickled": (pickle_weights, OSError, r"adapter_model\.bin is pickled, which can run code"),
    "missing adapter": (lambda f: (f / "adversarial" / "adapter_model.safetensors").unlink(), OSError, "has no adv"),
    "missing adapter config": (
        lambda f: (f / "safeguarding" / "adapter_config.json").unlink(),
        OSError,
        "has no safe",
    ),
    "missing config": (lambda f: (f / "acd_config.json").unlink(), OSError, "holds no prompt pair"),
    "truncated": (truncate, OSError, "is damaged"),
    "empty file": (
        lambda f: (f / "safeguarding" / "adapter_model.safetensors").write_bytes(b""),
        OSError,
        "is damaged",
    ),
    "NaN": (poison, ValueError, "safeguarding prompt holds NaN"),
    "another tensor": (other_tensor, ValueError, "expected one tensor 'prompt_embeddings'"),
    "another length": (other_length, ValueError, "holds 6 virtual tokens, its adapter_config.json says 7"),
    "another method": (other_method, ValueError, "is a LORA adapter"),
    "format version": (lambda f: edit_config(f, format_version=99), ValueError, "has format_version 99"),
    "unknown key": (lambda f: edit_config(f, gamma=1), ValueError, "unknown key 'gamma'"),
    "hidden size": (lambda f: edit_config(f, hidden_size=5), ValueError, "says hidden_size 5, the prompts have 32"),
    "not JSON": (lambda f: (f / "acd_config.json").write_text("{"), ValueError, "is not valid JSON"),
    "a list": (lambda f: (f / "acd_config.json").write_text("[]"), ValueError, "has format_version None"),
    "a number": (
        weights_of(torch.tensor(1.0)),
        ValueError,
        r"adapter_model\.safetensors: the safeguarding .* got \[\]",
    ),
    "no tokens": (weights_of(torch.zeros(0, HIDDEN)), ValueError, "safetensors holds 0 virtual tokens"),
    "no width": (weights_of(torch.zeros(7, 0)), ValueError, r"safetensors: the safeguarding .* got \[7, 0\]"),
    "float8": (
        weights_of(torch.zeros(7, HIDDEN).to(torch.float8_e4m3fn)),
        ValueError,
        r"safetensors: the safeguarding .* of torch\.float8_e4m3fn",
    ),
    "integers": (weights_of(torch.zeros(7, HIDDEN, dtype=torch.int32)), ValueError, r"of torch\.int32"),
    "deep config": (write("acd_config.json", DEEP), ValueError, r"acd_config\.json is not valid JSON"),
    "deep adapter config": (write(ADAPTER_CONFIG, DEEP), ValueError, r"adapter_config\.json is not valid JSON"),
    "adapter config not JSON": (write(ADAPTER_CONFIG, "{"), ValueError, r"adapter_config\.json is not valid JSON"),
    "adapter config a list": (write(ADAPTER_CONFIG, "[]"), ValueError, r"adapter_config\.json names no peft_type"),
    "unknown method": (
        write(ADAPTER_CONFIG, '{"peft_type": "NEW\\nONE"}'),
        ValueError,
        r"adapter_config\.json is a NEW ONE adapter, not a prompt-tuning one",
    ),
    "length as text": (
        write(ADAPTER_CONFIG, '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "7"}'),
        ValueError,
        r"holds 7 virtual tokens, its adapter_config\.json says '7'",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_embedding_pairs(saved, what):
    damage, kind, message = DAMAGE[what]
    damage(saved)
    with pytest.raises(kind, match=message) as error:
        PromptPair.from_pretrained(saved)
    assert "\n" not in str(error.value)


WHOLE = {
    "base_model_name_or_path": "org/tiny",
    "vocab_size": VOCAB,
    "training": {"chat": True, "pairs": {"train": {"D_HR": 4}}},
    "results": {
        "harmless_rate": [
            {"benchmark": "B", "method": "ACD", "rate": 0.9, "n": 10, "interval": [0.6, 1.0], "judge": "keywords"}
        ]
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved pair about which everything is known."""
    folder = tmp_path_factory.mktemp("whole")
    build_pair(**WHOLE).save_pretrained(folder)
    return folder


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["", "7", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
GONE = object()
ROW = ("results", "harmless_rate", 0)
PATHS = [
    *(("acd_config.json", key) for key in PairConfig.__dataclass_fields__),
    *(("acd_config.json", *path) for path in (ROW[:2], ROW, *((*ROW, key) for key in WHOLE["results"][ROW[1]][0]))),
    *(
        (ADAPTER_CONFIG, key)
        for key in ("peft_type", "num_virtual_tokens", "token_dim", "task_type", "base_model_name_or_path", "revision")
    ),
]


@pytest.mark.newest
@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_any_value_in_a_config_is_kept_or_refused(whole, path):
    """A pair that loads can be saved and comes back the same; one that does not says which file is wrong."""
    name, *keys, last = path

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(value=JSON | st.sampled_from([GONE, -1, 0, 1, 7, 10**400, 1e-300, [], {}, [[]], [{}], {"x": math.nan}]))
    def check(value):
        values = json.loads((whole / name).read_text(encoding="utf-8"))
        place = values
        for key in keys:
            place = place[key]
        if value is GONE:
            with contextlib.suppress(KeyError):
                del place[last]
        else:
            place[last] = value
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            (folder / name).write_text(json.dumps(values), encoding="utf-8")
            try:
                pair = PromptPair.from_pretrained(folder)
            except (OSError, ValueError) as error:
                assert Path(name).name in str(error)
                assert len(str(error).splitlines()) == 1
                return
            pair.save_pretrained(folder / "again")
            again = PromptPair.from_pretrained(folder / "again")
        assert again.config == pair.config
        assert torch.equal(again.safeguarding, pair.safeguarding)
        assert torch.equal(again.adversarial, pair.adversarial)

    check()


def row(**changes):
    return {"results": {"over_refusal": [WHOLE["results"]["harmless_rate"][0] | changes]}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": "0.5"}, "alpha must be a number, got '0.5'"),
        ({"alpha": None}, "alpha must be a number, got null"),
        ({"alpha": True}, "alpha must be a number, got True"),
        ({"alpha": torch.ones(2, 2)}, "alpha must be a number, got tensor"),
        ({"alpha": math.nan}, "alpha must be finite and at least 0"),
        ({"alpha": 1e39}, "alpha must be finite and at least 0"),
        ({"alpha": 10**400}, "alpha must hold what JSON can hold .* too large"),
        ({"beta": 10**400}, "beta must hold what JSON can hold .* too large"),
        ({"alpha": -0.1}, "alpha must be finite and at least 0"),
        ({"beta": {}}, "beta must be a number"),
        ({"beta": 1.5}, "beta must lie between 0 and 1"),
        ({"beta": math.nan}, "beta must lie between 0 and 1"),
        ({"share_instruction_kv": "false"}, "share_instruction_kv must be true or false or null, got 'false'"),
        ({"share_instruction_kv": 0}, "share_instruction_kv must be true or false or null, got 0"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"format_version": 1.0}, "format_version must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number or null, got True"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"vocab_size": -3}, "vocab_size must be at least 1"),
        ({"vocab_size": 97.0}, "vocab_size must be a whole number or null"),
        ({"acd_logits_version": None}, "acd_logits_version must be text"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be text or null"),
        ({"base_model_name_or_path": "\ud800"}, "base_model_name_or_path must hold what JSON can hold"),
        ({"base_model_revision": []}, "base_model_revision must be text or null"),
        ({"chat_template_sha256": b"ab"}, "chat_template_sha256 must be text or null"),
        ({"training": []}, "training must be a dict"),
        ({"training": {"dtype": torch.float32}}, "training must hold what JSON can hold"),
        ({"results": None}, "results must be a dict, got null"),
        ({"results": {"harmless_rate": 3}}, "results must hold a list of rows under 'harmless_rate', got 3"),
        ({"results": {"harmless_rate": [3]}}, "measured results must be a dict, got 3"),
        (row(rate="90 %"), "must have a rate, and an interval of rates, from 0 to 1"),
        (row(rate=90), "must have a rate, and an interval of rates, from 0 to 1"),
        (row(rate=math.nan), "must have a rate, and an interval of rates, from 0 to 1"),
        (row(interval=1), "must have a rate, and an interval of rates, from 0 to 1"),
        (row(interval=["0.6", 1]), "must have a rate, and an interval of rates, from 0 to 1"),
    ],
)
def test_bad_config_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        PairConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("safeguarding", "adversarial", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 4), r"must be a float tensor \[num_virtual_tokens, hidden_size\]"),
        (torch.zeros(3, 4, dtype=torch.long), torch.zeros(2, 4), "must be a float tensor"),
        (torch.zeros(3, 4, dtype=torch.complex64), torch.zeros(2, 4), r"must be a float tensor .* torch\.complex64"),
        (torch.zeros(3, 4).to(torch.float8_e5m2), torch.zeros(2, 4), r"must be a float tensor .* torch\.float8_e5m2"),
        (torch.zeros(3, 4, device="meta"), torch.zeros(2, 4), r"must be a float tensor .* meta\)"),
        (torch.zeros(3, 4).to_sparse(), torch.zeros(2, 4), r"must be a float tensor .*torch\.sparse_coo"),
        (torch.zeros(3, 0), torch.zeros(2, 0), r"must be a float tensor .* got \[3, 0\]"),
        ([[1.0]], torch.zeros(2, 4), "must be a float tensor"),
        (torch.zeros(3, 4), torch.zeros(2, 5), "hidden size 4, the adversarial one 5"),
        (torch.zeros(3, 4), torch.full((2, 4), torch.inf), "adversarial prompt holds NaN or infinite"),
    ],
)
def test_bad_tensors(safeguarding, adversarial, message):
    with pytest.raises(ValueError, match=message):
        PromptPair(safeguarding, adversarial)


def test_a_config_is_a_pair_config():
    with pytest.raises(ValueError, match="config must be a PairConfig, got dict"):
        PromptPair(torch.zeros(3, 4), torch.zeros(2, 4), {"alpha": 0.5})


class TestWhatToLoad:
    @pytest.mark.parametrize("name", ["", None, 3, b"org/pair"])
    def test_no_name(self, saved, monkeypatch, name):
        monkeypatch.chdir(saved)  # which holds a pair
        with pytest.raises(ValueError, match="pretrained_model_name_or_path must be a folder or a Hub id, got"):
            PromptPair.from_pretrained(name)

    @pytest.mark.parametrize("subfolder", ["..", "../pair", "a/../../pair", "/pair", 3])
    def test_a_subfolder_lies_inside(self, saved, subfolder):
        if subfolder == "/pair":
            subfolder = str(saved)
        with pytest.raises(ValueError, match="subfolder must"):
            PromptPair.from_pretrained(saved, subfolder=subfolder)

    @pytest.mark.parametrize("subfolder", ["pair/", "./pair", Path("pair")])
    def test_forms_of_a_subfolder(self, saved, subfolder):
        assert PromptPair.from_pretrained(saved.parent, subfolder=subfolder).alpha == 0.4


class TestHub:
    def test_id_not_found_while_offline(self, tmp_path):
        """As these tests are: see conftest."""
        with pytest.raises(OSError, match=r"^org/no-such-pair is not a folder, not in the local cache.*$") as error:
            PromptPair.from_pretrained("org/no-such-pair", cache_dir=tmp_path)
        assert "\n" not in str(error.value)

    @pytest.mark.newest
    def test_id_not_found_among_local_files(self, tmp_path):
        """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE once."""
        code = (
            "from acd_logits import PromptPair\n"
            f"options = {{'cache_dir': {str(tmp_path)!r}, 'local_files_only': True}}\n"
            "try: PromptPair.from_pretrained('org/no-such-pair', **options)\n"
            "except OSError as error: print(error)"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": ""}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert out.stdout.startswith("org/no-such-pair is not a folder, not in the local cache")
        assert out.stdout.count("\n") == 1

    def test_neither_folder_nor_id(self):
        with pytest.raises(OSError, match="neither a folder nor a valid Hub id"):
            PromptPair.from_pretrained("./no/such/folder")


def test_repr_names_shapes_and_strength():
    text = repr(PromptPair(torch.zeros(3, 4), torch.zeros(2, 4), PairConfig(alpha=0.25)))
    assert "[3, 4]" in text
    assert "alpha=0.25" in text


def test_the_digest_is_of_the_prompts():
    assert build_pair(alpha=0.4).digest == build_pair().digest != build_pair(seed=2).digest
