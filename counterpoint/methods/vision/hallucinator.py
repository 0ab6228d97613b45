"""Hallucinator: MoCo with a second positive for every query, made in feature space by a small net that learns along."""

from typing import Any

from torch import Tensor

from counterpoint.memory.mixing import Hallucination
from counterpoint.methods.vision.moco import MoCo
from counterpoint.views import HALLUCINATOR_1, HALLUCINATOR_2, ImageViews


class Hallucinator(MoCo):
    r"""MoCo whose queries come twice: as they are, and as a generator imagines them further away from their key.

    .. math::
        e = (1 + r)\, q - r\, k, \quad r \sim U(0, \text{ratio}) \qquad h = \mathrm{MLP}([q, e]) \qquad
        \ell = \tfrac12 \big( \ell_{\text{MoCo}}(q, k) + \ell_{\text{MoCo}}(h, k) \big)

    Two crops of an image are often too alike to teach much, and a step sees only one such pair. The extrapolation e
    leaves the key behind, the net of three layers makes it a feature, and both learn from the ordinary loss. q enters
    before it is normalised, k after. The query's crop is a centre-suppressed one, which makes the two images less alike
    already. After training only the encoder is kept.

    When to use it: on top of a contrastive method whose positives are easy, at hardly any cost: one small net. The
    generator alone is a part for any method with ``mixing=``, and the views are a choice of their own: ``counterpoint train
    simclr --mixing hallucinator --views hallucinator-1 --other_views hallucinator-2``, and the same for simsiam, where the
    part works on the predictions; see `counterpoint.memory.mixing.Hallucination` and the table of combinations. On SimCLR
    the paper's form has false negatives, which ``--mixing '[{duplicates: apart}]'`` has not.

    Defaults: ratio 0.1, hidden width 256 for 128 dimensions, crops whose centres lie in the central half by Beta(0.1,
    0.1), as released for small images; ImageNet wants (0.2, 0.8) and 0.6. All else as in MoCo. The paper's CIFAR-10
    recipe: SGD at 0.5, weight decay 1e-4, batch 512, 500 epochs.

    Where codes differ: the released code enqueues every key twice, which is a queue of half the length whose keys count
    double; we enqueue it once (``duplicate_keys`` does as released). Its crops begin at whole pixels. Its configuration
    for ImageNet takes ordinary crops during the first 20 epochs; ours are the same throughout.

    Source: Wu, Hobbs and Hovakimyan 2023, "Hallucination Improves the Performance of Unsupervised Visual Representation
    Learning" (ICCV; arXiv 2307.12168), with the code
    jingwu6/Hallucination-improves-the-performance-of-unsupervised-visual-representation-learning at c50c6dd.

    Args:
        hallucination_ratio: largest r; it is drawn once a step.
        hallucination_width: of the generator's hidden layers; None is twice the length of the projections.
        duplicate_keys: each key enters the queue twice.
        views: the random views of the query.
        other_views: the random views of the key.
        **moco: as in MoCo.
    """

    def __init__(
        self,
        hallucination_ratio: float = 0.1,
        hallucination_width: int | None = None,
        duplicate_keys: bool = False,
        views: ImageViews = HALLUCINATOR_1,
        other_views: ImageViews | None = HALLUCINATOR_2,
        **moco: Any,
    ):
        mixing = (*moco.pop("mixing", ()), Hallucination(hallucination_ratio, hallucination_width))
        super().__init__(mixing=mixing, views=views, other_views=other_views, **moco)
        self.duplicate_keys = duplicate_keys

    def remember(self, key: Tensor) -> None:
        self.queue.enqueue(key.repeat(2, 1) if self.duplicate_keys else key)
