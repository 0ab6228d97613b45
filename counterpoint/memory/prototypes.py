"""Learned cluster centres on the unit sphere: SwAV's prototypes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.contrast import unit
from counterpoint.errors import InputError


class Prototypes(nn.Module):
    """K learned unit vectors; answers the dot product of each embedding with each of them, [..., d] -> [..., K].

    Before each forward pass the rows are brought back to the unit sphere, in place and without gradient: the optimiser moves
    them freely, what is compared always lies on the sphere. For the first steps they can stay where they began, while
    embeddings find their way to them: call `before_step` once before every optimiser step.

    Args:
        dim: length d of an embedding.
        count: number K of prototypes.
        frozen_steps: optimiser steps in which they do not move.

    Attributes:
        weight: [K, d].
        steps: int64 scalar, steps counted so far; a buffer, so that a resumed training thaws them in the same step.

    Source: Caron et al. 2020 (arXiv 2006.09882), section 3.1 and appendix A; freezing as released.

    Raises:
        InputError: dim or count below one, or a negative number of steps.
    """

    steps: Tensor

    def __init__(self, dim: int, count: int, frozen_steps: int = 0) -> None:
        super().__init__()
        if dim < 1 or count < 1 or frozen_steps < 0:
            raise InputError(
                f"prototypes need dim and count of at least 1 and no negative number of steps, got {dim}, {count} and "
                f"{frozen_steps}"
            )
        self.frozen_steps = frozen_steps
        self.weight = nn.Parameter(unit(torch.randn(count, dim)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        # host's copy of `steps`, so that nobody waits for the device; None after loading a checkpoint
        self._count: int | None = 0

    def forward(self, z: Tensor) -> Tensor:
        self.normalise()
        with torch.autocast(z.device.type, enabled=False):  # 8 bits of mantissa over epsilon would be coarse codes
            return F.linear(z.to(self.weight.dtype), self.weight)

    @torch.compiler.disable
    def normalise(self) -> None:
        """Bring the rows to the unit sphere."""
        # through .data: a forward pass between another one and its backward pass must not invalidate it
        self.weight.data.copy_(unit(self.weight.data))

    @property
    def frozen(self) -> bool:
        """Whether the coming optimiser step leaves them where they are."""
        if self._count is None:
            self._count = int(self.steps)
        return self._count < self.frozen_steps

    def before_step(self) -> None:
        """Forget the gradient while frozen (so that no decay or momentum moves them either), and count the step."""
        if self.frozen:
            self.weight.grad = None
        self.steps.add_(1)
        self._count = None if self._count is None else self._count + 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._count = None
