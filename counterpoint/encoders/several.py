"""Several projection heads instead of one, as a part: a method takes it as ``heads=`` and computes its loss through it.

The vectors of C heads lie side by side in one row, so that a queue, a momentum copy and whoever looks at embeddings need
not know how many there are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint import contrast
from counterpoint.contrast import Pairs, adaptive
from counterpoint.contrast.redundancy import correlation
from counterpoint.encoders.heads import Beside, TemperatureNetwork
from counterpoint.errors import InputError


@dataclass(frozen=True)
class SeveralHeads:
    """Heads that differ in their first random weights only, each with the method's own loss; the losses add up.

    Args:
        count: C, number of heads.
    """

    count: int = 3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"there must be at least one head, got {self.count}")


@dataclass(frozen=True)
class AdaptiveHeads:
    r"""Heads under which every pair has a temperature of its own, that a small network reads off its two vectors (AMCL).

    .. math::
        \ell_i = \sum_c -\frac{s^c_{i,i'}}{\tau^c_{i,i'}} + \beta\,\Omega(\tau^c_{i,i'})
        + \log \sum_n e^{s^c_{in}/\tau^c_{in}} - \beta \sum_n w_n \Omega(\tau^c_{in}), \qquad
        \Omega(\tau) = \tfrac d2 \log \tau + \tfrac1\tau

    The method says who repels whom, and its temperature is the one that training starts from; of its objective nothing
    else is left. SimSiam has the first two terms, Barlow Twins temperatures of pairs of dimensions: see
    `counterpoint.contrast.adaptive`.

    Without the bounds nothing would hold: a positive whose similarity exceeds beta gains without end from a smaller
    temperature, a hard negative from a larger one.

    Args:
        count: C, number of heads.
        beta: weight of the regulariser. It comes with d / 2: 0.1 at d = 128 is 6.4 log tau.
        tau: the bounds. The paper's lower one is 1e-5, where 1 / tau is 100,000; 0.05 is our safe choice.
        hardest: None repels all negatives softly; a number k only the k most similar, by their mean. The paper's table has
            the one hardest, its release 100; few of them learn slowly on small data.
        decoupled: the positive is no candidate, as in the paper; False lets it be one (InfoNCE).
        network: how two vectors make a temperature: "concat" or "product"; see `TemperatureNetwork`.
        shared: one network for all heads (the paper's figure), or one for each.
        hidden: width of the network.

    Source: Wang et al. 2024 (arXiv 2310.05615).
    """

    count: int = 3
    beta: float = 0.1
    tau: tuple[float, float] = (0.05, 2.0)
    hardest: int | None = None
    decoupled: bool = True
    network: Literal["concat", "product"] = "concat"
    shared: bool = True
    hidden: int = 128

    def __post_init__(self) -> None:
        if min(self.count, self.hidden, 1 if self.hardest is None else self.hardest) < 1 or not self.beta >= 0:
            raise InputError(f"adaptive heads need positive numbers, and a beta of at least 0, got {self}")


Heads = SeveralHeads | AdaptiveHeads
"""Every choice of heads there is."""

NAMED: dict[str, Heads] = {
    "several": SeveralHeads(),
    "amcl": AdaptiveHeads(),
    "amcl-hardest": AdaptiveHeads(hardest=1),
}
"""Choices by the names that recipes and the command line use."""


class Several(nn.Module):
    """What becomes of a method's heads and of its loss; without a choice both stay what they are.

    Args:
        choice: the heads, or None.
        dim: d, length of a head's vectors.
        start: the temperature from which adaptive ones start: the method's own, or 1 where it has none.
        mixing: the method's mixing parts, for the message.

    Raises:
        InputError: heads together with mixing, or bounds that leave out the start.
    """

    def __init__(self, choice: Heads | None, dim: int, start: float = 1.0, mixing: tuple[Any, ...] = ()) -> None:
        super().__init__()
        if choice is not None and mixing:
            raise InputError(
                "several heads and mixing do not go together: mixed vectors would belong to no head; leave one of them out"
            )
        self.choice, self.count, self.dim = choice, 1 if choice is None else choice.count, dim
        self.temperature: TemperatureNetwork | None = None
        if isinstance(choice, AdaptiveHeads):
            self.temperature = TemperatureNetwork(
                dim,
                choice.count,
                hidden=choice.hidden,
                bounds=choice.tau,
                start=start,
                shared=choice.shared,
                form=choice.network,
            )

    @property
    def width(self) -> int:
        """Length of a row: the vectors of all heads."""
        return self.count * self.dim

    @property
    def adaptive(self) -> bool:
        """Whether pairs have temperatures of their own, so that the method's is only where they start."""
        return self.temperature is not None

    def each(self, make: Callable[[], nn.Module], *, apart: bool = False) -> nn.Module:
        """What `make` makes, once for each head.

        Args:
            make: one head.
            apart: the head reads the vector of the head before it, not the encoder's.
        """
        return make() if self.choice is None else Beside([make() for _ in range(self.count)], apart)

    @torch.compiler.disable  # losses bring their own kernels
    def forward(self, pairs: Pairs, objective: Callable[..., Tensor], **options: Any) -> Tensor:
        """The loss of `pairs` under `objective`, summed over the heads."""
        if self.choice is None:
            return pairs.loss(objective, **options)
        if self.temperature is None:
            return torch.stack([own.loss(objective, **options) for own in self.split(pairs)]).sum(0)
        assert isinstance(self.choice, AdaptiveHeads)
        chosen: dict[str, Any] = {"count": self.count, "beta": self.choice.beta}
        if objective is contrast.negative_cosine:
            return adaptive.adaptive_prediction(pairs.query, pairs.key, self.temperature, **chosen)
        if objective is contrast.barlow_twins:
            matrices = torch.stack([correlation(own.query, own.key) for own in self.split(pairs)])
            return adaptive.adaptive_barlow_twins(matrices, self.temperature, beta=self.choice.beta, **options)
        if whole(objective) not in (contrast.info_nce, contrast.nt_xent, contrast.dcl, contrast.clip_loss):
            name = getattr(objective, "__name__", objective)
            raise InputError(
                f"adaptive heads replace a softmax contrast (nt_xent, info_nce, dcl, clip_loss), not {name}"
            )
        chosen |= {"hardest": self.choice.hardest, "decoupled": self.choice.decoupled}
        return adaptive.adaptive_contrast(pairs, self.temperature, **chosen)

    def split(self, pairs: Pairs) -> list[Pairs]:
        """The pairs as each head sees them.

        Raises:
            InputError: a length of rows that is no multiple of the number of heads.
        """
        if pairs.query.shape[1] % self.count:
            raise InputError(f"{pairs.query.shape[1]} dimensions cannot be shared evenly by {self.count} heads")
        names = [name for name in ("query", "key", "negatives", "partner") if getattr(pairs, name) is not None]
        parts = zip(*(getattr(pairs, name).chunk(self.count, dim=1) for name in names), strict=True)
        return [replace(pairs, **dict(zip(names, own, strict=True))) for own in parts]


def whole(objective: Any) -> Any:
    """The function under its fixed options."""
    return whole(objective.func) if isinstance(objective, partial) else objective
