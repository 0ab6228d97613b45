"""Labels that change while a model learns: thresholds, softening, dropping, stages, and mixtures."""

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.memory.labels import Refinement, Targets, Transduction, mixed_up, one_hot

THOUGHT = torch.tensor([[0.95, 0.05], [0.5, 0.5], [0.02, 0.98], [0.1, 0.9], [0.11, 0.89]])
LABEL = torch.tensor([0, 1, 0, 0, 0])


def test_only_sure_inputs_join():
    target, sure = Transduction(threshold=0.9)(THOUGHT)
    assert sure.tolist() == [True, False, True, True, False]
    assert torch.equal(target, one_hot(THOUGHT.argmax(1), 2))


def test_softened_labels_stay_shares():
    target, stay = Refinement(share=0.2)(one_hot(LABEL, 2), THOUGHT)
    assert stay.all()
    torch.testing.assert_close(target[2], torch.tensor([0.8 + 0.2 * 0.02, 0.2 * 0.98]))
    torch.testing.assert_close(target.sum(1), torch.ones(5))
    assert torch.equal(Refinement(share=0.0)(one_hot(LABEL, 2), THOUGHT)[0], one_hot(LABEL, 2))


def test_doubted_labels_are_dropped():
    target, stay = Refinement("drop", least=0.05)(one_hot(LABEL, 2), THOUGHT)
    assert stay.tolist() == [True, True, False, True, True] and torch.equal(target, one_hot(LABEL, 2))


def test_stages_come_in_order_and_leave_the_others_rows_alone():
    targets = Targets(LABEL, 2, 3, Refinement("drop"), Transduction(threshold=0.9, rounds=2))
    assert targets.stages == 4 and targets.used.tolist() == [True] * 3 + [False] * 2
    assert [epoch for epoch in range(8) if targets.due(epoch, 8)] == [2, 3, 4, 5, 6, 7]
    targets.change(THOUGHT)
    assert targets.used.tolist() == [True, True, False, False, False] and not targets.due(3, 8) and targets.due(4, 8)
    before = targets.target[:3].clone()
    targets.change(THOUGHT)
    assert targets.used.tolist() == [True, True, False, True, False]
    targets.change(THOUGHT.flip(1))
    assert targets.used.tolist() == [True, True, False, True, False] and targets.target[3].tolist() == [1, 0]
    assert torch.equal(targets.target[:3], before) and not targets.due(7, 8)
    assert torch.equal(targets.of(torch.tensor([3, 0])), targets.target[[3, 0]])


def test_a_state_brings_everything_back():
    one, two = (Targets(LABEL, 2, 3, Refinement(), Transduction()) for _ in range(2))
    one.change(THOUGHT)
    two.state = one.state
    assert two.stage == 1 and torch.equal(one.target, two.target) and torch.equal(one.used, two.used)


def test_a_training_without_any_label_left_is_refused():
    targets = Targets(LABEL[2:3], 2, 1, Refinement("drop", least=0.5), None)
    with pytest.raises(InputError, match=r"no label has the 0\.5 that it needs to stay"):
        targets.change(THOUGHT[2:3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transduction(threshold=1.5), "threshold between 0 and 1"),
        (lambda: Transduction(rounds=0), "1 round or more"),
        (lambda: Refinement("harden"), 'soften or drop, not "harden"'),
        (lambda: Refinement(share=2.0), "a share and a least between 0 and 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_vectors_and_labels_are_mixed_alike():
    torch.manual_seed(0)
    label = torch.arange(64) % 4
    x = one_hot(label, 4) * 2
    mixed, target = mixed_up(x, label, 4, 0.4)
    torch.testing.assert_close(mixed, 2 * target)  # what holds of every row holds of every mixture
    torch.testing.assert_close(target.sum(1), torch.ones(64))
    share = target.gather(1, label[:, None])[:, 0]
    assert len(share.unique()) > 20 and share.min() < 0.1  # a draw for each row, from all of 0 to 1
    even = mixed_up(x, label, 4, 50.0)[1].gather(1, label[:, None])[:, 0]
    apart = even < 1  # the partner is of another class
    assert apart.any() and (even[apart] - 0.5).abs().max() < 0.3  # Beta(50, 50) lies around a half
