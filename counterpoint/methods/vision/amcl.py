"""AMCL: several projection heads, and a learned temperature for every pair under each of them."""

from typing import Any, Literal

from counterpoint.encoders.several import AdaptiveHeads
from counterpoint.errors import InputError
from counterpoint.methods.vision.simclr import SimCLR


class AMCL(SimCLR):
    r"""SimCLR whose pairs are compared by C heads, each pair and head under a temperature of its own.

    .. math::
        \ell_i = \sum_c -\frac{s^c_{i,i'}}{\tau^c_{i,i'}} + \beta\,\Omega(\tau^c_{i,i'})
        + \log \sum_n e^{s^c_{in}/\tau^c_{in}} - \beta \sum_n w_n \Omega(\tau^c_{in}), \qquad
        \Omega(\tau) = \tfrac d2 \log \tau + \tfrac1\tau

    Under strong views some positive pairs look less alike than some negative ones, and no single similarity with one
    temperature tells them apart. Heads are different similarities; a small network reads each pair's temperature off its two
    vectors. Both follow from maximum likelihood: a head says that z' is Gaussian around z with variance tau, and
    :math:`\Omega` is what the normalisation of that density costs. Negatives have the opposite sign throughout; w is the
    softmax over them.

    When to use it: many and strong augmentations, where the histograms of positive and negative similarities overlap. It
    is a part: ``heads=amcl`` puts it on MoCo (one queue for each head), SimSiam, Barlow Twins, SimCSE and CLIP, and
    ``heads=several`` is the same heads under the method's fixed temperature. Training alone pays for it; the encoder that is
    kept is the same.

    What the bounds do: a positive with s > beta gains without end from a smaller temperature, a negative with s > beta from a
    larger one, so temperatures run to `tau`'s ends, and the range is the strongest choice here. With beta 1 the best
    temperature of a positive would be :math:`2 (1 - s) / d`, below any safe bound at d = 128.

    Defaults: 3 heads, beta 0.1, heads 512-128 and the upper bound 2 from the authors' code; its lower bound 1e-5 lets 1 /
    tau explode, so ours is 0.05. Heads are SimCLR's, with batch normalisation (theirs have none). Negatives repel
    softly; the paper's table lets the hardest alone repel (``hardest=1``), which gives one gradient an anchor and learns
    slowly on small data. The temperature starts as SimCLR's.

    Where codes differ: the authors' first code did not run; we take its network ("concat"). Their later release has
    ``hardest=100``, beta 1e-4, tau from 1e-5 and ``network="product"``, which in our hands soon gives all pairs the lower
    bound; in the regulariser of the negatives it leaves d / 2 out and sums over the hardest, where we average all of Omega.
    Its Barlow Twins network reads columns of one fixed batch size; ours reads correlations.

    Source: Wang, Koniusz, Gedeon and Zheng 2024, "Adaptive Multi-head Contrastive Learning" (ECCV; arXiv 2310.05615),
    section 3; LeiWangR/cl at 3318352 (table of losses) and 755799d.

    Args:
        count: C, number of heads.
        beta: weight of the regulariser.
        tau: smallest and largest temperature.
        hardest: None repels all negatives softly; a number k the k most similar, by their mean.
        network: how two vectors make a temperature: "concat" or "product"; see `counterpoint.encoders.heads`.
        shared: one temperature network for all heads, or one for each.
        projection: hidden and output width of a head.
        **simclr: as in SimCLR; `temperature` is where temperatures start.
    """

    def __init__(
        self,
        count: int = 3,
        beta: float = 0.1,
        tau: tuple[float, float] = (0.05, 2.0),
        hardest: int | None = None,
        network: Literal["concat", "product"] = "concat",
        shared: bool = True,
        projection: tuple[int, int] = (512, 128),
        **simclr: Any,
    ):
        if simclr.pop("heads", None) is not None:
            raise InputError("AMCL says itself which heads there are: set count, beta, tau ... instead of heads")
        heads = AdaptiveHeads(count, beta, tau, hardest, network=network, shared=shared)
        super().__init__(projection=projection, heads=heads, **simclr)
