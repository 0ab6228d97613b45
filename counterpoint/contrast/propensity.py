"""Choosing pairs against the bias of the rule that finds them: weights by inverse propensity, and draws from them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.errors import InputError

Role = Literal["positive", "negative"]


def propensity(surface: Tensor, role: Role, *, sharpness: float = 0.1, among: Tensor | None = None) -> Tensor:
    r"""How likely the naive rule would pick each candidate: our reading of DebCSE, its formulas being out of reach.

    .. math:: e^+(x, c) = \sigma\big( (s_{sur}(x, c) - \mu_x) / t_p \big), \qquad e^- = 1 - e^+

    Positives that are made from the sentence itself look like it; sentences drawn at random do not.

    Args:
        surface: ``[B, K]``, how alike anchor and candidate look.
        role: as what the candidate is picked.
        sharpness: t_p.
        among: bool ``[B, K]``, the candidates that :math:`\mu_x` is the mean of; None: all.
    """
    if not sharpness > 0:
        raise InputError(f"the sharpness of a propensity must be positive, not {sharpness}")
    if role not in ("positive", "negative"):
        raise InputError(f'candidates are picked as "positive" or "negative", not "{role}"')
    counted = torch.ones_like(surface, dtype=torch.bool) if among is None else among
    mean = (surface * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    likely = (surface - mean) / sharpness
    return (likely if role == "positive" else -likely).sigmoid()


def inverse_propensity_logits(
    semantic: Tensor,
    allowed: Tensor,
    likely: Tensor | None = None,
    *,
    role: Role = "positive",
    temperature: float = 0.05,
    floor: float = 0.05,
    most: float = 10.0,
) -> Tensor:
    r"""Log weights of candidates: near in meaning (positives) or far (negatives), and unlikely under the naive rule.

    .. math::
        P^\pm(c \mid x) \propto \mathbb 1[c \text{ allowed}]\; e^{\pm s_{sem}(x, c) / t_s}
        \min\Big( \frac{1}{\max(e^\pm(x, c), \epsilon)}, w_{max} \Big)

    Self-normalised over the pool when drawn from. Our reading of DebCSE, not the paper's formula.

    Args:
        semantic: ``[B, K]``, how alike a teacher finds anchor and candidate.
        allowed: bool ``[B, K]``.
        likely: the propensities ``[B, K]``; None leaves them out (choice by meaning alone).
        role: "positive" (plus) or "negative" (minus).
        temperature: t_s.
        floor: epsilon.
        most: w_max, the largest inverse propensity.

    Returns:
        ``[B, K]``, -inf where not allowed.
    """
    if not (temperature > 0 and floor > 0 and most >= 1):
        raise InputError(
            f"temperature and floor must be positive and the largest weight at least 1, got {temperature}, {floor}, {most}"
        )
    if role not in ("positive", "negative"):
        raise InputError(f'candidates are picked as "positive" or "negative", not "{role}"')
    logits = (semantic if role == "positive" else -semantic) / temperature
    if likely is not None:
        logits = logits + likely.clamp(min=max(floor, 1 / most)).reciprocal().log()
    return logits.masked_fill(~allowed, -torch.inf)


@dataclass(frozen=True)
class InversePropensity:
    """The choices that turn similarities into weights: see `propensity` and `inverse_propensity_logits`.

    Args:
        debias: False leaves the propensities out.
        sharpness: t_p.
        temperature: t_s.
        floor: epsilon.
        most: w_max.
    """

    debias: bool = True
    sharpness: float = 0.1
    temperature: float = 0.05
    floor: float = 0.05
    most: float = 10.0

    def __post_init__(self) -> None:
        if min(self.sharpness, self.temperature, self.floor) <= 0 or self.most < 1:
            raise InputError(
                "sharpness, temperature and floor of propensities must be positive and the largest weight at least 1, got "
                f"{self.sharpness}, {self.temperature}, {self.floor} and {self.most}"
            )

    def logits(self, semantic: Tensor, surface: Tensor, allowed: Tensor, role: Role) -> Tensor:
        """Log weights ``[B, K]`` of candidates in a role."""
        likely = propensity(surface, role, sharpness=self.sharpness) if self.debias else None
        options: dict[str, Any] = {"temperature": self.temperature, "floor": self.floor, "most": self.most}
        return inverse_propensity_logits(semantic, allowed, likely, role=role, **options)


def draw_candidates(logits: Tensor, count: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
    """int64 ``[B, count]``: different candidates of each row, each next one drawn with the odds that are left.

    Args:
        logits: log weights ``[B, K]``, -inf for what may not be drawn.
        count: candidates of each row.
        generator: source of the draw.

    Returns:
        Columns; -1 where no candidate is left.
    """
    if not 1 <= count <= logits.shape[1]:
        raise InputError(f"{count} of {logits.shape[1]} candidates cannot be drawn")
    noise = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-20, 1 - 2**-24)
    score, at = (logits - (-noise.log()).log()).topk(count, dim=1)  # Gumbel: the largest are draws without replacement
    return at.masked_fill(score == -torch.inf, -1)
