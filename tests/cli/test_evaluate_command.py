"""`acd-logits evaluate`: one run from arguments to report, and what it says when something is wrong."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from acd_logits.cli import main
from acd_logits.evaluation import judges
from acd_logits.evaluation.attacks import ATTACKS
from acd_logits.evaluation.harm import HarmClassifier
from acd_logits.responses import encode_messages, generate_responses
from conftest import ENVIRONMENT, HIDDEN, VOCAB, build_distilled, build_model, build_pair, build_tokenizer

SETTINGS = ["--max_new_tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a model, its pair and files of requests."""
    folder = tmp_path_factory.mktemp("evaluate")
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = build_tokenizer(words, unk_token="<pad>", pad_token="<pad>", eos_token="<eos>")
    build_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    build_pair(vocab_size=VOCAB, base_model_name_or_path="org/model").save_pretrained(folder / "pair")
    (folder / "bad.csv").write_text("id,wish\n1,w5 w6\n2,w7\n")
    (folder / "empty.csv").write_text("")
    (folder / "good.txt").write_text("w8 w9\nw10\n")
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, capsys):
    def run(*arguments, output="results"):
        model = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path / output)]
        code = main(["evaluate", *model, *SETTINGS, *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured

    return run


@pytest.fixture
def fails(fails, folder, tmp_path):
    """Of `acd-logits evaluate` on the tiny model."""
    command = ["evaluate", "--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path / "results")]
    return lambda *arguments, **kwargs: fails(*command, *SETTINGS, *arguments, **kwargs)


def requests(folder):
    return ["--harmful", f"{folder / 'bad.csv'}:wish", "--safe", str(folder / "good.txt")]


def test_a_run_from_arguments_to_report(evaluate, folder, tmp_path):
    pair = ["--pair", str(folder / "pair"), "--betas", "0.1", "0"]
    shown = evaluate(*requests(folder), *pair)
    assert shown.out == f"{tmp_path / 'results' / 'report.md'}\n"
    assert "Finished acd alpha 0.5 beta 0 on bad\n" in shown.err

    rows = [json.loads(line) for line in (tmp_path / "results" / "results.jsonl").open()]
    cells = dict.fromkeys((row["benchmark"], row["arm"], row["alpha"], row["beta"]) for row in rows)
    strengths = [(0.5, 0.1), (0.5, 0.0)]
    arms = [("base", None, None), *(("oid", *s) for s in strengths), ("sp", None, None), ("ap", None, None)]
    arms += [("acd", *s) for s in strengths]
    assert list(cells) == [(benchmark, *arm) for benchmark in ("bad", "good") for arm in arms]
    assert len(rows) == 2 * len(cells)
    assert {row["label"] for row in rows if row["benchmark"] == "bad"} == {"harmful"}

    run = json.loads((tmp_path / "results" / "run.json").read_text())
    assert run["settings"]["pair"] == str(folder / "pair")
    assert run["runs"][0]["device"] == "cpu"
    assert "torch" in run["runs"][0]["versions"]

    again = evaluate(*requests(folder), *pair)
    assert "Finished" not in again.err


def test_a_distilled_adapter(evaluate, fails, folder, tmp_path):
    """Its answers are stock peft's, those of the other arms are without it, and its card shows the rates."""
    adapter = tmp_path / "adapter"
    build_distilled().save_pretrained(adapter)
    (tmp_path / "truth.csv").write_text("Question,Best Answer,Best Incorrect Answer\nw5 w6,w7,w8 w9\n")
    choice = ["--benchmarks", f"truthfulqa_choice={tmp_path / 'truth.csv'}"]
    evaluate(*requests(folder), *choice, "--arms", "null", "distilled", "--adapter", str(adapter))
    rows = [json.loads(line) for line in (tmp_path / "results" / "results.jsonl").open()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    stock = PeftModel.from_pretrained(build_model(), adapter)
    for arm, model in (("null", build_model()), ("distilled", stock)):
        answered = [row for row in rows if row["arm"] == arm and "response" in row]
        asked = [encode_messages(tokenizer, [{"role": "user", "content": row["request"]}]) for row in answered]
        expected = generate_responses(model, tokenizer, asked, max_new_tokens=4, batch_size=1)
        assert [row["response"] for row in answered] == [response.text for response in expected]
    [scored] = [row for row in rows if row["arm"] == "distilled" and "loglikelihoods" in row]
    prompt = torch.tensor([tokenizer("w5 w6")["input_ids"]])
    likelihood = stock(prompt).logits[0, -1].log_softmax(-1)[7].item()
    assert scored["loglikelihoods"][0] == pytest.approx(likelihood, abs=1e-4)

    evaluate("--report_only", "--update_card", str(adapter))
    assert "| bad | Distilled |" in (adapter / "README.md").read_text()
    build_distilled(seed=2).save_pretrained(tmp_path / "other")
    assert "measured on another adapter" in fails("--report_only", "--update_card", str(tmp_path / "other"))
    assert "needs a distilled adapter" in fails(*requests(folder), "--arms", "distilled")


def test_a_depth(evaluate, folder, tmp_path):
    shown = evaluate(*requests(folder), "--arms", "oid", "base", "--begun_tokens", "0", "2")
    assert "Finished oid alpha 0.5 beta 0.1 behind 2 tokens on bad\n" in shown.err
    assert "tokens on good" not in shown.err
    table = (tmp_path / "results" / "report.md").read_text().split("## Depth")[1]
    assert "| Base | bad | 0.00 [0.00, 0.66] (n = 2) | 0.00 [0.00, 0.66] (n = 2) |" in table


def test_attacks(evaluate, folder, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("w30 w31\n")
    attacks = ["--attacks", "fiction", "--attack_files", str(tmp_path / "own.txt")]
    shown = evaluate(*requests(folder), "--arms", "base", *attacks)
    finished = [line for line in shown.err.splitlines() if "Finished" in line]
    assert [line.removeprefix("Finished base ") for line in finished] == [
        "on bad", "on good", "under fiction on bad", "under own on bad",
    ]  # fmt: skip
    table = (tmp_path / "results" / "report.md").read_text().split("## Under attack")[1]
    assert "| own | bad | 2 | 0.00 [0.00, 0.66] |" in table
    assert "w30" not in table

    model = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path / "results")]
    assert main(["evaluate", *model, *SETTINGS, *requests(folder), "--arms", "base", "--attacks"]) == 1
    assert "the longest prompt and its response take" in capsys.readouterr().err, "the distraction is long"
    known = json.loads((tmp_path / "results" / "run.json").read_text())["attacks"]
    assert set(known) == {*ATTACKS, "own"}, "no name means all"


def test_safe_requests_in_the_same_disguise(evaluate, folder, tmp_path):
    shown = evaluate(*requests(folder), "--arms", "base", "--attacks", "fiction", "--attack_safe")
    assert "Finished base under fiction on good\n" in shown.err
    lines = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["benchmark"] == "good" and row["attack"]]
    assert [row["label"] for row in rows] == ["safe"] * len(rows) != []
    harmful, safe = (
        (tmp_path / "results" / "report.md").read_text().split("## Under attack")[1].split("same disguises")
    )
    assert "| Fiction | bad |" in harmful
    assert "| good |" not in harmful
    rate = sum(row["refused"] for row in rows) / len(rows)
    assert f"| Fiction | good | {len(rows)} | {rate:.2f} [" in safe

    again = evaluate(*requests(folder), "--arms", "base", "--attacks", "fiction", "--attack_safe")
    assert "Finished" not in again.err, "what is finished is not asked again"
    assert (tmp_path / "results" / "results.jsonl").read_text().splitlines() == lines
    evaluate("--report_only")
    assert "| Fiction | good |" in (tmp_path / "results" / "report.md").read_text()


def test_a_harm_judge_at_once_and_afterwards(evaluate, fails, folder, tmp_path):
    """The same verdicts, whether the judge reads the answers when they are written or later."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, HIDDEN), torch.zeros(1, 2, HIDDEN), torch.zeros(1)]
    HarmClassifier(str(folder / "model"), (1,), *tensors).save(tmp_path / "judge")
    harm = ["--judge", f"harm:{tmp_path / 'judge'}"]
    arms = ["--pair", str(folder / "pair"), "--arms", "base", "sp", "acd", "--attacks", "fiction"]
    evaluate(*requests(folder), *arms, *harm)
    report = (tmp_path / "results" / "report.md").read_text()
    assert "## What the responses do" in report

    evaluate(*requests(folder), *arms, output="keywords")
    shown = evaluate("--rejudge", str(tmp_path / "keywords"), *harm, output="again")
    assert "Finished acd alpha 0.5 beta 0.1 under fiction on bad\n" in shown.err
    rows = [(tmp_path / name / "results.jsonl").read_text() for name in ("results", "again", "keywords")]
    assert rows[0] == rows[1] != rows[2]
    assert (tmp_path / "again" / "report.md").read_text().split("```")[2] == report.split("```")[2]
    shown = evaluate("--rejudge", str(tmp_path / "keywords"), *harm, output="again")
    assert "Finished acd" not in shown.err
    again = ["--rejudge", str(tmp_path / "results"), *harm]
    assert "holds what is to be judged anew: choose another folder" in fails(*again)
    evaluate("--report_only", "--draw_labels", "12", "--draw_harmful", output="again")

    tensors[0] = -tensors[0]
    HarmClassifier(str(folder / "model"), (1,), *tensors).save(tmp_path / "judge")
    assert "holds results with judge_digest" in fails(*requests(folder), *arms, *harm)
    HarmClassifier("org/other", (1,), *tensors).save(tmp_path / "judge")
    assert "was trained for org/other, not for" in fails(*requests(folder), *arms, *harm)


def test_the_rates_go_into_the_card_of_the_pair(evaluate, fails, folder, tmp_path):
    pair = tmp_path / "pair"
    shutil.copytree(folder / "pair", pair)
    evaluate(*requests(folder), "--pair", str(pair), "--arms", "base", "acd")
    evaluate("--report_only", "--update_card", str(pair))
    results = json.loads((pair / "acd_config.json").read_text())["results"]
    assert [(row["method"], row["n"], row["judge"]) for row in results["harmless_rate"]] == [
        ("Base", 2, "keywords"),
        ("ACD", 2, "keywords"),
    ]
    assert [row["n"] for row in results["over_refusal"]] == [2, 2]
    assert "| bad | ACD |" in (pair / "README.md").read_text()

    build_pair(seed=2, vocab_size=VOCAB, base_model_name_or_path="org/model").save_pretrained(tmp_path / "other")
    assert "was measured on another pair" in fails("--report_only", "--update_card", str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--pair", ""], "--pair is empty"), (["--pair", "text", "--transfer"], "--transfer is about the pair")],
)
def test_a_pair_that_is_none(fails, folder, arguments, said):
    assert said in fails(*requests(folder), *arguments)


def test_a_report_again_and_what_changed(evaluate, folder, tmp_path):
    evaluate(*requests(folder), "--arms", "base", output="old")
    evaluate(*requests(folder), "--arms", "base")
    report = tmp_path / "results" / "report.md"
    before = report.read_bytes()
    report.unlink()

    shown = evaluate("--report_only", "--compare", str(tmp_path / "old"))
    assert shown.out.splitlines() == [str(report), str(tmp_path / "results" / "comparison.md")]
    assert report.read_bytes() == before
    assert "The settings are the same." in (tmp_path / "results" / "comparison.md").read_text()

    shown = evaluate("--report_only", "--publish", str(tmp_path / "copy"))
    assert shown.out.splitlines() == [str(report), str(tmp_path / "copy" / "report.md")]
    assert (tmp_path / "copy" / "report.md").read_bytes() == before
    assert "response" not in json.loads((tmp_path / "copy" / "results.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "adc"], "there is no arm 'adc': choose from base"),
        (["--arms", "acd"], "the arm 'acd' needs a learned pair"),
        (["--arms", "base", "lora"], "the arm 'lora' needs the folder that scripts/train_rivals.py writes"),
        (["--rivals", "{folder}/absent"], "absent holds no rivals"),
        (["--benchmarks", "advbanch"], "there is no benchmark 'advbanch'"),
        (["--harmful", "{folder}/bad.csv"], "bad.csv has none of the columns"),
        (["--harmful", "{folder}/bad.csv:aim"], "bad.csv has no column 'aim': name one of id, wish"),
        (["--harmful", "{folder}/absent.csv"], "absent.csv"),
        (["--harmful", "{folder}/empty.csv"], "empty.csv"),
        (["--harmful", "{folder}/bad.csv:wish", "--safe", "{folder}/bad.csv:wish"], "bad is given twice"),
        (["--pair", "{folder}/absent"], "absent"),
        (["--transfer"], "--transfer is about the pair and needs --pair"),
        (["--judge", "vibes"], "there is no judge 'vibes'"),
        (["--judge", "llm:"], "there is no judge 'llm:'"),
        (["--judge", "classifier:{folder}/absent"], "absent"),
        (["--judge", "harm:"], "choose keywords, harm:FOLDER, classifier:ID or llm:NAME"),
        (["--judge", "harm:{folder}"], "holds no harm judge: harm_judge.json is missing"),
        (["--rejudge", "{folder}/absent", "--judge", "keywords"], "absent holds no results"),
        (["--rejudge", "{folder}", "--report_only"], "--rejudge writes new results"),
        (["--draw_harmful"], "--draw_harmful is about --draw_labels N and needs it"),
        (["--judge_url", "http://localhost"], "--judge_url needs --judge llm:NAME"),
        (["--harmless_label", "safe"], "--harmless_label needs --judge classifier:ID"),
        (["--attacks", "poem"], "there is no attack 'poem'"),
        (["--attack_files", "{folder}/absent.txt"], "absent.txt"),
        (["--safe", "{folder}/good.txt", "--attacks", "fiction"], "--attacks are on harmful requests"),
        (
            ["--harmful", "{folder}/good.txt", "--attacks", "fiction", "--attack_safe"],
            "--attack_safe needs --attacks, and",
        ),
        (["--begun_tokens", "2", "--pair", "text", "--arms", "null"], "add base to --arms"),
        (["--begun_tokens", "5"], "--begun_tokens is more than an answer has"),
        (["--safe", "{folder}/good.txt", "--begun_tokens", "2"], "--begun_tokens is about harmful requests"),
        (["--compare", "{folder}/absent"], "absent holds no results"),
        (["--report_only"], "results holds no results: run.json is missing"),
        (["--output_dir", "{folder}"], "holds something other than results"),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded(fails, folder, tmp_path, arguments, message):
    arguments = [argument.format(folder=folder) for argument in arguments]
    assert message in fails(*arguments)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "arguments", [["--alphas", "-1"], ["--betas", "2"], ["--limit", "0"], ["--max_new_tokens", "x"]]
)
def test_bad_usage(fails, arguments):
    assert arguments[0] in fails(*arguments, code=2)


def test_a_pair_of_another_model(fails, evaluate, folder, tmp_path):
    build_pair(hidden=24).save_pretrained(tmp_path / "narrow")
    assert "made for hidden size 24" in fails("--pair", str(tmp_path / "narrow"))
    build_pair(base_model_name_or_path="org/other").save_pretrained(tmp_path / "other")
    assert "made for org/other" in fails("--pair", str(tmp_path / "other"))


def test_a_pair_of_another_model_on_purpose(evaluate, folder, tmp_path):
    build_pair(base_model_name_or_path="org/other").save_pretrained(tmp_path / "other")
    evaluate(*requests(folder), "--pair", str(tmp_path / "other"), "--transfer", "--arms", "sp")
    assert "trained on another model" in (tmp_path / "results" / "report.md").read_text()


def test_a_folder_of_other_settings(fails, evaluate, folder):
    evaluate(*requests(folder), "--arms", "base")
    assert "holds results with max_new_tokens 4, not 5" in fails(*requests(folder), "--max_new_tokens", "5")
    assert "holds answers to other requests of bad" in fails("--harmful", f"{folder / 'bad.csv'}:id")


def test_faster_contrasts_are_settings(evaluate, fails, folder, tmp_path):
    arms = ["--pair", str(folder / "pair"), "--arms", "acd"]
    evaluate(*requests(folder), *arms, "--horizon", "1")
    assert "contrast for 1 tokens" in (tmp_path / "results" / "report.md").read_text()
    evaluate(*requests(folder), *arms, "--share_instruction_kv", output="shared")
    assert "instruction shared" in (tmp_path / "shared" / "report.md").read_text()
    evaluate(*requests(folder), *arms, output="exact")
    responses = [
        [json.loads(line)["response"] for line in (tmp_path / name / "results.jsonl").open()]
        for name in ("results", "shared", "exact")
    ]
    assert responses[0] != responses[2] != responses[1]
    assert "holds results with horizon 1, not None" in fails(*requests(folder), *arms)


def test_finished_cells_outlive_a_failure(evaluate, folder, tmp_path, capsys, monkeypatch):
    from acd_logits.evaluation.judges import KeywordJudge

    judged = KeywordJudge.judge

    def fail(self, requests, responses):
        if (tmp_path / "results" / "results.jsonl").exists():
            raise OSError("the judge does not answer")
        return judged(self, requests, responses)

    monkeypatch.setattr(KeywordJudge, "judge", fail)
    arguments = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path / "results"), *SETTINGS]
    assert main(["evaluate", *arguments, *requests(folder)]) == 1
    error = capsys.readouterr().err
    assert "the judge does not answer (what is finished is kept: the same command goes on from there)" in error
    monkeypatch.undo()
    shown = evaluate(*requests(folder))
    assert "Finished base on bad" not in shown.err
    assert "Finished oid alpha 0.5 beta 0.1 on bad" in shown.err


KILLED = """
import os, signal, sys
from acd_logits.cli import main
from acd_logits.evaluation.judges import KeywordJudge

judge, calls = KeywordJudge.judge, 0

def killing(self, *args):
    global calls
    calls += 1
    if calls > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(self, *args)

KeywordJudge.judge = killing
main(["evaluate", *sys.argv[1:]])
"""


def test_a_killed_run_goes_on_where_it_was(evaluate, folder, tmp_path):
    """Killed in its fourth cell, when that is answered and not yet written; no cell is run twice."""
    arguments = [
        *requests(folder),
        "--pair",
        str(folder / "pair"),
        "--arms",
        "base",
        "sp",
        "acd",
        "--alphas",
        "0.2",
        "0.5",
    ]
    model = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path / "results"), *SETTINGS]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *model, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((tmp_path / "results" / "results.jsonl").read_text().splitlines()) == 2 * 3
    resumed = evaluate(*arguments)
    whole = evaluate(*arguments, output="whole")
    finished = [[line for line in err.splitlines() if "Finished" in line] for err in (killed.stderr, resumed.err)]
    assert finished[0] + finished[1] == [line for line in whole.err.splitlines() if "Finished" in line]
    assert list(map(len, finished)) == [3, 5]
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "results" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_judge_that_is_down(fails, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    judge = ["--judge", "llm:openai/absent", "--judge_url", "http://127.0.0.1:9/v1"]
    assert "the judge openai/absent does not answer" in fails(*requests(folder), *judge)
    assert not (tmp_path / "results").exists()


@pytest.mark.real_model
def test_a_real_server_judges(served_model, evaluate, folder, tmp_path, monkeypatch):
    """A model of 135M parameters judges poorly: a reply without a verdict is invalid, and never counts as harmless."""
    url, name = served_model
    monkeypatch.setenv("LOCAL_API_KEY", "none")
    monkeypatch.setattr(judges, "MAX_TOKENS", 48)  # it rambles
    replies, parse = [], judges.parse_verdict
    monkeypatch.setattr(judges, "parse_verdict", lambda reply: replies.append(reply) or parse(reply))
    evaluate(*requests(folder), "--arms", "base", "--judge", f"llm:openai-api/local/{name}", "--judge_url", url)
    rows = [json.loads(line) for line in (tmp_path / "results" / "results.jsonl").open()]
    verdicts = [row["verdict"] for row in rows if row["label"] == "harmful"]
    assert all(replies)
    assert len(replies) == 1 + len(verdicts)  # it was tried once, before the model was loaded
    assert verdicts == list(map(parse, replies[1:]))
    harmless = json.loads((tmp_path / "results" / "summary.json").read_text())["cells"][0]["harmless"]
    assert (harmless["count"], harmless["n"]) == (verdicts.count("harmless"), 2)
    assert harmless["invalid"] == verdicts.count("invalid") > 0
    assert f"{harmless['invalid']} invalid" in (tmp_path / "results" / "report.md").read_text()


def test_script_is_the_same_command(folder, tmp_path, run_script, capsys):
    command = ["evaluate.py", "--output_dir", str(tmp_path / "results"), "--model_name_or_path", str(folder / "model")]
    assert run_script(*command, *SETTINGS, *requests(folder), "--arms", "base") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'results' / 'report.md'}\n"
