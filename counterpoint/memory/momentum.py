"""A slowly moving copy of a module: MoCo's key encoder, BYOL's target."""

import copy
import math
from typing import Any

import torch
from torch import nn

from counterpoint.errors import InputError


class MomentumEncoder(nn.Module):
    r"""A copy of `module` whose parameters follow it as an exponential moving average, without gradient.

        p_copy <- m p_copy + (1 - m) p_online,      m(t) = final - (final - momentum) (cos(pi t) + 1) / 2

    m is constant when `final` is None; t in [0, 1] is the progress of training. Only parameters follow: the running
    statistics of batch normalisation come from the copy's own forward passes, in training mode like its parent, as in
    MoCo and BYOL.

    Args:
        module: what to copy, at its present weights; of several parts (encoder and projector) make one copy each.
        momentum: m at the start, between 0 (the copy is the online module) and 1 (it never moves).
        final: m at the end of training (BYOL: 1.0), or None.

    Source: He et al. 2020 (arXiv 1911.05722), equation 2; schedule: Grill et al. 2020 (arXiv 2006.07733), section 3.3.

    Raises:
        InputError: a momentum outside [0, 1].
    """

    def __init__(self, module: nn.Module, momentum: float = 0.99, final: float | None = None) -> None:
        super().__init__()
        for value in (momentum, momentum if final is None else final):
            if not 0 <= value <= 1:
                raise InputError(f"a momentum lies between 0 and 1, got {value}")
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.momentum, self.final = momentum, final

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy answers, without gradient."""
        return self.module(*args, **kwargs)

    def momentum_at(self, progress: float | None = None) -> float:
        """m at a progress of training between 0 and 1 (needed only with `final`)."""
        if self.final is None:
            return self.momentum
        if progress is None:
            raise InputError(
                "a momentum schedule needs the progress of training: update(online, progress=step / total_steps)"
            )
        t = min(max(progress, 0.0), 1.0)
        return self.final - (self.final - self.momentum) * (math.cos(math.pi * t) + 1) / 2

    @torch.no_grad()
    def update(self, online: nn.Module, progress: float | None = None) -> None:
        """Move the copy towards `online`, once per optimiser step.

        Args:
            online: the module that was copied (same parameters, by name and shape).
            progress: share of training done, between 0 and 1; needed only with `final`.

        Raises:
            InputError: `online` has other parameters than the copy, or a schedule without progress.
        """
        m = self.momentum_at(progress)
        copies, sources = dict(self.module.named_parameters()), dict(online.named_parameters())
        if copies.keys() != sources.keys():
            name = sorted(copies.keys() ^ sources.keys())[0]
            owner = "copy" if name in copies else "online module"
            raise InputError(
                f"the online module is not the one that was copied: only the {owner} has a parameter {name}"
            )
        for name, p in copies.items():
            if p.shape != sources[name].shape:
                raise InputError(
                    f"the online module is not the one that was copied: parameter {name} has shape"
                    f" {list(sources[name].shape)}, the copy's {list(p.shape)}"
                )
        if copies:
            torch._foreach_lerp_(list(copies.values()), [sources[name] for name in copies], 1 - m)
