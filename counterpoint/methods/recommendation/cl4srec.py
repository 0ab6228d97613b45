"""CL4SRec: next-item prediction beside a contrast of two random views of each history."""

from functools import partial
from typing import Any

from torch import Tensor

from counterpoint import contrast
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.train.method import Batch
from counterpoint.views.sequence import SequenceViews


class CL4SRec(SASRec):
    r"""SASRec whose states after two random views of a history attract each other.

    .. math:: \ell = \ell_{\text{next item}} + \lambda \, \mathrm{NTXent}(h', h'')

    with h' and h'' the states after the two views, plain dot products as scores and the other 2(B - 1) views of the batch as
    negatives.

    When to use it: instead of SASRec when histories are short and many; `weight` decides how much.

    Defaults: weight 0.1 and dot products (paper); two different operators out of crop (half of the items), mask (half)
    and reorder (80 %) for each history, as in QinHsiu/MCLRec at bc8d622.

    Where codes differ: the paper draws the two operators independently, so that they may be the same.

    Source: Xie et al. 2022, "Contrastive Learning for Sequential Recommendation" (arXiv 2010.14395), section 3.

    Args:
        weight: of the contrast (lambda).
        view_objective: "nt_xent", or any other objective of two views by name.
        view_temperature: of that objective.
        views: the random views.
    """

    def __init__(
        self,
        weight: float = 0.1,
        view_objective: str = "nt_xent",
        view_temperature: float = 1.0,
        views: SequenceViews = SequenceViews(),  # noqa: B008 (frozen)
        **sasrec: Any,
    ):
        super().__init__(**sasrec)
        self.weight, self.views = weight, views
        self.contrast = partial(contrast.objective(view_objective), temperature=view_temperature, normalize=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        first, second = self.views(batch["item_seq"], batch["item_seq_len"])
        h, h1, h2 = self.state(batch), self.encoder(*first).pooled, self.encoder(*second).pooled
        self.watch(h1, h2)
        return {"next item": self.next_item(h, batch), "contrast": self.weight * self.contrast(h1, h2)}
