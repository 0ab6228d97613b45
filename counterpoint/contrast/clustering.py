"""Contrast of cluster assignments: balanced soft codes by Sinkhorn-Knopp, and predicting one view's code from another."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.distributed import log_sum, rank, world_size
from counterpoint.contrast.operands import check_matrix, check_temperature, reduce, wide
from counterpoint.errors import InputError


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    r"""Soft codes of samples that use all prototypes about equally: entropic optimal transport, a few steps of it.

    .. math:: Q = \mathrm{diag}(u)\, e^{S/\epsilon}\, \mathrm{diag}(v), \qquad \sum_k Q_{bk} = 1, \quad \sum_b Q_{bk} \approx B/K

    Each iteration scales the prototypes to equal mass, then the samples; the samples come last, so their sums are exact and
    the balance is approximate. It runs on logarithms, where both scalings are log-sum-exps: no epsilon overflows or divides
    by zero. The constants (total mass, K, B) cancel in the last scaling and are left out.

    Under a process group the samples are those of all processes, however many each holds; each gets the codes of its own.

    Source: Cuturi 2013 (arXiv 1306.0895); Caron et al. 2020 (arXiv 2006.09882), section 3.1 and appendix A.

    Args:
        scores: ``[B, K]`` raw dot products of samples and prototypes, without a temperature.
        epsilon: smaller is sharper; to infinity all codes become uniform.
        iterations: at least 1.

    Returns:
        Float32 (or wider) ``[B, K]`` without gradient; rows sum to 1.

    Raises:
        InputError: wrong shape or type, epsilon not positive, no iteration.
    """
    check_matrix(scores, "scores")
    if not epsilon > 0:
        raise InputError(f"epsilon must be positive, not {epsilon}")
    if iterations < 1:
        raise InputError(f"Sinkhorn needs at least 1 iteration, not {iterations}")
    code = wide(scores) / epsilon
    for _ in range(iterations):
        code = code - log_sum(code.logsumexp(0))
        code = code.log_softmax(1)
    return code.exp()


@torch.no_grad()
def assign(
    z: Tensor,
    prototypes: Tensor,
    *,
    queue: Tensor | None = None,
    epsilon: float = 0.05,
    iterations: int = 3,
    balanced: bool = True,
) -> Tensor:
    """Codes ``[B, K]`` of embeddings among prototypes, by `sinkhorn`, without gradient.

    Args:
        z: ``[B, d]``, used as given (on the unit sphere).
        prototypes: ``[K, d]``, used as given.
        queue: ``[L, d]`` earlier embeddings that take part in the balance and get no code, for batches too small to be
            balanced. Under a process group all processes hold the same ones, and each accounts for its share.
        epsilon: as in `sinkhorn`.
        iterations: as in `sinkhorn`.
        balanced: False leaves the balance out: a softmax of each sample alone (an ablation; it collapses).
    """
    with torch.autocast(z.device.type, enabled=False):
        rows, prototypes = wide(z), wide(prototypes)
        if not balanced:
            return (rows @ prototypes.T / epsilon).softmax(1)
        if queue is not None:
            rows = torch.cat([queue.tensor_split(world_size())[rank()].to(rows), rows])
        return sinkhorn(rows @ prototypes.T, epsilon, iterations)[-len(z) :]


def swapped_prediction(
    scores: Tensor,
    codes: Tensor,
    *,
    assigned: Sequence[int] | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    r"""Every view predicts the codes of the others: cross-entropy with soft targets.

    .. math::
        \ell_b = \frac{1}{|A|\,(V-1)} \sum_{a \in A} \sum_{v \ne a} - \sum_k q_{abk} \log \mathrm{softmax}_k(S_{vb}/\tau)

    Holds views x batch x K scores (plain torch: the codes are as large).

    Source: Caron et al. 2020 (arXiv 2006.09882), equation 2; averages as released.

    Args:
        scores: ``[V, B, K]``, raw dot products of each view's embeddings with the prototypes.
        codes: ``[A, B, K]``, targets; no gradient flows into them.
        assigned: the view to which each of the codes belongs; None for the first A.
        temperature: of the prediction.
        reduction: "mean" over the batch, "sum" or "none" ``[B]``.

    Raises:
        InputError: shapes that do not fit, fewer than two views, or a view that does not exist.
    """
    check_temperature(temperature, 1)
    if scores.ndim != 3 or codes.ndim != 3 or scores.shape[1:] != codes.shape[1:] or 0 in (*scores.shape, *codes.shape):
        raise InputError(
            "swapped prediction needs scores [views, batch, K] and codes [assigned views, batch, K], not "
            f"{list(scores.shape)} and {list(codes.shape)}"
        )
    views = len(scores)
    own = list(range(len(codes))) if assigned is None else list(assigned)
    if views < 2 or len(own) != len(codes) or len({*own}) != len(own) or not {*own} <= {*range(views)}:
        raise InputError(
            f"swapped prediction needs at least two views and each code's own view among them, got {views} views and "
            f"codes of {own}"
        )
    rows = scores.new_zeros(scores.shape[1], dtype=torch.promote_types(scores.dtype, torch.float32))
    for view, score in enumerate(scores):
        targets = [code.detach() for place, code in zip(own, codes, strict=True) if place != view]
        if targets:
            # cross-entropy is linear in its target, so the sum of several costs one pass
            target = wide(torch.stack(targets).sum(0))
            rows = rows + functional.cross_entropy(wide(score) / temperature, target, reduction="none")
    return reduce(rows / (len(own) * (views - 1)), reduction)
