"""Optimiser groups, LARS and the schedule have the values that the formulas give."""

import copy
import math

import pytest
import torch
from torch import nn

from counterpoint.errors import InputError
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.methods.vision.simsiam import SimSiam
from counterpoint.train.optimise import KEPT, Optimisation, build_optimiser, bytes_of_training, decay_groups


def rates(choice: Optimisation, steps: int, group: int = 0, groups=None) -> list[float]:
    """The rate that each of `steps` optimiser steps uses."""
    groups = groups or [{"params": [nn.Parameter(torch.zeros(2, 2))]}]
    built = build_optimiser(groups, choice, steps)
    found = []
    for _ in range(steps):
        found.append(built["optimizer"].param_groups[group]["lr"])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    return found


def test_cosine_goes_from_the_peak_to_zero():
    found = rates(Optimisation(lr=0.8), 8)
    assert found == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert found[0] == 0.8 and found[4] == pytest.approx(0.4)


def test_warm_up_is_linear_and_reaches_the_peak():
    found = rates(Optimisation(lr=1.0, warmup=0.4), 10)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert found[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(1, 6)])


def test_constant_keeps_the_peak_after_the_warm_up():
    assert rates(Optimisation(lr=1.0, warmup=0.5, schedule="constant"), 4) == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_schedule_counts_steps_not_epochs():
    built = build_optimiser([{"params": [nn.Parameter(torch.zeros(2, 2))]}], Optimisation(), 4)
    assert built["lr_scheduler"]["interval"] == "step"


def test_only_matrices_and_filters_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decaying, other = decay_groups(net, 0.3)
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decaying["params"]} == {id(net[0].weight), id(net[2].weight)}
    assert {id(p) for p in other["params"]} == {id(p) for p in (net[0].bias, *net[1].parameters(), net[2].bias)}


def test_frozen_parameters_are_in_no_group():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert sum(len(group["params"]) for group in decay_groups(net, 0.1)) == 2


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adam", "adamw"])
def test_weight_decay_reaches_every_optimiser_and_spares_vectors(optimizer):
    method = SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8))
    method.optimisation = Optimisation(optimizer=optimizer, weight_decay=0.1)
    groups = build_optimiser(method.parameter_groups(), method.optimisation, 10)["optimizer"].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(method.parameters()))
    for name, p in method.named_parameters():
        assert decay[id(p)] == (0.1 if p.ndim > 1 else 0.0), name


def test_lars_scales_matrices_by_their_norm_and_leaves_vectors_alone():
    """You et al. 2017, eq. 6: w <- w - lr * trust * |w| / |g + wd w| * (g + wd w)."""
    weight, bias = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.ones(2))
    holder = nn.Module()
    holder.weight, holder.bias = weight, bias
    choice = Optimisation(optimizer="lars", lr=0.5, momentum=0.0, weight_decay=0.1, schedule="constant")
    optimiser = build_optimiser(decay_groups(holder, choice.weight_decay), choice, 10)["optimizer"]
    weight.grad, bias.grad = torch.full((2, 2), 0.2), torch.full((2,), 0.2)
    optimiser.step()
    direction = torch.full((2, 2), 0.2 + 0.1 * 3.0)
    trust = optimiser.param_groups[0]["trust_coeff"] * 6.0 / (0.4 + 0.1 * 6.0)
    torch.testing.assert_close(weight.detach(), 3.0 - 0.5 * trust * direction)
    torch.testing.assert_close(bias.detach(), torch.full((2,), 1 - 0.5 * 0.2))


def test_lars_adapts_without_weight_decay_too():
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.full((2, 2), 3.0))
    choice = Optimisation(optimizer="lars", lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
    optimiser = build_optimiser(decay_groups(holder, 0.0), choice, 10)["optimizer"]
    holder.weight.grad = torch.full((2, 2), 0.2)
    optimiser.step()
    trust = optimiser.param_groups[0]["trust_coeff"] * 6.0 / 0.4
    torch.testing.assert_close(holder.weight.detach(), torch.full((2, 2), 3.0 - 0.5 * trust * 0.2))


def test_sgd_takes_momentum_and_decay():
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.ones(1, 1))
    choice = Optimisation(lr=0.1, momentum=0.5, weight_decay=0.2, schedule="constant")
    optimiser = build_optimiser(decay_groups(holder, 0.2), choice, 10)["optimizer"]
    expected, buffer = 1.0, 0.0
    for _ in range(3):
        holder.weight.grad = torch.ones(1, 1)
        optimiser.step()
        buffer = 0.5 * buffer + (1 + 0.2 * expected)
        expected -= 0.1 * buffer
    assert holder.weight.item() == pytest.approx(expected)


def test_simsiam_predictor_keeps_its_rate_under_the_cosine():
    method = SimSiam(encoder="convnet-4", image_size=16, projection=(16, 16), bottleneck=8)
    method.optimisation = Optimisation(lr=0.5, warmup=0.2)
    groups = method.parameter_groups()
    every = [{id(p) for p in group["params"]} for group in groups]
    predictor = {id(p) for p in method.predictor.parameters()}
    fixed = [index for index, group in enumerate(every) if group & predictor]
    assert set().union(*(every[index] for index in fixed)) == predictor
    assert set().union(*every) == {id(p) for p in method.parameters()}
    for index in range(len(groups)):
        found = rates(method.optimisation, 10, index, method.parameter_groups())
        if index in fixed:
            assert found == [0.5] * 10
        else:
            assert found[0] == 0.25 and found[-1] < 0.05
    assert groups[fixed[0]]["weight_decay"] == method.optimisation.weight_decay


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Optimisation(optimizer="sdg"), 'no optimizer named "sdg".*sgd'),
        (Optimisation(schedule="cosin"), 'no schedule named "cosin".*cosine'),
    ],
)
def test_unknown_names_are_refused(choice, message):
    with pytest.raises(InputError, match=message):
        rates(choice, 1)


def test_linear_goes_from_the_peak_to_zero_after_the_warm_up():
    found = rates(Optimisation(lr=1.0, warmup=0.2, schedule="linear"), 10)
    assert found == pytest.approx([0.5, 1.0, *(1 - step / 8 for step in range(8))])


@pytest.mark.parametrize("name", KEPT)
def test_memory_of_a_training_is_what_it_then_holds(name):
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    model[0].bias.requires_grad_(False)
    optimiser = build_optimiser(decay_groups(model, 0.1), Optimisation(optimizer=name), 5)["optimizer"]
    model(torch.ones(3, 30)).sum().backward()
    optimiser.step()
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    kept = [x for state in optimiser.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
    assert bytes_of_training(model, name) == held + sum(x.nbytes for x in kept)


@pytest.mark.parametrize("name", KEPT)
def test_states_from_a_checkpoint_lie_as_their_weights_do(name):
    def built():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, build_optimiser(decay_groups(model, 0.1), Optimisation(optimizer=name), 9)["optimizer"]

    def step(model, optimiser, number):
        optimiser.zero_grad()
        model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        optimiser.step()

    model, optimiser = built()
    step(model, optimiser, 1)
    again, other = built()
    again.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimiser.state_dict())
    for kept in state["state"].values():
        kept.update({key: x.contiguous() for key, x in kept.items() if torch.is_tensor(x)})
    other.load_state_dict(state)
    step(model, optimiser, 2)
    step(again, other, 2)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", KEPT)
def test_a_weight_may_begin_to_learn_later_than_others(name):
    first, later = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimiser = build_optimiser([{"params": [first, later]}], Optimisation(optimizer=name), 9)["optimizer"]
    for step in range(3):
        first.grad = torch.ones(3, 3)
        later.grad = torch.ones(3, 3) if step else None
        optimiser.step()
        assert torch.equal(later, torch.ones(3, 3)) == (step == 0)
