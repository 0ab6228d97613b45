"""Prototypes lie on the sphere whenever they are compared, and stay where they are while frozen."""

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.memory import Prototypes


def stepped(part: Prototypes, optimiser: torch.optim.Optimizer, z: torch.Tensor) -> None:
    optimiser.zero_grad()
    part(z).square().sum().backward()
    part.before_step()
    optimiser.step()


def test_rows_are_normalised_in_place_before_the_forward_pass():
    torch.manual_seed(0)
    part, z = Prototypes(4, 6), torch.randn(3, 2, 4)
    weight = part.weight
    weight.data.mul_(torch.arange(1.0, 7)[:, None])
    directions = torch.nn.functional.normalize(weight.detach(), dim=1)
    scores = part(z)
    assert part.weight is weight and scores.shape == (3, 2, 6)
    torch.testing.assert_close(weight.detach(), directions)
    torch.testing.assert_close(scores, z @ directions.T)


def test_two_forward_passes_before_one_backward_pass():
    torch.manual_seed(0)
    part, z = Prototypes(4, 6), torch.randn(3, 4, requires_grad=True)
    (part(z).sum() + part(2 * z).sum()).backward()
    torch.testing.assert_close(part.weight.grad, 3 * z.detach().sum(0).expand(6, 4))


def test_they_stay_for_the_first_steps_and_move_then():
    """Also under weight decay and momentum, which would move them without a gradient."""
    torch.manual_seed(0)
    part, z = Prototypes(4, 6, frozen_steps=3), torch.randn(5, 4)
    optimiser = torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    part.normalise()
    start = part.weight.detach().clone()
    for step in range(5):
        assert part.frozen == (step < 3)
        stepped(part, optimiser, z)
        if step < 3:
            torch.testing.assert_close(part.weight.detach(), start, rtol=0, atol=1e-6)
        else:
            assert (part.weight.detach() - start).abs().max() > 1e-3
    assert part.steps == 5


def test_a_checkpoint_knows_how_many_steps_are_left():
    torch.manual_seed(0)
    part, again = Prototypes(4, 6, frozen_steps=2), Prototypes(4, 6, frozen_steps=2)
    part.before_step()
    again.load_state_dict(part.state_dict())
    assert again.frozen
    again.before_step()
    assert not again.frozen and again.steps == 2


def test_scores_are_float32_under_autocast():
    torch.manual_seed(0)
    part, z = Prototypes(64, 6), torch.nn.functional.normalize(torch.randn(5, 64), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = part(z.to(torch.bfloat16))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, z.to(torch.bfloat16).float() @ part.weight.detach().T)


def test_it_compiles():
    torch.manual_seed(0)
    part, z = Prototypes(4, 6), torch.randn(3, 4)
    compiled = torch.compile(part, backend="aot_eager")
    part.weight.data.mul_(3)
    torch.testing.assert_close(compiled(z), part(z))
    compiled(z).sum().backward()
    torch.testing.assert_close(part.weight.grad, z.sum(0).expand(6, 4))


@pytest.mark.parametrize("wrong", [(0, 3, 0), (4, 0, 0), (4, 3, -1)])
def test_bad_sizes_are_refused(wrong):
    with pytest.raises(InputError, match="prototypes need dim and count"):
        Prototypes(*wrong)
