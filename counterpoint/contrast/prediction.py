"""Losses without negatives: a prediction should point where its target points."""

from torch import Tensor

from counterpoint.contrast.operands import check_matrix, reduce, unit
from counterpoint.errors import InputError


def negative_cosine(prediction: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Minus the cosine between prediction and target, which is a constant: :math:`-\cos(p_i, \mathrm{stop}(z_i))`.

    BYOL's squared distance of unit vectors is 2 plus twice this value.

    Source: Chen and He 2021 (arXiv 2011.10566), eq. 1; Grill et al. 2020 (arXiv 2006.07733), eq. 2.

    Args:
        prediction: ``[N, d]``.
        target: ``[N, d]``; no gradient flows into it.
        reduction: "mean", "sum" or "none".

    Raises:
        InputError: wrong shape or type.
    """
    check_matrix(prediction, "prediction")
    check_matrix(target, "target")
    if prediction.shape != target.shape:
        raise InputError(
            f"prediction and target must have one shape, not {list(prediction.shape)} and {list(target.shape)}"
        )
    return reduce(-(unit(prediction) * unit(target.detach())).sum(1), reduction)
