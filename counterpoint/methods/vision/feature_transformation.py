"""Feature transformation: MoCo whose features, not only whose images, are augmented."""

from typing import Any, Literal

from counterpoint.memory.mixing import Transformation
from counterpoint.methods.vision.moco import MoCo


class FeatureTransformation(MoCo):
    r"""MoCo with extrapolated positives, which are harder, and interpolated negatives, which are new at each step.

    .. math::
        \ell = -\frac{\hat q \cdot \hat k}{\tau} + \log \Big( e^{\hat q \cdot \hat k / \tau}
        + \sum_j e^{\hat q \cdot \hat n_j / \tau} \Big), \qquad
        \hat q = \lambda q + (1 - \lambda) k, \;\; \hat k = \lambda k + (1 - \lambda) q, \;\;
        \hat n_j = \lambda' n_j + (1 - \lambda') n_{\pi(j)}

    The scores of a MoCo in training show positives that become alike within a few epochs and then teach little. With
    :math:`\lambda \in (1, 2)` the features of a pair move apart along their own line, by the more the less alike they
    are: :math:`\hat q \cdot \hat k = s + 2\lambda(1 - \lambda)(1 - s) \le s`. The queue is mixed with a shuffle
    :math:`\pi` of itself. Nothing is brought back to the unit sphere, the queue keeps the original keys, and the gradient
    reaches q through both sides of the positive.

    When to use it: instead of MoCo, at no cost. On any other objective of pairs: ``mixing=feature-transformation``
    (in-batch objectives get the extrapolation; see `counterpoint.memory.mixing.Transformation`). Every run's report
    shows the scores that enter its loss, so the effect can be seen.

    Defaults: target "posneg", one :math:`\lambda - 1 \sim \mathrm{Beta}(2, 2)` and one
    :math:`\lambda' \sim \mathrm{Beta}(1.6, 1.6)` a step, from the first epoch (the released commands).

    Where codes differ: the released code (DTennant/CL-Visualizing-Feature-Transformation at c53d1be) draws element by element
    with Beta(2, 2) whenever its target is "pos" or "neg" alone; here `target` and `elementwise` are apart, so that an
    ablation changes one thing. Its `norm_target` is ignored there: only the pair is ever brought back to the sphere, as
    with `renormalize`. It rounds the recorded scores to half precision; ours are float32.

    Source: Zhu et al. 2021, "Improving Contrastive Learning by Visualizing Feature Transformation" (ICCV; arXiv
    2108.02982), sections 3 and 4.

    Args:
        target: "pos", "neg" or "posneg".
        elementwise: for which of them each element of a feature has a draw of its own: "none", "pos", "neg", "posneg".
        positive_alpha: of the Beta distribution of the extrapolation.
        negative_alpha: of the Beta distribution of the interpolation.
        renormalize: bring the features of a pair back to the unit sphere (an ablation).
        warmup_epochs: epochs without it at the start.
        **moco: as in MoCo.
    """

    def __init__(
        self,
        target: Literal["posneg", "pos", "neg"] = "posneg",
        elementwise: Literal["none", "pos", "neg", "posneg"] = "none",
        positive_alpha: float = 2.0,
        negative_alpha: float = 1.6,
        renormalize: bool = False,
        warmup_epochs: int = 0,
        **moco: Any,
    ):
        part = Transformation(target, elementwise, positive_alpha, negative_alpha, renormalize, warmup_epochs)
        super().__init__(mixing=(*moco.pop("mixing", ()), part), **moco)
