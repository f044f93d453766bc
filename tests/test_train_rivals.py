"""The script that makes the rivals of a pair: what it makes on a tiny model, and that it goes on where it was."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from acd_logits.evaluation.rival_folder import RivalFolder
from acd_logits.evaluation.rivals import LoRA
from acd_logits.evaluation.steering import decoder_layers
from acd_logits.responses import Response
from conftest import HIDDEN, VOCAB, build_model, build_tokenizer
from tiny_training import CHAT_TEMPLATE, HARMFUL, REFUSAL, SAFE, anchor_rows

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_rivals.py"
NAMES = ["steering", "cast", "lora", "safedecoding", "adacd"]
SETTINGS = ["--device", "cpu", "--num_requests", "2", "--max_new_tokens", "2", "--held_out_fraction", "0.3"]
SETTINGS += ["--learning_rate", "0.03", "--num_train_epochs", "15", "--train_batch_size", "8", "--batch_size", "3"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_rivals", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A model, its tokenizer, and anchors beside them."""
    path = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = build_tokenizer(words, unk_token="<pad>", special=names.values(), **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path / "model")
    build_model().save_pretrained(path / "model")
    (path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in anchor_rows()))
    return path


@pytest.fixture
def run(script, tiny_folder, monkeypatch, capsys):
    def run(output, *arguments, code=0):
        files = ["--train_file", str(tiny_folder / "anchors.jsonl"), "--output_dir", str(output)]
        model = ["--model_name_or_path", str(tiny_folder / "model")]
        monkeypatch.setattr(sys, "argv", ["train_rivals.py", *files, *model, *SETTINGS, *arguments])
        assert script.main() == code
        return capsys.readouterr()

    return run


def test_all_rivals_are_made_and_what_is_there_is_kept(run, script, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "is_refusal", lambda text, request: "w50" in text)
    monkeypatch.setattr(script, "STRENGTHS", {name: some[:2] for name, some in script.STRENGTHS.items()})

    def stopped(shop):
        shop.folder.joinpath("run").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(script.MAKE, "lora", stopped)
        run(tmp_path / "rivals", code=130)
    shown = run(tmp_path / "rivals", "--guard", "org/guard", "--harmless_label", "fine")
    assert [line.partition(":")[0] for line in shown.out.splitlines()[-5:]] == list(script.MAKE)
    name = str(tiny_folder / "model")
    folder = RivalFolder(tmp_path / "rivals", name)
    assert folder.names == [*NAMES, "guard"]
    assert folder.settings["guard"] == {"model": "org/guard", "harmless_label": "fine"}
    rivals = folder.load(NAMES)
    assert rivals["cast"].direction.shape == rivals["cast"].condition.direction.shape == (HIDDEN,)
    assert 1 <= rivals["cast"].condition.layer <= rivals["cast"].layer < 3

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    questions = [([{"role": "user", "content": f"{text} w31"}], []) for text in (HARMFUL, SAFE)]
    refused, answered = LoRA(tmp_path / "rivals" / "lora").answer(model, tokenizer, questions, max_new_tokens=3)
    assert refused.text == REFUSAL
    assert not answered.text.startswith("w50")

    before = (tmp_path / "rivals" / "lora" / "adapter_model.safetensors").read_bytes()
    steering = folder.digests(["steering"])
    content = json.loads((tmp_path / "rivals" / "rivals.json").read_text())
    assert content["made"]["lora"]["held_out_gap"] > 0
    cast = content["rivals"].pop("cast")
    (tmp_path / "rivals" / "rivals.json").write_text(json.dumps(content))
    assert run(tmp_path / "rivals").err.count("minutes") == 1
    folder = RivalFolder(tmp_path / "rivals", name)
    assert folder.settings["cast"] == cast
    assert folder.digests(["steering"]) == steering
    assert (tmp_path / "rivals" / "lora" / "adapter_model.safetensors").read_bytes() == before
    assert (
        "was made with other settings: choose another --output_dir"
        in run(tmp_path / "rivals", "--seed", "1", code=1).err
    )


def test_what_is_wrong(run, script, tmp_path):
    nobody = [{"split": "D_S", "instruction": "w1", "history": []}]
    args = type("Args", (), {"output_dir": tmp_path, "seed": 0, "num_requests": 2})
    both = [*nobody, {"split": "D_HR", "instruction": "w2", "history": []}]
    with pytest.raises(ValueError, match="the held-out part of the anchors has no harmful request: choose another"):
        script.Workshop(args, (both, nobody), None, None)
    assert "--harmless_label needs --guard" in run(tmp_path / "rivals", "--harmless_label", "safe", code=1).err
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds something other than rivals" in run(tmp_path, code=1).err
    assert not (tmp_path / "rivals").exists()


def test_the_adapter_is_trained_where_the_model_is(script, tmp_path):
    shop = script.Workshop.__new__(script.Workshop)
    shop.folder, shop.model = tmp_path, build_model()
    shop.args = type("Args", (), {"learning_rate": 0.1, "num_train_epochs": 1, "train_batch_size": 1, "seed": 0})
    assert script.lora_arguments(shop).device == torch.device("cpu")
    shop.model = build_model().to("meta")
    with pytest.raises(ValueError, match="the model is on meta: leave --device out"):
        script.lora_arguments(shop)


class Refuses:
    """Refuses as many of the first harmful and of the first safe requests."""

    def __init__(self, harmful, safe):
        self.shares = {"harmful": harmful, "safe": safe}

    def answer(self, model, tokenizer, questions, **settings):
        number = self.shares[questions[0][0][0]["content"]]
        return [Response("no" if i < number else "yes", (), True) for i in range(len(questions))]


def test_the_choice_refuses_harmful_requests_more_than_safe_ones(script, monkeypatch):
    monkeypatch.setattr(script, "is_refusal", lambda text, request: text == "no")
    shop = script.Workshop.__new__(script.Workshop)
    shop.asked = [[([{"role": "user", "content": name}], [])] * 4 for name in ("harmful", "safe")]
    shop.model = shop.tokenizer = None
    shop.args = type("Args", (), {"max_new_tokens": 4, "batch_size": 2})
    rivals = {1.0: Refuses(1, 0), 2.0: Refuses(4, 1), 3.0: Refuses(4, 4), 5.0: Refuses(3, 0)}
    assert shop.choose(rivals) == (2.0, 0.75)


def test_the_best_layers_are_tried_at_every_strength(script):
    class Shop(script.Workshop):
        def __init__(self):
            self.tried = []

        def gap(self, rival):
            self.tried.append((rival.layer, rival.strength))
            return {3: 0.5, 4: 0.4, 5: 0.3 + (rival.strength == 2.0)}.get(rival.layer, 0.0)

    shop = Shop()
    settings, gap = script.choose_steering(shop, "steering", torch.zeros(10, 4), None)
    assert (settings, gap) == ({"layer": 5, "strength": 2.0}, 1.3)
    assert shop.tried[:7] == [(layer, 1.0) for layer in range(1, 8)]
    assert {layer for layer, _ in shop.tried[7:]} == {3, 4, 5}


def test_questions_are_drawn_once_each(script):
    rows = [
        {"split": split, "instruction": f"w{i}", "history": ["w1", "w2"] if i == 3 else []}
        for i in range(6)
        for split in (("D_HR", "D_HA") if i < 4 else ("D_S", "D_S"))
    ]
    harmful = script.ask(rows, True, 9, seed=0)
    assert sorted(messages[-1]["content"] for messages, _ in harmful) == ["w0", "w1", "w2", "w3"]
    assert sorted(len(messages) for messages, _ in harmful) == [1, 1, 1, 3]
    assert script.ask(rows, True, 2, seed=0) == harmful[:2]
    assert len(script.ask(rows, False, 9, seed=0)) == 2


def test_directions_are_differences_of_what_goes_into_the_layers(script, tokenizer):
    model = build_model()
    shop = script.Workshop.__new__(script.Workshop)
    shop.model, shop.tokenizer = model, tokenizer
    shop.args = type("Args", (), {"batch_size": 2})
    texts = ["w5 w6 w7", "w8", "w9 w10"]
    last, mean = script.layer_inputs(shop, [([{"role": "user", "content": text}], []) for text in texts])
    assert last.shape == mean.shape == (3, 3, HIDDEN)
    seen = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    for i, state in enumerate(seen):
        torch.testing.assert_close(last[i % 3, i // 3], state[0, -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mean[i % 3, i // 3], state[0].mean(0), atol=1e-5, rtol=1e-4)


def test_the_condition_tells_harmful_from_safe(script):
    """Layer 2 of 4 does, from below: its safe requests lie along the direction."""
    generator = torch.Generator().manual_seed(0)
    candidates = torch.eye(4)[[0, 0, 0, 0]]
    harmful, safe = (torch.randn(4, 6, 4, generator=generator) for _ in range(2))
    harmful[2, :, 0], safe[2, :, 0] = 0.0, 9.0
    condition = script.find_condition(candidates, harmful, safe)
    assert (condition.layer, condition.larger) == (2, False)
    mask = torch.ones(6, 1)
    assert condition.met(harmful[2][:, None], mask).all()
    assert not condition.met(safe[2][:, None], mask).any()
