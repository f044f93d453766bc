"""A distilled prompt as an artifact: what is saved, what stock peft makes of it, and what is refused."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers.utils import logging

from acd_logits.pairs.distilled import DistilledPrompt
from acd_logits.pairs.fit import chat_template_digest
from conftest import build_distilled, build_model
from reference import key_value_logits


def test_it_comes_back_as_it_was(tmp_path):
    saved = build_distilled(base_model_name_or_path="org/tiny")
    saved.save_pretrained(tmp_path)
    loaded = DistilledPrompt.from_pretrained(tmp_path)
    assert torch.equal(loaded.prompt, saved.prompt)
    assert (loaded.facts, loaded.digest) == (saved.facts, saved.digest)
    assert loaded.digest != build_distilled(seed=2).digest
    files = ["README.md", "acd_distilled.json", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_stock_peft_runs_it(tmp_path):
    """The whole input sees it, and begins at position n."""
    distilled, ids = build_distilled(), torch.tensor([[5, 6, 7, 8]])
    distilled.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(build_model(), tmp_path)
    expected = key_value_logits(build_model(), distilled.prompt, ids[0], 1, len(distilled.prompt))
    torch.testing.assert_close(stock(ids).logits[0], expected, atol=1e-5, rtol=0)


def test_the_card_says_what_it_is(tmp_path):
    kept = {"KL": 0.1234, "agreement": 0.9, "KL_first": 0.5, "agreement_first": 0.75}
    rates = [{"benchmark": "AdvBench", "method": "Distilled", "rate": 0.97, "n": 100, "interval": [0.92, 0.99]}]
    facts = {"training": {"held_out_loss": {"kept": kept}}, "results": {"harmless_rate": rates}}
    distilled = build_distilled(base_model_name_or_path="org/tiny", **facts)
    card = distilled.card("org/distilled", "apache-2.0")
    _, metadata, text = card.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert (metadata["library_name"], metadata["license"]) == ("peft", "apache-2.0")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/tiny", "adapter")
    assert '"org/distilled")' in text
    assert "The teacher is the pair `org/pair` at\nalpha 0.4 and beta 0.2." in text
    assert "| the first token | 0.500 | 75.0 % |" in text
    assert "| AdvBench | Distilled | 97.0 % | 92.0 to 99.0 | 100 |" in text
    assert "Not measured." in build_distilled().card()
    distilled.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("Mine\n")
    distilled.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine\n"


def test_another_model_or_chat_template_warns(model, tokenizer, caplog):
    logging.enable_propagation()
    model.config._name_or_path = model.name_or_path = "models/Tiny"
    tokenizer.chat_template = "{{ messages }}"
    facts = {"base_model_name_or_path": "org/tiny", "chat_template_sha256": chat_template_digest(tokenizer)}
    for distilled in (build_distilled(), build_distilled(**facts)):
        distilled.check(model)
        distilled.check_chat_template(tokenizer)
    assert not caplog.text
    model.name_or_path = "org/other"
    tokenizer.chat_template = "{{ messages[0].content }}"
    distilled.check(model)
    assert "This adapter was made for org/tiny, the model is org/other: it may protect less." in caplog.text
    distilled.check_chat_template(tokenizer)
    assert "This adapter was trained with another chat template: it may protect less." in caplog.text


def test_what_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"holds no distilled adapter: acd_distilled.json is missing"):
        DistilledPrompt.from_pretrained(tmp_path)
    build_distilled().save_pretrained(tmp_path)
    (tmp_path / "acd_distilled.json").write_text(json.dumps({"teacher": {}}))
    with pytest.raises(ValueError, match="does not say what was distilled"):
        DistilledPrompt.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was distilled for 2 layers, the model has 3"):
        build_distilled(sizes=(2, 2, 8)).check(build_model())
    with pytest.raises(ValueError, match="no rotary embeddings over full attention"):
        build_distilled().check(build_model("gpt2"))
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        DistilledPrompt(build_distilled().prompt * torch.nan, build_distilled().facts).save_pretrained(tmp_path)
