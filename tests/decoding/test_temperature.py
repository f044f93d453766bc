"""What sampling draws: 20,000 tokens against the distribution that the user asked for."""

import copy

import pytest
import torch
from transformers import set_seed

from acd_logits import ACDLogitsProcessor, PromptPair
from conftest import DEVICE, HIDDEN, VOCAB, build_batch, build_model

pytestmark = pytest.mark.newest

DRAWS, CHUNK, TEMPERATURE = 20_000, 2_500, 0.7  # a temperature of the user's own
ALPHAS = [0.3, 0.5, 0.8]


@pytest.fixture(scope="module")
def prompt():
    """Soft prompt of both streams, so that they agree."""
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def plain_logits(model, prompt, batch):
    """`[rows, vocab]` of the untouched model behind the prompt."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([prompt.expand(len(embeds), -1, -1), embeds], 1)).logits[:, -1].float()


def draw(model, prompt, batch, alpha, **options):
    """How often `generate` draws each token as the first one, `[rows, vocab]`."""
    acd, rows = (
        ACDLogitsProcessor(model, PromptPair(prompt, prompt), alpha, beta=0.0, **options),
        len(batch["input_ids"]),
    )
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": 1}
    set_seed(0)
    counts = torch.zeros(rows, VOCAB)
    for _ in range(DRAWS // CHUNK):
        out = model.generate(**batch, logits_processor=[acd], num_return_sequences=CHUNK, **sampling)
        for row, tokens in enumerate(out[:, -1].view(rows, CHUNK).cpu()):
            counts[row] += tokens.bincount(minlength=VOCAB)
    acd.detach()
    return counts


def p_value(counts, probabilities):
    """Of Pearson's chi-square test; the tokens expected fewer than 5 times count as one."""
    expected = DRAWS * probabilities.double().cpu()
    rare = expected < 5
    observed, expected = (
        torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (counts.double(), expected)
    )
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def test_sampling_keeps_its_temperature(prompt):
    model, batch, alpha = build_model(), build_batch((2,)), 0.5
    wanted = plain_logits(copy.deepcopy(model), prompt, batch)[0] / TEMPERATURE
    assert p_value(draw(model, prompt, batch, alpha)[0], wanted.softmax(-1)) > 1e-3
    verbatim = draw(model, prompt, batch, alpha, keep_temperature=False)[0]
    assert p_value(verbatim, wanted.softmax(-1)) < 1e-9
    assert p_value(verbatim, (wanted * (1 - alpha)).softmax(-1)) > 1e-3


def test_sampling_keeps_its_temperature_in_every_row(prompt):
    model, batch, alpha = build_model(), build_batch((2, 2, 2)), torch.tensor(ALPHAS)
    wanted = (plain_logits(copy.deepcopy(model), prompt, batch) / TEMPERATURE).softmax(-1)
    for counts, expected in zip(draw(model, prompt, batch, alpha), wanted, strict=True):
        assert p_value(counts, expected) > 1e-3
    for counts, expected in zip(draw(model, prompt, batch, alpha, keep_temperature=False), wanted, strict=True):
        assert p_value(counts, expected) < 1e-9
