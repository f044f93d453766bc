"""How the soft prompt starts, where it stands, and what learns."""

import pytest
import torch

from acd_logits import ACDLogitsProcessor
from acd_logits.training import OPOModel, collate, initial_prompts, place_soft_prompt
from acd_logits.training.data import IGNORED
from conftest import HIDDEN, build_batch, build_model, build_pair
from reference import shared_logits
from tiny_training import build_options


def test_prompts_start_as_texts(tokenizer, tmp_path):
    model = build_model()
    (tmp_path / "text").write_text("w3 w4 w5\n")
    table = model.get_input_embeddings().weight
    for length, tokens in [(None, [3, 4, 5]), (2, [3, 4]), (7, [3, 4, 5, 3, 4, 5, 3])]:
        options = build_options(safe_prompt_file=str(tmp_path / "text"), num_virtual_tokens=length)
        prompt = initial_prompts(model, tokenizer, options).safeguarding
        torch.testing.assert_close(prompt, table[tokens])


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
