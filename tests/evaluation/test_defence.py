"""What an attacker differentiates is what decoding chooses from."""

import math

import pytest
import torch

from acd_logits import ACDLogitsProcessor
from acd_logits.decoding.contrast import contrast
from acd_logits.evaluation.defence import Defence, target_loss
from conftest import build_key_value_pair, build_model, build_pair

PROMPT = [5, 6, 7, 8, 9, 10, 11]
BUILD = {
    "paired": build_pair,
    "shared": lambda: build_pair(share_instruction_kv=True),
    "key_value": build_key_value_pair,
    "nothing in front": lambda: build_pair(0, 0),
}


@pytest.fixture(params=BUILD)
def pair(request):
    return BUILD[request.param]()


@pytest.mark.parametrize("alpha", [0.7, 0.0])
def test_the_logits_are_those_of_decoding(pair, alpha):
    model = build_model()
    acd = ACDLogitsProcessor(model, pair, alpha=alpha, beta=0.0)
    inputs = {"input_ids": torch.tensor([PROMPT]), "max_new_tokens": 6, "do_sample": False}
    got = model.generate(
        **inputs, logits_processor=[acd], output_scores=True, return_dict_in_generate=True, pad_token_id=0
    )
    expected, response = torch.cat(got.scores), got.sequences[0, len(PROMPT) :].tolist()
    defence = Defence(acd)
    for before in (1, 4, len(PROMPT) - 1):
        rows = torch.tensor([PROMPT[before:] + response] * 2)
        with torch.no_grad():
            streams = defence.logits(defence.begin(PROMPT[:before]), model.get_input_embeddings()(rows), len(response))
        assert len(streams) == (2 if alpha else 1)
        for row in (0, 1):
            ours = [logits[row] for logits in streams]
            ours = contrast(*ours, alpha) if alpha else ours[0]
            torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_the_kinds_of_prompts_have_other_losses():
    """So that a mask of the wrong kind would be noticed."""
    losses = set()
    for build in BUILD.values():
        defence = Defence(ACDLogitsProcessor(build_model(), build(), alpha=0.7))
        losses.add(round(defence.losses(defence.begin(PROMPT[:3]), [PROMPT[3:]], [12, 13]).item(), 3))
    assert len(losses) == len(BUILD)


def test_rows_have_the_loss_they_have_alone(pair):
    defence = Defence(ACDLogitsProcessor(build_model(), pair, alpha=0.7), batch_size=2)
    begun, rows = defence.begin([5, 6]), [[7, 8], [9, 10], [11, 12]]
    together = defence.losses(begun, rows, [20, 21, 22])
    alone = torch.cat([defence.losses(begun, [row], [20, 21, 22]) for row in rows])
    torch.testing.assert_close(together, alone)
    assert len(set(together.tolist())) == 3


@pytest.mark.parametrize("alpha", [0.7, 0.0])
@pytest.mark.parametrize("after", [[30, 31], []], ids=["template", "no template"])
def test_the_gradient_is_that_of_the_loss(pair, alpha, after):
    """Against a small change of the embedding of one token of the suffix, which stands nowhere else."""
    model, suffix, target = build_model().double(), [40, 41, 42], [50, 51]
    defence = Defence(ACDLogitsProcessor(model, pair, alpha=alpha, beta=0.0))
    begun = defence.begin([5, 6, 7])
    gradient = defence.gradient(begun, suffix, after, target)
    assert gradient.shape == (3, 97)
    weight, step = model.get_input_embeddings().weight.data, 1e-3
    for place, token in ((0, 60), (1, 61), (2, 62), (2, 63)):
        losses = []
        for sign in (1, -1):
            kept = weight[suffix[place]].clone()
            weight[suffix[place]] += sign * step * weight[token]
            losses.append(defence.losses(begun, [suffix + after], target).item())
            weight[suffix[place]] = kept
        assert gradient[place, token].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=5e-3)
    assert gradient.abs().max() > 0.05


def test_the_loss_is_the_likelihood_under_decoding_where_the_target_can_be_chosen():
    generator = torch.Generator().manual_seed(0)
    safe, adversarial = torch.randn(2, 4, 3, 11, generator=generator) * 3
    scores = contrast(safe, adversarial, 0.5, 0.1)
    chosen = scores.argmax(-1)
    got = target_loss([safe, adversarial], chosen, 0.5, 0.1)
    torch.testing.assert_close(got, -scores.log_softmax(-1).amax(-1).mean(-1))
    alone = target_loss([safe], chosen, 0.0, 0.1)
    torch.testing.assert_close(alone, -safe.log_softmax(-1).gather(-1, chosen[..., None]).mean((1, 2)))


def test_a_target_below_the_threshold_can_be_pulled_up():
    safe, adversarial = torch.tensor([[[5.0, 0.0, 1.0]]], requires_grad=True), torch.zeros(1, 1, 3)
    target = torch.tensor([[1]])
    loss = target_loss([safe, adversarial], target, 0.5, 0.1)
    below = 5 + math.log(0.1)
    likelihood = torch.tensor([10.0, 0.0]).log_softmax(-1)[1].item()  # the third token is cut as well
    assert loss.item() == pytest.approx(below - likelihood, abs=1e-5)
    loss.sum().backward()
    assert safe.grad[0, 0, 1] < -1
    assert safe.grad[0, 0, 2] == 0


@pytest.mark.parametrize("name", ["gemma3", "mamba2"])
def test_models_without_plain_keys_are_refused(name):
    acd = ACDLogitsProcessor(build_model(name), build_pair())
    with pytest.raises(ValueError, match="the adaptive attack needs full attention over plain keys"):
        Defence(acd)


def test_a_repetition_penalty_is_refused():
    model = build_model()
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match=r"generation_config has repetition_penalty 1\.2, which the adaptive attack"):
        Defence(ACDLogitsProcessor(model, build_pair()))
