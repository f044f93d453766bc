"""The distillation: what the teacher leaves, how far the student is from it, and that stock peft runs the result."""

import copy
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.cli import main
from acd_logits.decoding.contrast import contrast
from acd_logits.training import OPOModel, distil_data
from acd_logits.training.distil import DistilArguments, DistilTrainingArguments
from acd_logits.training.distil_data import TeacherSettings, ask_teacher, check_memory, collate_teacher, load_prompts
from acd_logits.training.distil_model import (
    DISTIL_NAMES,
    DIVERGENCES,
    DistilTrainer,
    StudentModel,
    student_log_probs,
    student_start,
)
from conftest import VOCAB, build_batch, build_key_value_pair, build_model, build_pair, build_tokenizer
from reference import key_value_logits
from tiny_training import CHAT_TEMPLATE, anchor_rows, history

SETTINGS = {"alpha": 0.5, "beta": 0.1, "temperature": 0.0, "max_response_tokens": 6, "top_k": 5, "batch_size": 4}


@pytest.fixture
def anchors(tmp_path):
    """An anchor file; one harmful instruction comes with an answer that has begun, too."""
    rows = anchor_rows(4)
    rows.append({**rows[0], "begun": "w60 w61", "response": "w50 w51"})
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "anchors.jsonl"


def ask(tokenizer, anchors, pair, model=None, **settings):
    examples = load_prompts(str(anchors), tokenizer, False, 0.0, 0, None)
    given = TeacherSettings(**{**SETTINGS, "seed": 0, **settings})
    return ask_teacher(model or build_model(), tokenizer, examples, pair, given, anchors.with_name("teacher.jsonl"))


class TestTeacher:
    def test_each_prompt_is_asked_once(self, tokenizer, anchors):
        parts = load_prompts(str(anchors), tokenizer, False, 0.25, 0, None)
        assert len(parts.train) + len(parts.held_out) == 4 + 4 + 1
        assert {e["instruction"] for e in parts.train}.isdisjoint(e["instruction"] for e in parts.held_out)
        assert sum(e["begun"] for e in parts) == 1
        assert len(list(load_prompts(str(anchors), tokenizer, False, 0.25, 0, 5))) == 5
        with pytest.raises(ValueError, match="raise --max_prompts"):
            load_prompts(str(anchors), tokenizer, False, 0.25, 0, 1)

    def test_mirrors_are_drawn_together(self, tokenizer, tmp_path):
        rows = anchor_rows(6)
        (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        drawn = load_prompts(str(tmp_path / "anchors.jsonl"), tokenizer, False, 0.0, 0, 4).train
        assert len(drawn) == 4
        assert len({e["mirror"] for e in drawn}) == 2

    @pytest.mark.parametrize("beta", [0.1, 0.0])
    def test_its_distributions_are_those_of_the_contrast(self, tokenizer, anchors, beta):
        """Along its greedy continuations, which are those of the processor: the training's own forward says so."""
        model, pair = build_model(), build_key_value_pair()
        examples = ask(tokenizer, anchors, pair, model, beta=beta).train
        batch = collate_teacher(examples)
        inputs = [batch[name] for name in ("input_ids", "attention_mask", "labels")]
        for rows, streams in OPOModel(model, pair, True)(*inputs):
            scores = contrast(streams["safeguarding"], streams["adversarial"], 0.5, beta).log_softmax(-1)
            ids, got = batch["teacher_ids"][rows], batch["teacher_log_probs"][rows]
            kept = got[..., :-1].isfinite()
            torch.testing.assert_close(scores.gather(-1, ids)[kept], got[..., :-1][kept], atol=1e-4, rtol=0)
            tail = scores.scatter(-1, ids, -math.inf).exp().sum(-1)
            torch.testing.assert_close(tail, got[..., -1].exp(), atol=1e-4, rtol=0)
            assert torch.equal(ids[..., 0], scores.argmax(-1))
            assert torch.equal(ids[..., 0], batch["labels"][rows]), "greedy"
        ids = torch.tensor([examples[0]["input_ids"]])
        own = build_model()
        tokens = own.generate(ids, logits_processor=[ACDLogitsProcessor(own, pair, beta=beta)], max_new_tokens=6)
        written = tokens[0, ids.shape[1] :].tolist()
        assert written[: len(examples[0]["response"])] == examples[0]["response"]

    def test_a_run_that_was_stopped_goes_on(self, tokenizer, anchors, monkeypatch):
        pair = build_key_value_pair()
        whole = ask(tokenizer, anchors, pair, temperature=1.0)
        assert all(type(e["teacher_log_probs"]) is torch.Tensor for e in whole)
        file = anchors.with_name("teacher.jsonl")
        lines = file.read_text().splitlines(keepends=True)
        assert len(lines) == 1 + 3  # 9 prompts in batches of 4
        assert "w10" not in file.read_text()
        file.write_text("".join(lines[:2]) + lines[2][:30])
        sizes, generate = [], distil_data.generate_batch

        def counting(model, tokenizer, prompts, *args, **kwargs):
            sizes.append(len(prompts))
            return generate(model, tokenizer, prompts, *args, **kwargs)

        monkeypatch.setattr(distil_data, "generate_batch", counting)
        again = ask(tokenizer, anchors, pair, temperature=1.0)
        assert sizes == [4, 1]
        assert file.read_text() == "".join(lines)
        assert [e["response"] for e in again] == [e["response"] for e in whole]
        with pytest.raises(ValueError, match="of a run with another model, other instructions or settings"):
            ask(tokenizer, anchors, pair, temperature=0.5)

    def test_a_template_that_writes_the_date_does_not_end_a_run(self, tokenizer, anchors, monkeypatch):
        pair = build_key_value_pair()
        settings = TeacherSettings(**{**SETTINGS, "seed": 0})
        file, answers = anchors.with_name("teacher.jsonl"), []
        for day in (93, 94):
            examples = load_prompts(str(anchors), tokenizer, False, 0.0, 0, None)
            for example in examples:
                example["input_ids"].insert(0, day)
            answers.append(ask_teacher(build_model(), tokenizer, examples, pair, settings, file))
            monkeypatch.setattr(distil_data, "generate_batch", lambda *_, **__: pytest.fail("asks again"))
        assert [e["response"] for e in answers[1]] == [e["response"] for e in answers[0]]

    def test_a_repetition_penalty_of_the_model_is_left_out(self, tokenizer, anchors):
        pair, model = build_key_value_pair(), build_model()
        plain = ask(tokenizer, anchors, pair)
        anchors.with_name("teacher.jsonl").unlink()
        model.generation_config.repetition_penalty = 50.0
        assert [e["response"] for e in ask(tokenizer, anchors, pair, model)] == [e["response"] for e in plain]

    def test_memory_is_bounded(self):
        assert check_memory(1000, 64, 64) == 1000 * 64 * (64 * 8 + 4)
        with pytest.raises(ValueError, match=r"may take 30.8 GiB, more than 4: lower --top_k"):
            check_memory(1_000_000, 64, 64)


class TestStudent:
    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    @pytest.mark.parametrize("begin", [[], [5, 6, 7]])  # what all rows begin with is run once
    def test_it_stands_where_stock_peft_puts_it(self, tmp_path, name, begin):
        """Token by token: the training's forward chooses what `PeftModel.generate()` wrote, padded on the left."""
        prompt, model, batch = build_key_value_pair().safeguarding, build_model(name), build_batch((9, 6, 8))
        build_key_value_pair().save_pretrained(tmp_path)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for row, length in zip(ids, mask.sum(-1).tolist(), strict=True):
            row[len(row) - length :][: len(begin)] = torch.tensor(begin, dtype=torch.long)
        stock = PeftModel.from_pretrained(build_model(name), tmp_path, subfolder="safeguarding")
        record = {"output_logits": True, "return_dict_in_generate": True}
        out = stock.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **record)
        labels = out.sequences[:, ids.shape[1] :]
        whole_mask = torch.cat([mask, torch.ones_like(labels)], 1)
        [(rows, logits)] = StudentModel(model, prompt)(out.sequences, whole_mask, labels)
        assert rows.tolist() == [0, 1, 2]
        assert torch.equal(logits.argmax(-1), labels)
        torch.testing.assert_close(logits, torch.stack(out.logits, 1), atol=1e-4, rtol=0)

    def test_it_starts_as_the_pairs_sp(self):
        model, pair = build_model(), build_key_value_pair()
        assert torch.equal(student_start(model, pair), pair.safeguarding)
        soft, ids = build_pair(), build_batch((9,))["input_ids"]
        start = student_start(model, soft)
        x = torch.cat([soft.safeguarding[None], model.get_input_embeddings()(ids)], 1)
        got = key_value_logits(model, start, ids[0], 1, len(start))
        torch.testing.assert_close(got, model(inputs_embeds=x).logits[0, -9:], atol=1e-4, rtol=0)

    def test_divergences_are_those_over_the_vocabulary_where_all_is_kept(self):
        torch.manual_seed(0)
        z, teacher = torch.randn(3, 7), torch.randn(3, 7).log_softmax(-1)
        log_probs, ids = teacher.sort(descending=True)  # six tokens, and the last as "all others"
        q = z.log_softmax(-1)
        expected = {
            "forward_kl": (teacher.exp() * (teacher - q)).sum(-1),
            "reverse_kl": (q.exp() * (q - teacher)).sum(-1),
            "total_variation": 0.5 * (teacher.exp() - q.exp()).abs().sum(-1),
        }
        student = student_log_probs(z, ids[:, :6])
        for name, divergence in DIVERGENCES.items():
            got = divergence(log_probs, student, log_probs.isfinite())
            torch.testing.assert_close(got, expected[name])

    def test_where_the_teacher_is_cut_off(self):
        """One token is left to it; the second place is filled up with the same token, and there are no others."""
        z = torch.randn(7, requires_grad=True)
        teacher, ids = torch.tensor([0.0, -math.inf, -math.inf]), torch.tensor([4, 4])
        student, kept = student_log_probs(z, ids), teacher.isfinite()
        p = z.log_softmax(-1)[4]
        torch.testing.assert_close(DIVERGENCES["forward_kl"](teacher, student, kept), -p)
        torch.testing.assert_close(DIVERGENCES["total_variation"](teacher, student, kept), 1 - p.exp())
        (gradient,) = torch.autograd.grad(DIVERGENCES["forward_kl"](teacher, student, kept), z)
        assert gradient.isfinite().all()


@pytest.fixture
def folder(anchors):
    """A model, a pair and anchors for the command."""
    folder = anchors.parent
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = build_tokenizer(words, unk_token="<pad>", special=["<eos>"], pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    build_model().save_pretrained(folder / "model")
    build_key_value_pair(scale=0.5, vocab_size=VOCAB).save_pretrained(folder / "pair")
    return folder


def command(folder, *more, output="out"):
    return [
        *("distil", "--pair", str(folder / "pair"), "--train_file", str(folder / "anchors.jsonl")),
        *("--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / output), "--use_cpu"),
        *("--max_response_tokens", "5", "--num_train_epochs", "2", "--per_device_train_batch_size", "4"),
        *("--held_out_fraction", "0.25", "--learning_rate", "0.05", "--warmup_steps", "0", "--logging_steps", "1"),
        *("--report_to", "none", "--disable_tqdm", "true", "--dataloader_pin_memory", "false", *more),
    ]


def test_the_command_leaves_an_adapter_that_stock_peft_runs(folder, capsys, monkeypatch):
    more = ["--num_train_epochs", "8", "--save_strategy", "epoch"]
    assert main(command(folder, *more)) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "held out, before -> after" in out
    assert out.endswith(f"{folder / 'out'}: 7 virtual tokens\n")
    evaluations = [line for line in history(folder / "out") if "eval_loss" in line]
    assert evaluations[-1]["eval_KL"] < evaluations[0]["eval_KL"]
    facts = json.loads((folder / "out" / "acd_distilled.json").read_text())
    pair = PromptPair.from_pretrained(folder / "pair")
    assert facts["teacher"] == {"pair": "pair", "pair_digest": pair.digest, "alpha": 0.5, "beta": 0.1}
    assert set(facts["training"]["held_out_loss"]["kept"]) <= {"epoch", "loss", *DISTIL_NAMES}
    assert DISTIL_NAMES[0] in facts["training"]["held_out_loss"]["kept"]
    card = (folder / "out" / "README.md").read_text()
    assert "| the first token | " in card
    assert str(folder) not in card.replace("path/to", "")

    # What the training ended with is what stock peft generates with
    model = build_model()
    stock = PeftModel.from_pretrained(copy.deepcopy(model), folder / "out")
    assert stock.active_peft_config.peft_type.value == "CARTRIDGE"
    batch = build_batch((9, 6))
    tokens = stock.generate(**batch, max_new_tokens=5, do_sample=False)
    prompt = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in stock.get_prompt(1).layers])
    student = StudentModel(model, prompt.permute(3, 0, 1, 2, 4))
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    [(_, logits)] = student(tokens, mask, tokens[:, -5:])
    assert torch.equal(logits.argmax(-1), tokens[:, -5:])

    # Nothing is left to do
    monkeypatch.setattr(DistilTrainer, "train", lambda *_, **__: pytest.fail("trains again"))
    monkeypatch.setattr(distil_data, "generate_batch", lambda *_, **__: pytest.fail("asks again"))
    assert main(command(folder, *more)) == 0


def test_a_training_that_was_stopped_ends_as_one_that_was_not(folder, monkeypatch, capsys):
    compute_loss = DistilTrainer.compute_loss

    def stop_in_the_second_epoch(self, *args, **kwargs):
        if self.state.epoch >= 1:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistilTrainer, "compute_loss", stop_in_the_second_epoch)
        assert main(command(folder, output="stopped")) == 130
    assert list((folder / "stopped" / "run").glob("checkpoint-*"))
    (folder / "whole").mkdir()
    shutil.copy(folder / "stopped" / "teacher.jsonl", folder / "whole")
    for output in ("stopped", "whole"):
        assert main(command(folder, output=output)) == 0
    ends = [(folder / output / "adapter_model.safetensors").read_bytes() for output in ("stopped", "whole")]
    assert ends[0] == ends[1]


def test_a_copied_teacher_is_not_asked_again(folder, monkeypatch):
    assert main(command(folder, "--max_steps", "1", output="one")) == 0
    (folder / "two").mkdir()
    shutil.copy(folder / "one" / "teacher.jsonl", folder / "two")
    monkeypatch.setattr(distil_data, "generate_batch", lambda *_, **__: pytest.fail("asks again"))
    more = ["--max_steps", "1", "--learning_rate", "0.02", "--divergence", "total_variation"]
    assert main(command(folder, *more, output="two")) == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_by_hand(tokenizer, anchors, tmp_path, name):
    model, pair = build_model(), build_key_value_pair()
    rows = ask(tokenizer, anchors, pair, model, beta=0.0, max_response_tokens=10).train
    options = DistilArguments(pair="p", train_file="t", divergence=name, first_token_weight=2.0)
    quiet = {"use_cpu": True, "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True}
    args = DistilTrainingArguments(str(tmp_path), **quiet)
    student, found = StudentModel(model, student_start(model, pair)), []
    trainer = DistilTrainer(options, model=student, args=args, train_dataset=rows, eval_dataset=rows)
    got = trainer.evaluate()
    for batch in (collate_teacher([row]) for row in rows):
        [(_, logits)] = student(*(batch[key] for key in ("input_ids", "attention_mask", "labels")))
        teacher = batch["teacher_log_probs"]
        own = student_log_probs(logits, batch["teacher_ids"])
        found += enumerate(DIVERGENCES[name](teacher, own, teacher.isfinite())[0].tolist())

    def mean(places):
        return sum(value for i, value in found if i in places) / sum(i in places for i, _ in found)

    for where, places in (("", range(10)), ("_first", [0]), ("_2_to_8", range(1, 8)), ("_9_on", range(8, 10))):
        assert got[f"eval_divergence{where}"] == pytest.approx(mean(places), rel=1e-4)
    assert got["eval_loss"] == pytest.approx(mean(range(10)) + 2 * mean([0]), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "/nowhere"], "nowhere"),
        (["--alpha", "1"], "--alpha must be at least 0 and below 1"),
        (["--divergence", "reverse_kl"], "add --beta 0, or choose another --divergence"),
        (["--top_k", "0"], "--top_k must be at least 1"),
        (["--push_to_hub", "--hub_model_id", "a/b"], "acd-logits push --adapter"),
    ],
)
def test_bad_arguments_get_one_line(folder, fails, arguments, message):
    assert message in fails(*command(folder, *arguments))
