"""How the soft prompt starts, where it stands, and what learns."""

import pytest
import torch

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.training import (
    OPOModel,
    collate,
    initial_prompts,
    instructions,
    place_soft_prompt,
)
from acd_logits.training import (
    model as training_model,
)
from acd_logits.training.model import by_length
from conftest import HIDDEN, build_batch, build_key_value_pair, build_model, build_pair
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


def test_key_value_prompts_start_as_the_keys_and_values_of_texts(tokenizer, tmp_path):
    model = build_model()
    (tmp_path / "text").write_text("w3 w4 w5 w6 w7")
    options = build_options(safe_prompt_file=str(tmp_path / "text"), prompt_type="key_value", num_virtual_tokens=5)
    got = initial_prompts(model, tokenizer, options)
    expected = PromptPair.from_text(model, tokenizer, "w3 w4 w5 w6 w7", prompt_type="key_value")
    torch.testing.assert_close(got.safeguarding, expected.safeguarding)
    assert got.config.prompt_type == "key_value"
    assert len(initial_prompts(model, tokenizer, build_options(prompt_type="key_value")).adversarial) == 64


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


def example(x, y):
    """An example of these prompt and response tokens."""
    row = {"input_ids": x, "response": y, "opening": 0, "avoid_until": len(y), "split": 0, "begun": False}
    return row | {"mirror": str(x)}


def response_logits(opo, batch):
    """What the model says in both streams, in the rows' order, and without a prompt."""
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    rows = {}
    for part, streams in opo(ids, mask, labels):
        rows |= {int(i): {name: logits[k] for name, logits in streams.items()} for k, i in enumerate(part)}
    return [rows[i] | {"plain": plain} for i, plain in enumerate(opo.plain_logits(ids, mask, labels.shape[1]))]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "mistral_sliding", "mamba2", "bamba"])
def test_logits_are_those_of_each_response_alone(name):
    model = build_model(name)
    pair = build_pair(n_s=6, n_a=5)
    opo = OPOModel(model, pair)
    rows = [([5, 6, 7, 8], [9, 10, 11]), ([12, 13], [14]), ([15, 16, 17], [18, 19, 20, 21, 22, 23, 24])]
    embedding = model.get_input_embeddings()
    streams = {"safeguarding": pair.safeguarding, "adversarial": pair.adversarial, "plain": torch.zeros(0, HIDDEN)}
    for got, (x, y) in zip(response_logits(opo, collate([example(x, y) for x, y in rows])), rows, strict=True):
        tokens = embedding(torch.tensor([x + y]))
        for stream, prompt in streams.items():
            alone = model(inputs_embeds=torch.cat([prompt[None], tokens], 1), use_cache=False).logits[0]
            torch.testing.assert_close(got[stream][: len(y)], alone[-len(y) - 1 : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", [[], [90, 3, 4, 90]], ids=["nothing in common", "a common start"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_computing_what_rows_share_once_changes_nothing(name, start, monkeypatch):
    model = build_model(name)
    rows = [([*start, 5, 6, 7, 8], [9, 10, 11]), ([*start, 12], [14, 15, 16]), ([*start, 12, 16, 17], [18, 19, 20])]
    batch, results, lengths = collate([example(x, y) for x, y in rows]), [], []
    model.register_forward_pre_hook(
        lambda _, __, call: lengths.append(call["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for shared in (True, False):
        monkeypatch.setattr(training_model, "reuses_prefix", lambda _, shared=shared: shared)
        opo = OPOModel(model, build_pair(n_s=6, n_a=5))
        logits = response_logits(opo, batch)
        sum(row["safeguarding"].log_softmax(-1).sum() for row in logits).backward()
        results.append((logits, opo.prompts["safeguarding"].delta.grad))
    (one, gradient), (other, expected) = results
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    # Of the plain forward: the common start, and the longest rest, without the last token of the response
    behind = [*([len(start)] if start else []), 6]
    whole = len(start) + 7
    assert lengths == [6 + len(start), 6, 5 + len(start), 6, *behind, 6 + whole, 5 + whole, whole]


@pytest.mark.parametrize("prompt_type", ["embedding", "key_value"])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 5, 4), (6, 6, 2)])
def test_a_shared_instruction_does_not_see_the_prompts(lengths, prompt_type):
    model = build_model()
    pair = build_key_value_pair() if prompt_type == "key_value" else build_pair(n_s=4, n_a=3)
    opo = OPOModel(model, pair, share_instruction_kv=True)
    rows = [(list(range(10, 10 + n)), [40 + n, 50, 60, 61, 62, 63, 64][: 2 + 2 * i]) for i, n in enumerate(lengths)]
    batch = collate([example(x, y) for x, y in rows])
    logits = response_logits(opo, batch)
    for got, (x, y) in zip(logits, rows, strict=True):
        nothing = pair.safeguarding[:0]
        for stream, prompt in [("plain", nothing), *((name, getattr(pair, name)) for name in opo.prompts)]:
            expected = shared_logits(model, prompt, torch.tensor(x + y), len(x))
            torch.testing.assert_close(got[stream][: len(y)], expected[len(x) - 1 : -1], atol=1e-4, rtol=1e-4)
    logits[0]["safeguarding"][0].logsumexp(-1).backward()
    (x, y), trained = rows[0], opo.prompts["safeguarding"]
    soft = pair.safeguarding.clone().requires_grad_()
    shared_logits(model, soft, torch.tensor(x + y), len(x))[len(x) - 1].logsumexp(-1).backward()
    torch.testing.assert_close(trained.delta.grad, soft.grad * trained.scale, atol=1e-6, rtol=1e-4)


def test_key_values_move_in_units_of_their_layer():
    pair = build_key_value_pair()
    opo = OPOModel(build_model(), pair, share_instruction_kv=True)
    prompt = opo.prompts["safeguarding"]
    assert torch.equal(prompt(), pair.safeguarding)
    with torch.no_grad():
        prompt.delta += 1
    moved = prompt() - pair.safeguarding
    for layer in range(pair.safeguarding.shape[1]):
        for half in (0, 1):
            std = pair.safeguarding[:, layer, half].std()
            torch.testing.assert_close(
                moved[:, layer, half], std.expand_as(moved[:, layer, half]), atol=1e-5, rtol=1e-3
            )


def test_an_instruction_is_computed_once_within_the_bound(monkeypatch):
    model, calls = build_model(), []
    model.base_model.register_forward_pre_hook(
        lambda _, __, call: calls.append(call["input_ids"].tolist()), with_kwargs=True
    )
    rows = [(5, 6, 7), (5, 6), (), (5, 6, 7)]
    cache = instructions.InstructionCache(model)
    first = cache(rows)
    assert calls == [[[5, 6]], [[0], [7]]]  # the common start once, and no row twice
    assert [keys.shape[:3] for keys, _ in first] == [(4, 2, 3)] * 3
    second = cache(rows)
    assert len(calls) == 2
    monkeypatch.setattr(instructions, "CACHE_BYTES", 0)
    third = instructions.InstructionCache(model)(rows)
    for layers in (second, third):
        for one, other in zip(first, layers, strict=True):
            torch.testing.assert_close(one, other)


def test_rows_of_like_length_run_together():
    def split(*lengths):
        return [rows.tolist() for rows in by_length(torch.tensor(lengths))]

    assert split(4, 40, 4, 38) == [[0, 2], [1, 3]]
    assert split(3, 3, 3) == [[0, 1, 2]]
    assert split(0, 5) == [[0], [1]]


def test_a_shared_instruction_needs_keys_and_values():
    model = build_model()
    opo = OPOModel(model, build_pair(), share_instruction_kv=True)
    model.model.gradient_checkpointing = True
    batch = collate([example([5, 6, 7], [8])])
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        opo(batch["input_ids"], batch["attention_mask"], batch["labels"])


def test_only_the_prompts_learn_and_in_full_precision():
    model = build_model("gpt2").to(torch.bfloat16)  # has dropout
    opo = OPOModel(model, build_pair(n_s=6)).train()
    batch = collate([example([5, 6], [9, 10])])
    one, other = (response_logits(opo, batch)[0]["safeguarding"] for _ in range(2))
    one.sum().backward()
    assert torch.equal(one, other)
    assert [name for name, _ in opo.named_parameters()] == ["prompts.safeguarding.delta", "prompts.adversarial.delta"]
    delta = opo.prompts["safeguarding"].delta
    assert delta.dtype == delta.grad.dtype == torch.float32
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.dtype == torch.bfloat16
    assert delta.grad.abs().sum() > 0


def test_a_quantised_base_stays_in_train_mode():
    """bitsandbytes, on a CPU, repacks weights in eval mode, and has no gradient then."""
    model = build_model()
    model.is_quantized = True
    assert OPOModel(model, build_pair()).base.training


def test_a_shared_instruction_needs_an_attention_that_can_be_replaced():
    model = build_model()
    model.set_attn_implementation("eager")
    opo = OPOModel(model, build_key_value_pair(), share_instruction_kv=True)
    batch = collate([example([3, 4, 5], [6])])
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        opo(batch["input_ids"], batch["attention_mask"], batch["labels"])
