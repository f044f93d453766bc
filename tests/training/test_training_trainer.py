"""Steps and evaluations: what the loss is a mean over, its forms and its weights."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from acd_logits.anchors import SPLITS
from acd_logits.training import OPOModel, OPOTrainingArguments, Run, initial_prompts, train_pair, trainer
from acd_logits.training.trainer import NAMES
from conftest import VOCAB, build_model
from tiny_training import anchor_examples, assert_same_pair, build_arguments, build_options, history

JOINT = {"contrast_weight": 0.5, "first_token_weight": 2.0}


@pytest.mark.parametrize(
    "options",
    [
        {"retain": "ce"},
        {"retain": "kl", **JOINT},
        {"retain": "answer", "prompt_type": "key_value", "num_virtual_tokens": 6, **JOINT},
    ],
    ids=["the paper's", "joint", "key-value"],
)
def test_micro_batches_change_nothing(tokenizer, tmp_path, options):
    """Eight at once, or twice four; 21 examples, so that an epoch's last step is short."""
    examples = anchor_examples(tokenizer)
    results = []
    for size in (8, 4):
        folder, steps = tmp_path / str(size), 8 // size
        arguments = build_arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        results.append(train_pair(build_model(), Run(build_options(**options), arguments, tokenizer, examples)))
    assert_same_pair(*results, rtol=1e-4, atol=1e-4)
    whole, parts = ([line for line in history(tmp_path / size) if "SP_L_p" in line] for size in ("8", "4"))
    for one, other in zip(whole, parts, strict=True):
        assert {key: one.get(key) for key in ("loss", *NAMES)} == pytest.approx(
            {key: other.get(key) for key in ("loss", *NAMES)}, rel=1e-3, abs=1e-5
        )


def test_the_plain_model_answers_each_safe_example_once(tokenizer, tmp_path, monkeypatch):
    """Over two epochs and three evaluations; without the store, the prompts come out the same."""
    examples, plain_logits, rows = anchor_examples(tokenizer), OPOModel.plain_logits, []

    def counting(self, input_ids, attention_mask, response_length):
        rows.append(len(input_ids))
        return plain_logits(self, input_ids, attention_mask, response_length)

    monkeypatch.setattr(OPOModel, "plain_logits", counting)
    results = []
    for limit in (trainer.PLAIN_CACHE_BYTES, 0):
        monkeypatch.setattr(trainer, "PLAIN_CACHE_BYTES", limit)
        options, arguments = build_options(retain="kl"), build_arguments(tmp_path / str(limit))
        results.append(train_pair(build_model(), Run(options, arguments, tokenizer, examples)))
        assert sum(rows) == (7 + 3 if limit else 2 * 7 + 3 * 3)
        rows.clear()
    assert_same_pair(*results, rtol=1e-4, atol=1e-4)


def test_retain_may_leave_out_what_refusals_begin_with(tokenizer, tmp_path):
    """The held-out L_r at the start, by hand: the plain model without the refusals' first word, apologies cut off."""
    examples, model = anchor_examples(tokenizer), build_model()
    safe = [example for example in examples.held_out if SPLITS[example["split"]] == "D_S"]
    safe[0]["response"] = [50, *safe[0]["response"]]
    options = build_options(retain="answer")
    prompt = initial_prompts(model, tokenizer, options).safeguarding
    train_pair(model, Run(options, build_arguments(tmp_path), tokenizer, examples))
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
    first = next(line for line in history(tmp_path) if "eval_SP_L_r" in line)
    assert len(losses) < sum(len(example["response"]) for example in safe)
    assert first["eval_SP_L_r"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_weights_of_zero_switch_a_term_off(tokenizer, tmp_path):
    """The loss is the weighted sum of what the log shows."""
    options = build_options(ln_weight=0.0, lr_weight=0.0, lp_weight=2.0, contrast_weight=0.25, first_token_weight=3.0)
    train_pair(build_model(), Run(options, build_arguments(tmp_path), tokenizer, anchor_examples(tokenizer)))
    lines = [line for line in history(tmp_path) if "SP_L_p" in line]
    assert lines
    for line in lines:
        sp, ap, acd = (line.get(f"{s}_L_p", 0) + 3 * line.get(f"{s}_L_p_first", 0) for s in ("SP", "AP", "ACD"))
        assert line["loss"] == pytest.approx(2 * (sp + ap + 0.25 * acd), rel=1e-4)


def test_mirrors_are_told_apart(tokenizer, tmp_path):
    """What the log shows of L_m is part of the loss, and training on it alone lowers it."""
    alone = dict.fromkeys(("lp_weight", "ln_weight", "lr_weight"), 0.0)
    options = build_options(mirror_weight=2.0, contrast_weight=0.5, **alone)
    arguments = build_arguments(tmp_path, num_train_epochs=4)
    train_pair(build_model(), Run(options, arguments, tokenizer, anchor_examples(tokenizer)))
    lines = [line for line in history(tmp_path) if "SP_L_m" in line]
    assert lines
    for line in lines:
        assert line["loss"] == pytest.approx(2 * (line["SP_L_m"] + 0.5 * line["ACD_L_m"]), rel=1e-4)
    held_out = [line for line in history(tmp_path) if "eval_SP_L_m" in line]
    assert held_out[-1]["eval_SP_L_m"] < held_out[0]["eval_SP_L_m"]
    assert held_out[-1]["eval_ACD_L_m"] < held_out[0]["eval_ACD_L_m"]


def test_without_balance_the_trainer_decides(tokenizer, tmp_path):
    examples = anchor_examples(tokenizer)
    # One safe example more: 7 refusals, 7 answers to harmful instructions, 8 answers to safe ones
    examples.train += examples.held_out[2:3]
    for balance, steps in ((True, 21), (False, 22)):
        folder = tmp_path / str(balance)
        arguments = build_arguments(folder, num_train_epochs=1, per_device_train_batch_size=1)
        options = build_options(balance=balance)
        pair = train_pair(build_model(), Run(options, arguments, tokenizer, examples))
        assert sum(any(name in line for name in NAMES) for line in history(folder)) == steps
        assert pair.config.training["balance"] is balance


def test_gradient_checkpointing_changes_nothing(tokenizer, tmp_path):
    new_name = hasattr(OPOTrainingArguments, "activation_checkpointing")
    flag = "activation_checkpointing" if new_name else "gradient_checkpointing"
    pairs = []
    for checkpointing in (False, True):
        model = build_model()
        arguments = build_arguments(tmp_path / str(checkpointing), num_train_epochs=1, **{flag: checkpointing})
        pairs.append(train_pair(model, Run(build_options(), arguments, tokenizer, anchor_examples(tokenizer))))
        assert model.model.layers[0].gradient_checkpointing == checkpointing
    assert_same_pair(*pairs)


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
    train_pair(model, Run(build_options(), build_arguments(tmp_path), tokenizer, anchor_examples(tokenizer)))
    losses = [line["eval_loss"] for line in history(tmp_path) if "eval_loss" in line]
    assert losses[-1] < losses[0]
