"""Eq. 3 and 4."""

import math

import pytest
import torch

from acd_logits.anchors import SPLITS
from acd_logits.training import joint_loss, opo_loss
from acd_logits.training.data import IGNORED
from acd_logits.training.loss import count_tokens, mirror_loss, mirrored_rows


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


def test_the_joint_loss_is_that_of_both_streams_and_of_their_contrast():
    torch.manual_seed(0)
    safe, adversarial, plain = torch.randn(3, 6, 4, 11) * 3
    splits = torch.tensor([0, 1, 2, 2, 0, 1])
    labels = torch.randint(0, 11, (6, 4))
    labels[0, 2:] = labels[3, 1:] = labels[5, :] = IGNORED
    avoided = labels.clone()
    avoided[0, :1] = avoided[1, :2] = IGNORED  # the refusal and the answer begin alike there
    sums = joint_loss(safe, adversarial, labels, avoided, splits, 0.4, plain[splits == 2])
    streams = [
        (safe, "safeguarding"),
        (adversarial, "adversarial"),
        ((safe - 0.4 * adversarial) / 0.6, "safeguarding"),
    ]
    for i, (logits, stream) in enumerate(streams):
        expected = by_hand(logits, labels, splits, stream, plain)
        expected[:, 1] = by_hand(logits, avoided, splits, stream, plain)[:, 1]
        torch.testing.assert_close(sums[:, i].double(), expected, rtol=1e-5, atol=1e-5)
    tokens = count_tokens(labels, avoided, splits)
    for i, (follow, avoid) in enumerate([(0, 1), (1, 0), (0, 1)]):
        assert tokens[:, i, 0].tolist() == [
            int((labels[k] != IGNORED).sum()) * (splits[k] == follow) for k in range(6)
        ]
        assert tokens[:, i, 1].tolist() == [
            int((avoided[k] != IGNORED).sum()) * (splits[k] == avoid) for k in range(6)
        ]
        assert tokens[:, i, 2].tolist() == [0, 0, 4, 1, 0, 0]


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


def test_the_mirror_loss_is_that_of_the_refusals_log_odds():
    torch.manual_seed(0)
    safe, harmful = torch.randn(2, 5, 3, 11) * 3
    openings = torch.tensor([2, 7])
    losses = mirror_loss(safe, harmful, openings)

    def log_odds(logits):
        p = float(logits.double().softmax(-1)[openings].sum())
        return math.log(p / (1 - p))

    for i in range(5):
        for k in range(3):
            by_hand = math.log(1 + math.exp(log_odds(safe[i, k]) - log_odds(harmful[i, k])))
            assert losses[i, k].item() == pytest.approx(by_hand, rel=1e-4)
    more = torch.zeros(11).index_fill(0, openings, 5.0)  # what makes both refuse more changes nothing
    torch.testing.assert_close(mirror_loss(safe + more, harmful + more, openings), losses)


def test_rows_that_mirror_each_other():
    """A harmful answer, an answer that has begun, a row that fills up a batch and a row alone are left out."""
    rows = [("D_HR", 1), ("D_S", 1), ("D_HA", 1), ("D_S", 2), ("D_HR", 3), ("D_S", 3), ("D_HR", 4), ("D_S", 4)]
    rows += [("D_S", 4)]
    labels = torch.ones(len(rows), 2, dtype=torch.long)
    labels[4] = IGNORED
    batch = {
        "splits": torch.tensor([SPLITS.index(split) for split, _ in rows]),
        "mirrors": torch.tensor([mirror for _, mirror in rows]),
        "begun": torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 0]),
        "labels": labels,
    }
    safe, harmful = mirrored_rows(batch)
    assert list(zip(safe.tolist(), harmful.tolist(), strict=True)) == [(1, 0), (8, 6)]
