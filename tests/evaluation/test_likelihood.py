"""Log-likelihoods under the contrast, against two full forwards for each scored token."""

import pytest
import torch

from acd_logits import ACDLogitsProcessor
from acd_logits.evaluation.likelihood import contrasted_logits, response_loglikelihoods
from conftest import build_key_value_pair, build_model, build_pair
from reference import ReferenceProcessor, SharedReference

INSTRUCTION, RESPONSES = [5, 6, 7, 8], [[9, 10, 11], [12], [13, 14, 15, 16, 17]]
KINDS = {
    "paired": (build_pair, ReferenceProcessor),
    "shared": (lambda: build_pair(share_instruction_kv=True), SharedReference),
    "key_value": (build_key_value_pair, SharedReference),
}


def slow_scores(reference, instruction, response):
    """The scores of each token of a response, `[tokens, vocab]`."""
    ids = [instruction + response[:i] for i in range(len(response))]
    return torch.cat([reference(torch.tensor([row]), None) for row in ids])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("instruction", "beta", "horizon"), [(INSTRUCTION, 0.0, None), ([5], 0.1, None), (INSTRUCTION, 0.0, 2)]
)
def test_responses_behind_an_instruction(kind, instruction, beta, horizon):
    build, reference_class = KINDS[kind]
    model, pair = build_model(), build()
    acd = ACDLogitsProcessor(model, pair, alpha=0.7, horizon=horizon)
    reference = reference_class(model, pair, 0.7, beta, horizon)
    likely = list(instruction)
    for _ in range(3):
        likely.append(reference(torch.tensor([likely]), None).argmax().item())
    responses = [*RESPONSES, likely[len(instruction) :]]
    got = response_loglikelihoods(acd, instruction, responses, beta)
    for response, (loglikelihood, greedy) in zip(responses, got, strict=True):
        scores = slow_scores(reference, instruction, response)
        targets = torch.tensor(response)
        expected = scores.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
        assert loglikelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == bool((scores.argmax(-1) == targets).all())
    assert got[-1][1]
    assert not all(greedy for _, greedy in got)


def test_the_kinds_of_prompts_score_differently():
    """So that a test against the wrong reference would fail."""
    found = set()
    for build, _ in KINDS.values():
        acd = ACDLogitsProcessor(build_model(), build(), alpha=0.7)
        found.add(round(response_loglikelihoods(acd, INSTRUCTION, RESPONSES)[0][0], 2))
    assert len(found) == len(KINDS)


def test_one_stream_alone():
    model, pair = build_model(), build_pair()
    acd = ACDLogitsProcessor(model, pair, alpha=0.0, horizon=1)
    (got,) = response_loglikelihoods(acd, INSTRUCTION, RESPONSES[:1])
    embeds = torch.cat([pair.safeguarding, model.get_input_embeddings()(torch.tensor(INSTRUCTION + RESPONSES[0]))])
    with torch.no_grad():
        scores = model(inputs_embeds=embeds[None]).logits[0, -4:-1].log_softmax(-1)
    assert got[0] == pytest.approx(scores.gather(-1, torch.tensor(RESPONSES[0])[:, None]).sum().item(), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "mamba2", "bamba"])
@pytest.mark.parametrize("lengths", [(7, 4), (4, 7)])
def test_every_position_of_every_architecture_is_contrasted(name, lengths):
    model, pair = build_model(name), build_pair(*lengths)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22, 23]]
    inputs = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    acd = ACDLogitsProcessor(model, pair, alpha=0.5)
    with torch.no_grad():
        got = contrasted_logits(acd, inputs, beta=0.1)
    acd.detach()
    reference = ReferenceProcessor(model, pair, 0.5, 0.1)
    for row, scores in zip(rows, got, strict=True):
        expected = torch.cat([reference(torch.tensor([row[: i + 1]]), None) for i in range(len(row))])
        torch.testing.assert_close(scores[: len(row)], expected, atol=1e-4, rtol=0)


def test_a_shared_instruction_scores_no_texts():
    acd = ACDLogitsProcessor(build_model(), build_pair(share_instruction_kv=True))
    with pytest.raises(ValueError, match="score a response behind an instruction"):
        contrasted_logits(acd, torch.tensor([[5, 6, 7]]), 0.0)


def test_texts_that_the_soft_prompts_do_not_reach():
    acd = ACDLogitsProcessor(build_model("mistral_sliding"), build_pair())
    contrasted_logits(acd, torch.full((1, 153), 5), 0.0)
    with pytest.raises(ValueError, match="carry a soft prompt 153 tokens far"):
        contrasted_logits(acd, torch.full((1, 154), 5), 0.0)
