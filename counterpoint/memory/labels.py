"""Labels that a model changes while it learns: softened or dropped ones, and those that it gives to inputs without any."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.errors import InputError


@dataclass(frozen=True)
class Transduction:
    r"""Transductive fine-tuning: inputs without labels join the training under the labels that the model is sure of.

    .. math:: \hat y_i = \arg\max_c p_{ic} \quad \text{where} \quad \max_c p_{ic} \ge \theta

    A model trained so has seen the inputs that it answers for: its results are no inductive ones, and evaluation says so.

    Args:
        inputs: where they are: a part of the known set that is trained on ("test", "dev"), or a file.
        threshold: :math:`\theta`.
        rounds: how often the model looks at them; each time all of them are judged anew.

    Source: Zhong et al. 2023 (arXiv 2302.09268), whose text could not be read: self-training is our reading of the name.

    Raises:
        InputError: a threshold that is no share, or no round.
    """

    inputs: str = "test"
    threshold: float = 0.9
    rounds: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or self.rounds < 1:
            raise InputError(
                f"transduction has a threshold between 0 and 1 and 1 round or more, not {self.threshold} and {self.rounds}"
            )

    def __call__(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities ``[N, C]`` -> one-hot targets ``[N, C]``, and bool ``[N]``, which of them count."""
        most, label = probabilities.max(1)
        return one_hot(label, probabilities.shape[1]), most >= self.threshold


@dataclass(frozen=True)
class Refinement:
    r"""Self-calibrated fine-tuning: given labels give way a little to what the model thinks, or are dropped where it objects.

    .. math:: y'_i = (1 - a)\, y_i + a\, p_i \qquad \text{or} \qquad \text{row } i \text{ out if } p_{i y_i} < \epsilon

    Args:
        how: "soften" or "drop".
        share: a.
        least: :math:`\epsilon`.

    Source: Zhong et al. 2023 (arXiv 2302.09268), whose text could not be read: this is our reading of the name.

    Raises:
        InputError: another way, or numbers that are no shares.
    """

    how: Literal["soften", "drop"] = "soften"
    share: float = 0.2
    least: float = 0.05

    def __post_init__(self) -> None:
        if self.how not in ("soften", "drop"):
            raise InputError(f'refinement is soften or drop, not "{self.how}"')
        if not (0 <= self.share <= 1 and 0 <= self.least < 1):
            raise InputError(f"refinement has a share and a least between 0 and 1, not {self.share} and {self.least}")

    def __call__(self, target: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot targets and probabilities ``[N, C]`` -> targets ``[N, C]``, and bool ``[N]``, which rows stay."""
        if self.how == "soften":
            return torch.lerp(target, probabilities, self.share), torch.ones(len(target), dtype=torch.bool)
        return target, (target * probabilities).sum(1) >= self.least


class Targets:
    """What each row of a training is to be taken for, and which rows take part; refinement and transduction change it.

    The training has one stage more than there are changes, all of as many epochs. Not a module: a checkpoint holds `state`,
    since how many rows there are is known with the data only.

    Args:
        label: int64 ``[N]``; those of unlabelled rows do not count.
        classes: C.
        labelled: the first so many rows have labels.
        refinement: first change, if any.
        transduction: further ones, if any.

    Attributes:
        target: ``[N, C]``.
        used: bool ``[N]``.
        stage: changes that have happened.
    """

    def __init__(
        self,
        label: Tensor,
        classes: int,
        labelled: int,
        refinement: Refinement | None,
        transduction: Transduction | None,
    ):
        self.target, self.labelled = one_hot(label, classes), labelled
        self.used = torch.arange(len(label)) < labelled
        self.refinement, self.transduction = refinement, transduction
        self.stage = 0

    @property
    def stages(self) -> int:
        return 1 + (self.refinement is not None) + (0 if self.transduction is None else self.transduction.rounds)

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether a stage begins with this epoch, out of so many."""
        return min(epoch * self.stages // epochs, self.stages - 1) > self.stage

    def change(self, probabilities: Tensor) -> None:
        """The next stage, given what the model thinks of all rows ``[N, C]``."""
        self.stage += 1
        self.target = self.target.cpu()
        own, other = slice(0, self.labelled), slice(self.labelled, None)
        if self.refinement is not None and self.stage == 1:
            self.target[own], self.used[own] = self.refinement(self.target[own], probabilities[own])
            if not self.used.any():
                raise InputError(f"no label has the {self.refinement.least} that it needs to stay: lower least")
        elif self.transduction is not None:
            self.target[other], self.used[other] = self.transduction(probabilities[other])

    def of(self, index: Tensor) -> Tensor:
        """Targets ``[B, C]`` of the rows int64 ``[B]``, on their device."""
        self.target = self.target.to(index.device)
        return self.target[index]

    @property
    def state(self) -> dict[str, Any]:
        return {"stage": self.stage, "target": self.target, "used": self.used}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.stage, self.target, self.used = state["stage"], state["target"], state["used"]


def mixed_up(x: Tensor, target: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Each row mixed with a random other, and its label alike: mixup.

    .. math:: \lambda x_i + (1 - \lambda) x_{\pi(i)}, \quad \lambda y_i + (1 - \lambda) y_{\pi(i)}, \quad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Args:
        x: ``[N, D]``.
        target: classes int64 ``[N]``, or shares of them ``[N, C]``.
        classes: C.
        alpha: :math:`\alpha`; one draw a row.

    Returns:
        ``[N, D]`` and ``[N, C]``.

    Source: Zhang et al. 2018 (arXiv 1710.09412), equation 2.
    """
    shape = torch.full((len(x), 1), alpha, device=x.device)
    share = torch.distributions.Beta(shape, shape, validate_args=False).sample()
    partner = torch.randperm(len(x), device=x.device)
    soft = one_hot(target, classes) if target.ndim == 1 else target
    return torch.lerp(x[partner], x, share.to(x.dtype)), torch.lerp(soft[partner], soft, share)


def one_hot(label: Tensor, classes: int) -> Tensor:
    """int64 ``[N]`` -> float32 ``[N, C]``."""
    return torch.nn.functional.one_hot(label, classes).float()
