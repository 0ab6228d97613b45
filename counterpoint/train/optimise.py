"""Optimisers and schedules of the learning rate."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from counterpoint.errors import InputError


@dataclass(frozen=True)
class Optimisation:
    """How weights are updated.

    `lr` is the peak rate as given to the optimiser: nothing scales it behind your back.
    """

    optimizer: str = "sgd"
    lr: float = 0.06
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.0
    schedule: str = "cosine"


KEPT = {"sgd": 1, "lars": 1, "adam": 2, "adamw": 2}
"""Numbers that each optimiser keeps of a weight from step to step."""


def bytes_of_training(module: nn.Module, optimizer: str) -> int:
    """Memory that a training takes besides the weights, whatever its batch: gradients, and what the optimiser keeps.

    Activations, views and data come on top.
    """
    return (1 + KEPT[optimizer]) * sum(p.nbytes for p in module.parameters() if p.requires_grad)


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and filters decay; biases and normalisation (vectors) do not (and LARS leaves them alone)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimiser(
    groups: list[dict[str, Any]], choice: Optimisation, total_steps: float, *, fused: bool = True
) -> dict[str, Any]:
    """Optimiser and per-step schedule in Lightning's form.

    Args:
        groups: parameter groups.
        choice: optimiser "sgd" (momentum), "lars" (You et al. 2017), "adam" or "adamw"; schedule, after a linear
            warm-up over the share `warmup` of all steps: "cosine" or "linear" to zero, or "constant".
        total_steps: optimiser steps of the whole training.
        fused: take torch's fused kernels of adam and adamw, on CPU and GPU; not with gradient scaling, which must see the
            gradients first.

    Raises:
        InputError: unknown optimiser or schedule.
    """
    groups = [group for group in groups if group["params"]]
    device = groups[0]["params"][0].device.type
    kernel: dict[str, Any] = {"fused": True} if fused and device in ("cpu", "cuda") else {}
    optimiser: torch.optim.Optimizer
    match choice.optimizer:
        case "sgd":
            # its fused kernel cannot take a weight that begins to learn later than others, as prototypes do
            optimiser = torch.optim.SGD(groups, lr=choice.lr, momentum=choice.momentum)
        case "adam":
            optimiser = torch.optim.Adam(groups, lr=choice.lr, **kernel)
        case "adamw":
            optimiser = torch.optim.AdamW(groups, lr=choice.lr, **kernel)
        case "lars":
            from timm.optim.lars import Lars

            # timm's adapts only what decays: say it, so that a weight decay of 0 does not turn LARS into SGD
            groups = [{"always_adapt": all(p.ndim > 1 for p in group["params"]), **group} for group in groups]
            optimiser = Lars(groups, lr=choice.lr, momentum=choice.momentum)
        case unknown:
            raise InputError(f'no optimizer named "{unknown}"; there are sgd, lars, adam, adamw')
    optimiser.register_load_state_dict_post_hook(_laid_out_like_weights)
    if choice.schedule not in ("cosine", "linear", "constant"):
        raise InputError(f'no schedule named "{choice.schedule}"; there are cosine, linear, constant')
    warm = round(choice.warmup * total_steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        if choice.schedule == "constant":
            return 1.0
        done = (step - warm) / max(1, total_steps - warm)
        return 1 - done if choice.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    fixed = [group.pop("schedule", choice.schedule) == "constant" for group in optimiser.param_groups]
    factors = [(lambda step: 1.0) if constant and choice.schedule != "constant" else factor for constant in fixed]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factors)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _laid_out_like_weights(optimiser: torch.optim.Optimizer) -> None:
    """Fused kernels take weight, gradient and state as they lie in memory; a checkpoint holds states of channels-last weights
    row by row."""
    for weight, state in optimiser.state.items():
        for name, kept in state.items():
            if torch.is_tensor(kept) and kept.shape == weight.shape and kept.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=kept.dtype).copy_(kept)
