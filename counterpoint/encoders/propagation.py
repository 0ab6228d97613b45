"""Locations of a feature map that are alike speak for each other: PixPro's pixel propagation module."""

import torch
from torch import Tensor, nn

from counterpoint.contrast import unit
from counterpoint.encoders.heads import pixel_projector
from counterpoint.errors import InputError


class Propagation(nn.Module):
    r"""Each location of a map becomes a sum over all locations of it, weighted by similarity; ``[N, C, H, W]`` twice.

    .. math:: y_i = \sum_j \max(\cos(x_i, x_j), c)^\gamma\, \frac{g(x_j)}{\lVert g(x_j) \rVert}

    Not a softmax and not divided by the sum of the weights: what follows normalises. The weights come from x itself, before g.

    Args:
        dim: C.
        gamma: sharpness; below 1 every weight gets 1e-6 first, since its gradient at 0 would be infinite.
        clamp: c, smallest similarity that counts as one (negative ones must not become large by an even power).
        layers: of g: 0 is the identity, 1 a 1 x 1 convolution, 2 two of them with batch normalisation and ReLU between.

    Source: Xie et al. 2021 (arXiv 2011.10043), section 3.2; the normalisation of g as released.

    Raises:
        InputError: a sharpness or a number of layers that makes no sense.
    """

    def __init__(self, dim: int, gamma: float = 2.0, clamp: float = 0.0, layers: int = 1) -> None:
        super().__init__()
        if not gamma > 0 or layers not in (0, 1, 2):
            raise InputError(f"propagation needs gamma > 0 and 0, 1 or 2 layers, got {gamma} and {layers}")
        self.gamma, self.clamp = gamma, clamp
        self.transform: nn.Module = nn.Identity()
        if layers:
            self.transform = nn.Conv2d(dim, dim, 1) if layers == 1 else pixel_projector(dim, dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value = unit(self.transform(x).flatten(2).transpose(1, 2))
        place = unit(x.flatten(2).transpose(1, 2))
        with torch.autocast(x.device.type, enabled=False):
            weight = (place @ place.transpose(1, 2)).clamp(min=self.clamp)
            weight = (weight + 1e-6 if self.gamma < 1 else weight) ** self.gamma
            return (weight @ value).transpose(1, 2).reshape(x.shape)
