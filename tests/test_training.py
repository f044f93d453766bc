"""Opposite Prompt Optimization: the losses, the text, and what a run leaves behind."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast, T5Config

from acd_logits import ACDLogitsProcessor, PromptPair, training
from acd_logits.cli import main
from acd_logits.prompts import place_soft_prompt
from acd_logits.training import (
    IGNORED,
    SPLITS,
    TERMS,
    AnchorTokens,
    BalancedSampler,
    OPOArguments,
    OPOModel,
    OPOTrainer,
    OPOTrainingArguments,
    collate,
    count_tokens,
    encode_anchors,
    encode_pair,
    end_of_turn,
    opo_loss,
    train_pair,
)
from conftest import HIDDEN, VOCAB, build_batch, build_model, build_pair
from reference import shared_logits

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
HARMFUL, SAFE = "w10 w11 w12 w13", "w20 w21 w22 w23"
REFUSAL, COMPLIANCE, ANSWER = "w50 w51 w52", "w60 w61 w62 w63", "w70 w71"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w90', 'assistant': 'w91'}[m.role] }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w91{% endif %}"
)


def anchor_rows(number=10):
    """Harmful instructions, refused and answered, and safe ones, answered; every row has words of its own."""
    rows = []
    for i in range(number):
        words = " ".join(f"w{30 + (7 * i + k) % 20}" for k in range(1 + i % 3))
        rows += [
            {"instruction": f"{HARMFUL} {words}", "response": REFUSAL, "split": "D_HR"},
            {"instruction": f"{HARMFUL} {words}", "response": f"{COMPLIANCE} {words}", "split": "D_HA"},
            {"instruction": f"{SAFE} {words}", "response": f"{ANSWER} {words}", "split": "D_S"},
        ]
    kinds = {"D_HR": "harmful", "D_HA": "harmful", "D_S": "near_miss"}
    return [{**r, "finished": True, "kind": kinds[r["split"]], "mirror": str(i // 3)} for i, r in enumerate(rows)]


def anchor_tokens(tokenizer, number=10, held_out=3):
    rows = encode_anchors(anchor_rows(number), tokenizer, False, 64)
    return AnchorTokens(rows[3 * held_out :], rows[: 3 * held_out])


def build_options(**options):
    """The paper's loss: cross entropy, no weights; and two epochs for both prompts."""
    paper = {"retain": "ce", "ln_weight": 1.0, "lr_weight": 1.0, "adversarial_epochs": 2.0}
    return OPOArguments(train_file="unused", model_name_or_path="some/model", **{**paper, **options})


def build_arguments(folder, **arguments):
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1, "logging_steps": 1}
    defaults |= {"warmup_steps": 0}  # the few steps of a test would all be part of it
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    return OPOTrainingArguments(output_dir=str(folder), **{**defaults, **quiet, **arguments})


def history(folder, stream="safeguarding"):
    return json.loads(Path(folder, f"{stream}-run", "log_history.json").read_text())


def assert_same_pair(got, expected, **tolerance):
    torch.testing.assert_close(got.safeguarding, expected.safeguarding, **tolerance)
    torch.testing.assert_close(got.adversarial, expected.adversarial, **tolerance)


@pytest.fixture(scope="module", autouse=True)
def known_words():
    """Let the prompts start as texts that the tiny tokenizer has words for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAFE_PROMPT", "w3 w4 w5 w6 w7")
        patch.setattr(training, "OPPOSITE_PROMPT", "w9 w8 w7 w6")
        yield


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
        *("--per_device_train_batch_size", "8", "--warmup_steps", "0", "--adversarial_epochs", "2"),
        *("--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false"),
    ]


# Eq. 3 and 4


def by_hand(logits, labels, splits, stream, plain=None):
    """Eq. 3 and 4, token by token in double precision; the sums of each row."""
    follow, avoid = ("D_HR", "D_HA") if stream == "safeguarding" else ("D_HA", "D_HR")
    sums = torch.zeros(len(logits), 3, dtype=torch.float64)
    for i, split in enumerate(SPLITS[s] for s in splits):
        for t, y in enumerate(labels[i].tolist()):
            if y == IGNORED:
                continue
            p = logits[i, t].double().softmax(-1)
            if split == follow:
                sums[i, 0] += -math.log(p[y])
            if split == avoid:
                sums[i, 1] += -math.log(1 - p[y])
            if split == "D_S" and plain is None:
                sums[i, 2] += -math.log(p[y])
            if split == "D_S" and plain is not None:
                q = plain[i, t].double().softmax(-1)
                sums[i, 2] += sum(float(q[v]) * math.log(q[v] / p[v]) for v in range(len(q)))
    return sums


@pytest.mark.parametrize("stream", ["safeguarding", "adversarial"])
@pytest.mark.parametrize("retain", ["ce", "kl"])
def test_loss_is_equations_3_and_4(stream, retain):
    torch.manual_seed(0)
    logits, plain = torch.randn(2, 6, 4, 11) * 3
    splits = torch.tensor([0, 1, 2, 2, 0, 1])
    labels = torch.randint(0, 11, (6, 4))
    labels[0, 2:] = labels[3, 1:] = labels[5, :] = IGNORED
    given = plain if retain == "kl" else None

    avoided = labels.clone()
    avoided[0, :1] = avoided[1, :2] = IGNORED  # the refusal and the answer begin alike there
    sums = opo_loss(logits, labels, avoided, splits, stream, None if given is None else given[splits == 2])
    expected = by_hand(logits, labels, splits, stream, given)
    expected[:, 1] = by_hand(logits, avoided, splits, stream, given)[:, 1]
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    follow, avoid = (0, 1) if stream == "safeguarding" else (1, 0)
    tokens = count_tokens(labels, avoided, splits, stream)
    assert tokens[:, 0].tolist() == [int((labels[i] != IGNORED).sum()) * (splits[i] == follow) for i in range(6)]
    assert tokens[:, 1].tolist() == [int((avoided[i] != IGNORED).sum()) * (splits[i] == avoid) for i in range(6)]
    assert tokens[:, 2].tolist() == [0, 0, 4, 1, 0, 0]


def test_unlikelihood_is_exact_where_p_rounds_to_one():
    logits = torch.zeros(1, 1, 11)
    logits[..., 3] = 60.0
    logits.requires_grad_()
    labels = torch.tensor([[3]])
    loss = opo_loss(logits, labels, labels, torch.tensor([1]), "safeguarding")[0, 1]
    loss.backward()
    # 1 - P = 10 / (10 + e^60)
    assert loss.item() == pytest.approx(60 - math.log(10), rel=1e-6)
    assert logits.grad[0, 0, 3].item() == pytest.approx(1)
    assert logits.grad[0, 0, 4].item() == pytest.approx(-0.1)


def test_gradients_are_those_of_the_equations():
    torch.manual_seed(1)
    logits = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    labels, splits = torch.tensor([[1, 2], [3, IGNORED], [5, 6]]), torch.tensor([0, 1, 2])
    p = logits.softmax(-1)
    expected = -p[0, 0, 1].log() - p[0, 1, 2].log() - (1 - p[1, 0, 3]).log() - p[2, 0, 5].log() - p[2, 1, 6].log()
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (got,) = torch.autograd.grad(opo_loss(logits, labels, labels, splits, "safeguarding").sum(), logits)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


# Where the soft prompt sits


@pytest.mark.parametrize("lengths", [(4, 4), (7, 4), (3, 6)])
def test_soft_prompt_sits_where_inference_puts_it(lengths):
    model, batch, seen = build_model(), build_batch(), []
    pair = build_pair(*lengths)
    acd = ACDLogitsProcessor(model, pair)
    acd.streams.reusable = False
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    model.generate(**batch, logits_processor=[acd], max_new_tokens=1, do_sample=False)

    rows = len(batch["input_ids"])
    for i, prompt in enumerate([pair.safeguarding, pair.adversarial]):
        x = model.get_input_embeddings()(batch["input_ids"])
        embeds, mask, positions = place_soft_prompt(prompt, x, batch["attention_mask"])
        paired = {key: seen[0][key][i * rows : (i + 1) * rows] for key in ("inputs_embeds", "position_ids")}
        paired_mask = seen[0]["attention_mask"]
        paired_mask = (
            torch.ones_like(paired["position_ids"]) if paired_mask is None else paired_mask[i * rows :][:rows]
        )
        extra = max(lengths) - lengths[i]  # the shorter stream has more padding in front
        assert not paired_mask[:, :extra].any()
        torch.testing.assert_close(mask, paired_mask[:, extra:])
        torch.testing.assert_close(positions, paired["position_ids"][:, extra:])
        torch.testing.assert_close(embeds[mask == 1], paired["inputs_embeds"][:, extra:][mask == 1])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "mistral_sliding", "mamba2", "bamba"])
def test_logits_are_those_of_each_response_alone(name):
    model = build_model(name)
    prompt = build_pair(n_s=6).safeguarding
    opo = OPOModel.from_prompt(model, prompt)
    examples = [
        {"input_ids": [5, 6, 7, 8], "response": [9, 10, 11], "opening": 0, "split": 0},
        {"input_ids": [12, 13], "response": [14], "opening": 0, "split": 1},
        {"input_ids": [15, 16, 17], "response": [18, 19, 20, 21], "opening": 0, "split": 2},
    ]
    batch = collate(examples)
    logits = opo(batch["input_ids"], batch["attention_mask"], batch["labels"].shape[1])
    plain = opo(batch["input_ids"], batch["attention_mask"], batch["labels"].shape[1], prompted=False)
    embedding = model.get_input_embeddings()
    for i, example in enumerate(examples):
        n, tokens = len(example["response"]), embedding(torch.tensor([example["input_ids"] + example["response"]]))
        alone = model(inputs_embeds=torch.cat([prompt[None], tokens], 1), use_cache=False).logits[0, -n - 1 : -1]
        torch.testing.assert_close(logits[i, :n], alone, atol=1e-4, rtol=1e-4)
        alone = model(inputs_embeds=tokens, use_cache=False).logits[0, -n - 1 : -1]
        torch.testing.assert_close(plain[i, :n], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", [[], [90, 3, 4, 90]], ids=["nothing in common", "a common start"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_computing_what_rows_share_once_changes_nothing(name, start, monkeypatch):
    model = build_model(name)
    examples = [
        {"input_ids": [*start, 5, 6, 7, 8], "response": [9, 10, 11], "opening": 0, "split": 0},
        {"input_ids": [*start, 12], "response": [14], "opening": 0, "split": 1},
        {"input_ids": [*start, 12, 16, 17], "response": [18, 19, 20, 21], "opening": 0, "split": 2},
    ]
    batch = collate(examples)
    kept = (batch["labels"] != IGNORED)[..., None]
    lengths, results = [], []
    model.register_forward_pre_hook(
        lambda _, __, call: lengths.append(call["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for shared in (True, False):
        monkeypatch.setattr(OPOModel, "shares_prefix", lambda _, shared=shared: shared)
        opo = OPOModel.from_prompt(model, build_pair(n_s=6).safeguarding)
        logits, plain = (opo(batch["input_ids"], batch["attention_mask"], 4, prompted=p) for p in (True, False))
        (logits.log_softmax(-1) * kept).sum().backward()
        results.append((logits * kept, plain * kept, opo.soft_prompt.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    behind = [*([len(start)] if start else []), 8]  # of the plain forward: the common start, and the longest rest
    assert lengths == [6 + len(start), 8, *behind, 6 + len(start) + 8, len(start) + 8]


@pytest.mark.parametrize("lengths", [(1, 1), (3, 5), (6, 6)])
@pytest.mark.parametrize("n", [0, 4])
def test_a_shared_instruction_does_not_see_the_soft_prompt(lengths, n):
    model, soft = build_model(), torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(5))
    opo = OPOModel.from_prompt(model, soft, share_instruction_kv=True)
    rows = [(list(range(10, 10 + length)), [40 + length, 50, 60][: 2 + i]) for i, length in enumerate(lengths)]
    batch = collate([{"input_ids": x, "response": y, "opening": 0, "split": 0} for x, y in rows])
    logits = opo(batch["input_ids"], batch["attention_mask"], 3)
    for got, (x, y) in zip(logits, rows, strict=True):
        expected = shared_logits(model, opo.soft_prompt, torch.tensor(x + y), len(x))
        torch.testing.assert_close(got[: len(y)], expected[len(x) - 1 : -1], atol=1e-5, rtol=1e-5)
    if n:
        opo.soft_prompt.grad = None
        logits[0, 0].logsumexp(-1).backward()
        got = opo.soft_prompt.grad.clone()
        opo.soft_prompt.grad = None
        x, y = rows[0]
        shared_logits(model, opo.soft_prompt, torch.tensor(x + y), len(x))[len(x) - 1].logsumexp(-1).backward()
        torch.testing.assert_close(got, opo.soft_prompt.grad, atol=1e-6, rtol=1e-4)


def test_a_pair_trained_with_a_shared_instruction_is_used_so(tokenizer, tmp_path):
    """What its loss was computed on is what generate computes."""
    model = build_model()
    options = build_options(share_instruction_kv=True, adversarial_epochs=0.0)
    train_pair(model, tokenizer, anchor_tokens(tokenizer), options, build_arguments(tmp_path))
    pair = PromptPair.from_pretrained(tmp_path)
    assert pair.config.share_instruction_kv
    assert pair.config.training["share_instruction_kv"]
    batch = collate(anchor_tokens(tokenizer).held_out)
    length = batch["labels"].shape[1]
    opo = OPOModel.from_prompt(build_model(), pair.safeguarding, share_instruction_kv=True)
    prompts = {name: batch[name][:, :-length] for name in ("input_ids", "attention_mask")}
    acd = ACDLogitsProcessor(model, pair, alpha=0.0, beta=0.0)
    options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    scores = model.generate(**prompts, logits_processor=[acd], **options).scores[0]
    torch.testing.assert_close(
        scores, opo(batch["input_ids"], batch["attention_mask"], length)[:, 0], atol=1e-4, rtol=0
    )


def test_a_shared_instruction_needs_keys_and_values():
    model = build_model()
    opo = OPOModel.from_prompt(model, torch.zeros(4, HIDDEN), share_instruction_kv=True)
    model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        opo(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long), 1)


def test_only_the_soft_prompt_learns_and_in_full_precision():
    model = build_model("gpt2").to(torch.bfloat16)  # has dropout
    opo = OPOModel.from_prompt(model, build_pair(n_s=6).safeguarding).train()
    batch = collate([{"input_ids": [5, 6], "response": [9, 10], "opening": 0, "split": 0}])
    logits = opo(batch["input_ids"], batch["attention_mask"], 2)
    logits.sum().backward()
    assert torch.equal(logits, opo(batch["input_ids"], batch["attention_mask"], 2))
    assert [name for name, p in opo.named_parameters() if p.requires_grad] == [
        "prompt_encoder.default.embedding.weight"
    ]
    assert opo.soft_prompt.dtype == opo.soft_prompt.grad.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert opo.soft_prompt.grad.abs().sum() > 0


def test_a_quantised_base_stays_in_train_mode():
    """bitsandbytes, on a CPU, repacks weights in eval mode, and has no gradient then."""
    model = build_model()
    model.is_quantized = True
    opo = OPOModel.from_prompt(model, build_pair(n_s=6).safeguarding)
    assert opo.eval().base_model.training


def test_training_on_a_4_bit_model(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantization, device_map={"": "cpu"}
    )
    train_pair(model, tokenizer, anchor_tokens(tokenizer), build_options(), build_arguments(tmp_path))
    losses = [line["eval_loss"] for line in history(tmp_path) if "eval_loss" in line]
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path):
    new_name = hasattr(OPOTrainingArguments, "activation_checkpointing")
    flag = "activation_checkpointing" if new_name else "gradient_checkpointing"
    pairs = []
    for checkpointing in (False, True):
        model = build_model()
        arguments = build_arguments(tmp_path / str(checkpointing), num_train_epochs=1, **{flag: checkpointing})
        pairs.append(train_pair(model, tokenizer, anchor_tokens(tokenizer), build_options(), arguments))
        assert model.model.layers[0].gradient_checkpointing == checkpointing
    assert_same_pair(*pairs)


# Text


def test_training_text_is_what_inference_sees(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    turn = [{"role": "user", "content": "w5 w6"}]
    inference = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert inference == [90, 5, 6, 2, 91]
    assert encode_pair(tokenizer, "w5 w6", "w7 w8", chat=True, finished=True) == (inference, [7, 8, 2])
    assert encode_pair(tokenizer, "w5 w6", "w7 w8", chat=True, finished=False) == (inference, [7, 8])
    plain = tokenizer("w5 w6")["input_ids"]
    assert encode_pair(tokenizer, "w5 w6", "w7 w8", chat=False, finished=True) == (plain, [7, 8, 2])


@pytest.mark.parametrize(
    ("behind", "token"),
    [("<turn> w5", "<turn>"), ("w5 <turn> <eos>", "<turn>"), ("", "<eos>"), ("w5", "<eos>")],
)
def test_the_templates_own_token_ends_a_turn(tokenizer, behind, token):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}w90 {{ m.content }} " + behind + " {% endfor %}"
    assert end_of_turn(tokenizer, chat=True) == tokenizer.convert_tokens_to_ids(token)
    assert end_of_turn(tokenizer, chat=False) == tokenizer.eos_token_id


def test_what_refusal_and_answer_begin_with_is_not_avoided(tokenizer):
    rows = [
        {"instruction": "w5", "response": "w9 w10 w11", "split": "D_HR"},
        {"instruction": "w5", "response": "w9 w12 w11", "split": "D_HA"},
        {"instruction": "w5", "response": "w13 w10 w11", "split": "D_HA"},
        {"instruction": "w6", "response": "w9 w10 w11", "split": "D_HA"},
        {"instruction": "w5", "response": "w9 w10 w11", "split": "D_S"},
    ]
    rows = [{**row, "finished": False, "kind": "harmful", "mirror": ""} for row in rows]
    batch = collate(encode_anchors(rows, tokenizer, False, 64))
    assert batch["labels"].tolist() == [[9, 10, 11], [9, 12, 11], [13, 10, 11], [9, 10, 11], [9, 10, 11]]
    assert batch["avoided"].tolist() == [
        [IGNORED, 10, 11],
        [IGNORED, 12, 11],
        [13, 10, 11],
        [9, 10, 11],
        [9, 10, 11],
    ]


def test_long_responses_are_cut_off(tokenizer):
    (example,) = encode_anchors(anchor_rows(1)[:1], tokenizer, False, 2)
    prompt = f"{HARMFUL} w30"
    parts = {"input_ids": tokenizer(prompt)["input_ids"], "response": [50, 51], "opening": 0, "split": 0}
    assert example == parts | {"instruction": prompt, "kind": "harmful", "mirror": "0"}


@pytest.mark.real_model
def test_smollm2_text():
    from transformers import AutoTokenizer

    from acd_logits.demo_model import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    prompt, response = encode_pair(tokenizer, "Hi there", "Hello!", chat=True, finished=True)
    text = tokenizer.decode(prompt + response)
    assert text.endswith("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>")


# The order of an epoch


def example(split, kind, mirror, length=5):
    return {
        "input_ids": [3] * length,
        "response": [4],
        "opening": 0,
        "split": SPLITS.index(split),
        "kind": kind,
        "mirror": mirror,
    }


def uneven_examples():
    """12 harmful instructions, refused and answered, 10 near misses of which 8 mirror them, 30 everyday requests."""
    rows = [example(split, "harmful", f"m{i}", 5 + i) for split in ("D_HR", "D_HA") for i in range(12)]
    rows += [example("D_S", "near_miss", f"m{i}", 5 + i) for i in range(4, 14)]
    return rows + [example("D_S", "everyday", f"e{i}", 5 + i % 15) for i in range(30)]


def test_every_batch_is_balanced():
    examples = uneven_examples()
    sampler = BalancedSampler(examples, batch_size=9, seed=0)  # two of each of the four groups, and one left over
    order = list(sampler)
    assert len(order) == len(sampler) == 4 * 10
    assert len(set(order)) == len(order)
    for i in range(0, 40, 8):
        groups = Counter((examples[k]["split"], examples[k]["kind"]) for k in order[i : i + 8])
        assert list(groups.values()) == [2, 2, 2, 2]


def test_what_mirrors_each_other_comes_together():
    examples = uneven_examples()
    order = list(BalancedSampler(examples, batch_size=8, seed=0))
    together = 0
    for i in range(0, 40, 4):
        near, *others = (examples[k] for k in order[i : i + 4])  # the smallest group comes first
        harmful = [e["mirror"] for e in others if e["kind"] == "harmful"]
        together += [near["mirror"]] * 2 == harmful
        if near["mirror"] in ("m12", "m13"):  # which mirror nothing
            assert set(harmful) <= {f"m{k}" for k in (0, 1, 2, 3)}
    assert together == 8


def test_an_apology_is_in_every_epoch():
    examples = uneven_examples()
    apologies = {k for k, e in enumerate(examples) if e["mirror"] in ("e4", "e17", "e29")}
    sampler = BalancedSampler([e | {"apology": k in apologies} for k, e in enumerate(examples)], batch_size=8, seed=0)
    everyday = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        chosen = {k for k in sampler if examples[k]["kind"] == "everyday"}
        assert apologies < chosen and len(chosen) == 10
        everyday.append(chosen)
    assert len(set.union(*everyday)) == 30


def test_every_epoch_has_its_own_order_and_choice():
    sampler = BalancedSampler(uneven_examples(), batch_size=8, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert set(first) != set(second)
    sampler.set_epoch(0)  # as where a run goes on
    assert list(sampler) == first
    assert list(BalancedSampler(uneven_examples(), batch_size=8, seed=1)) != first


def test_batches_are_of_like_length():
    rows = [example(split, "harmful", f"m{i}", 5 + i) for split in ("D_HR", "D_HA") for i in range(40)]
    rows += [example("D_S", "everyday", f"e{i}", 5 + i) for i in range(40)]
    order = list(BalancedSampler(rows, batch_size=12, seed=0))
    spread = [[len(rows[k]["input_ids"]) for k in order[i : i + 12]] for i in range(0, 120, 12)]
    assert all(max(lengths) - min(lengths) < 12 for lengths in spread)
    assert [lengths[0] for lengths in spread] != sorted(lengths[0] for lengths in spread)


def test_without_balance_the_trainer_decides(tokenizer, tmp_path):
    pairs = anchor_tokens(tokenizer)
    pairs.train += pairs.held_out[2:3]  # a safe one more: 7 refusals, 7 answers to harmful instructions, 8 safe ones
    for balance, steps in ((True, 21), (False, 22)):
        folder = tmp_path / str(balance)
        arguments = build_arguments(folder, num_train_epochs=1, per_device_train_batch_size=1)
        options = build_options(balance=balance, adversarial_epochs=0.0)
        pair = train_pair(build_model(), tokenizer, pairs, options, arguments)
        assert sum("L_p" in line or "L_n" in line or "L_r" in line for line in history(folder)) == steps
        assert pair.config.training["balance"] is balance


# A run


def undecided_model(tokenizer):
    """A tiny model that refuses a harmful instruction as often as not, and that a prefix can tell which to do."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prefixes = {"D_HR": ["", "w80 w81 "], "D_HA": ["", "w82 w83 "], "D_S": ["", "w80 w81 ", "w82 w83 "]}
    rows = [
        {**row, "instruction": prefix + row["instruction"]}
        for row in anchor_rows()
        for prefix in prefixes[row["split"]]
    ]
    batch = collate(encode_anchors(rows, tokenizer, False, 64))
    length = batch["labels"].shape[1]
    for _ in range(120):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -length - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pair trained on the tiny model, far enough for its losses to fall, with the folder it was saved to."""
    from conftest import tokenizer as fixture

    tokenizer = fixture.__wrapped__()
    folder = tmp_path_factory.mktemp("run") / "pair"
    options = build_options(retain="kl", alpha=0.4, beta=0.2, adversarial_epochs=20.0)
    arguments = build_arguments(folder, num_train_epochs=20, learning_rate=0.03)
    model = undecided_model(tokenizer)
    weights = copy.deepcopy(model.state_dict())
    pair = train_pair(model, tokenizer, anchor_tokens(tokenizer), options, arguments)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    return folder, pair, model, tokenizer


@pytest.mark.parametrize("stream", ["safeguarding", "adversarial"])
def test_a_run_lowers_every_term_on_held_out_instructions(trained, stream):
    log = history(trained[0], stream)
    evaluations = [line for line in log if "eval_loss" in line]
    assert len(evaluations) == 1 + 20  # before the first step, and after each epoch
    for term in TERMS:
        values = [line[f"eval_{term}"] for line in evaluations]
        assert values[-1] < values[0], term
        assert [line[term] for line in log if term in line]
    weighted = sum(evaluations[2][f"eval_{term}"] for term in TERMS)
    assert evaluations[2]["eval_loss"] == pytest.approx(weighted, rel=1e-5)


def test_the_streams_mirror_each_other(trained):
    """SP refuses what AP answers: the likeliest first token of each after a harmful instruction."""
    _, pair, model, tokenizer = trained
    x = model.get_input_embeddings()(torch.tensor([tokenizer(f"{HARMFUL} w31")["input_ids"]]))
    first = [
        model(inputs_embeds=torch.cat([prompt[None], x], 1)).logits[0, -1].argmax().item()
        for prompt in (pair.safeguarding, pair.adversarial)
    ]
    assert first == [50, 60]


def test_the_pair_is_saved_with_what_made_it(trained):
    folder, pair, model, _ = trained
    loaded = PromptPair.from_pretrained(folder)
    assert_same_pair(loaded, pair, rtol=0, atol=0)
    config = loaded.config
    assert (config.alpha, config.beta) == (0.4, 0.2)
    assert config.base_model_name_or_path == "some/model"
    assert (config.hidden_size, config.vocab_size) == (32, VOCAB)
    assert config.training["retain"] == "kl"
    assert config.training["batch_size"] == 8
    assert config.training["pairs"] == {
        "train": {"D_HR": 7, "D_HA": 7, "D_S": 7},
        "held_out": {"D_HR": 3, "D_HA": 3, "D_S": 3},
    }
    losses = config.training["held_out_loss"]["adversarial"]
    assert losses["kept"]["loss"] < losses["first"]["loss"]

    stock = PeftModel.from_pretrained(copy.deepcopy(model), folder, subfolder="safeguarding")
    ids = torch.tensor([[5, 6, 7]])
    x = torch.cat([pair.safeguarding[None], model.get_input_embeddings()(ids)], 1)
    torch.testing.assert_close(stock(input_ids=ids).logits, model(inputs_embeds=x).logits)


def test_prompts_start_as_texts(tokenizer, tmp_path):
    model = build_model()
    (tmp_path / "text").write_text("w3 w4 w5\n")
    table = model.get_input_embeddings().weight
    for length, tokens in [(None, [3, 4, 5]), (2, [3, 4]), (7, [3, 4, 5, 3, 4, 5, 3])]:
        options = build_options(safe_prompt_file=str(tmp_path / "text"), num_virtual_tokens=length)
        prompt = training.initial_prompts(model, tokenizer, options).safeguarding
        torch.testing.assert_close(prompt, table[tokens])


def test_the_best_checkpoint_is_kept(tokenizer, tmp_path):
    """With a learning rate that ruins the prompt, the best of a run is its first checkpoint, not its last."""
    arguments = build_arguments(tmp_path, num_train_epochs=4, learning_rate=0.05, lr_scheduler_type="constant")
    pairs, options = anchor_tokens(tokenizer), build_options()

    class Spoil(OPOTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step >= 6:  # two epochs of three steps
                self.optimizer.param_groups[0]["lr"] = 50.0
            return super().training_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "OPOTrainer", Spoil)
        pair = train_pair(build_model(), tokenizer, pairs, options, arguments)
    losses = [line["eval_loss"] for line in history(tmp_path) if "eval_loss" in line][1:]
    assert min(losses) == losses[1]
    saved = training.load_file(tmp_path / "safeguarding-run" / "checkpoint-6" / "adapter_model.safetensors")
    assert torch.equal(saved["prompt_embeddings"], pair.safeguarding)
    assert pair.config.training["held_out_loss"]["safeguarding"]["kept"]["epoch"] == 2


@pytest.mark.parametrize("retain", ["ce", "kl", "answer"])
def test_micro_batches_change_nothing(tokenizer, tmp_path, retain):
    """Eight at once, or twice four; 21 pairs, so that an epoch's last step is short."""
    pairs = anchor_tokens(tokenizer)
    results = []
    for size in (8, 4):
        folder, steps = tmp_path / str(size), 8 // size
        arguments = build_arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        results.append(train_pair(build_model(), tokenizer, pairs, build_options(retain=retain), arguments))
    assert_same_pair(*results, rtol=1e-4, atol=1e-4)
    whole, parts = ([line for line in history(tmp_path / size) if "L_p" in line] for size in ("8", "4"))
    for one, other in zip(whole, parts, strict=True):
        assert {key: one[key] for key in ("loss", *TERMS)} == pytest.approx(
            {key: other[key] for key in ("loss", *TERMS)}, rel=1e-3
        )


def test_the_plain_model_answers_each_safe_pair_once(tokenizer, tmp_path, monkeypatch):
    """Over two epochs and three evaluations of each prompt; without the store, the prompts come out the same."""
    pairs, forward, rows = anchor_tokens(tokenizer), OPOModel.forward, []

    def counting(self, input_ids, attention_mask, response_length, prompted=True):
        if not prompted:
            rows.append(len(input_ids))
        return forward(self, input_ids, attention_mask, response_length, prompted)

    monkeypatch.setattr(OPOModel, "forward", counting)
    results = []
    for limit in (training.PLAIN_CACHE_BYTES, 0):
        monkeypatch.setattr(training, "PLAIN_CACHE_BYTES", limit)
        options, arguments = build_options(retain="kl"), build_arguments(tmp_path / str(limit))
        results.append(train_pair(build_model(), tokenizer, pairs, options, arguments))
        assert sum(rows) == (2 * (7 + 3) if limit else 2 * (2 * 7 + 3 * 3))
        rows.clear()
    assert_same_pair(*results, rtol=1e-4, atol=1e-4)


def test_answers_that_begin_as_refusals_do_are_not_followed(tokenizer):
    """What is left of them is the place of the first token, on safe requests."""
    examples = anchor_tokens(tokenizer, held_out=0).train[:6]
    refusal, answer, safe = examples[:3]
    answer["response"], safe["response"] = [50, 60, 61], [50, 70, 71]
    openings = training.refusal_openings(examples)
    assert openings == [50]
    kept = training.leave_out_apologies(examples, openings)
    assert kept == [refusal, {**safe, "response": [50], "apology": True}, *examples[3:]]
    assert safe["response"] == [50, 70, 71]


def test_retain_may_leave_out_what_refusals_begin_with(tokenizer, tmp_path):
    """The held-out L_r at the start, by hand: the plain model without the refusals' first word, apologies cut off."""
    pairs, model = anchor_tokens(tokenizer), build_model()
    safe = [example for example in pairs.held_out if SPLITS[example["split"]] == "D_S"]
    safe[0]["response"] = [50, *safe[0]["response"]]
    options = build_options(retain="answer")
    prompt = training.initial_prompts(model, tokenizer, options).safeguarding
    train_pair(model, tokenizer, pairs, options, build_arguments(tmp_path))
    losses = []
    for example in safe:
        ids, response = example["input_ids"], example["response"]
        x = model.get_input_embeddings()(torch.tensor([ids + response]))
        plain, prompted = (
            model(inputs_embeds=embeds).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            for embeds in (x, torch.cat([prompt[None], x], dim=1))
        )
        plain[0, 50] = -math.inf
        plain = plain.log_softmax(-1)
        divergence = torch.where(plain.exp() > 0, plain.exp() * (plain - prompted), 0).sum(-1)
        losses += divergence[: 1 if response[0] == 50 else None].tolist()
    first = next(line for line in history(tmp_path) if "eval_L_r" in line)
    assert len(losses) < sum(len(example["response"]) for example in safe)
    assert first["eval_L_r"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_without_a_held_out_part(tokenizer, tmp_path):
    pairs = anchor_tokens(tokenizer, held_out=0)
    pair = train_pair(build_model(), tokenizer, pairs, build_options(held_out_fraction=0.0), build_arguments(tmp_path))
    assert_same_pair(PromptPair.from_pretrained(tmp_path), pair)
    assert not any("eval_loss" in line for line in history(tmp_path))


def test_the_adversarial_prompt_may_have_epochs_of_its_own(tokenizer, tmp_path):
    options = build_options(adversarial_epochs=1.0)
    train_pair(build_model(), tokenizer, anchor_tokens(tokenizer), options, build_arguments(tmp_path))
    assert history(tmp_path)[-1]["epoch"] == 2
    assert history(tmp_path, "adversarial")[-1]["epoch"] == 1


def test_the_adversarial_prompt_may_stay_as_it_starts(tokenizer, tmp_path):
    options = build_options(adversarial_epochs=0.0)
    model = build_model()
    pair = train_pair(model, tokenizer, anchor_tokens(tokenizer), options, build_arguments(tmp_path))
    start = training.initial_prompts(model, tokenizer, options)
    assert torch.equal(pair.adversarial, start.adversarial)
    assert not torch.equal(pair.safeguarding, start.safeguarding)


def test_a_run_goes_on_from_another_pair(tokenizer, tmp_path):
    build_pair(n_s=5, n_a=3, vocab_size=VOCAB, results={"over_refusal": []}).save_pretrained(tmp_path / "first")
    start = PromptPair.from_pretrained(tmp_path / "first")
    options = build_options(init_pair=str(tmp_path / "first"), adversarial_epochs=0.0)
    arguments = build_arguments(tmp_path / "second", num_train_epochs=1, learning_rate=1e-3)
    pair = train_pair(build_model(), tokenizer, anchor_tokens(tokenizer), options, arguments)
    assert torch.equal(pair.adversarial, start.adversarial)
    moved = (pair.safeguarding - start.safeguarding).abs().max()
    assert 0 < moved < 0.01
    assert pair.config.results == {}, "they were measured on the first pair"
    assert pair.config.training["init_pair"] == start.digest

    build_pair(n_s=5, n_a=3, seed=2, vocab_size=VOCAB).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="holds a run with another init_pair"):
        again = build_options(init_pair=str(tmp_path / "first"), adversarial_epochs=0.0)
        train_pair(build_model(), tokenizer, anchor_tokens(tokenizer), again, arguments)


def test_a_pair_to_go_on_from_must_fit(tokenizer, tmp_path):
    build_pair(hidden=8).save_pretrained(tmp_path / "first")
    options = build_options(init_pair=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="was made for hidden size 8"):
        train_pair(build_model(), tokenizer, anchor_tokens(tokenizer), options, build_arguments(tmp_path / "second"))
    with pytest.raises(ValueError, match="leave it out with --init_pair"):
        build_options(init_pair="a/pair", num_virtual_tokens=7)


def test_weights_of_zero_switch_a_term_off(tokenizer, tmp_path):
    """With L_p alone, L_n and L_r do not matter: other weights would give another prompt."""
    options = build_options(ln_weight=0.0, lr_weight=0.0, lp_weight=2.0)
    train_pair(build_model(), tokenizer, anchor_tokens(tokenizer), options, build_arguments(tmp_path))
    for line in history(tmp_path):
        if "L_p" in line:
            assert line["loss"] == pytest.approx(2 * line["L_p"], rel=1e-4)


# Interruptions


KILLED = """
import os, signal, sys
from acd_logits import training
from acd_logits.cli import main

steps = 0
compute_loss = training.OPOTrainer.compute_loss

def killing(self, *args, **kwargs):
    global steps
    steps += self.stream == "adversarial"
    if steps > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_loss(self, *args, **kwargs)

training.OPOTrainer.compute_loss = killing
main(["train", *sys.argv[1:]])
"""


def test_a_killed_run_goes_on_where_it_was(command, model_folder, tmp_path, monkeypatch, capsys):
    """Killed in the second epoch of AP: SP is finished, AP has the checkpoint of its first epoch."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "pair"
    assert not (folder / "acd_config.json").exists()
    assert (folder / "adversarial-run" / "checkpoint-3").is_dir()
    # A checkpoint that was cut short does not count
    (folder / "adversarial-run" / "checkpoint-6").mkdir()
    (folder / "adversarial-run" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 2.0, "glo')

    streams = []
    train = OPOTrainer.train
    monkeypatch.setattr(OPOTrainer, "train", lambda self, **k: (streams.append((self.stream, k)), train(self, **k)))
    assert main(["train", *command]) == 0, capsys.readouterr().err
    assert streams == [("adversarial", {"resume_from_checkpoint": str(folder / "adversarial-run" / "checkpoint-3")})]
    assert main(["train", *command, "--output_dir", str(tmp_path / "whole")]) == 0
    assert_same_pair(PromptPair.from_pretrained(folder), PromptPair.from_pretrained(tmp_path / "whole"))
    resumed, whole = (
        [line["eval_loss"] for line in history(f, "adversarial") if "eval_loss" in line]
        for f in (folder, tmp_path / "whole")
    )
    assert resumed == pytest.approx(whole, rel=1e-6)

    # And once more: nothing is left to do
    streams.clear()
    assert main(["train", *command]) == 0
    assert streams == []


def test_a_run_goes_on_within_an_epoch(tokenizer, tmp_path, monkeypatch):
    """Three steps make an epoch, and a checkpoint is written after every second."""
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    pairs, compute_loss = anchor_tokens(tokenizer), OPOTrainer.compute_loss

    def stop_in_step_5(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(OPOTrainer, "compute_loss", stop_in_step_5)
    for _ in range(2):
        arguments = build_arguments(tmp_path / "stopped", **every)
        with pytest.raises(KeyboardInterrupt):
            train_pair(build_model(), tokenizer, pairs, build_options(), arguments)
    monkeypatch.undo()
    resumed, whole = (
        train_pair(build_model(), tokenizer, pairs, build_options(), build_arguments(tmp_path / name, **every))
        for name in ("stopped", "whole")
    )
    assert_same_pair(resumed, whole)


def test_two_processes_give_what_one_gives(command, tmp_path):
    """On the same data order: 24 training pairs, two processes of 5 against one of 10, and a short last batch."""
    # With --cpu instead of --multi_gpu, accelerate 1.15 starts a single process
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
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
    for stream in ("safeguarding", "adversarial"):
        logs = [history(tmp_path / name, stream) for name in ("one", "two")]
        for keys in (["loss", *TERMS], ["eval_loss", *(f"eval_{term}" for term in TERMS)]):
            first, second = ([[line.get(k) for k in keys] for line in log if keys[0] in line] for log in logs)
            assert len(first) == len(second) > 0
            for line, other in zip(first, second, strict=True):
                assert line == pytest.approx(other, rel=1e-3)


# The command


def test_the_command_trains_a_pair(command, tmp_path, capsys):
    assert main(["train", *command]) == 0
    out = capsys.readouterr().out
    for stream in ("safeguarding", "adversarial"):
        assert re.search(rf"^{stream}, held out, before -> after \d epochs: L_p [\d.]+ -> [\d.]+, L_n", out, re.M)
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
    for stream in ("safeguarding", "adversarial"):
        assert list((tmp_path / "pair" / f"{stream}-run" / "runs").glob("*/events.out.tfevents.*"))


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
        (["--retain", "mse"], "invalid choice: 'mse'"),
        (["--resume_from_checkpoint", "some/where"], "leave out --resume_from_checkpoint"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--push_to_hub", "--hub_model_id", "a/b", "--hub_private_repo", "false"], "acd-logits push --public"),
        (["--eval_strategy", "no"], "load_best_model_at_end"),
    ],
)
def test_bad_arguments_get_one_line(complaint, arguments, message):
    assert message in complaint(*arguments)


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
