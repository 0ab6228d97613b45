"""Scorers: how well two vectors go together, for every pair of a row of x and a row of y."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from counterpoint.contrast import unit
from counterpoint.errors import InputError, nearest

Scorer = Literal["cosine", "dot", "distance", "bilinear", "match"]


class Similarity(nn.Module):
    """Dot products ``[N, M]`` of x ``[N, d]`` and y ``[M, d]``, of unit vectors or as given."""

    def __init__(self, normalize: bool = True):
        super().__init__()
        self.normalize = normalize

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (unit(x), unit(y)) if self.normalize else (x, y)
        return x @ y.T


class Distance(nn.Module):
    """Minus the squared distance ``[N, M]``: an energy with its sign changed."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x @ y.T - x.square().sum(1, keepdim=True) - y.square().sum(1)


class Bilinear(nn.Module):
    r""":math:`x^\top W y`, so that x and y may play different parts; W starts as the identity, a plain dot product.

    Args:
        dim: d.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ self.weight @ y.T


class Match(nn.Module):
    r"""A small network that looks at both vectors: :math:`w^\top \mathrm{relu}(U x + V y + R (x \odot y) + b)`.

    Holds N x M x `hidden` numbers. Source: the match classifier of Rethmeier and Augenstein's CLESS (arXiv 2010.01061) reads text
    and label vector, concatenated; the product is ours.

    Args:
        dim: d.
        hidden: width of the layer between; None is d.
    """

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or dim
        self.of_x, self.of_y = nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False)
        self.of_both, self.last = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        alone = self.of_x(x)[:, None] + self.of_y(y)[None]
        return self.last((alone + self.of_both(x[:, None] * y[None])).relu())[..., 0]


def scorer(name: Scorer, dim: int) -> nn.Module:
    """The scorer called `name` of vectors of length `dim`: from x ``[N, d]`` and y ``[M, d]`` to scores ``[N, M]``.

    Raises:
        InputError: none has that name.
    """
    match name:
        case "cosine" | "dot":
            return Similarity(name == "cosine")
        case "distance":
            return Distance()
        case "bilinear":
            return Bilinear(dim)
        case "match":
            return Match(dim)
    known = get_args(Scorer)
    raise InputError(f'no scorer named "{name}"{nearest(str(name), known) or "; there are " + ", ".join(known)}')
