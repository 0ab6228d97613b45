r"""Noise contrast: tell the partner of a query from samples of a distribution whose probabilities may be known.

Binary NCE asks of each pair whether it is real, ranking NCE which of several candidates is. With scores s and noise q both
learn :math:`s(x, y) = \log p(y \mid x) + c_x`; only binary NCE, corrected by q, fixes the constant, so that its sigmoid is a
probability. Without q it is negative sampling, and s becomes :math:`\log p(y \mid x) - \log K q(y)`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.candidates import Candidates, candidates
from counterpoint.contrast.distributed import gather_plain
from counterpoint.contrast.kernels import log_sum_exp, softplus_sum
from counterpoint.contrast.operands import Temperature, check_temperature, divide, einsum, reduce
from counterpoint.contrast.relation import Listed, Mask, Relation
from counterpoint.contrast.softmax import info_nce
from counterpoint.errors import InputError


def binary_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    log_noise: float | Tensor | None = None,
    negatives_log_noise: float | Tensor | None = None,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each query asks of its key and of K others, one by one, whether they belong to it.

    .. math::
        \ell_i = -\log \sigma(l_{ip}) - \sum_{k=1}^{K} \log \sigma(-l_{ik}), \qquad
        l_{ij} = \frac{s_{ij}}{\tau} - \log K q(y_j)

    Without `log_noise` l is :math:`s/\tau`: negative sampling, and with the keys of a batch alone that is
    `counterpoint.contrast.sigmoid_loss` with a bias of 0. The sum over the pool runs tile by tile; with `ignore` all N x M
    scores are held.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        temperature: scalar, 0-d tensor, or one value per query ``[N]``.
        log_noise: log q, natural, of each key ``[M]``, or one number for all; a constant. None: no correction.
        negatives_log_noise: log q of the `negatives` ``[K]``, or one number; None takes the number of `log_noise`.
        positives: int64 ``[N]``, the key row of each query; None pairs row i with key i.
        negatives: shared extra keys ``[K, d]``, for example samples of the noise.
        hard_negatives: extra keys of each query alone ``[N, S, d]``; their noise is that of all, so it must be one number.
        ignore: pairs of the batch that do not count: a relation or bool ``[N, M]``; positives always count.
        in_batch: do the other keys of the batch count?
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean", "sum" or "none" ``[N]``.

    Raises:
        InputError: wrong shape or type, no negatives, or noise that is not known of all candidates.

    Source: Gutmann and Hyvarinen 2010 (AISTATS); for conditional models Ma and Collins 2018 (arXiv 1809.01812); without q
    Mikolov et al. 2013 (arXiv 1310.4546), equation 4.
    """
    check_temperature(temperature, 1, len(query))
    found = candidates(
        query,
        key,
        positives=positives,
        negatives=negatives,
        hard_negatives=hard_negatives,
        ignore=ignore,
        in_batch=in_batch,
        normalize=normalize,
    )
    noise, own = _noise(log_noise, negatives_log_noise, found, key, positives)
    scaled = divide(found.query, temperature)
    attraction = (scaled * found.positive).sum(1)
    if found.without is not None:
        counts = found.counted()
        scores = found._replace(query=scaled).scores()
        many = counts.sum(1, keepdim=True).clamp(min=1)
        logits = scores if noise is None else scores - noise - many.log()
        total = functional.softplus(logits).masked_fill(~counts, 0.0).sum(1)
        shift = 0.0 if own is None else own + many[:, 0].log()
        return reduce(functional.softplus(shift - attraction) + total, reduction)
    shift = 0.0 if noise is None or own is None else own + math.log(found.negatives)
    total = _softplus(scaled, found.pool, noise, found.negatives)
    # softplus(l) - l = softplus(-l): the pool holds the positive, too, unless the keys of the batch are left out
    positive = shift - attraction if found.keys else functional.softplus(shift - attraction)
    rows = total + positive
    if found.hard is not None:
        bias = 0.0 if noise is None else float(noise) + math.log(found.negatives)
        rows = rows + functional.softplus(einsum("nd,nsd->ns", scaled, found.hard) - bias).sum(1)
    return reduce(rows, reduction)


def ranking_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    log_noise: float | Tensor | None = None,
    negatives_log_noise: float | Tensor | None = None,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each query picks its key among K others that were drawn from a known noise: InfoNCE corrected by log q.

    .. math::
        \ell_i = -l_{ip} + \log \sum_{j} e^{l_{ij}}, \qquad l_{ij} = \frac{s_{ij}}{\tau} - \log q(y_j)

    Where some candidates are drawn more often than others (frequent answers, popular items) plain InfoNCE pushes them down
    by as much; the correction takes that back. Uniform noise cancels: then this is `counterpoint.contrast.info_nce`. With the
    mean over the K + 1 candidates in the place of the sum it is lower by log(K + 1), and that difference bounds the mutual
    information: :math:`I(x; y) \ge \log(K + 1) - \ell`.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        temperature, positives, negatives, ignore, in_batch, normalize, reduction: as in `binary_nce`.
        log_noise: log q of each key ``[M]`` (need not sum to 1), or one number for all, which changes nothing.
        negatives_log_noise: log q of the `negatives` ``[K]``; one number only beside one number.
        hard_negatives: extra keys of each query alone ``[N, S, d]``; only with uniform noise.

    Raises:
        InputError: as `binary_nce`.

    Source: Ma and Collins 2018 (arXiv 1809.01812), section 3; Jozefowicz et al. 2016 (arXiv 1602.02410), section 3.1; the bound:
    van den Oord et al. 2018 (arXiv 1807.03748), section 2.3.
    """
    if not isinstance(log_noise, Tensor) and not isinstance(negatives_log_noise, Tensor):
        if log_noise is not None and negatives_log_noise is not None and negatives_log_noise != log_noise:
            raise InputError("two numbers of noise that differ: give log_noise and negatives_log_noise as tensors")
        return info_nce(
            query,
            key,
            temperature=temperature,
            positives=positives,
            negatives=negatives,
            hard_negatives=hard_negatives,
            ignore=ignore,
            in_batch=in_batch,
            normalize=normalize,
            reduction=reduction,
        )
    check_temperature(temperature, 1, len(query))
    found = candidates(
        query,
        key,
        positives=positives,
        negatives=negatives,
        hard_negatives=hard_negatives,
        ignore=ignore,
        in_batch=in_batch,
        normalize=normalize,
    )
    noise, own = _noise(log_noise, negatives_log_noise, found, key, positives)
    assert isinstance(noise, Tensor) and own is not None
    # a key that is to be ignored counts where it is the positive
    without = None if found.without is None else _over(found.without & ~Listed(found.own), found)
    attraction = divide(found.attraction, temperature) - own
    rows = log_sum_exp(found.query, found.pool, temperature=temperature, without=without, log_weight=-noise)
    if not found.keys:
        rows = torch.logaddexp(rows, attraction)
    return reduce(rows - attraction, reduction)


def _over(relation: Relation, found: Candidates) -> Relation:
    """A relation of the keys as one of the whole pool, whose further columns it says nothing about."""
    if len(found.pool) == found.keys:
        return relation
    tile = relation.holds(slice(0, len(found.query)), slice(0, found.keys))
    return Mask(functional.pad(tile, (0, len(found.pool) - found.keys)))


def _noise(
    log_noise: float | Tensor | None,
    negatives_log_noise: float | Tensor | None,
    found: Candidates,
    key: Tensor,
    positives: Tensor | None,
) -> tuple[float | Tensor | None, float | Tensor | None]:
    """log q of the pool ``[C]`` (or one number), and of the positive of each query ``[N]``.

    Raises:
        InputError: it is not known of all candidates, or of another number of them.
    """
    others = log_noise if negatives_log_noise is None and not isinstance(log_noise, Tensor) else negatives_log_noise
    further = len(found.pool) - found.keys
    if log_noise is None:
        if others is not None:
            raise InputError("negatives_log_noise is given, but log_noise, that of the keys, is not")
        return None, None
    if not isinstance(log_noise, Tensor) and not isinstance(others, Tensor) and (others == log_noise or not further):
        return log_noise, log_noise
    if found.hard is not None:
        raise InputError("hard negatives have no noise of their own: give log_noise as one number, or leave them out")
    if further and others is None:
        raise InputError(f"the noise of {further} negatives is not known: give negatives_log_noise")
    own = torch.as_tensor(log_noise, dtype=found.query.dtype, device=key.device)
    if own.ndim and own.shape != (len(key),):
        raise InputError(f"log_noise must hold one value per key, [{len(key)}], not {list(own.shape)}")
    mine = own.expand(len(key)).detach()
    parts = [gather_plain(mine).rows] if found.keys else []
    if further:
        rest = torch.as_tensor(others, dtype=mine.dtype, device=mine.device)
        if rest.ndim and rest.shape != (further,):
            raise InputError(
                f"negatives_log_noise must hold one value per negative, [{further}], not {list(rest.shape)}"
            )
        parts.append(rest.expand(further).detach())
    at = slice(None) if positives is None else positives
    return torch.cat(parts), mine[at]


def _softplus(query: Tensor, pool: Tensor, noise: float | Tensor | None, count: int) -> Tensor:
    """Sum over the pool of softplus(logit) ``[N]``, tile by tile."""
    if not len(pool):
        return query.new_zeros(len(query))
    if not isinstance(noise, Tensor):
        return softplus_sum(query, pool, bias=0.0 if noise is None else -noise - math.log(count))
    # a shift of each column is one more dimension, in which all queries are 1
    shift = -noise - math.log(count)
    return softplus_sum(torch.cat([query, torch.ones_like(query[:, :1])], 1), torch.cat([pool, shift[:, None]], 1))
