"""Projectors and predictors: small multilayer perceptrons between an encoder's vector and what a loss contrasts."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterpoint.errors import InputError

Norm = Literal["bn", "bn-noaffine"]


class FeatureNorm(nn.BatchNorm1d):
    """Batch normalisation of vectors [B, D] that says so when a training batch is too small to have a variance."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] < 2:
            raise InputError(
                "BatchNorm needs at least two samples in a training batch, got 1; enlarge the batch or drop the last"
            )
        return super().forward(input)


def mlp(
    dim: int,
    hidden: int,
    out: int,
    *,
    layers: int = 2,
    norm: Literal["bn"] | None = None,
    bias: bool | None = None,
    last_norm: Norm | None = None,
    last_bias: bool | None = None,
) -> nn.Sequential:
    """Linear - [BatchNorm] - ReLU, `layers` - 1 times, then Linear - [BatchNorm]; [B, dim] -> [B, out].

    Args:
        dim: length of the input vectors.
        hidden: width of the layers between.
        out: length of the output vectors.
        layers: number of linear layers; 1 is a single linear map without ReLU.
        norm: "bn" normalises before each ReLU.
        bias: of the linear layers before a ReLU; None gives one only where no normalisation follows
            (which would cancel it).
        last_norm: "bn", or "bn-noaffine" without learned scale and shift, after the last linear layer.
        last_bias: of the last linear layer; None as for `bias`.

    Raises:
        InputError: a width or number of layers below one.
    """
    if min(dim, hidden, out, layers) < 1:
        raise InputError(
            f"a head needs positive widths and layers, got dim {dim}, hidden {hidden}, out {out}, layers {layers}"
        )
    parts: list[nn.Module] = []
    width = dim
    for _ in range(layers - 1):
        parts.append(nn.Linear(width, hidden, bias=norm is None if bias is None else bias))
        if norm:
            parts.append(FeatureNorm(hidden))
        parts.append(nn.ReLU(inplace=True))
        width = hidden
    parts.append(nn.Linear(width, out, bias=last_norm is None if last_bias is None else last_bias))
    if last_norm:
        parts.append(FeatureNorm(out, affine=last_norm == "bn"))
    return nn.Sequential(*parts)


def simclr_projector(dim: int, hidden: int = 2048, out: int = 128) -> nn.Sequential:
    """Linear (no bias) - BN - ReLU - Linear.

    Source: Chen et al. 2020 (arXiv 2002.05709), section 4.2 and appendix B.
    """
    return mlp(dim, hidden, out, norm="bn")


def moco_projector(dim: int, hidden: int | None = None, out: int = 128, layers: int = 2) -> nn.Sequential:
    """Linear - ReLU - Linear; hidden None is `dim` (2048 for a ResNet-50). One layer is the linear map of MoCo v1.

    Source: Chen et al. 2020 (arXiv 2003.04297), section 3; version 1: He et al. 2020 (arXiv 1911.05722).
    """
    return mlp(dim, hidden or dim, out, layers=layers)


def byol_projector(dim: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """Linear - BN - ReLU - Linear (no bias).

    Source: Grill et al. 2020 (arXiv 2006.07733), section 3.3; biases as released.
    """
    return mlp(dim, hidden, out, norm="bn", bias=True, last_bias=False)


def byol_predictor(dim: int = 256, hidden: int = 4096, out: int | None = None) -> nn.Sequential:
    """The projector's architecture again, from the online projection to the target's; out None is `dim`.

    Source: as `byol_projector`.
    """
    return mlp(dim, hidden, out or dim, norm="bn", bias=True, last_bias=False)


def simsiam_projector(dim: int, hidden: int = 2048, out: int = 2048, layers: int = 3) -> nn.Sequential:
    """Linear - BN - ReLU (`layers` - 1 times), Linear - BN without scale and shift.

    Source: Chen and He 2021 (arXiv 2011.10566), section 3 (three layers; two on CIFAR, appendix D); the last
    normalisation as released.
    """
    return mlp(dim, hidden, out, layers=layers, norm="bn", last_norm="bn-noaffine")


def simsiam_predictor(dim: int = 2048, hidden: int = 512) -> nn.Sequential:
    """A bottleneck: Linear (no bias) - BN - ReLU - Linear back to `dim`. Source: Chen and He 2021, section 3."""
    return mlp(dim, hidden, dim, norm="bn")


def barlow_projector(dim: int, hidden: int = 8192, out: int = 8192) -> nn.Sequential:
    """Linear (no bias) - BN - ReLU twice, then Linear without bias.

    Source: Zbontar et al. 2021 (arXiv 2103.03230), section 2.2; biases as released.
    """
    return mlp(dim, hidden, out, layers=3, norm="bn", last_bias=False)


def pixel_projector(dim: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """The same small perceptron at every location of a map: 1 x 1 convolution - BN - ReLU - 1 x 1 convolution.

    Source: Xie et al. 2021 (arXiv 2011.10043), section 3.1; biases as released.
    """
    return nn.Sequential(
        nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, out, 1)
    )


class Beside(nn.Module):
    """Heads of one form and own weights; their vectors side by side, ``[B, C d]``.

    Args:
        heads: the heads.
        apart: each sees only its own part of the input, the vector of the head before it; False shows all to all.
    """

    def __init__(self, heads: list[nn.Module], apart: bool = False) -> None:
        super().__init__()
        self.heads, self.apart = nn.ModuleList(heads), apart

    def forward(self, x: Tensor) -> Tensor:
        seen = x.chunk(len(self.heads), dim=1) if self.apart else [x] * len(self.heads)
        return torch.cat([head(part) for head, part in zip(self.heads, seen, strict=True)], dim=1)


class TemperatureNetwork(nn.Module):
    r"""Temperatures of pairs of unit vectors, between two bounds: :math:`\tau = l + (h - l)\,\sigma(r)`.

    "concat": r is the one output of a perceptron (Linear - ReLU - Linear) that reads both vectors, x first; all pairs cost N
    x M x `hidden`, computed in blocks and again in the backward pass. "product": :math:`r = b - \langle \varphi(x),
    \varphi(y) \rangle` with a perceptron :math:`\varphi` from d to d, which does not mind the order of the two; all pairs
    cost one matrix product, which a long queue may need, but what all vectors share can carry every temperature to the lower
    bound, where none moves any more. In float32 whatever the precision, since the inverse of a temperature is taken.

    Args:
        dim: d, length of the vectors.
        count: C, number of heads.
        hidden: width of the hidden layer.
        bounds: l and h.
        start: the temperature from which training starts, before the pair has its say.
        shared: one network for all heads.
        form: "concat" or "product".

    Source: Wang et al. 2024 (arXiv 2310.05615), section 3, as its repository sketches it ("concat") and as its later
    release has it ("product"). The start is ours.

    Raises:
        InputError: bounds that are none, or a start that does not lie between them.
    """

    def __init__(
        self,
        dim: int,
        count: int,
        *,
        hidden: int = 128,
        bounds: tuple[float, float] = (0.05, 2.0),
        start: float = 1.0,
        shared: bool = True,
        form: Literal["concat", "product"] = "concat",
    ) -> None:
        super().__init__()
        low, high = self.bounds = bounds
        if not 0 < low < high < math.inf:
            raise InputError(f"temperatures lie between two positive bounds, the lower first, not {low} and {high}")
        if not low < start < high:
            raise InputError(
                f"adaptive temperatures start at {start}, which must lie between their bounds {low} and {high}: choose "
                "other bounds (tau) or another temperature"
            )
        if form not in ("concat", "product"):
            raise InputError(f'a temperature network is of the form "concat" or "product", not "{form}"')
        self.form, nets = form, 1 if shared else count
        wide, out = (dim, dim) if form == "product" else (2 * dim, 1)
        self.nets = nn.ModuleList(mlp(wide, hidden, out, last_bias=form == "product") for _ in range(nets))
        self.offset = nn.Parameter(torch.full((nets,), math.log((start - low) / (high - start))))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """``[..., C, d]`` twice -> ``[..., C]``: of the pairs that stand at the same place."""
        with torch.autocast(first.device.type, enabled=False):
            if self.form == "product":
                return self._bounded(self.offset - (self._read(first) * self._read(second)).sum(-1))
            return self._bounded(self.offset + self._read(torch.cat([first, second], dim=-1))[..., 0])

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """``[N, C, d]`` and ``[M, C, d]`` -> ``[C, N, M]``: of all pairs, head by head."""
        with torch.autocast(first.device.type, enabled=False):
            if self.form == "product":
                score = -torch.einsum("ncd,mcd->cnm", self._read(first), self._read(second))
            else:
                score = torch.stack([self._all_pairs(c, first[:, c], second[:, c]) for c in range(first.shape[1])])
            return self._bounded(self.offset[:, None, None] + score)

    def _read(self, x: Tensor) -> Tensor:
        if len(self.nets) == 1:
            return self.nets[0](x)
        return torch.stack([net(x[..., c, :]) for c, net in enumerate(self.nets)], dim=-2)

    def _all_pairs(self, head: int, x: Tensor, y: Tensor) -> Tensor:
        """The perceptron of x and y side by side for all pairs; its first layer is a sum, so each part is computed once."""
        net: Any = self.nets[head % len(self.nets)]
        first, last = net[0], net[2]
        for_x, for_y = first.weight.chunk(2, dim=1)
        x, y = nn.functional.linear(x, for_x, first.bias), nn.functional.linear(y, for_y)
        size = max(1, BLOCK[x.device.type == "cpu"] // max(1, y.numel()))
        rows = [checkpoint(_summed, part, y, last.weight[0], use_reentrant=False, preserve_rng_state=False)
                for part in x.split(size)]  # fmt: skip
        return torch.cat(rows)

    def _bounded(self, score: Tensor) -> Tensor:
        low, high = self.bounds
        return low + (high - low) * score.float().sigmoid()


BLOCK = {True: 2**20, False: 2**26}
"""Hidden values of all pairs that are held at once on a CPU and elsewhere."""


def _summed(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return (x[:, None] + y).relu() @ weight


def symmetric_relu(x: Tensor, b: Tensor | float) -> Tensor:
    """``relu(x - b) - relu(-x - b)``: for b >= 0 what exceeds b on either side of zero; b = 0 changes nothing."""
    return (x - b).relu() - (-x - b).relu()


def reweight(x: Tensor, kappa: float) -> Tensor:
    """Column i of ``[B, d]`` divided by kappa^i: later ones count ever less (1.05^-2047 is zero for all purposes)."""
    powers = torch.arange(x.shape[1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return x * (kappa**-powers).to(x.dtype)


class Reweight(nn.Module):
    """A head without weights: `reweight` by a fixed kappa > 1, in the place of what a trained head does to features.

    Source: Xue et al. 2024 (arXiv 2403.11391).

    Raises:
        InputError: kappa is not positive.
    """

    def __init__(self, kappa: float = 1.05) -> None:
        super().__init__()
        if not kappa > 0:
            raise InputError(f"kappa must be positive, not {kappa}")
        self.kappa = kappa

    def forward(self, x: Tensor) -> Tensor:
        return reweight(x, self.kappa)


class SymmetricReLU(nn.Module):
    """`symmetric_relu` with one learned threshold that starts at 0. Source: as `Reweight`."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return symmetric_relu(x, self.threshold)


def identity_projector(dim: int) -> nn.Sequential:
    """Linear - `SymmetricReLU` - Linear, which starts as the identity. Source: as `Reweight`."""
    layers = [nn.Linear(dim, dim), SymmetricReLU(), nn.Linear(dim, dim)]
    for layer in layers[::2]:
        assert isinstance(layer, nn.Linear)
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


__all__ = [
    "Beside",
    "FeatureNorm",
    "Reweight",
    "SymmetricReLU",
    "TemperatureNetwork",
    "barlow_projector",
    "byol_predictor",
    "byol_projector",
    "identity_projector",
    "mlp",
    "moco_projector",
    "pixel_projector",
    "reweight",
    "simclr_projector",
    "simsiam_predictor",
    "simsiam_projector",
    "symmetric_relu",
]
