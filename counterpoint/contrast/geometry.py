"""How embeddings lie in space: close pairs, even spread, used dimensions, scores of positives and negatives."""

import math

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather
from counterpoint.contrast.kernels import log_sum_exp
from counterpoint.contrast.operands import Temperature, check_matrix, reduce, unit, wide
from counterpoint.contrast.relation import Listed
from counterpoint.errors import InputError


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Mean distance of positive pairs, :math:`\mathbb{E} \lVert x_i - y_i \rVert^\alpha`; 0 is perfect.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1.

    Args:
        x: ``[N, d]``.
        y: ``[N, d]``; row i belongs to row i.
        alpha: power of the distance.
        normalize: project rows to the unit sphere first.
    """
    check_matrix(x, "x")
    check_matrix(y, "y")
    if x.shape != y.shape:
        raise InputError(f"x and y must have one shape, not {list(x.shape)} and {list(y.shape)}")
    x, y = (unit(x), unit(y)) if normalize else (wide(x), wide(y))
    return reduce((x - y).norm(dim=1).pow(alpha), "mean")


def uniformity(x: Tensor, *, t: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Log of the mean Gaussian potential over pairs of rows.

    .. math:: \log \mathbb{E}_{i \ne j}\, e^{-t \lVert x_i - x_j \rVert^2}

    0 when all rows coincide, about -2t for an even spread in many dimensions. Tiled: memory stays linear in N, and the
    value is differentiable.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1.

    Args:
        x: ``[N, d]``, N at least 2.
        t: sharpness of the potential.
        normalize: project rows to the unit sphere first; False uses the rows as given (any norm).
    """
    check_matrix(x, "x")
    if not t > 0:
        raise InputError(f"t must be positive, not {t}")
    x = unit(x) if normalize else wide(x)
    everyone = gather(x)
    n = len(everyone.rows)
    if n < 2:
        raise InputError("uniformity needs at least two rows")
    own = Listed(torch.arange(everyone.start, everyone.start + len(x), device=x.device))
    square = everyone.rows.square().sum(1)
    mine = slice(everyone.start, everyone.start + len(x))
    if normalize and bool((square > 0.5).all()):  # a row of zeros (dead encoder) lies off the sphere
        rows = (
            log_sum_exp(x, everyone.rows if everyone.ranks > 1 else None, temperature=1 / (2 * t), without=own) - 2 * t
        )
    else:
        rows = log_sum_exp(x, everyone.rows, temperature=1 / (2 * t), without=own, log_weight=-t * square)
        rows = rows - t * square[mine]
    return gather(rows).rows.logsumexp(0) - math.log(n * (n - 1))


def effective_rank(x: Tensor) -> Tensor:
    r"""Number of directions that are really used: :math:`\exp(-\sum_k p_k \log p_k)`, p the normalised singular values.

    Between 1 and d; a collapsed encoder shows as 1. Without gradient.

    Source: Roy and Vetterli 2007; RankMe, Garrido et al. 2023 (arXiv 2210.02885), eq. 1.

    Args:
        x: ``[N, d]``.
    """
    check_matrix(x, "x")
    with torch.no_grad():
        values = torch.linalg.svdvals(x.float())
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return torch.special.entr(share).sum().exp()


@torch.no_grad()
def isotropy(hidden: Tensor, lengths: Tensor) -> Tensor:
    r"""How different the states of the tokens of a text are from each other: 1 minus the mean cosine of all pairs.

    .. math:: 1 - \frac{\sum_b \sum_{i \ne j} \cos(h_i^b, h_j^b)}{\sum_b n_b (n_b - 1)}

    pooled over the pairs of all texts b, so that long texts weigh more. Pairs lie within one text; 0 means that all states of a
    text point one way. Linear in the number of states; float64, without gradient.

    Source: Su and Xu 2023 (arXiv 2210.14140), section 3; its tables round to two decimals and call large models, with 0.55
    or more, isotropic.

    Args:
        hidden: ``[sum n, E]``, states of all texts, one text after the other.
        lengths: int64 ``[N]``, states of each text; a text of one adds nothing.

    Raises:
        InputError: lengths that do not sum to the number of states, or no text with two of them.
    """
    check_matrix(hidden, "hidden")
    if int(lengths.sum()) != len(hidden) or bool((lengths < 0).any()):
        raise InputError(f"lengths sum to {int(lengths.sum()):,}, but there are {len(hidden):,} states")
    pairs = int((lengths * (lengths - 1)).sum())
    if pairs == 0:
        raise InputError("isotropy needs a text of at least two tokens")
    rows = unit(hidden.double())
    text = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
    sums = rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, text, rows)
    return 1 - (sums.square().sum() - rows.square().sum()) / pairs


@torch.no_grad()
def score_stats(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    temperature: Temperature = 1.0,
    *,
    without: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""What a loss sees of each query: five numbers about its scores s, which show training without keeping any score.

    .. math::
        \Big[ \bar s, \;\; \tfrac{1}{M - 1} \sum_j (s_j - \bar s)^2, \;\; s_+, \;\;
        \tfrac1M \sum_j e^{s_j/\tau}, \;\; e^{s_+/\tau} \Big]

    over its M negatives j and its positive. Mean and variance come from the moments of the negatives and the
    exponentials from the tiled log-sum-exp, so no N x M matrix is held. Without gradient.

    Source: Zhu et al. 2021 (arXiv 2108.02982), section 3. Their code rounds the first three to half precision; these are
    float32.

    Args:
        query: ``[N, d]``.
        key: ``[N, d]``, row i the positive of query i.
        negatives: ``[K, d]``, shared.
        temperature: of the exponentials; the first three numbers are without it.
        without: int64 ``[N, W]``, rows of `negatives` that are none of the query's (itself, its positive).
        hard_negatives: further negatives of each query alone ``[N, S, d]``.
        normalize: cosine similarity (True) or plain dot product.

    Returns:
        float32 ``[N, 5]``. NaN where there are too few negatives: one has no variance, none has no mean either.
    """
    check_matrix(query, "query")
    check_matrix(key, "key")
    if query.shape != key.shape:
        raise InputError(f"query and key must have one shape, not {list(query.shape)} and {list(key.shape)}")
    ready = unit if normalize else wide
    query, key, negatives = ready(query), ready(key), ready(negatives)
    with torch.autocast(query.device.type, enabled=False):
        centre = negatives.sum(0) / max(len(negatives), 1)
        apart = negatives - centre  # scores are near each other: their squares would not be
        here, count = query @ centre, len(negatives)
        total, square = torch.zeros_like(here), ((query @ (apart.T @ apart)) * query).sum(1)
        parts = []
        if len(negatives):
            excluded = None if without is None else Listed(without)
            parts.append(log_sum_exp(query, negatives, temperature=temperature, without=excluded))
        if without is not None:
            left_out = torch.einsum("nd,nwd->nw", query, apart[without])
            total, square = total - left_out.sum(1), square - left_out.square().sum(1)
            count -= without.shape[1]
        if hard_negatives is not None:
            own = torch.einsum("nd,nsd->ns", query, ready(hard_negatives))
            parts.append((own / _per_row(temperature)).logsumexp(1))
            total, square = total + (own - here[:, None]).sum(1), square + (own - here[:, None]).square().sum(1)
            count += hard_negatives.shape[1]
        number = torch.full_like(here, count)
        mean = total / number
        variance = (square - total * mean).clamp(min=0) / (number - 1)
        spread = torch.stack(parts).logsumexp(0) - number.log() if parts else mean
        positive = (query * key).sum(1)
        columns = [here + mean, variance, positive, spread.exp(), (positive / _flat(temperature)).exp()]
        return torch.stack(columns, dim=1).float()


def _flat(temperature: Temperature) -> Temperature:
    """One value, or one per row ``[N]``."""
    return temperature.flatten() if isinstance(temperature, Tensor) else temperature


def _per_row(temperature: Temperature) -> Temperature:
    return temperature.reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
