"""lm-evaluation-harness's model `acd`, on tiny models, against two full forwards per scored token."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from peft import LoraConfig, get_peft_model
from transformers import T5Config

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.evaluation.harness import ACDLM
from conftest import VOCAB, build_key_value_pair, build_model, build_pair, build_tokenizer
from reference import ReferenceProcessor, SharedReference

BOS = 1
# Several lengths in one batch, one-token choices of one context, and an empty context, which stands for BOS
TEXTS = [
    ([5, 6, 7], [8, 9, 10, 11]),
    ([20, 21, 22, 23, 24, 25, 26], [27]),
    ([20, 21, 22, 23, 24, 25, 26], [28]),
    ([30], [31, 32]),
    ([], [40, 41, 42]),
]


def words(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return build_tokenizer(vocabulary, unk_token="<pad>", **names)


def build(paths, **kwargs):
    arguments = {"pair": paths[1], "device": "cpu", "batch_size": 4} | kwargs
    return get_model("acd")(pretrained=paths[0], **arguments)


def ask(lm, kind, *arguments):
    requests = [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def reference_loglikelihood(model, pair, context, continuation, alpha, beta=0.0):
    """Eq. 5 for one token after the other, each by two forwards over all that stands before it."""
    reference = ReferenceProcessor(model, pair, alpha, beta)
    ids, total, greedy = list(context) or [BOS], 0.0, True
    for token in continuation:
        scores = reference(torch.tensor([ids]), None)[0]
        total += scores.log_softmax(-1)[token].item()
        greedy = greedy and scores.argmax().item() == token
        ids.append(token)
    return total, greedy


def greedy_continuation(model, pair, context, tokens, alpha, beta=0.0):
    reference, ids = ReferenceProcessor(model, pair, alpha, beta), list(context)
    for _ in range(tokens):
        ids.append(reference(torch.tensor([ids]), None)[0].argmax().item())
    return ids[len(context) :]


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (0.5, 0), (0.5, 0.1), (0.5, None), (None, 0)])
def test_loglikelihoods_are_those_of_the_reference(paths, alpha, beta):
    model, pair = build_model(), build_pair()
    strength, threshold = 0.5 if alpha is None else alpha, beta or 0
    likely = greedy_continuation(model, pair, [50, 51], 3, strength, threshold)
    texts = [*TEXTS, ([50, 51], likely)]
    lm = build(paths, alpha=alpha, beta=beta)
    # The continuation begins with its space, as in lm_eval's tasks
    answers = ask(lm, "loglikelihood", *((words(context), " " + words(answer)) for context, answer in texts))
    expected = [reference_loglikelihood(model, pair, *text, strength, threshold) for text in texts]
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    got, wanted = (torch.tensor([value for value, _ in some]) for some in (answers, expected))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert answers[-1][1]
    assert got.isfinite().all() == (threshold == 0)
    assert got[-1].isfinite()


def test_rolling_windows_leave_room_for_the_soft_prompt(paths):
    model, pair = build_model(), build_pair()
    assert build(paths).max_length == 256 - 7
    lm = build(paths, alpha=0.5, max_length=7 + 16)
    short, long = list(range(10, 20)), list(range(30, 60))
    answers = ask(lm, "loglikelihood_rolling", (words(short),), (words(long),))
    windows = [([BOS], short)], [([BOS], long[:16]), (long[13:16], long[16:])]
    expected = [sum(reference_loglikelihood(model, pair, *w, 0.5)[0] for w in some) for some in windows]
    assert answers == pytest.approx(expected, abs=1e-4)


def test_generation_is_that_of_the_processor(paths, tokenizer):
    prompts = ["w5 w6 w7", "w8", "w10 w11 w12 w13"]
    settings = {"until": ["w0"], "max_gen_toks": 8}
    model = build_model()
    acd = ACDLogitsProcessor(model, build_pair(), alpha=0.7, beta=0.1)
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    sequences = [model.generate(**x, max_new_tokens=8, logits_processor=[acd])[0] for x in inputs]
    expected = [tokenizer.decode(sequence) for sequence in sequences]
    answers = ask(build(paths, alpha=0.7, beta=0.1), "generate_until", *((p, settings) for p in prompts))
    assert [f"{p} {answer}" for p, answer in zip(prompts, answers, strict=True)] == expected


def test_the_results_say_the_strengths_in_use(paths):
    strengths = ("acd_alpha", "acd_beta", "acd_loglikelihood_beta")
    assert [build(paths).get_model_info()[name] for name in strengths] == [0.5, 0.1, 0]
    lm = build(paths, alpha=0.3, beta=0.2)
    assert [lm.get_model_info()[name] for name in strengths] == [0.3, 0.2, 0.2]


@pytest.mark.parametrize("kind", ["embedding", "key_value"])
def test_a_shared_instruction_is_the_context(paths, tmp_path, kind):
    pair = build_key_value_pair() if kind == "key_value" else build_pair(share_instruction_kv=True)
    pair.save_pretrained(tmp_path)
    model, lm = build_model(), build((paths[0], str(tmp_path)), alpha=0.7, max_length=pair_width(pair) + 10)
    answers = ask(lm, "loglikelihood", *((words(context), " " + words(answer)) for context, answer in TEXTS))
    expected = [shared_loglikelihood(model, pair, *text, 0.7) for text in TEXTS]
    assert [value for value, _ in answers] == pytest.approx(expected, abs=1e-4)
    long = list(range(10, 24))
    (answer,) = ask(lm, "loglikelihood", (words(long), " w8 w9"))
    assert answer[0] == pytest.approx(shared_loglikelihood(model, pair, long[-9:], [8, 9], 0.7), abs=1e-4)
    rolled = ask(lm, "loglikelihood_rolling", (words(range(30, 37)),))
    assert rolled == pytest.approx([shared_loglikelihood(model, pair, [BOS], range(30, 37), 0.7)], abs=1e-4)


def pair_width(pair):
    return max(len(pair.safeguarding), len(pair.adversarial))


def shared_loglikelihood(model, pair, context, continuation, alpha):
    reference = SharedReference(model, pair, alpha)
    ids, total = list(context) or [BOS], 0.0
    for token in continuation:
        total += reference(torch.tensor([ids]), None)[0].log_softmax(-1)[token].item()
        ids.append(token)
    return total


def test_what_the_threshold_cuts_is_warned_of(paths, caplog):
    assert ask(build(paths), "loglikelihood", ("w5", " w6 w7 w8"))[0][0] > -math.inf
    assert "-inf" not in caplog.text
    lm = build(paths, beta=0.9)
    assert ask(lm, "loglikelihood", ("w5", " w6 w7 w8"))[0] == (-math.inf, False)
    assert "beta=0.9 gives some texts the log-likelihood -inf" in caplog.text


def test_the_manual_prompts_and_a_loaded_model(paths, tokenizer):
    model = build_model()
    pair = PromptPair.from_text(model, tokenizer)
    expected = reference_loglikelihood(model, pair, [5, 6], [7, 8], 0.5)
    lm = ACDLM(pretrained=build_model(), tokenizer=tokenizer, pair="text")
    assert ask(lm, "loglikelihood", ("w5 w6", " w7 w8"))[0] == pytest.approx(expected, abs=1e-4)


def test_adapters_act_in_both_streams(paths, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(build_model(), config).eval()
    adapted.save_pretrained(tmp_path)
    expected = reference_loglikelihood(adapted.merge_and_unload(), build_pair(), [5, 6], [7, 8], 0.5)
    assert expected != pytest.approx(reference_loglikelihood(build_model(), build_pair(), [5, 6], [7, 8], 0.5))
    lm = build(paths, peft=str(tmp_path))
    assert ask(lm, "loglikelihood", ("w5 w6", " w7 w8"))[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pair": None}, "needs pair="),
        ({"alpha": "strong"}, "alpha must be a number, got 'strong'"),
        ({"alpha": -1}, "alpha must be finite and at least 0"),
        ({"beta": 2}, "beta must lie between 0 and 1"),
        ({"backend": "seq2seq"}, "ACD supports decoder-only models"),
        ({"autogptq": True}, "cannot apply its contrast under autogptq"),
        ({"gptqmodel": True}, "cannot apply its contrast under gptqmodel"),
        ({"tp_plan": "auto"}, "cannot apply its contrast under tp_plan"),
    ],
)
def test_bad_arguments_are_said_before_the_model_is_loaded(paths, monkeypatch, arguments, message):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail())
    with pytest.raises(ValueError, match=message):
        build(paths, **arguments)


def test_what_does_not_fit_is_said_before_the_model_is_loaded(paths, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail())
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="t5 would run as an encoder-decoder"):
        build((str(tmp_path / "t5"), paths[1]))
    build_pair(hidden=24).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for hidden size 24"):
        build((paths[0], str(tmp_path)))
    build_pair(base_model_name_or_path="org/other").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for org/other"):
        build((paths[0], str(tmp_path)))


CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ANSWERS = """\
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [w0], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


def test_the_command_line_measures_local_tasks(paths, tokenizer, tmp_path):
    documents = [
        {"context": "w5 w6 w7", "choices": ["w8 w9", "w10"], "gold": 0},
        {"context": "w20", "choices": ["w21", "w22 w23 w24"], "gold": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, text in (("choices", CHOICES), ("answers", ANSWERS)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    command = [sys.executable, "-m", "acd_logits.evaluation.harness", "--model", "acd"]
    command += ["--model_args", f"pretrained={paths[0]},pair={paths[1]},alpha=0.7"]
    command += ["--tasks", "tiny_choices,tiny_answers", "--include_path", str(tmp_path), "--device", "cpu"]
    command += ["--batch_size", "2", "--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)

    samples = {name: read_samples(tmp_path / "out", name) for name in ("tiny_choices", "tiny_answers")}
    model, pair = build_model(), build_pair()
    acd = ACDLogitsProcessor(model, pair, alpha=0.7)
    for document, scored, answered in zip(documents, *samples.values(), strict=True):
        inputs = tokenizer(document["context"], return_tensors="pt")
        context = inputs["input_ids"][0].tolist()
        expected = [
            reference_loglikelihood(model, pair, context, tokenizer(choice)["input_ids"], 0.7)[0]
            for choice in document["choices"]
        ]
        assert [float(value) for value, _ in scored["filtered_resps"]] == pytest.approx(expected, abs=1e-4)
        assert scored["acc"] == (expected.index(max(expected)) == document["gold"])
        generated = model.generate(**inputs, max_new_tokens=4, logits_processor=[acd])[0]
        assert f"{document['context']} {answered['filtered_resps'][0]}" == tokenizer.decode(generated)


def read_samples(folder, task):
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
