"""The script that trains a harm judge, from files of labels to a judge that `evaluate` takes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from acd_logits.evaluation.harm import HarmClassifier
from conftest import build_model
from tiny_harm import write_labelled

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_harm_judge.py"


@pytest.fixture
def model_name(tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def run(model_name, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train_harm_judge", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments, code=0):
        model = ["--model_name_or_path", model_name, "--device", "cpu", "--output_dir", str(tmp_path / "judge")]
        monkeypatch.setattr(sys, "argv", ["train_harm_judge.py", *model, *map(str, arguments)])
        assert script.main() == code
        return capsys.readouterr()

    return run


def test_from_labels_to_a_judge(run, model_name, tmp_path):
    labels = write_labelled(tmp_path / "results", "labels-train.jsonl").path / "labels-train.jsonl"
    fresh = write_labelled(tmp_path / "fresh", seed=1).path / "labels.jsonl"
    shown = run("--train_labels", labels, "--fresh_labels", fresh, "--layers", 1, 2).out.splitlines()
    assert shown[0] == "layers 1 and 2, trained on 27 responses that do not refuse"
    assert shown[2] == "| Cohen's kappa | Cross-validated | Fresh labels |"
    assert shown[4].startswith("| Goes along or not, by the harm judge | ")
    assert shown[-1] == str(tmp_path / "judge")

    judge = HarmClassifier.load(tmp_path / "judge", model_name)
    assert judge.layers == (1, 2)
    assert judge.facts["fresh"]["harmful"]["n"] == 27
    text = "".join(file.read_bytes().decode("latin-1") for file in (tmp_path / "judge").iterdir())
    assert not any(word in text for word in ("w60", "w75", "help with that")), "it holds no text"
    again = run("--train_labels", labels, code=1).err
    assert "harm_judge.json exists: delete it or choose another name" in again


def test_without_fresh_labels(run, tmp_path):
    labels = write_labelled(tmp_path / "results").path / "labels.jsonl"
    assert "Fresh labels" not in run("--train_labels", labels).out
    content = json.loads((tmp_path / "judge" / "harm_judge.json").read_text())
    assert "fresh" not in content


def test_what_is_wrong_is_found_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail())
    assert "holds no results: run.json is missing" in run("--train_labels", tmp_path / "labels.jsonl", code=1).err
    results = write_labelled(tmp_path / "results", kinds=("complies", "refuses"))
    labels = results.path / "labels.jsonl"
    assert "0 (to 0 requests) are of the kind that does not go along" in run("--train_labels", labels, code=1).err
    labels.write_text("{")
    assert "labels.jsonl is damaged" in run("--train_labels", labels, code=1).err
