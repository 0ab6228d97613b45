"""SupReMix: contrast for regression, with pairs mixed so that the embedding follows the label."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counterpoint import encoders
from counterpoint.contrast.regression import Shift, Weight, supremix
from counterpoint.encoders import heads
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method
from counterpoint.views import MOCO_V2, ImageViews

VIEWS = replace(MOCO_V2, blur=0.0)
"""As released: crops from a fifth of the area on, mirror, colour strength 0.4, no blur."""


class SupReMix(Method):
    r"""Supervised contrast over measured values: mixtures fill the gaps between labels, and distance counts.

    .. math::
        \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i} \frac{s_{ip}}{\tau}
        + \log \sum_{c \ne i} \big(|t_i - t_c| + 1\big) \, e^{s_{ic}/\tau}

    SupCon takes values for classes: it knows neither their order nor their distance. Here c also runs over mixtures that
    belong to anchor i alone. Negatives mix the anchor with a row of another label,
    :math:`\lambda h_i + (1 - \lambda) h_k`, :math:`\lambda \sim \mathrm{Beta}(2, 8)`: they lie between the two. Positives
    mix a row below with a row above, both less than `window` away, in the shares that give the anchor's very label:
    between two labels the embedding is to be a straight line. Mixtures are constants; both kinds come out of the
    similarities of the batch in closed form, where the released code holds a tensor of N x N x N vectors.

    When to use it: the label is a number (an age, an angle, a dose) and a linear probe or a small regressor will read the
    embedding. Views must not change the label: no rotation and no mirror where the label is a direction.

    Defaults: temperature 0.5, window 5 label units, Beta(2, 8), weight d + 1, projector 2048-128 with a last batch
    normalisation, as released for AgeDB (ages in years; temperature 0.3 for IMDB-WIKI). Window and weight are in label units:
    scale a label in [0, 1] to about a hundred, or change both.

    Where codes differ: the released code subtracts the largest logit of rows and of mixtures each on its own before it joins
    them, which weighs mixtures by more than their similarity (``shift=separate``; the default ``joint`` is the
    formula). It also sorts the labels of mixtures apart from the mixtures (not kept here), and its STS-B version divides by
    one positive more. "L2_inv" there gives mixtures (d + 1)^2 + 1 (kept with ``separate``).

    With ``mix_negative=False, mix_positive=False`` it is SupCon with distance weights, and with ``distance_weight=none``
    besides, SupCon on labels rounded to `rounding`: the baselines of its study.

    Source: Wu et al. 2023, "Mixup Your Own Pairs" (arXiv 2309.16633), section 3; code
    Dingyijiang1/Mixup-Your-Own-Pairs at d6152e0, whose commits are by the paper's first author.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        target: what is to be followed: a factor of the data, or "label"; None is its only measured value.
        rounding: labels are rounded to multiples of this, so that equal ones are positives; 0 keeps them as they are.
        temperature: of the softmax.
        distance_weight: of a row in the denominator, by its label's distance d: "L1_inv" d + 1, "L2_inv" d^2 + 1, "L1" and
            "L2" one over these, "none" 1.
        mix_negative: mix the anchor with rows of other labels.
        mix_positive: mix rows on both sides of the anchor's label.
        share: parameters of the Beta distribution of the anchor's share in a mixed negative.
        window: largest distance, in label units, of the rows that a positive is mixed from.
        shift: "joint" (formula) or "separate" (released code).
        views: the random views.
        pretrained: start from timm's pretrained weights.
    """

    uses_labels = True

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (2048, 128),
        target: str | None = None,
        rounding: float = 0.0,
        temperature: float = 0.5,
        distance_weight: Weight = "L1_inv",
        mix_negative: bool = True,
        mix_positive: bool = True,
        share: tuple[float, float] = (2.0, 8.0),
        window: float = 5.0,
        shift: Shift = "joint",
        views: ImageViews = VIEWS,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = heads.mlp(self.encoder.dim, *projection, norm="bn", last_norm="bn")
        self.views = replace(views, size=image_size)
        self.target, self.rounding = target, rounding
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "weight": distance_weight,
            "share": share if mix_negative else None,
            "window": window if mix_positive else None,
            "shift": shift,
        }

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images).pooled)

    def loss(self, batch: Batch) -> Tensor:
        value = target_of(batch, self.target)
        if self.rounding:
            value = (value / self.rounding).round() * self.rounding
        z1, z2 = self.project(self.views(batch["image"])), self.project(self.views(batch["image"]))
        self.watch(z1, z2)
        return supremix(torch.stack([z1, z2], dim=1), value, **self.options)


def target_of(batch: Batch, name: str | None) -> Tensor:
    """The values ``[B]`` called `name`, or the only measured ones of a batch.

    Raises:
        InputError: there are none, or several and no name.
    """
    known = {key: value for key, value in batch.items() if value.ndim == 1 and key != "index"}
    measured = [key for key, value in known.items() if value.is_floating_point()]
    if name is None and len(measured) != 1:
        what = f"the measured values {', '.join(measured)}" if measured else "no measured value"
        choice = f"say which with target=: {', '.join(known)}" if known else "it needs one float a picture as a factor"
        raise InputError(f"a regression needs one value for each picture; the data has {what}: {choice}")
    if name is not None and name not in known:
        raise InputError(f'the data has no value "{name}"; it has {", ".join(known) or "none"}')
    return known[name or measured[0]].float()
