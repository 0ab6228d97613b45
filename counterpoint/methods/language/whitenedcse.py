"""WhitenedCSE: views of a sentence that are whitened in different groups of channels before they are compared."""

from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.contrast.whitening import shuffled_group_whitening
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE, columns
from counterpoint.train.method import Batch
from counterpoint.views.text import stack


class WhitenedCSE(SimCSE):
    r"""Unsupervised SimCSE of several views, whose train-only head begins with a shuffled group whitening.

    .. math::
        \mathcal{L} = \sum_{v=2}^{V} \frac1B \sum_i \Big( -\frac{\cos(z_i^1, z_i^v)}{\tau}
        + \log \sum_j e^{\cos(z_i^1, z_j^v)/\tau} \Big), \qquad z^v = \tanh(A\, \mathrm{SGW}_{\pi_v}(h^v) + b)

    Contrast spreads sentences by pushing them apart, whitening by giving the batch unit covariance; here both work at once.
    :math:`\mathrm{SGW}_\pi` shuffles the channels of the pooled vectors h by a random :math:`\pi`, whitens each of G groups on
    its own (:math:`h_g \mapsto C_g^{-1/2}(h_g - \bar h_g)` over the view's batch) and puts the channels back. Each view draws
    its own :math:`\pi`, so that the positives differ by more than dropout. Embeddings are the bare pooled vectors.

    When to use it: as unsupervised SimCSE, where the embeddings of an encoder crowd in a narrow cone. It costs V passes of
    the encoder instead of two. The batch must be larger than a group (D / G channels).

    Defaults: three views, G = 128 (groups of 6 channels of BERT-base), temperature 0.05; the paper's recipe is batch 128,
    AdamW at 1e-5, one epoch of 10^6 sentences of 32 tokens. Ours: 1e-5 beside the variances (released: nothing, which a
    dead channel turns into infinity).

    Where codes differ: the release cuts its batch into thirds of the sentences instead of views, so that all views of a
    sentence share one shuffle and differ by dropout alone; ``chunking="released"`` does that. The loss is a sum over views, as
    released: with three, gradients are twice those of SimCSE. :math:`C^{-1/2}` is a constant for the gradient, as released.
    The statistics are those of one device, as released.

    Source: Zhuo et al. 2023, "WhitenedCSE: Whitening-based Contrastive Learning of Sentence Embeddings" (ACL; arXiv
    2305.17746); SupstarZh/WhitenedCSE at 65fe70a.

    Args:
        copies: V, passes of a sentence through the encoder; the first is the anchor of all others.
        groups: G, a divisor of the encoder's width; 0 for no whitening: SimCSE of several views.
        shuffle: who is grouped with whom: drawn for each "view", "shared" by the views of a step, or "none".
        chunking: what is whitened together: a "view" of the batch, or its parts as "released".
        eps: beside the variances.
        kind: "zca", or "cholesky"; see `counterpoint.contrast.whitening`.
        detach: False lets gradient pass through the whitening matrix.
        **simcse: as in SimCSE.
    """

    reads_pairs = False

    def __init__(
        self,
        copies: int = 3,
        groups: int = 128,
        shuffle: Literal["view", "shared", "none"] = "view",
        chunking: Literal["view", "released"] = "view",
        eps: float = 1e-5,
        kind: Literal["zca", "cholesky"] = "zca",
        detach: bool = True,
        **simcse: Any,
    ):
        super().__init__(**simcse)
        if copies < 2 or groups < 0 or not eps >= 0:
            raise InputError(f"copies are 2 or more, groups and eps not negative, got {copies}, {groups} and {eps}")
        if groups and self.encoder.dim % groups:
            raise InputError(
                f"groups must divide the {self.encoder.dim} dimensions of {self.encoder.name}, and {groups} does not"
            )
        for name, value, known in (
            ("shuffle", shuffle, ("view", "shared", "none")),
            ("chunking", chunking, ("view", "released")),
            ("kind", kind, ("zca", "cholesky")),
        ):
            if value not in known:
                raise InputError(f'{name} must be one of {", ".join(known)}, not "{value}"')
        self.copies, self.groups, self.shuffle, self.chunking = copies, groups, shuffle, chunking
        self.eps, self.kind, self.detach_matrix = eps, kind, detach

    def used(self, rows: Any) -> Any:
        return rows.single() if len(rows.columns) > 1 else rows

    def loss(self, batch: Batch) -> Tensor:
        anchor, *others = self.project(*columns(batch)[:1] * self.copies)
        return torch.stack([self.contrast(anchor, view) for view in others]).sum()

    def project(self, *sentences: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        pooled = self.encoder.pooled(*stack(list(sentences), self.encoder.pad))
        return self.head(self.whitened(pooled)).tensor_split(len(sentences))

    def whitened(self, pooled: Tensor) -> Tensor:
        """Pooled vectors ``[V B, D]``, view after view, each under its shuffle."""
        if not self.groups:
            return pooled
        options: Any = {"groups": self.groups, "eps": self.eps, "kind": self.kind, "detach": self.detach_matrix}
        permutations = self.permutations(pooled)
        if self.chunking == "view":
            return shuffled_group_whitening(pooled, permutations, **options)
        sentences = pooled.unflatten(0, (self.copies, -1)).transpose(0, 1)  # all views of a sentence together
        white = shuffled_group_whitening(sentences.flatten(0, 1), permutations, **options)
        return white.view_as(sentences).transpose(0, 1).flatten(0, 1)

    def permutations(self, pooled: Tensor) -> Tensor:
        """int64 ``[V, D]``, drawn."""
        dim, device = pooled.shape[1], pooled.device
        match self.shuffle:
            case "view":
                return torch.rand(self.copies, dim, device=device).argsort(1)
            case "shared":
                return torch.rand(dim, device=device).argsort().expand(self.copies, -1)
        return torch.arange(dim, device=device).expand(self.copies, -1)
