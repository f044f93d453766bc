"""A run of both streams: its losses fall, and the pair is saved with what made it."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from acd_logits import ACDLogitsProcessor, PromptPair, training
from acd_logits.decoding.contrast import contrast
from acd_logits.training import (
    AnchorExamples,
    OPOModel,
    OPOTrainer,
    Run,
    collate,
    encode_anchors,
    initial_prompts,
    train_pair,
)
from acd_logits.training.trainer import NAMES
from conftest import VOCAB, build_key_value_pair, build_model, build_pair
from tiny_training import (
    HARMFUL,
    anchor_examples,
    anchor_rows,
    assert_same_pair,
    build_arguments,
    build_options,
    history,
)


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
    options = build_options(retain="kl", alpha=0.4, beta=0.2)
    arguments = build_arguments(folder, num_train_epochs=20, learning_rate=0.03)
    model = undecided_model(tokenizer)
    weights = copy.deepcopy(model.state_dict())
    pair = train_pair(model, Run(options, arguments, tokenizer, anchor_examples(tokenizer)))
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    return folder, pair, model, tokenizer


def test_a_run_lowers_every_term_on_held_out_instructions(trained):
    log = history(trained[0])
    evaluations = [line for line in log if "eval_loss" in line]
    assert len(evaluations) == 1 + 20  # before the first step, and after each epoch
    assert [name for name in NAMES if not any(name in line for line in log)] == []
    terms = [name for name in NAMES if name.startswith(("SP", "AP")) and not name.endswith("_first")]
    for name in terms:
        values = [line[f"eval_{name}"] for line in evaluations]
        assert values[-1] < values[0], name
    weighted = sum(evaluations[2][f"eval_{term}"] for term in terms)
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
    losses = config.training["held_out_loss"]
    assert losses["kept"]["loss"] < losses["first"]["loss"]

    stock = PeftModel.from_pretrained(copy.deepcopy(model), folder, subfolder="safeguarding")
    ids = torch.tensor([[5, 6, 7]])
    x = torch.cat([pair.safeguarding[None], model.get_input_embeddings()(ids)], 1)
    torch.testing.assert_close(stock(input_ids=ids).logits, model(inputs_embeds=x).logits)


def test_the_best_checkpoint_is_kept(tokenizer, tmp_path):
    """With a learning rate that ruins the prompt, the best of a run is its first checkpoint, not its last."""
    arguments = build_arguments(tmp_path, num_train_epochs=4, learning_rate=0.05, lr_scheduler_type="constant")
    examples, options, model = anchor_examples(tokenizer), build_options(), undecided_model(tokenizer)

    class Spoil(OPOTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step >= 6:  # two epochs of three steps
                self.optimizer.param_groups[0]["lr"] = 50.0
            return super().training_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run, "OPOTrainer", Spoil)
        pair = train_pair(model, Run(options, arguments, tokenizer, examples))
    losses = [line["eval_loss"] for line in history(tmp_path) if "eval_loss" in line][1:]
    assert min(losses) == losses[1]
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == {"prompts.safeguarding.delta", "prompts.adversarial.delta"}
    start = initial_prompts(model, tokenizer, options)
    assert torch.equal(start.safeguarding + saved["prompts.safeguarding.delta"], pair.safeguarding)
    assert pair.config.training["held_out_loss"]["kept"]["epoch"] == 2


def test_without_a_held_out_part(tokenizer, tmp_path):
    examples = anchor_examples(tokenizer, held_out=0)
    pair = train_pair(
        build_model(), Run(build_options(held_out_fraction=0.0), build_arguments(tmp_path), tokenizer, examples)
    )
    assert_same_pair(PromptPair.from_pretrained(tmp_path), pair)
    assert not any("eval_loss" in line for line in history(tmp_path))


def test_a_finished_run_is_not_trained_again(tokenizer, tmp_path, monkeypatch):
    parts = build_options(), build_arguments(tmp_path), tokenizer, anchor_examples(tokenizer)
    pair = train_pair(build_model(), Run(*parts))
    (tmp_path / "acd_config.json").unlink()
    monkeypatch.setattr(OPOTrainer, "train", lambda *_, **__: pytest.fail("trains again"))
    assert_same_pair(train_pair(build_model(), Run(*parts)), pair, rtol=0, atol=0)
    assert_same_pair(PromptPair.from_pretrained(tmp_path), pair, rtol=0, atol=0)


def test_key_value_prompts_are_trained_for_their_contrast(tokenizer, tmp_path):
    """Its terms fall on held-out instructions, and the pair is used as it was trained."""
    model, examples = undecided_model(tokenizer), anchor_examples(tokenizer)
    options = build_options(prompt_type="key_value", num_virtual_tokens=6, retain="kl", contrast_weight=1.0)
    arguments = build_arguments(tmp_path, num_train_epochs=12, learning_rate=0.1)
    train_pair(model, Run(options, arguments, tokenizer, examples))
    evaluations = [line for line in history(tmp_path) if "eval_loss" in line]
    for term in ("L_p", "L_n"):
        assert evaluations[-1][f"eval_ACD_{term}"] < evaluations[0][f"eval_ACD_{term}"]
    pair = PromptPair.from_pretrained(tmp_path)
    assert pair.config.prompt_type == "key_value"
    assert pair.safeguarding.shape == pair.adversarial.shape == (6, 3, 2, 2, 8)
    stock = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, subfolder="safeguarding")
    assert stock.active_peft_config.peft_type.value == "CARTRIDGE"
    batch = collate(examples.held_out)
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    prompts = {"input_ids": ids[:, : -labels.shape[1]], "attention_mask": mask[:, : -labels.shape[1]]}
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    decode = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    scores = model.generate(**prompts, logits_processor=[acd], **decode).scores[0].log_softmax(-1)
    for rows, logits in OPOModel(model, pair, share_instruction_kv=True)(ids, mask, labels):
        safe, adversarial = (logits[name][:, 0] for name in ("safeguarding", "adversarial"))
        expected = contrast(safe, adversarial, pair.alpha).log_softmax(-1)
        torch.testing.assert_close(scores[rows], expected, atol=1e-4, rtol=0)


def test_a_run_goes_on_from_another_pair(tokenizer, tmp_path):
    build_pair(n_s=5, n_a=3, vocab_size=VOCAB, results={"over_refusal": []}).save_pretrained(tmp_path / "first")
    start = PromptPair.from_pretrained(tmp_path / "first")
    options = build_options(init_pair=str(tmp_path / "first"))
    arguments = build_arguments(tmp_path / "second", num_train_epochs=1, learning_rate=1e-3)
    pair = train_pair(build_model(), Run(options, arguments, tokenizer, anchor_examples(tokenizer)))
    for name in ("safeguarding", "adversarial"):
        moved = (getattr(pair, name) - getattr(start, name)).abs().max()
        assert 0 < moved < 0.01
    assert pair.config.results == {}, "they were measured on the first pair"
    assert pair.config.training["init_pair"] == start.digest

    build_pair(n_s=5, n_a=3, seed=2, vocab_size=VOCAB).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="holds a run with another init_pair"):
        again = build_options(init_pair=str(tmp_path / "first"))
        train_pair(build_model(), Run(again, arguments, tokenizer, anchor_examples(tokenizer)))


def test_the_adversarial_prompt_can_be_held(tokenizer, tmp_path):
    build_key_value_pair(vocab_size=VOCAB).save_pretrained(tmp_path / "first")
    start = PromptPair.from_pretrained(tmp_path / "first")
    held = {"init_pair": str(tmp_path / "first"), "prompt_type": "key_value", "hold_adversarial": True}
    options = build_options(**held, contrast_weight=1.0)
    arguments = build_arguments(tmp_path / "second", num_train_epochs=1)
    pair = train_pair(build_model(), Run(options, arguments, tokenizer, anchor_examples(tokenizer)))
    assert torch.equal(pair.adversarial, start.adversarial)
    assert (pair.safeguarding - start.safeguarding).abs().max() > 0
    line = next(line for line in history(tmp_path / "second") if "SP_L_p" in line)
    terms = [line.get(f"{stream}_{term}", 0.0) for stream in ("SP", "ACD") for term in ("L_p", "L_n", "L_r")]
    assert line["loss"] == pytest.approx(sum(terms), rel=1e-3), "what cannot change is no part of the loss"
    with pytest.raises(ValueError, match="--hold_adversarial keeps the AP of a pair"):
        build_options(hold_adversarial=True)


def test_a_pair_to_go_on_from_must_fit(tokenizer, tmp_path):
    build_pair(hidden=8).save_pretrained(tmp_path / "first")
    options = build_options(init_pair=str(tmp_path / "first"))
    with pytest.raises(ValueError, match="was made for hidden size 8"):
        train_pair(
            build_model(), Run(options, build_arguments(tmp_path / "second"), tokenizer, anchor_examples(tokenizer))
        )
    build_pair(vocab_size=VOCAB).save_pretrained(tmp_path / "embeddings")
    options = build_options(init_pair=str(tmp_path / "embeddings"), prompt_type="key_value")
    with pytest.raises(ValueError, match="holds embedding prompts: add --prompt_type embedding"):
        train_pair(
            build_model(), Run(options, build_arguments(tmp_path / "third"), tokenizer, anchor_examples(tokenizer))
        )
    assert not (tmp_path / "second").exists(), "the cure would be another run in that folder"
    assert not (tmp_path / "third").exists()
    with pytest.raises(ValueError, match="leave it out with --init_pair"):
        build_options(init_pair="a/pair", num_virtual_tokens=7)


def test_keys_and_values_are_trained_on_one_device(tokenizer, tmp_path):
    model = build_model()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1}
    run = Run(build_options(prompt_type="key_value"), build_arguments(tmp_path), tokenizer, anchor_examples(tokenizer))
    with pytest.raises(ValueError, match="--device_map splits the model up: leave it out"):
        train_pair(model, run)


def test_the_best_prompt_must_have_been_saved(tmp_path):
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 2}
    with pytest.raises(ValueError, match="give --save_steps and --eval_steps one number"):
        training.prepare(build_options(), build_arguments(tmp_path, **every))


def test_other_turns_are_another_run(tokenizer, tmp_path):
    rows = anchor_rows()
    for history_ in ([], ["w3", "w4"]):
        parts = encode_anchors([row | {"history": history_} for row in rows], tokenizer, False, 64)
        run = Run(build_options(), build_arguments(tmp_path), tokenizer, AnchorExamples(parts[9:], parts[:9]))
        if history_:
            with pytest.raises(ValueError, match="holds a run with another anchors_sha256"):
                train_pair(build_model(), run)
        else:
            train_pair(build_model(), run)


def test_a_pair_trained_with_a_shared_instruction_is_used_so(tokenizer, tmp_path):
    """What its loss was computed on is what generate computes."""
    model = build_model()
    options = build_options(share_instruction_kv=True)
    train_pair(model, Run(options, build_arguments(tmp_path), tokenizer, anchor_examples(tokenizer)))
    pair = PromptPair.from_pretrained(tmp_path)
    assert pair.config.share_instruction_kv
    assert pair.config.training["share_instruction_kv"]
    batch = collate(anchor_examples(tokenizer).held_out)
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    prompts = {"input_ids": ids[:, : -labels.shape[1]], "attention_mask": mask[:, : -labels.shape[1]]}
    acd = ACDLogitsProcessor(model, pair, alpha=0.0, beta=0.0)
    decode = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    scores = model.generate(**prompts, logits_processor=[acd], **decode).scores[0]
    for rows, logits in OPOModel(build_model(), pair, share_instruction_kv=True)(ids, mask, labels):
        torch.testing.assert_close(scores[rows], logits["safeguarding"][:, 0], atol=1e-4, rtol=0)


def test_the_head_is_given_tokens_in_one_piece(tokenizer, tmp_path):
    """With a frozen matrix, torch would copy it for every row of a slice."""
    model, pieces = build_model(), []
    model.lm_head.register_forward_hook(lambda _, args, __: pieces.append(args[0].is_contiguous()))
    run = Run(build_options(), build_arguments(tmp_path), tokenizer, anchor_examples(tokenizer))
    train_pair(model, run)
    assert pieces
    assert all(pieces)
    assert not model.lm_head._forward_pre_hooks


def test_a_run_goes_on_within_an_epoch(tokenizer, tmp_path, monkeypatch):
    """Three steps make an epoch, and a checkpoint is written after every second."""
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    examples, compute_loss = anchor_examples(tokenizer), OPOTrainer.compute_loss

    def stop_in_step_5(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(OPOTrainer, "compute_loss", stop_in_step_5)
    for _ in range(2):
        arguments = build_arguments(tmp_path / "stopped", **every)
        with pytest.raises(KeyboardInterrupt):
            train_pair(build_model(), Run(build_options(), arguments, tokenizer, examples))
    monkeypatch.undo()
    resumed, whole = (
        train_pair(build_model(), Run(build_options(), build_arguments(tmp_path / name, **every), tokenizer, examples))
        for name in ("stopped", "whole")
    )
    assert_same_pair(resumed, whole)
