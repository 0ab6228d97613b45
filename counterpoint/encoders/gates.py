"""Gates: which dimensions of an embedding count, decided by something other than the embedding."""

import torch
from torch import Tensor, nn

from counterpoint.encoders.heads import FeatureNorm
from counterpoint.errors import InputError


class PairGate(nn.Module):
    """Which dimensions two classes share: a value in (0, 1) per dimension, learned, the same whichever class comes first.

    Class embedding - ReLU - BN - Linear - ReLU - BN - Linear - sigmoid. Batch normalisation sees the batch of pairs.

    Args:
        classes: how many there are.
        dim: length of the gated embeddings.
        embedding: length of the class embeddings.
        hidden: width between the linear layers.
        fuse: a pair's embedding is the mean of its classes'; False multiplies the gates of the two classes instead.
        eps: of the batch normalisations.

    Source: Hydra (SimLAP; arXiv 2410.18200); erow/vitookit at f6a8057, ``BasicGate``.
    """

    def __init__(
        self,
        classes: int,
        dim: int = 256,
        embedding: int = 512,
        hidden: int = 1024,
        *,
        fuse: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if min(classes, dim, embedding, hidden) < 1:
            raise InputError(
                f"a gate needs positive sizes, got classes {classes}, dim {dim}, embedding {embedding}, hidden {hidden}"
            )
        self.fuse = fuse
        self.embedding = nn.Embedding(classes, embedding)
        self.layers = nn.Sequential(
            nn.ReLU(),
            FeatureNorm(embedding, eps=eps),
            nn.Linear(embedding, hidden),
            nn.ReLU(),
            FeatureNorm(hidden, eps=eps),
            nn.Linear(hidden, dim),
            nn.Sigmoid(),
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Gates ``[B, dim]`` of the pairs of classes `first` and `second`, int64 ``[B]`` each."""
        one, other = self.embedding(first), self.embedding(second)
        if self.fuse:
            return self.layers((one + other) / 2)
        return self.layers(one) * self.layers(other)

    @torch.no_grad()
    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Share of the dimensions that each pair keeps open, ``[B]``: how much two classes have in common."""
        return self(first, second).mean(1)
