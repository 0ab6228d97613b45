"""MoCHi: MoCo whose queue is sharpened, because most of its keys are too easy to teach anything."""

from typing import Any

from counterpoint.memory.mixing import HardMixing
from counterpoint.methods.vision.moco import MoCo


class MoCHi(MoCo):
    r"""MoCo with synthetic negatives: the hardest keys of the queue are mixed with each other and with the query.

    .. math::
        \ell_i = -\frac{q_i \cdot k_i}{\tau} + \log \Big( e^{q_i \cdot k_i / \tau}
        + \sum_{n \in \text{queue}} e^{q_i \cdot n / \tau} + \sum_{h \in H_i} e^{q_i \cdot h / \tau} \Big)

    Late in training few keys of a queue are hard, and a longer queue hardly adds any. :math:`H_i` holds s mixtures of
    two of the query's N hardest keys and s' mixtures of such a key with the query itself (of which it is less than
    half), on the unit sphere and without gradient. Each query has its own; they are drawn anew at each step and
    never enter the queue.

    When to use it: instead of MoCo when the embedding is to be transferred or searched: the paper's gain is a more
    evenly used sphere and better detection, hardly a better linear probe. Few mixtures with the query: they may be
    false negatives. On any other objective with negatives: ``mixing=mochi``.

    Defaults: (N, s, s') = (1024, 1024, 128) after 10 epochs without, for a queue of 65,536. A queue of 4,096 wants about
    (128, 64, 16).

    Where codes differ: there is no official code; two independent ones agree on the mixing. They, and we, treat the
    query inside a mixture as a constant.

    Source: Kalantidis et al. 2020, "Hard Negative Mixing for Contrastive Learning" (NeurIPS; arXiv 2010.01028), section 3.

    Args:
        hard: N, how many of the most similar keys are mixed.
        mixed: s, mixtures of two hard keys.
        mixed_with_query: s', mixtures of a hard key and the query.
        warmup_epochs: epochs without mixing at the start.
        **moco: as in MoCo.
    """

    def __init__(
        self, hard: int = 1024, mixed: int = 1024, mixed_with_query: int = 128, warmup_epochs: int = 10, **moco: Any
    ):
        mixing = (*moco.pop("mixing", ()), HardMixing(hard, mixed, mixed_with_query, warmup_epochs))
        super().__init__(mixing=mixing, **moco)
