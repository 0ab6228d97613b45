r"""The softmax family: every loss is an attraction towards positives plus a log-sum-exp over all that counts.

.. math:: \ell_i = -\sum_j P_{ij} s_{ij}/\tau + \log \sum_j W_{ij} \exp(s_{ij}/\tau)

The first term costs O(N d); the second stands on `counterpoint.contrast.kernels` and never holds an N x M matrix.

Shared conventions: inputs are L2-normalised inside unless ``normalize=False``; ``reduction`` is ``"mean"``, ``"sum"``
or ``"none"`` (per row); float32 accumulation whatever the input; under a process group, local rows meet the columns of
every rank, and the gradient averaged over ranks equals the single-process gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.distributed import (
    Gathered,
    Placed,
    by_ring,
    gather,
    gather_plain,
    place,
    sum_over_ranks,
    world_size,
)
from counterpoint.contrast.kernels import log_sum_exp, ring
from counterpoint.contrast.operands import (
    Temperature,
    among_all,
    check_dimensions,
    check_matrix,
    check_pair,
    check_temperature,
    divide,
    einsum,
    fits_at_once,
    ignored_pairs,
    logit_matrix,
    own_rows,
    reduce,
    two_views,
    unit,
    wide,
)
from counterpoint.contrast.relation import Listed, Mask, Relation, Same, Transposed
from counterpoint.errors import InputError


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.1,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    decoupled: bool = False,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each query picks its key among all keys (van den Oord et al. 2018, arXiv 1807.03748, eq. 4).

    .. math:: \ell_i = -\frac{1}{|P_i|}\sum_{p \in P_i} \frac{s_{ip}}{\tau} + \log \sum_{j} \exp(s_{ij}/\tau)

    The candidates j are the keys, the shared `negatives` and the query's own `hard_negatives`.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        temperature: scalar (or 0-d tensor, learnable), or one value per query ``[N]``.
        positives: which keys are positive: None pairs row i with key i; int64 ``[N]`` or ``[N, P]`` lists key rows
            (-1 pads); bool ``[N, M]`` marks them. Several positives are averaged outside the log.
        negatives: shared extra keys ``[K, d]``, for example a queue.
        hard_negatives: extra keys of each query alone ``[N, S, d]``; with `symmetric` those of the keys follow, ``[2N, S, d]``.
        ignore: pairs of the batch that do not count (false negatives): a relation or bool ``[N, M]``; over several
            processes that is the part of this one's keys, or ``[N, M of all]``. Positives always count.
        in_batch: do the other keys of the batch count as negatives? MoCo says no: only the queue does.
        decoupled: leave positives out of the denominator (DCL, arXiv 2110.06848).
        symmetric: average with the loss of keys picking queries (needs the default pairing).
        label_smoothing: share of the target spread evenly over all candidates.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean", "sum" or "none".

    Returns:
        Scalar, or ``[N]`` with ``reduction="none"``.

    Raises:
        InputError: wrong shape or type, a query without positive, or no candidate left in a denominator.
    """
    check_pair(query, key, temperature)
    if symmetric:
        if positives is not None or negatives is not None or not in_batch:
            raise InputError("symmetric=True needs the default pairing: no positives, negatives or in_batch=False")
        options = (ignore, decoupled, label_smoothing, normalize, reduction)
        return _both_ways(query, key, temperature, hard_negatives, *options)
    if positives is None and len(query) != len(key):
        raise InputError(
            f"query has {len(query)} rows and key {len(key)}: row i is paired with row i, so pass positives= to say "
            "which keys belong to which query"
        )
    if label_smoothing and ignore is not None:
        raise InputError("label_smoothing spreads the target over all keys, also those to ignore: use one of the two")
    ready = unit if normalize else wide
    query, key = ready(query), ready(key)
    if negatives is not None:
        check_matrix(negatives, "negatives")
        check_dimensions(negatives, "negatives", query)
        negatives = ready(negatives)
    keys = (place(key) if by_ring() else gather(key)) if in_batch else Gathered(key, 0, 1)
    paired = in_batch and positives is None and negatives is None and hard_negatives is None
    if paired and ignore is None and not decoupled and fits_at_once(query, keys):
        logits = logit_matrix(query, key, temperature)
        return reduce(_picked(logits, own_rows(query, keys), label_smoothing), reduction)
    index, relation = _positives(positives, len(query), keys, key)
    logits = _positive_logits(query, key, index, positives, temperature)

    parts: list[Tensor] = []
    count: int | Tensor = 0
    mean_logit: float | Tensor = 0.0
    if in_batch:
        without = _ignored(ignore, relation, decoupled, keys, query, key)
        parts.append(_over_ranks(query, key, keys, temperature, without))
        if label_smoothing:
            whole = sum_over_ranks(key.sum(0))
            count, mean_logit = _add_candidates(count, mean_logit, query, whole, keys.total, temperature)
    elif not decoupled:
        parts.append(logits.logsumexp(1))
        if label_smoothing:
            present = logits.isfinite()
            count, mean_logit = present.sum(1), logits.masked_fill(~present, 0).sum(1)
    if negatives is not None:
        parts.append(log_sum_exp(query, negatives, temperature=temperature))
        if label_smoothing:
            count, mean_logit = _add_candidates(count, mean_logit, query, negatives.sum(0), len(negatives), temperature)
    if hard_negatives is not None:
        hard = _own_logits(query, hard_negatives, temperature, normalize)
        parts.append(hard.logsumexp(1))
        if label_smoothing:
            count, mean_logit = count + hard.shape[1], mean_logit + hard.sum(1)
    if not parts:
        raise InputError("no negatives: in_batch=False and decoupled=True leave nothing in the denominator")
    if decoupled and negatives is None and hard_negatives is None and keys.total < 2:
        raise InputError("decoupled contrast of one pair has no negatives: use a batch of at least 2")
    normaliser = torch.stack(parts).logsumexp(0) if len(parts) > 1 else parts[0]
    if decoupled and (positives is not None or ignore is not None) and bool(normaliser.isneginf().any()):
        raise InputError("decoupled contrast left a query without negatives: positives and ignore cover all its keys")

    if positives is None:
        attraction = logits[:, 0]
    else:
        present = logits.isfinite()
        attraction = logits.masked_fill(~present, 0).sum(1) / present.sum(1).clamp(min=1)
    if label_smoothing:
        attraction = (1 - label_smoothing) * attraction + label_smoothing * mean_logit / count
    return reduce(normaliser - attraction, reduction)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.1,
    hard_negatives: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Two views of each item; every other row of both views is a negative (SimCLR, arXiv 2002.05709, eq. 1).

    .. math:: \ell_i = -\frac{s_{i,i'}}{\tau} + \log \sum_{j \ne i} \exp(s_{ij}/\tau), \quad i \in 1 \dots 2N

    Args:
        z1: ``[N, d]`` embeddings of the first view.
        z2: ``[N, d]`` embeddings of the second view; row i belongs to row i.
        temperature: scalar or 0-d tensor.
        hard_negatives: extra keys of each anchor alone ``[2N, S, d]``, first view's anchors first.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over the 2N anchors, "sum", or "none" ``[2N]`` (first view's anchors first).

    Raises:
        InputError: wrong shape or type, or a batch of one (it has no negative).
    """
    query, keys, pair = two_views(z1, z2, temperature, normalize, travel=True)
    if hard_negatives is None and isinstance(keys, Gathered) and fits_at_once(query, keys, gain=4):
        logits = logit_matrix(query, query, temperature).fill_diagonal_(-torch.inf)
        return reduce(_picked(logits, own_rows(query, keys).roll(len(z1))), reduction)
    normaliser = _over_ranks(query, None, keys, temperature, Listed(own_rows(query, keys)))
    normaliser = _and_own(normaliser, query, hard_negatives, temperature, normalize)
    return reduce(normaliser - divide(pair, temperature), reduction)


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 0.1,
    weighted: bool = False,
    sigma: float = 0.5,
    detach_weight: bool = True,
    one_way: bool = False,
    hard_negatives: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""NT-Xent without the positive in the denominator (Yeh et al. 2022, arXiv 2110.06848, eq. 6).

    .. math:: \ell_i = -w_i \frac{s_{i,i'}}{\tau} + \log \sum_{j \notin \{i, i'\}} \exp(s_{ij}/\tau)

    The coupling factor :math:`q_i = 1 - p(\text{positive})` that multiplies every NT-Xent gradient is gone, so small
    batches and easy positives keep their learning signal. The loss may be negative.

    Args:
        z1: ``[N, d]``, first view.
        z2: ``[N, d]``, second view.
        temperature: scalar or 0-d tensor.
        weighted: DCLW: :math:`w_i = 2 - N \,\mathrm{softmax}_i(s_{i,i'}/\sigma)`, mean 1, larger for hard positives.
        sigma: temperature of that weight.
        detach_weight: treat the weight as a constant.
        one_way: anchors from the first view only (rows ``[N]`` instead of ``[2N]``).
        hard_negatives: extra keys of each anchor alone ``[2N, S, d]``, first view's anchors first (``[N, S, d]`` if `one_way`).
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over anchors (the average of both directions), "sum" or "none".

    Raises:
        InputError: wrong shape or type, or a batch of one (the log-sum would be empty).
    """
    query, keys, pair = two_views(z1, z2, temperature, normalize, travel=True)
    own = own_rows(query, keys)
    half = len(z1)
    partner = torch.cat([own[:half] + half, own[half:] - half])
    everything = None
    weight = _dclw_weight(pair[:half], sigma, detach_weight).repeat(2) if weighted else 1.0
    without = torch.stack([own, partner], dim=1)
    if one_way:
        query, everything, pair, without = query[:half], query, pair[:half], without[:half]
        weight = weight[:half] if isinstance(weight, Tensor) else weight
    normaliser = _over_ranks(query, everything, keys, temperature, Listed(without))
    normaliser = _and_own(normaliser, query, hard_negatives, temperature, normalize)
    return reduce(normaliser - divide(weight * pair, temperature), reduction)


def dclw(z1: Tensor, z2: Tensor, *, temperature: Temperature = 0.1, sigma: float = 0.5, **options) -> Tensor:
    """`dcl` with its von Mises-Fisher weight on the positives: ``dcl(..., weighted=True)``."""
    return dcl(z1, z2, temperature=temperature, weighted=True, sigma=sigma, **options)


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Temperature = 0.1,
    mean: str = "outside",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Everything with the anchor's label is a positive (Khosla et al. 2020, arXiv 2004.11362, eq. 2 and 3).

    .. math::
        \text{outside: } \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i} \frac{s_{ip}}{\tau}
            + \log \sum_{j \ne i} e^{s_{ij}/\tau} \qquad
        \text{inside: } \ell_i = -\log \frac{1}{|P_i|} \sum_{p \in P_i} e^{s_{ip}/\tau}
            + \log \sum_{j \ne i} e^{s_{ij}/\tau}

    ``mean="none"`` is the inside form without 1 / |P_i|: the probability that any of the positives is picked.

    The outside form needs no pairwise positives: the mean over them is a class sum, O(N d).

    Args:
        features: ``[N, d]``, or ``[N, V, d]`` with V views of each item.
        labels: int64 ``[N]``.
        temperature: scalar or 0-d tensor.
        mean: "outside" or "inside" the logarithm, or "none".
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over anchors that have a positive (0 when none has), "sum", or "none" (0 for anchors without
            a positive); rows are view-major: ``[V * N]``.

    Raises:
        InputError: wrong shape or type, or an unknown `mean`.
    """
    if mean not in ("outside", "inside", "none"):
        raise InputError(f'mean must be "outside", "inside" or "none", not "{mean}"')
    items = len(features)
    if not isinstance(labels, Tensor):
        raise InputError(f"labels must be an integer tensor, not {type(labels).__name__}")
    if labels.is_floating_point() or labels.shape != (items,):
        raise InputError(f"labels must be integers [{items}], one per item, not {labels.dtype} {list(labels.shape)}")
    if features.ndim == 3:
        labels = labels.repeat(features.shape[1])
        features = features.transpose(0, 1).flatten(0, 1)
    check_matrix(features, "features")
    check_temperature(temperature, 1)
    x = unit(features) if normalize else wide(features)
    keys, everyone = place(x) if by_ring() else gather(x), gather_plain(labels).rows
    own = own_rows(x, keys)
    normaliser = _over_ranks(x, None, keys, temperature, Listed(own))
    classes, group = torch.unique(everyone, return_inverse=True)
    mine = group[keys.start : keys.start + len(x)]
    positives = torch.bincount(group, minlength=len(everyone))[mine] - 1
    if mean == "outside":
        sums = sum_over_ranks(x.new_zeros(len(classes), x.shape[1]).index_add(0, mine, x))
        attraction = divide((x * (sums[mine] - x)).sum(1) / positives.clamp(min=1), temperature)
    else:
        apart = ~Same(mine, group) | Listed(own)
        attraction = _over_ranks(x, None, keys, temperature, apart)
        if mean == "inside":
            attraction = attraction - positives.clamp(min=1).to(x.dtype).log()
    return reduce(torch.where(positives > 0, normaliser - attraction, 0.0), reduction, positives > 0)


def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: Temperature = 0.07,
    label_smoothing: float = 0.0,
    ignore: Relation | Tensor | None = None,
    hard_negatives: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Images pick their texts and texts their images, averaged (Radford et al. 2021, arXiv 2103.00020, figure 3).

    .. math::
        \ell_i = \tfrac12 \Big[ -2\frac{s_{ii}}{\tau} + \log\sum_j e^{s_{ij}/\tau} + \log\sum_j e^{s_{ji}/\tau} \Big]

    One process computes both normalisers in one pass over the similarities.

    Args:
        image: ``[N, d]``.
        text: ``[N, d]``; row i belongs to row i.
        temperature: scalar or 0-d tensor; a learned logit scale s is ``temperature=1 / s``.
        label_smoothing: share of the target spread evenly over all candidates.
        ignore: pairs that do not count (duplicate captions): a relation or bool ``[N, N]``, symmetric in meaning.
        hard_negatives: extra keys of each row alone ``[2N, S, d]``, those of the images first.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean", "sum" or "none" ``[N]``.

    Raises:
        InputError: wrong shape or type.
    """
    check_matrix(image, "image")
    check_matrix(text, "text")
    return info_nce(
        image,
        text,
        temperature=temperature,
        symmetric=True,
        ignore=ignore,
        hard_negatives=hard_negatives,
        label_smoothing=label_smoothing,
        normalize=normalize,
        reduction=reduction,
    )


def coupling(z1: Tensor, z2: Tensor, *, temperature: Temperature = 0.1) -> Tensor:
    r"""NT-Xent's negative-positive coupling :math:`q_i = 1 - p_i(\text{positive})` of every anchor ``[2N]``.

    It multiplies the gradient that NT-Xent sends through term i; near 0 nothing is learned from that anchor
    (arXiv 2110.06848, proposition 1). Without gradient.
    """
    with torch.no_grad():
        return 1 - torch.exp(-nt_xent(z1, z2, temperature=temperature, reduction="none"))


def _both_ways(query, key, temperature, hard, ignore, decoupled, label_smoothing, normalize, reduction) -> Tensor:
    options = {"decoupled": decoupled, "label_smoothing": label_smoothing, "normalize": False, "reduction": reduction}
    if len(query) != len(key):
        raise InputError(f"row i is paired with row i, but there are {len(query)} and {len(key)} rows")
    query, key = (unit(query), unit(key)) if normalize else (wide(query), wide(key))
    per_row = isinstance(temperature, Tensor) and temperature.ndim > 0
    if by_ring() and ignore is None and hard is None and not (per_row or label_smoothing or decoupled):
        row, column = ring.log_sum_exp(query, key, temperature=temperature, columns=True)
        return reduce((row + column) / 2 - divide((query * key).sum(1), temperature), reduction)
    if world_size() > 1 or per_row or label_smoothing or decoupled or hard is not None:
        mine, others = (None, None) if hard is None else ((unit if normalize else wide)(hard)).tensor_split(2)
        there = info_nce(query, key, temperature=temperature, ignore=ignore, hard_negatives=mine, **options)
        options |= {"ignore": _transposed(ignore), "hard_negatives": others}
        back = info_nce(key, query, temperature=temperature, **options)
        return (there + back) / 2
    keys = Gathered(key, 0, 1)
    if ignore is None and fits_at_once(query, keys):
        logits, own = logit_matrix(query, key, temperature), own_rows(query, keys)
        return reduce((_picked(logits, own) + _picked(logits.T, own)) / 2, reduction)
    without = _ignored(ignore, Listed(own_rows(query, keys)), False, keys, query, key)
    row, column = log_sum_exp(query, key, temperature=temperature, without=without, columns=True)
    return reduce((row + column) / 2 - divide((query * key).sum(1), temperature), reduction)


def _picked(logits: Tensor, column: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy ``[N]`` of row i picking ``column[i]``."""
    return functional.cross_entropy(logits, column, reduction="none", label_smoothing=label_smoothing)


def _own_logits(query: Tensor, hard: Tensor, temperature: Temperature, normalize: bool) -> Tensor:
    """Logits of each query and its own further keys ``[N, S]``."""
    if hard.ndim != 3 or len(hard) != len(query):
        raise InputError(f"hard_negatives must be [{len(query)}, S, d], not {list(hard.shape)}")
    check_dimensions(hard, "hard_negatives", query)
    return divide(einsum("nd,nsd->ns", query, unit(hard) if normalize else wide(hard)), temperature)


def _and_own(
    normaliser: Tensor, query: Tensor, hard: Tensor | None, temperature: Temperature, normalize: bool
) -> Tensor:
    if hard is None:
        return normaliser
    return torch.logaddexp(normaliser, _own_logits(query, hard, temperature, normalize).logsumexp(1))


def _over_ranks(
    query: Tensor, key: Tensor | None, keys: Gathered | Placed, temperature: Temperature, without: Relation | None
) -> Tensor:
    """Log-sum-exp of local queries over the keys of all ranks: `key` of this one (None: its queries), `keys` of all."""
    if isinstance(keys, Placed):
        return ring.log_sum_exp(query, key, temperature=temperature, without=without)
    other = keys.rows if keys.ranks > 1 else key
    return log_sum_exp(query, other, temperature=temperature, without=without)


def _dclw_weight(similarity: Tensor, sigma: float, detach: bool) -> Tensor:
    everyone = gather(similarity).rows
    weight = 2 - torch.exp(similarity / sigma - (everyone / sigma).logsumexp(0)) * len(everyone)
    return weight.detach() if detach else weight


def _positives(positives, n: int, keys: Gathered | Placed, key: Tensor) -> tuple[Tensor | None, Relation]:
    """Positives as rows of `key` ``[N, P]`` (None when a mask lists them), and as a relation to the keys of all ranks."""
    device, local = key.device, len(key)
    if positives is None:
        own = torch.arange(n, device=device)[:, None]
        return own, Listed(own + keys.start)
    if positives.dtype == torch.bool:
        if positives.shape != (n, local):
            raise InputError(f"positives must mark queries x keys, [{n}, {local}], not {list(positives.shape)}")
        if not bool(positives.any(1).all()):
            raise InputError("positives leaves a query without any positive key")
        return None, Mask(among_all(positives, keys))
    index = positives[:, None] if positives.ndim == 1 else positives
    if index.is_floating_point() or index.ndim != 2 or len(index) != n:
        raise InputError(f"positives must be int64 [{n}], int64 [{n}, P] or bool [{n}, {local}]")
    if bool((index >= local).any()) or not bool((index >= 0).any(1).all()):
        raise InputError(f"positives must list, for every query, at least one key row below {local}")
    return index, Listed(torch.where(index < 0, -1, index + keys.start))


def _positive_logits(query, key, index, positives, temperature) -> Tensor:
    """Logits of the positives ``[N, P]``, -inf where padded."""
    if index is None:
        return divide(einsum("nd,md->nm", query, key), temperature).masked_fill(~positives, -torch.inf)
    if positives is None:
        return divide((query * key[: len(query)]).sum(1, keepdim=True), temperature)
    if index.shape[1] == 1:
        chosen = (query * key[index[:, 0].clamp(min=0)]).sum(1, keepdim=True)
    else:
        chosen = einsum("nd,npd->np", query, key[index.clamp(min=0)])
    return divide(chosen, temperature).masked_fill(index < 0, -torch.inf)


def _ignored(ignore, positives: Relation, decoupled: bool, keys: Gathered | Placed, query, key) -> Relation | None:
    """Pairs that do not count in the denominator."""
    if ignore is None:
        return positives if decoupled else None
    ignore = ignored_pairs(ignore, keys, len(query), len(key))
    return ignore | positives if decoupled else ignore & ~positives


def _transposed(ignore):
    if ignore is None:
        return None
    if isinstance(ignore, Same):
        return Same(ignore.column_ids, ignore.row_ids)
    return ignore.T if isinstance(ignore, Tensor) else Transposed(ignore)


def _add_candidates(count, mean_logit, query, total, more: int, temperature) -> tuple[int | Tensor, Tensor]:
    """Join `more` candidates, whose sum is `total` ``[d]``, to the count and the sum of the logits."""
    return count + more, mean_logit + divide(einsum("nd,d->n", query, total), temperature)
