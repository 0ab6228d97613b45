"""Core-tuning: fine-tuning with contrast on hard pairs that are mixed from the batch, and a smoother classifier."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.contrast.focal import focal_sup_con, mix_hard_pairs
from counterpoint.contrast.operands import reduce
from counterpoint.errors import InputError
from counterpoint.methods.vision.fine_tuning import FineTuning
from counterpoint.train.method import Batch


class CoreTuning(FineTuning):
    r"""Fine-tuning that also gathers each class: focal supervised contrast and cross entropy on mixed hard pairs.

    .. math::
        L = \frac{1}{3B} \sum_a -\langle y_a, \log \mathrm{softmax}(W f_a) \rangle
        + \eta \frac{1}{|A|} \sum_{a \in A} \frac{1}{3B} \sum_{b:\, y_b = y_a} -(1 - p_{ab}) \log p_{ab}

    A self-supervised encoder spreads its features evenly; cross entropy separates the classes but leaves each scattered. So
    each batch of features becomes three blocks: the features themselves (constants for the encoder);
    :math:`(1 - \lambda) f_i + \lambda f_{\pi(i)}`, :math:`\lambda \ge 0.8`, semi-hard negatives; and
    :math:`\lambda f_{hp(i)} + (1 - \lambda) f_{hn(i)}`, a hard positive mixed with a hard negative; labels are mixed alike.
    The classifier learns from all three, which smooths its boundary. The contrast takes rows with the same soft label as
    positives and counts those little that agree already (:math:`p_{ab}` near 1).

    When to use it: instead of fine-tuning after self-supervised training, with few labels or classes that must lie apart.
    ``counterpoint train core-tuning --data cifar10 --start runs/simclr-1``.

    Defaults: eta 0.1 (the paper's for CIFAR-10, out of 0.1, 1, 10), alpha 1, temperature 0.07, 256 dimensions, of the
    released script. It trains ResNet-50 with SGD (Nesterov) at 0.01, weight decay 1e-4, batch 256, 100 epochs.

    Where codes differ: the released mining (``mining="released"``, the default, with which its figures were made) multiplies
    similarities by 0/1 masks, so that with features that are never negative the hard positive is nearly always the anchor
    itself, never another positive; "masked" finds the least similar positive, as the paper says. The released contrast divides
    by the number of rows, the paper by the number of positives (``divide_by``), which makes it larger by their ratio:
    scale eta. Released code compares soft labels by an integer code that overflows beyond 18 classes; we compare rows.
    Our optimiser has no Nesterov step.

    Source: Zhang et al. 2021, "Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized
    Fine-Tuning" (NeurIPS; arXiv 2102.06605), section 4; Vanint/Core-tuning at f70e1bf.

    Args:
        eta: weight of the contrast.
        alpha: shares are drawn from Beta(alpha, alpha), one per row.
        min_share: smallest share of the partner in the semi-hard negatives.
        mining: "released" or "masked".
        gamma: strength of the focus; 0 is none.
        divide_by: "rows" or "positives".
        **fine_tuning: as in FineTuning.
    """

    def __init__(
        self,
        eta: float = 0.1,
        alpha: float = 1.0,
        min_share: float = 0.8,
        mining: Literal["masked", "released"] = "released",
        gamma: float = 1.0,
        divide_by: Literal["rows", "positives"] = "rows",
        **fine_tuning: Any,
    ):
        if alpha <= 0 or not 0 <= min_share <= 1:
            raise InputError(f"alpha must be positive and min_share a share, got {alpha} and {min_share}")
        super().__init__(eta=eta, **fine_tuning)
        self.alpha, self.min_share, self.mining, self.gamma, self.divide_by = alpha, min_share, mining, gamma, divide_by

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        features, targets = self.mixed(self.features(batch), batch["label"])
        rows = nn.functional.cross_entropy(self.classifier(features), targets, reduction="none")
        terms = {"cross entropy": reduce(rows, "mean")}
        contrasted = features
        if self.contrastor is not None:
            contrasted = self.contrastor(features)
            options: Any = {"temperature": self.temperature, "gamma": self.gamma, "divide_by": self.divide_by}
            terms["contrast"] = self.eta * focal_sup_con(contrasted, targets, **options)
        self.watch_classes(contrasted[: len(batch["label"])], batch["label"])  # the block that is not mixed
        return terms

    def mixed(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The three blocks ``[3B, D]`` and their soft labels ``[3B, K]``."""
        n, device = len(features), features.device
        shape = torch.full((2, n), self.alpha, device=device)
        toward, away = torch.distributions.Beta(shape, shape, validate_args=False).sample()
        return mix_hard_pairs(
            features,
            labels,
            classes=self.classes,
            permutation=torch.randperm(n, device=device),
            lam_negative=toward,
            lam_positive=away,
            min_lam_negative=self.min_share,
            mining=self.mining,
        )
