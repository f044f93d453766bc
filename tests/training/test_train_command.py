"""The command `acd-logits train`: its arguments, several processes, and runs that were killed."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, T5Config

from acd_logits import PromptPair
from acd_logits.cli import main
from acd_logits.training import OPOTrainer, OPOTrainingArguments
from acd_logits.training.trainer import NAMES
from conftest import VOCAB, build_model
from tiny_training import CHAT_TEMPLATE, anchor_rows, assert_same_pair, history

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A saved tiny Llama with a tokenizer, and beside it anchor data and texts for the prompts to start as."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    build_model().save_pretrained(folder)
    (folder / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in anchor_rows()))
    (folder / "safe.txt").write_text("w3 w4 w5 w6 w7 w8\n")
    (folder / "opposite.txt").write_text("w9 w8 w7 w6\n")
    return folder


@pytest.fixture
def command(model_folder, tmp_path):
    """Arguments of `train` for the tiny model; later ones win."""
    return [
        *("--train_file", str(model_folder / "anchors.jsonl"), "--model_name_or_path", str(model_folder)),
        *("--safe_prompt_file", str(model_folder / "safe.txt"), "--output_dir", str(tmp_path / "pair")),
        *("--opposite_prompt_file", str(model_folder / "opposite.txt"), "--held_out_fraction", "0.2"),
        *("--num_train_epochs", "2", "--learning_rate", "0.1", "--logging_steps", "1", "--use_cpu"),
        *("--per_device_train_batch_size", "8", "--warmup_steps", "0", "--prompt_type", "embedding"),
        *("--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"),
    ]


KILLED = """
import os, signal, sys
from acd_logits import training
from acd_logits.cli import main

steps = 0
compute_loss = training.OPOTrainer.compute_loss

def killing(self, *args, **kwargs):
    global steps
    steps += 1
    if steps > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_loss(self, *args, **kwargs)

training.OPOTrainer.compute_loss = killing
main(["train", *sys.argv[1:]])
"""


def test_a_killed_run_goes_on_where_it_was(command, model_folder, tmp_path, monkeypatch, capsys):
    """Killed in the second epoch: there is the checkpoint of the first."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "pair"
    assert not (folder / "acd_config.json").exists()
    assert (folder / "run" / "checkpoint-3").is_dir()
    # A checkpoint that was cut short does not count
    (folder / "run" / "checkpoint-6").mkdir()
    (folder / "run" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 2.0, "glo')

    runs = []
    train = OPOTrainer.train
    monkeypatch.setattr(OPOTrainer, "train", lambda self, **k: (runs.append(k), train(self, **k)))
    assert main(["train", *command]) == 0, capsys.readouterr().err
    assert runs == [{"resume_from_checkpoint": str(folder / "run" / "checkpoint-3")}]
    assert main(["train", *command, "--output_dir", str(tmp_path / "whole")]) == 0
    assert_same_pair(PromptPair.from_pretrained(folder), PromptPair.from_pretrained(tmp_path / "whole"))
    resumed, whole = (
        [line["eval_loss"] for line in history(f) if "eval_loss" in line] for f in (folder, tmp_path / "whole")
    )
    assert resumed == pytest.approx(whole, rel=1e-6)

    # And once more: nothing is left to do
    runs.clear()
    assert main(["train", *command]) == 0
    assert runs == []


def test_two_processes_give_what_one_gives(command, tmp_path):
    """On the same data order: 24 training examples, two processes of 5 against one of 10, and a short last batch."""
    # With --cpu instead of --multi_gpu, accelerate 1.15 starts a single process
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--prompt_type", "key_value", "--num_virtual_tokens", "5"]
    two = [*command, "--retain", "kl", "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "5"]
    two += ["--ddp_timeout", "60"]
    finished = subprocess.run(
        [*launch, str(ROOT / "scripts" / "train.py"), *two],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("virtual tokens") == 1
    one = [*command, "--retain", "kl", "--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "10"]
    assert main(["train", *one]) == 0
    pairs = [PromptPair.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert_same_pair(*pairs, rtol=1e-4, atol=1e-4)
    logs = [history(tmp_path / name) for name in ("one", "two")]
    for keys in (["loss", *NAMES], ["eval_loss", *(f"eval_{name}" for name in NAMES)]):
        first, second = ([[line.get(k) for k in keys] for line in log if keys[0] in line] for log in logs)
        assert len(first) == len(second) > 0
        for line, other in zip(first, second, strict=True):
            assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_the_command_trains_a_pair(command, tmp_path, capsys):
    assert main(["train", *command]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^held out, before -> after \d epochs:$", out, re.M)
    for stream in ("SP", "AP", "ACD"):
        assert re.search(rf"^{stream} +L_p [\d.]+ -> [\d.]+, L_n [\d.]+ -> [\d.]+, L_r", out, re.M)
    assert out.endswith(f"{tmp_path / 'pair'}: 5 and 5 virtual tokens\n")  # the shorter text has 5
    pair = PromptPair.from_pretrained(tmp_path / "pair")
    assert pair.config.chat_template_sha256
    assert pair.config.training["chat"]
    assert pair.config.training["safe_prompt"] == "w3 w4 w5 w6 w7 w8"


def test_the_finished_pair_is_pushed(command, tmp_path, capsys, monkeypatch):
    pushed = []

    def push(pair, repo_id, **kwargs):
        pushed.append((pair, repo_id, kwargs))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(PromptPair, "push_to_hub", push)
    options = ["--push_to_hub", "--hub_model_id", "some/pair", "--hub_revision", "v1"]
    assert main(["train", *command, "--num_train_epochs", "1", *options]) == 0
    assert capsys.readouterr().out.endswith("https://hub/commit\n")
    ((pair, *call),) = pushed  # once, and not from the two runs
    assert_same_pair(pair, PromptPair.from_pretrained(tmp_path / "pair"))
    assert call == ["some/pair", {"revision": "v1", "token": None}]


def test_a_bfloat16_model_logged_to_tensorboard(command, tmp_path):
    pytest.importorskip("tensorboard")
    assert main(["train", *command, "--dtype", "bfloat16", "--report_to", "tensorboard", "--no_chat"]) == 0
    pair = PromptPair.from_pretrained(tmp_path / "pair")
    assert pair.safeguarding.dtype == torch.float32
    assert not torch.equal(pair.safeguarding, pair.safeguarding.bfloat16().float())
    assert (pair.config.training["dtype"], pair.config.chat_template_sha256) == ("bfloat16", None)
    more = ["--dtype", "bfloat16", "--prompt_type", "key_value", "--output_dir", str(tmp_path / "key-value")]
    assert main(["train", *command, *more]) == 0
    assert PromptPair.from_pretrained(tmp_path / "key-value").adversarial.dtype == torch.bfloat16
    assert list((tmp_path / "pair" / "run" / "runs").glob("*/events.out.tfevents.*"))


@pytest.fixture
def complaint(command, capsys, monkeypatch):
    """Run `train` with these arguments on top; it must fail before it loads weights. Returns its line of complaint."""

    def run(*arguments):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loads the model"))
        try:
            code = main(["train", *command, *map(str, arguments)])
        except SystemExit as usage_error:
            code = usage_error.code
        captured = capsys.readouterr()
        assert code in (1, 2)
        (line,) = re.findall(r"^acd-logits: error: .+\n", captured.err, re.M)
        return line

    return run


def test_the_splits_must_not_be_empty(complaint, tmp_path):
    path = tmp_path / "anchors.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in anchor_rows() if row["split"] != "D_HA"))
    assert "no D_HA" in complaint("--train_file", path)
    # One safe instruction cannot be on both sides
    rows = [row for row in anchor_rows(5) if row["split"] != "D_S"] + anchor_rows(1)[2:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the held-out pairs have no D_S" in complaint("--train_file", path)


def test_a_chat_template_must_be_there(complaint, model_folder, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((model_folder / "config.json").read_text())
    assert "has no chat template: leave out --chat" in complaint("--model_name_or_path", tmp_path / "model", "--chat")


def test_encoder_decoders_are_refused(complaint, tmp_path):
    T5Config().save_pretrained(tmp_path)
    assert "is an encoder-decoder" in complaint("--model_name_or_path", tmp_path)


def test_prompts_must_fit_into_the_context(complaint):
    line = complaint("--num_virtual_tokens", 245)
    assert "245 virtual tokens and the longest pair's" in line
    assert "context of 256" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", "/nowhere"], "/nowhere"),
        (["--safe_prompt_file", "nowhere.txt"], "nowhere.txt"),
        (["--safe_prompt_file", os.devnull], "is empty: a prompt starts as"),
        (["--ln_weight", "-1"], "--ln_weight must be finite and at least 0, not -1.0"),
        (["--held_out_fraction", "1"], "--held_out_fraction must be at least 0 and below 1"),
        (["--num_virtual_tokens", "0"], "--num_virtual_tokens must be at least 1"),
        (["--alpha", "1"], "--alpha must be at least 0 and below 1"),
        (["--retain", "mse"], "invalid choice: 'mse'"),
        (["--resume_from_checkpoint", "some/where"], "leave out --resume_from_checkpoint"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--push_to_hub", "--hub_model_id", "a/b", "--hub_private_repo", "false"], "acd-logits push --public"),
        (["--eval_strategy", "no"], "load_best_model_at_end"),
    ],
)
def test_bad_arguments_get_one_line(complaint, arguments, message):
    assert message in complaint(*arguments)


def test_a_shared_instruction_excludes_checkpointing(complaint):
    new_name = hasattr(OPOTrainingArguments, "activation_checkpointing")
    flag = "--activation_checkpointing" if new_name else "--gradient_checkpointing"
    assert "or train with --prompt_type embedding" in complaint(flag, "--prompt_type", "key_value")


def test_a_folder_belongs_to_one_run(complaint, command, tmp_path):
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "training_settings.json").write_text('{"model": "another"}')
    assert re.search(r"holds a run with another model \(another, now .+\): choose another --output_dir", complaint())


def test_a_loss_that_is_not_a_number_stops_the_run(command, model_folder, tmp_path, capsys):
    model = build_model()
    model.lm_head.weight.data[5] = math.nan
    model.save_pretrained(tmp_path / "model")
    for file in model_folder.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_text(file.read_text())
    arguments = [*command, "--model_name_or_path", str(tmp_path / "model")]
    for extra in ([], ["--eval_on_start", "false"]):
        assert main(["train", *arguments, *extra]) == 1
        assert capsys.readouterr().err.endswith(
            "acd-logits: error: the loss is nan after 0 steps: lower --learning_rate\n"
        )
    assert not (tmp_path / "pair" / "acd_config.json").exists()
