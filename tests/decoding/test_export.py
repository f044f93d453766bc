"""What `acd-logits export` writes and refuses."""

import ast
import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from acd_logits import PromptPair
from acd_logits.cli import main
from acd_logits.decoding.export import export
from conftest import VOCAB, build_model, build_pair


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def base(tmp_path, tokenizer):
    """Writes a tiny base model; returns its folder."""

    def write(**kwargs):
        folder = tmp_path / "base"
        build_model().save_pretrained(folder, **kwargs)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_the_weights_are_linked_into_a_folder_of_their_own(base, tmp_path, shards):
    folder, out = base(**shards), tmp_path / "out"
    export(folder, out, build_pair())

    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(path.name for path in (out / "model").glob("*.safetensors")) == weights
    assert all((out / "model" / name).samefile(folder / name) for name in weights)
    assert not list(out.glob("*.safetensors*"))
    assert read(out / "model" / "config.json") == read(folder / "config.json")
    config = read(out / "config.json")
    assert config["auto_map"] == {"AutoModelForCausalLM": "safeguarded.SafeguardedModel"}
    assert config["architectures"] == ["SafeguardedLlamaForCausalLM"]
    assert config["acd"] == {"format_version": 1, "base_model_name_or_path": "base"}
    ids = AutoTokenizer.from_pretrained(out)("w5 w6 w7")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(folder)("w5 w6 w7")["input_ids"]


def test_the_strength_of_the_pair_can_be_set(base, tmp_path):
    export(base(), tmp_path / "out", build_pair(alpha=0.3), alpha=0.7, beta=0.0)
    pair = PromptPair.from_pretrained(tmp_path / "out" / "pair")
    assert (pair.alpha, pair.beta) == (0.7, 0.0)


def test_the_card_has_the_pairs_rates_unless_another_strength_is_set(base, tmp_path):
    row = {"benchmark": "AdvBench", "method": "ACD", "rate": 0.9, "n": 10}
    pair = build_pair(results={"harmless_rate": [row]})
    export(base(), tmp_path / "same", pair, alpha=pair.alpha)
    export(base(), tmp_path / "other", pair, alpha=0.7)
    data = [ModelCard.load(tmp_path / name / "README.md").data for name in ("same", "other")]
    assert data[0].library_name == "transformers"
    assert [result.metric_value for result in data[0].eval_results] == [0.9]
    assert data[1].eval_results is None
    assert PromptPair.from_pretrained(tmp_path / "other" / "pair").config.results == {}


def test_texts_of_the_files_name_no_folder_of_this_machine(base, tmp_path):
    export(base(), tmp_path / "out")
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md", ".py")]
    assert not any(str(tmp_path) in text for text in texts)
    ast.parse((tmp_path / "out" / "safeguarded.py").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base, out: out.mkdir(), "exists: choose a new folder"),
        (lambda base, out: (base / "config.json").unlink(), "config.json is missing"),
        (lambda base, out: (base / "model.safetensors").unlink(), "safetensors"),
        (
            lambda base, out: (base / "config.json").write_text('{"architectures": ["X"], "acd": {}}'),
            "exported already",
        ),
    ],
    ids=["there", "no model", "no weights", "exported"],
)
def test_what_cannot_be_exported(base, tmp_path, change, message):
    folder, out = base(), tmp_path / "out"
    change(folder, out)
    with pytest.raises((OSError, ValueError), match=message):
        export(folder, out, build_pair())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not (out / "config.json").exists()


def test_a_pair_of_another_model_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="hidden size 16"):
        export(base(), tmp_path / "out", build_pair(hidden=16))
    assert not (tmp_path / "out").exists()


def test_command(base, tmp_path, capsys, fails):
    build_pair(vocab_size=VOCAB).save_pretrained(tmp_path / "saved")
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", str(base()), "--pair", str(tmp_path / "saved"), "--alpha", "0.7"]
    assert main(["export", *arguments, "--output_dir", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert PromptPair.from_pretrained(out / "pair").alpha == 0.7
    assert "exists" in fails("export", "--output_dir", str(out))
