r"""Attraction and repulsion by distance: positives are compared with positives, negatives with negatives.

Instead of one softmax over everything, each query pulls its positives and pushes its negatives by an expected squared
distance under two distributions of its own: far positives weigh more, near negatives weigh more.

.. math::
    \pi^+_{bu} = \mathrm{softmax}_u(+\tau\, d_{bu}) \qquad \pi^-_{bj} = \mathrm{softmax}_j(-\tau\, d_{bj})
    \qquad d(x, y) = \lVert x - y \rVert^2

Since :math:`-\tau d = 2 \tau \langle x, y \rangle - \tau \lVert y \rVert^2 + \text{const}`, the repulsion is the
softmax-weighted mean of a similarity: one tiled pass, no N x M matrix. With constant weights its gradient is that of
:math:`-\frac1\tau \log \sum_j e^{-\tau d_{bj}}`, so the same pass serves both.

Inputs are L2-normalised inside unless ``normalize=False``; under a process group, local queries meet the rows of every rank.

Source: Zheng et al. 2023, "Contrastive Attraction and Contrastive Repulsion for Representation Learning" (TMLR; arXiv
2105.03746).
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from counterpoint.contrast.distributed import Gathered, gather
from counterpoint.contrast.kernels import softmax_mean
from counterpoint.contrast.operands import reduce, unit
from counterpoint.contrast.relation import Relation, Same
from counterpoint.contrast.softmax import info_nce
from counterpoint.errors import InputError

ALONE = "a batch of one item has nothing to repel: use a batch of at least 2"


def attraction(
    views: Tensor,
    keys: Tensor | None = None,
    *,
    tau: float = 1.0,
    alpha: float = 1.0,
    uniform: bool = False,
    stop: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each view of an item is pulled to its other views, to the far ones most; 0 when all agree.

    .. math:: \ell_b = \frac{\alpha}{V} \sum_v \sum_{u \ne v} \pi^+_{bvu}\, d(z^v_b, z^u_b)

    Args:
        views: ``[V, N, d]``, V at least 2.
        keys: ``[V, N, d]``, constants that stand in for the other views (of a momentum encoder).
        tau: how much more a far positive weighs.
        alpha: factor of the cost, not of the weights.
        uniform: every positive weighs the same (the ablation).
        stop: treat the weights as constants.
        normalize: squared distance on the unit sphere (True) or of the rows as given.
        reduction: "mean", "sum" or "none" (per item).

    Raises:
        InputError: wrong shape, or a single view.
    """
    distance = _to_other_views(views, keys, normalize)
    weight = torch.full_like(distance, 1 / distance.shape[2]) if uniform else (tau * distance).softmax(dim=2)
    weight = weight.detach() if stop else weight
    return reduce(alpha * (weight * distance).sum(2).mean(0), reduction)


def attraction_weights(
    views: Tensor, keys: Tensor | None = None, *, tau: float = 1.0, normalize: bool = True
) -> Tensor:
    """How much each positive counts: ``[V, N, V - 1]``, the other views in their order."""
    return (tau * _to_other_views(views, keys, normalize)).softmax(dim=2)


def repulsion(
    views: Tensor,
    *,
    tau: float = 0.9,
    beta: float = 1.0,
    uniform: bool = False,
    stop: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each view is pushed from the other items of every later view, from the near ones most; not positive.

    .. math:: \ell_b = -\frac{\beta}{|\{x < y\}|} \sum_{x < y} \sum_{j \ne b} \pi^-_{bj}\, d(z^x_b, z^y_j)

    Args:
        views: ``[V, N, d]``, at least 2 views of 2 items.
        tau: how much more a near negative weighs; the paper takes 0.9 on CIFAR-10, 2 on CIFAR-100, STL-10 and ImageNet.
        beta: factor of the cost, not of the weights.
        uniform: every negative weighs the same (the ablation).
        stop, normalize, reduction: as in `attraction`.

    Raises:
        InputError: wrong shape, a single view or item, or a negative tau.
    """
    x, others = _others(views, normalize, tau)
    keys = others.gathered.rows.unbind(1)
    pairs = combinations(range(len(x)), 2)
    if uniform or tau == 0:
        rows = [_mean_distance(x[a], keys[b], others.gathered.start) for a, b in pairs]
    else:
        rows = [_Expected.of(x[a], keys[b], tau, others.itself).distance(tau, stop) for a, b in pairs]
    return reduce(-beta * torch.stack(rows).mean(0), reduction)


def repulsion_weights(query: Tensor, key: Tensor, *, tau: float = 0.9, normalize: bool = True) -> Tensor:
    """How much each negative counts: ``[N, N - 1]`` in full, the keys of the other items in their order."""
    q, k = (unit(query), unit(key)) if normalize else (query, key)
    logits = tau * (2 * q @ k.T - k.square().sum(1))
    return _without_diagonal(logits[..., None])[..., 0].softmax(dim=1)


def queue_repulsion(
    views: Tensor,
    queue: Tensor,
    *,
    tau: float = 2.0,
    beta: float = 1.0,
    uniform: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each view is pushed from a queue of keys and from the other items of its own view, in one distribution.

    The queue's share of the weights is a constant, as are its keys; the batch's share is not.

    Args:
        views: ``[V, N, d]``, at least 2 items.
        queue: ``[K, d]``.
        tau, beta, uniform, normalize, reduction: as in `repulsion`.

    Raises:
        InputError: as `repulsion`.
    """
    x, others = _others(views, normalize, tau)
    far = _views(queue.detach()[None], normalize)[0]
    near = others.gathered.rows.unbind(1)
    rows = []
    for query, own in zip(x, near, strict=True):
        if uniform or tau == 0:
            counts = len(far), len(own) - 1
            means = _mean_distance(query, far), _mean_distance(query, own, others.gathered.start)
            rows.append((counts[0] * means[0] + counts[1] * means[1]) / sum(counts))
            continue
        queued = _Expected.of(query, far, tau)
        batch = _Expected.of(query, own, tau, others.itself)
        share = torch.sigmoid(batch.row - queued.row)
        rows.append((1 - share).detach() * queued.distance(tau, stop=True) + share * batch.distance(tau, stop=False))
    return reduce(-beta * torch.stack(rows).mean(0), reduction)


def momentum_rbf(
    queries: Tensor, key: Tensor, *, temperature: float = 1.0, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""InfoNCE of several query views against one momentum key, the far views weighing most (CACR on MoCo v3).

    .. math::
        \ell_b = 2T \sum_v P_v(b) \Big[-\frac{\langle q^v_b, k_b \rangle}{T}
            + \log \sum_j e^{\langle q^v_b, k_j \rangle / T}\Big], \quad
        P_v(b) = \mathrm{softmax}_v \big(\lVert q^v_b - k_b \rVert^2 / T\big)

    Args:
        queries: ``[V, N, d]``, the views that meet this key; one alone has weight 1 (then it is MoCo v3's loss).
        key: ``[N, d]``, constant; the other keys of the batch are the negatives.
        temperature: T.
        normalize, reduction: as in `attraction`.

    Raises:
        InputError: wrong shape.
    """
    q, k, weight = _query_weights(queries, key, temperature, normalize)
    own = torch.arange(len(k), device=k.device).repeat(len(q))
    rows = info_nce(q.flatten(0, 1), k, positives=own, temperature=temperature, normalize=False, reduction="none").view(
        len(q), -1
    )
    return reduce(2 * temperature * (weight * rows).sum(0), reduction)


def momentum_euclidean(
    queries: Tensor, key: Tensor, *, temperature: float = 1.0, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""Attraction minus repulsion of several query views and one momentum key, the far views weighing most.

    .. math::
        \ell_b = \sum_v P_v(b) \Big[ C^v_{bb} - \sum_{j \ne b} \pi_{bj} C^v_{bj} \Big], \quad
        C^v_{bj} = 1 - \langle q^v_b, k_j \rangle, \quad \pi_{bj} = \mathrm{softmax}_{j \ne b}(-C^v_{bj} / T)

    P as in `momentum_rbf`; P and the other weights are constants. The released code sums over the batch
    (``reduction="sum"``).

    Args:
        queries, key, temperature, normalize, reduction: as in `momentum_rbf`; at least 2 items.

    Raises:
        InputError: wrong shape, or a single item.
    """
    q, k, weight = _query_weights(queries, key, temperature, normalize)
    keys = gather(k)
    if len(keys.rows) < 2:
        raise InputError(ALONE)
    own = _itself(keys, len(k)).repeat(len(q))
    row, mean = softmax_mean(q.flatten(0, 1), keys.rows, temperature=temperature, without=_same(own, keys))
    similar = temperature * (row + (mean - row).detach())  # the value of the mean, the gradient of constant weights
    pull = 1 - (q * k).sum(2)
    rows = pull + similar.view(len(q), -1) - 1
    return reduce((weight * rows).sum(0), reduction)


class _Others(NamedTuple):
    """The rows of every rank ``[N, V, d]``, and the relation of each local query to itself."""

    gathered: Gathered
    itself: Relation


class _Expected(NamedTuple):
    """Of each query: log-sum-exp and mean of the logits ``-tau * d``, but for the query's own square."""

    row: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, tau: float, without: Relation | None = None) -> "_Expected":
        log_weight = -tau * key.square().sum(1)
        row, mean = softmax_mean(query, key, temperature=1 / (2 * tau), without=without, log_weight=log_weight)
        return cls(row, mean, query.square().sum(1))

    def distance(self, tau: float, stop: bool) -> Tensor:
        """Expected squared distance; with `stop` the gradient of constant weights, which is that of the log-sum-exp."""
        mean = self.row + (self.mean - self.row).detach() if stop else self.mean
        return self.square - mean / tau


def _mean_distance(query: Tensor, key: Tensor, own: int | None = None) -> Tensor:
    """Plain mean of the squared distances to all keys, or to all but those of the queries, which start at row `own`."""
    total, squares, count = key.sum(0), key.square().sum(), len(key)
    if own is not None:
        mine = key[own : own + len(query)]
        total, squares, count = total - mine, squares - mine.square().sum(1), count - 1
    return query.square().sum(1) + (squares - 2 * (query * total).sum(1)) / count


def _to_other_views(views: Tensor, keys: Tensor | None, normalize: bool) -> Tensor:
    """Squared distances of each view to the other views of its item, ``[V, N, V - 1]``."""
    x = _views(views, normalize)
    if len(x) < 2:
        raise InputError("attraction needs at least two views of each item, got one")
    if keys is not None and keys.shape != views.shape:
        raise InputError(f"views and keys must have one shape, not {list(views.shape)} and {list(keys.shape)}")
    y = x if keys is None else _views(keys.detach(), normalize)
    with torch.autocast(x.device.type, enabled=False):
        product = torch.einsum("vnd,und->vun", x, y)
    squares = x.square().sum(2)[:, None] + y.square().sum(2)[None]
    return _without_diagonal(squares - 2 * product).transpose(1, 2)


def _without_diagonal(matrix: Tensor) -> Tensor:
    """``[N, N, ...] -> [N, N - 1, ...]``, the order kept."""
    n = len(matrix)
    rest = matrix.shape[2:]
    return matrix.flatten(0, 1)[1:].reshape(n - 1, n + 1, *rest)[:, :-1].reshape(n, n - 1, *rest)


def _others(views: Tensor, normalize: bool, tau: float) -> tuple[Tensor, _Others]:
    if not tau >= 0:
        raise InputError(f"tau cannot be negative, got {tau}")
    x = _views(views, normalize)
    keys = gather(x.transpose(0, 1).contiguous())
    if len(keys.rows) < 2:
        raise InputError(ALONE)
    return x, _Others(keys, _same(_itself(keys, x.shape[1]), keys))


def _itself(keys: Gathered, count: int) -> Tensor:
    """Where the `count` local rows stand among those of all ranks."""
    return keys.start + torch.arange(count, device=keys.rows.device)


def _same(own: Tensor, keys: Gathered) -> Same:
    # not `Listed`, which would make a GPU's host wait
    return Same(own, torch.arange(len(keys.rows), device=own.device))


def _query_weights(queries: Tensor, key: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[V, N, d]`` and key ``[N, d]``, ready, and the constant weights ``[V, N]`` of the query views."""
    if queries.shape[1:] != key.shape:
        raise InputError(f"queries must be [V, N, d] and key [N, d], not {list(queries.shape)} and {list(key.shape)}")
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
    q, k = _views(queries, normalize), _views(key.detach()[None], normalize)[0]
    distance = (q.detach() - k).square().sum(2)
    return q, k, (distance / temperature).softmax(dim=0)


def _views(views: Tensor, normalize: bool) -> Tensor:
    if views.ndim != 3 or not views.is_floating_point() or 0 in views.shape:
        raise InputError(f"views must be floating point [V, N, d] with nothing empty, not {list(views.shape)}")
    return unit(views) if normalize else views.to(torch.promote_types(views.dtype, torch.float32))
