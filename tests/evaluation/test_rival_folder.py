"""A folder of rivals: what is wrong with it shows before any work, and its rivals answer and score in a comparison."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from acd_logits.evaluation.benchmarks import Benchmark, Request
from acd_logits.evaluation.comparison import Decoding, plan_cells, run_comparison
from acd_logits.evaluation.judges import ClassifierJudge, KeywordJudge
from acd_logits.evaluation.report import write_report
from acd_logits.evaluation.results import ResultsFolder
from acd_logits.evaluation.rival_folder import RivalFolder, check_scoring
from acd_logits.evaluation.rivals import REFUSAL
from conftest import HIDDEN, VOCAB, build_model, build_tokenizer
from test_judges import save_classifier
from tiny_results import SETTINGS

NAMES = ["steering", "cast", "lora", "safedecoding", "adacd", "guard"]
ASKED = Benchmark("asked", "Asked", (Request("w5 w6 w7", "harmful"), Request("w8 w9", "safe"), Request("w10", "safe")))
CHOICES = Benchmark("choices", "Choices", (Request("w5 w6", "safe", choices=("w7 w8 w9", "w10")),))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with every rival of a tiny model."""
    path = tmp_path_factory.mktemp("rivals")
    rivals = {
        "steering": {"layer": 1, "strength": 2.0},
        "cast": {"layer": 2, "strength": 2.0, "condition": {"layer": 1, "threshold": 0.1, "larger": True}},
        "lora": {},
        "safedecoding": {"strength": 3.0, "tokens": 2, "common": 5},
        "adacd": {"strength": 0.5, "tokens": 3},
        "guard": {"model": save_classifier(path / "guard", ["safe", "unsafe"]), "harmless_label": None},
    }
    content = {"format_version": 1, "model": "org/tiny", "rivals": rivals}
    (path / "rivals.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(1)
    for arm, names in (("steering", ("steering",)), ("cast", ("cast", "condition"))):
        save_file({name: torch.randn(HIDDEN, generator=generator) for name in names}, path / f"{arm}.safetensors")
    adapted = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(path / "lora")
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "rivals")
    return tmp_path / "rivals"


def change(folder, **settings):
    content = json.loads((folder / "rivals.json").read_text())
    (folder / "rivals.json").write_text(json.dumps(content | settings))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rivals.json", r"rivals holds no rivals: rivals\.json is missing, which scripts/train_rivals\.py writes"),
        ("steering.safetensors", r"steering\.safetensors is missing, which the arm 'steering' needs"),
        ("cast.safetensors", r"cast\.safetensors is missing, which the arm 'cast' needs"),
        ("lora/adapter_model.safetensors", r"adapter_model\.safetensors is missing, which the arm 'lora' needs"),
    ],
)
def test_a_file_is_missing(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        RivalFolder(folder, "org/tiny")


def test_a_folder_that_is_wrong(folder):
    with pytest.raises(ValueError, match="were made for org/tiny, not for org/other: make them for this model"):
        RivalFolder(folder, "org/other")
    change(folder, rivals={"adacd": {"strenght": 1.0}, "guard": {"model": "org/guard"}})
    rivals = RivalFolder(folder, "org/tiny")
    assert rivals.names == ["adacd", "guard"]
    for name in rivals.names:
        with pytest.raises(ValueError, match=f"has damaged settings of '{name}' .+: make it again"):
            rivals.load([name])
    with pytest.raises(ValueError, match="has no 'lora', but adacd, guard: leave the arm out"):
        rivals.load(["base", "lora"])
    change(folder, rivals=[])
    with pytest.raises(ValueError, match=r"rivals\.json is damaged, since it names no rivals: make the rivals again"):
        RivalFolder(folder, "org/tiny")
    change(folder, model=None)
    with pytest.raises(ValueError, match="since it names no model"):
        RivalFolder(folder, "org/tiny")
    change(folder, format_version=2)
    with pytest.raises(ValueError, match="was not written by this version"):
        RivalFolder(folder, "org/tiny")
    (folder / "rivals.json").write_text("{")
    with pytest.raises(ValueError, match=r"rivals\.json is not valid JSON .+: make the rivals again"):
        RivalFolder(folder, "org/tiny")


@pytest.mark.parametrize("name", ["steering.safetensors", "cast.safetensors", "lora/adapter_model.safetensors"])
def test_a_file_that_is_cut_off(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-5])
    with pytest.raises(OSError, match=r"\.safetensors is damaged .+: make the rivals again"):
        RivalFolder(folder, "org/tiny").load([name.partition("/")[0].partition(".")[0]])


def test_results_belong_to_the_rivals_that_gave_them(folder, tmp_path):
    digests = RivalFolder(folder, "org/tiny").digests(["base", "lora", "steering", "adacd"])
    assert list(digests) == ["lora", "steering", "adacd"]
    results = ResultsFolder(tmp_path / "results", SETTINGS)
    results.register([ASKED], rivals=digests)
    save_file({"steering": torch.zeros(HIDDEN)}, folder / "steering.safetensors")
    changed = RivalFolder(folder, "org/tiny").digests(["lora", "steering"])
    assert changed["lora"] == digests["lora"]
    results.register([ASKED], rivals={"lora": changed["lora"]})
    with pytest.raises(ValueError, match="holds answers of another steering: choose another folder"):
        results.register([ASKED], rivals=changed)


def run(path, rivals, names, benchmarks, tokenizer):
    results = ResultsFolder(path, SETTINGS)
    results.register(benchmarks, rivals=rivals.digests(names))
    results.start({"date": "2026-01-01", "device": "cpu", "command": "evaluate", "versions": {"torch": "2"}})
    cells = plan_cells([benchmark.name for benchmark in benchmarks], names, [0.5], [0.1])
    model, decoding = build_model(), Decoding(max_new_tokens=5, batch_size=2)
    judge = KeywordJudge()
    run_comparison(model, tokenizer, results, benchmarks, cells, judge, None, decoding, rivals=rivals.load(names))
    return results


def test_rivals_answer_in_a_comparison(whole, tmp_path):
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = build_tokenizer(words, unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")
    rivals = RivalFolder(whole, "org/tiny")
    assert rivals.names == NAMES
    results = run(tmp_path, rivals, ["null", *NAMES, "base"], [ASKED], tokenizer)
    said = {}
    for row in results.rows:
        said.setdefault(row["arm"], []).append(row["response"])
    assert list(said) == ["null", *NAMES, "base"]
    assert all(said[name] != said["null"] for name in ("steering", "lora", "safedecoding", "adacd"))
    guard = ClassifierJudge(str(whole / "guard")).judge_requests([request.text for request in ASKED.requests])
    assert said["guard"] == [
        a if verdict == "harmless" else REFUSAL for a, verdict in zip(said["null"], guard, strict=True)
    ]
    alone = run(tmp_path / "alone", rivals, ["null", "base"], [ASKED], tokenizer)
    assert [row["response"] for row in alone.rows] == said["null"] + said["base"], "no rival leaves anything behind"
    report = write_report(results).read_text()
    for title in ("Steering", "CAST", "Safety tuning", "SafeDecoding", "AdaCD", "Guard"):
        assert f"| {title} | " in report


def test_choices_are_scored_by_the_changed_model(whole, tokenizer, tmp_path):
    names = ["null", "lora", "steering"]
    rows = run(tmp_path, RivalFolder(whole, "org/tiny"), names, [CHOICES], tokenizer).rows
    assert len({tuple(row["loglikelihoods"]) for row in rows}) == 3
    check_scoring([*names, "base"], [ASKED, CHOICES])
    check_scoring(NAMES, [ASKED])
    with pytest.raises(ValueError, match="the arm 'cast' cannot score the choices of choices: leave one of them out"):
        check_scoring(NAMES, [ASKED, CHOICES])
