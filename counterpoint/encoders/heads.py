"""Projectors and predictors: small multilayer perceptrons between an encoder's vector and what a loss contrasts."""

from typing import Literal

from torch import Tensor, nn

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


def moco_projector(dim: int, hidden: int | None = None, out: int = 128) -> nn.Sequential:
    """Linear - ReLU - Linear; hidden None is `dim` (2048 for a ResNet-50).

    Source: Chen et al. 2020 (arXiv 2003.04297), section 3.
    """
    return mlp(dim, hidden or dim, out)


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


__all__ = [
    "FeatureNorm",
    "byol_predictor",
    "byol_projector",
    "mlp",
    "moco_projector",
    "simclr_projector",
    "simsiam_predictor",
    "simsiam_projector",
]
