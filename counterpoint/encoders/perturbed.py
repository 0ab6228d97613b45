"""Embeddings moved on purpose: a regulariser that keeps a classifier's answers smooth around each text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from counterpoint.contrast.adversarial import ascended, symmetric_cross_entropy
from counterpoint.encoders.text import TextEncoder
from counterpoint.errors import InputError

NORMS = ("embeddings.LayerNorm", "embeddings.layer_norm", "embeddings.norm")
"""What transformers' models call the normalisation of their summed embeddings."""


@dataclass(frozen=True)
class Sift:
    r"""Scale-invariant fine-tuning: answers must not change when normalised embeddings move in the worst direction.

    .. math:: w\, \frac1B \sum_i \mathrm{SCE}\big(f(\bar x_i + \delta_i),\, f(x_i)\big), \qquad
        \delta \leftarrow \delta + \eta\, \frac{g}{10^{-6} + \max_h |g_h|}

    x are the sums of a text's embeddings, brought to mean 0 and variance 1 before the model's own normalisation gets them, so
    that the same step means the same for large and for small embeddings (the model's normalisation undoes the first, so
    the clean answers stay what they are). The perturbation starts as small truncated noise and takes one step along the gradient
    of the symmetric cross entropy (`counterpoint.contrast.adversarial`) between perturbed and clean answers, model and clean
    answers held constant. Then both answers are pulled together; x is a constant in the perturbed pass. Costs two more forward
    passes and one and a half backward ones.

    Nothing of it stays in the model.

    Args:
        weight: w; 3 for a very small model and 5 for others, as released.
        noise: standard deviation of the first perturbation, which is cut at two of them.
        rate: :math:`\eta`.

    Source: He et al. 2021 (arXiv 2006.03654), section 5; microsoft/DeBERTa at 4d7fe0b, `sift/sift.py` and its MNLI script.

    Raises:
        InputError: a number that is negative.
    """

    weight: float = 5.0
    noise: float = 1e-2
    rate: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.noise >= 0 and self.rate >= 0):
            raise InputError(
                f"weight, noise and rate are not negative, got {self.weight}, {self.noise} and {self.rate}"
            )

    def __call__(self, encoder: TextEncoder, answer: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The clean scores ``[B, C]``, and the weighted penalty.

        Args:
            encoder: whose embeddings move.
            answer: the scores of a batch, through the encoder; called three times. However often it calls the encoder, it must
                be with the same rows each time.

        Raises:
            InputError: an encoder whose embeddings have no normalisation that we know, or that is called in chunks.
        """
        norm = embedding_norm(encoder)
        seen: list[Tensor] = []

        def clean(x: Tensor) -> Tensor:
            seen.append(normalised(x))
            return seen[-1]

        with before(norm, clean):
            scores = answer()
        places = [x.detach() for x in seen]
        moves = [self.first(x).requires_grad_() for x in places]
        rows = symmetric_cross_entropy(self.moved(norm, places, moves, answer), scores.detach(), reduction="none")
        gradients = torch.autograd.grad(rows.sum(), moves)
        moves = [ascended(m.detach(), g, rate=self.rate) for m, g in zip(moves, gradients, strict=True)]
        return scores, self.weight * symmetric_cross_entropy(self.moved(norm, places, moves, answer), scores)

    def first(self, x: Tensor) -> Tensor:
        """Truncated noise for the embeddings x, float32."""
        noise = torch.randn(x.shape, device=x.device) * self.noise
        return noise.clamp(-2 * self.noise, 2 * self.noise)

    @staticmethod
    def moved(norm: nn.Module, places: list[Tensor], moves: list[Tensor], answer: Callable[[], Tensor]) -> Tensor:
        """The scores where the embeddings are `places` + `moves`, call by call."""
        turn = iter(zip(places, moves, strict=True))

        def shifted(x: Tensor) -> Tensor:
            place, move = next(turn)
            return (place + move).to(x.dtype)

        with before(norm, shifted):
            return answer()


def normalised(x: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Mean 0 and variance 1 along the last axis."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


def embedding_norm(encoder: TextEncoder) -> nn.Module:
    """The normalisation of a model's summed embeddings.

    Raises:
        InputError: it has none that we know, or the encoder is called in chunks, whose second pass would not be perturbed.
    """
    if "forward" in vars(encoder):
        raise InputError("perturbed embeddings need the encoder's batch as a whole: leave chunk out")
    for name, module in encoder.model.named_modules():
        if name.endswith(NORMS):
            return module
    raise InputError(
        f"{encoder.name} does not normalise its embeddings in a place that we know ({', '.join(NORMS)}), where a perturbation "
        "would be added: leave it out, or take another encoder"
    )


@contextmanager
def before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`module` gets `change` of its input."""
    hook = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
