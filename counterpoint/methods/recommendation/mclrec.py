"""MCLRec: learned augmenters give two more views, trained in alternation with the encoder."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint import contrast
from counterpoint.contrast.margin import contrastive_regularizer
from counterpoint.errors import InputError
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.train.method import Batch
from counterpoint.train.optimise import build_optimiser, decay_groups
from counterpoint.views.sequence import SequenceViews, View

Variant = Literal["released", "paper"]


class Augmenter(nn.Module):
    """A small learned view: Linear layers with GELU between them, and unit rows at the end.

    Args:
        widths: of input, hidden layers and output.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, state: Tensor) -> Tensor:
        return contrast.unit(self.layers(state))


def meta_contrast(
    h1: Tensor,
    h2: Tensor,
    z1: Tensor,
    z2: Tensor,
    *,
    regularizer: float = 0.1,
    temperature: float = 1.0,
    variant: Variant = "released",
) -> dict[str, Tensor]:
    r"""States of two data views against the learned views of the other, and the learned views against each other.

    .. math::
        N(h_1, z_2) + N(h_2, z_1) + N(z_1, z_2) \;+\; 0.1 \big[ R(h_1, z_2) + R(h_2, z_1) + R(z_1, z_2) \big]

    N is NT-Xent at temperature 1 with dot products (h is not normalised), R the margin regulariser.

    Args:
        h1, h2: ``[N, d]``, states of the two data views.
        z1, z2: ``[N, d]``, learned views of h1 and h2, unit rows.
        regularizer: weight of R; 0 leaves it out.
        temperature: of the scores in R.
        variant: "released": margins per row, three pairs; "paper": margins of the whole batch, only R(z1, z2).

    Returns:
        ``"meta contrast"`` and, unless left out, ``"regularizer"`` (weighted).
    """
    pairs = ((h1, z2), (h2, z1), (z1, z2))
    terms = {"meta contrast": _total(contrast.nt_xent(x, y, temperature=1.0, normalize=False) for x, y in pairs)}
    if regularizer:
        margins: dict[str, Any] = {"temperature": temperature, "normalize": False, "batch_wide": variant == "paper"}
        kept = pairs[-1:] if variant == "paper" else pairs
        terms["regularizer"] = regularizer * _total(contrastive_regularizer(x, y, **margins) for x, y in kept)
    return terms


class MCLRec(SASRec):
    r"""CL4SRec with two learned views on top, so that data decides which change of a history keeps its meaning.

    .. math::
        \ell_{\text{encoder}} = \ell_{\text{next item}} + \lambda N(h_1, h_2) + \beta (\ell_{\text{meta}} + \ell_R), \qquad
        \ell_{\text{augmenters}} = \ell_{\text{meta}} + \ell_R

    with :math:`z_i = w_i(h_i)` from two small networks; see `meta_contrast` for the terms. Each batch is passed three
    times, with the same random views and fresh dropout: a step of the encoder with frozen augmenters, a step of the
    augmenters against the encoder that just moved, and a second step of the encoder. Only the encoder is used afterwards.

    When to use it: sparse histories with small batches, where the in-batch negatives of CL4SRec are too few or too easy.

    Defaults: those of Amazon Beauty (weight 0, meta_weight 0.05; released script and paper). Others: Sports 0.04 and
    0.4, Yelp 0.03 and 0.1, Toys 0.01 and 0.1, ml-1m 0 and 0.01. Augmenters 64-32-16-64, regulariser 0.1.

    Where codes differ: the paper lists two passes, its code does three, as here. The paper's regulariser takes its margins over
    the batch and only on (z1, z2); its code per row and on three pairs: ``variant``. The results come from the code, so
    that it is the default. No gradient passes through the other part's update in either.

    Requires its own optimisation steps: neither gradient accumulation, nor clipping, nor float16 scaling, nor several
    devices (``joint=True`` takes them all).

    Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation" (arXiv 2304.07763),
    section 3; QinHsiu/MCLRec at bc8d622.

    Args:
        weight: of the contrast of the two data views (lambda).
        meta_weight: of the contrast with learned views and of the regulariser (beta).
        regularizer: weight of the regulariser inside (gamma = meta_weight * regularizer); 0 leaves it out.
        regularizer_temperature: of its scores.
        augmenter: widths of the hidden layers of the augmenters.
        joint: the ablation: one step per batch, of all weights, on the encoder's loss.
        variant: "released" or "paper" regulariser.
        views: the random views.
    """

    def __init__(
        self,
        weight: float = 0.0,
        meta_weight: float = 0.05,
        regularizer: float = 0.1,
        regularizer_temperature: float = 1.0,
        augmenter: tuple[int, ...] = (32, 16),
        joint: bool = False,
        variant: Variant = "released",
        views: SequenceViews = SequenceViews(),  # noqa: B008 (frozen)
        **sasrec: Any,
    ):
        if variant not in ("released", "paper"):
            raise InputError(f'variant is "released" or "paper", not "{variant}"')
        super().__init__(**sasrec)
        self.weight, self.meta_weight, self.views, self.joint = weight, meta_weight, views, joint
        widths = (self.encoder.dim, *augmenter, self.encoder.dim)
        self.augmenters = nn.ModuleList([Augmenter(widths), Augmenter(widths)])
        self.margins: dict[str, Any] = {
            "regularizer": regularizer,
            "temperature": regularizer_temperature,
            "variant": variant,
        }
        self.automatic_optimization = joint

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return self.encoder_loss(batch, self.views(batch["item_seq"], batch["item_seq_len"]))

    def encoder_loss(self, batch: Batch, views: tuple[View, View]) -> dict[str, Tensor]:
        terms = {"next item": self.next_item(self.state(batch), batch)}
        h1, h2 = (self.encoder(*view).pooled for view in views)
        if self.weight:
            terms["contrast"] = self.weight * contrast.nt_xent(h1, h2, temperature=1.0, normalize=False)
        return terms | {name: self.meta_weight * term for name, term in self.meta(h1, h2).items()}

    def augmenter_loss(self, views: tuple[View, View]) -> dict[str, Tensor]:
        return self.meta(*(self.encoder(*view).pooled for view in views))

    def meta(self, h1: Tensor, h2: Tensor) -> dict[str, Tensor]:
        z1, z2 = (augment(h) for augment, h in zip(self.augmenters, (h1, h2), strict=True))
        self.watch(z1, z2)
        return meta_contrast(h1, h2, z1, z2, **self.margins)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        if self.joint:
            return super().training_step(batch, batch_idx)
        encoder, augmenters = self.optimizers()  # type: ignore[attr-defined]
        views = self.views(batch["item_seq"], batch["item_seq_len"])
        # the first two steps bypass Lightning's counter, so that one batch counts as one step
        self.descend(self.encoder, encoder.optimizer, lambda: self.encoder_loss(batch, views))
        self.descend(self.augmenters, augmenters.optimizer, lambda: self.augmenter_loss(views))
        self.terms = self.descend(self.encoder, encoder, lambda: self.encoder_loss(batch, views))
        self.requires_grad_(True)
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        self.after_step()
        return None

    def descend(self, part: nn.Module, optimiser: Any, loss: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step of `part` alone; gradient still passes through the weights of the other."""
        for one in (self.encoder, self.augmenters):
            one.requires_grad_(one is part)
        optimiser.zero_grad()
        terms = loss()
        self.manual_backward(_total(terms.values()))
        optimiser.step()
        return {name: term.detach() for name, term in terms.items()}

    def configure_optimizers(self) -> Any:
        if self.joint:
            return super().configure_optimizers()
        total = self.trainer.estimated_stepping_batches
        return [
            build_optimiser(decay_groups(part, self.optimisation.weight_decay), self.optimisation, total)
            for part in (self.encoder, self.augmenters)
        ]

    def on_fit_start(self) -> None:
        if not self.joint and self.trainer.precision == "16-mixed":
            raise InputError("mclrec steps its optimisers itself, without float16 scaling: use bf16-mixed or 32-true")
        if not self.joint and self.trainer.world_size > 1:
            raise InputError("mclrec freezes parts in turn, which needs one device: use devices=1 or joint=True")


def _total(terms: Any) -> Tensor:
    return torch.stack(list(terms)).sum()
