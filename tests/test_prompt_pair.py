"""The artifact: saving, loading, checking, and every way it can be wrong."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.utils import logging

from acd_logits import PromptPair
from acd_logits.prompt_pair import PairConfig
from conftest import HIDDEN, PAIR_FILES, VOCAB, build_batch, build_model, build_pair


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

    def test_failed_save_leaves_nothing_behind(self, tmp_path, monkeypatch):
        from acd_logits import prompt_pair

        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(prompt_pair, "save_file", fail)
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
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_artifacts(saved, what):
    damage, kind, message = DAMAGE[what]
    damage(saved)
    with pytest.raises(kind, match=message) as error:
        PromptPair.from_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("safeguarding", "adversarial", "message"),
    [
        (torch.zeros(3), torch.zeros(2, 4), r"must be a float tensor \[num_virtual_tokens, hidden_size\]"),
        (torch.zeros(3, 4, dtype=torch.long), torch.zeros(2, 4), "must be a float tensor"),
        ([[1.0]], torch.zeros(2, 4), "must be a float tensor"),
        (torch.zeros(3, 4), torch.zeros(2, 5), "hidden size 4, the adversarial one 5"),
        (torch.zeros(3, 4), torch.full((2, 4), torch.inf), "adversarial prompt holds NaN or infinite"),
    ],
)
def test_bad_tensors(safeguarding, adversarial, message):
    with pytest.raises(ValueError, match=message):
        PromptPair(safeguarding, adversarial)


class TestHub:
    @pytest.mark.parametrize("flags", [{"local_files_only": True}, {}])
    def test_id_not_found_while_offline(self, tmp_path, flags):
        """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE once."""
        code = (
            "from acd_logits import PromptPair\n"
            f"try: PromptPair.from_pretrained('org/no-such-pair', cache_dir={str(tmp_path)!r}, **{flags})\n"
            "except OSError as error: print(error)"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "" if flags else "1"}
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
