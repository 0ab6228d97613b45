"""Clusters of a whole training set: k-means on embeddings, and a memory of which item belongs to which."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.contrast import unit
from counterpoint.errors import InputError


def kmeans(vectors: Tensor | np.ndarray, clusters: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters of vectors on the unit sphere: the cluster of each row int64 [N] and the centres float32 [clusters, D].

    Mini-batch k-means of up to a million rows at a time, at most 100 rounds, until the centres move less than 1e-5. The same
    vectors and seed give the same clusters. Fewer distinct rows than clusters leave some clusters empty.

    Args:
        vectors: [N, D]; rows are L2-normalised here.
        clusters: how many.
        seed: of the first centres.

    Raises:
        InputError: more clusters than rows.

    Source: Sculley 2010; settings of Zhang et al. 2024 (arXiv 2402.11816, released cluster.py).
    """
    import warnings

    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    x = unit(torch.as_tensor(vectors).detach().cpu()).numpy()
    if not 1 <= clusters <= len(x):
        raise InputError(f"{len(x):,} items cannot be put into {clusters} clusters")
    options: dict[str, Any] = {"batch_size": min(len(x), 1_000_000), "max_iter": 100, "tol": 1e-5, "n_init": 1}
    model = MiniBatchKMeans(clusters, random_state=seed, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        model.fit(x)
    return torch.from_numpy(model.labels_.astype(np.int64)), torch.from_numpy(model.cluster_centers_.astype(np.float32))


def intersection(labels: Tensor) -> Tensor:
    """Items are together where every clustering has them together: int64 [S, N] -> groups int64 [N], from 0.

    Groups are numbered in the order of the mixed-radix number c_1 c_2 ... c_S; those without items have no number.
    """
    return torch.unique(labels, dim=1, return_inverse=True)[1]


class Clusterings(nn.Module):
    """One clustering of the training set after another, in a buffer, so that a checkpoint holds them.

    Attributes:
        labels: int64 [S, N], the cluster of each item in each of S clusterings so far.
    """

    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("labels", torch.zeros(0, 0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, label: Tensor) -> None:
        """Remember a clustering int64 [N] of the same N items."""
        label = label.to(self.labels.device)[None]
        self.labels = torch.cat([self.labels, label]) if len(self) else label

    def groups(self, last: bool = False) -> Tensor:
        """Groups int64 [N] of items that all clusterings have together, or the last one alone."""
        return intersection(self.labels[-1:] if last else self.labels)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (found := state.get(prefix + "labels")) is not None:  # how many there are is known by the checkpoint alone
            self.labels = torch.empty_like(found, device=self.labels.device)
        super()._load_from_state_dict(state, prefix, *rest)
