r"""Contrast for regression: labels have an order and a distance, and between two of them lies a third.

A mixture of two embeddings has the similarity :math:`a\,s_{ij} + (1 - a)\,s_{ik}` to an anchor, so that the N x N
similarities say everything: no mixture is ever formed in training. `mixtures` and `weighted_sup_con` spell them out.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather, gather_plain
from counterpoint.contrast.operands import Temperature, check_matrix, check_temperature, einsum, reduce, unit, wide
from counterpoint.errors import InputError

Weight = Literal["L1_inv", "L2_inv", "L1", "L2", "none"]
Shift = Literal["joint", "separate"]
TRIPLES = {"cpu": 2**20, "cuda": 2**24}
"""So many mixed positives are looked at together."""


class Mixtures(NamedTuple):
    """Every mixture of a batch, in the lexicographic order of its indices.

    Attributes:
        negative_index: int64 ``[P, 2]``, anchor i and the other row k.
        negatives: ``[P, d]``.
        negative_labels: ``[P]``.
        positive_index: int64 ``[Q, 3]``, anchor i, the row j below it and the row k above it.
        positives: ``[Q, d]``.
        positive_labels: ``[Q]``, those of the anchors.
    """

    negative_index: Tensor
    negatives: Tensor
    negative_labels: Tensor
    positive_index: Tensor
    positives: Tensor
    positive_labels: Tensor


class _Block(NamedTuple):
    """Columns of each anchor: weighted log-sum-exp, sum of its positives' logits, their number, largest logit; all [N]."""

    log_sum: Tensor
    pull: Tensor
    positives: Tensor
    top: Tensor


def distance_weight(distance: Tensor, kind: Weight = "L1_inv", *, shifted: bool = False) -> Tensor:
    """How much a row counts in the denominator, by the signed distance of its label from the anchor's.

    "L1_inv" is \\|d\\| + 1 and "L2_inv" d^2 + 1: the farther, the more. "L1" and "L2" are one over these, "none" is 1.

    Args:
        distance: any shape, label of the anchor minus label of the row.
        kind: which.
        shifted: take (d + 1)^2 + 1 for "L2_inv", as the released code does for mixtures (2 instead of 1 for equal labels).

    Raises:
        InputError: no such kind.
    """
    if kind not in get_args(Weight):
        raise InputError(f'no distance weight "{kind}"; there are {", ".join(get_args(Weight))}')
    if kind == "none":
        return torch.ones_like(distance)
    if kind.startswith("L1"):
        size = distance.abs() + 1
    else:
        size = (distance + 1 if shifted and kind == "L2_inv" else distance).square() + 1
    return size if kind.endswith("_inv") else 1 / size


def mixtures(features: Tensor, labels: Tensor, share: Tensor, *, window: float) -> Mixtures:
    r"""All mixtures of a batch, one by one (SupReMix, arXiv 2309.16633): to look at, since there are up to :math:`N^3`.

    Negatives of i, one for each k of another label: :math:`\lambda h_i + (1 - \lambda) h_k`. Positives of i, one for each
    j below and k above it within the window: :math:`a h_j + (1 - a) h_k` with :math:`a = (t_k - t_i) / (t_k - t_j)`, so
    that the mixed label is :math:`t_i`. None is brought to the unit sphere.

    Args:
        features: ``[N, d]``.
        labels: ``[N]``.
        share: :math:`\lambda` of every ordered pair of different labels ``[P]``, in lexicographic order.
        window: largest distance of a partner's label, itself excluded.

    Raises:
        InputError: wrong shape, or another number of shares than of pairs.
    """
    t = _values(labels, len(features)).to(wide(features).dtype)
    difference = t[:, None] - t
    negative = (difference != 0).nonzero()
    if share.shape != (len(negative),):
        raise InputError(f"{len(negative)} pairs have different labels, but share is {list(share.shape)}")
    i, k = negative.T
    share = share.to(t.dtype)
    below, above = _within(difference, window), _within(-difference, window)
    anchor, lower = below.nonzero().T
    partners = above.sum(1)[anchor]  # each row below meets all rows above
    start = above.sum(1).cumsum(0)[anchor] - partners
    at = torch.arange(int(partners.sum()), device=t.device) + (start - partners.cumsum(0) + partners).repeat_interleave(
        partners
    )
    anchor, lower = anchor.repeat_interleave(partners), lower.repeat_interleave(partners)
    upper = above.nonzero()[:, 1][at]
    part = ((t[upper] - t[anchor]) / (t[upper] - t[lower]).clamp(min=1e-9)).clamp(0, 1)
    return Mixtures(
        negative,
        share[:, None] * features[i] + (1 - share[:, None]) * features[k],
        share * t[i] + (1 - share) * t[k],
        torch.stack([anchor, lower, upper], 1),
        part[:, None] * features[lower] + (1 - part[:, None]) * features[upper],
        t[anchor],
    )


def supremix(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Temperature = 0.5,
    weight: Weight = "L1_inv",
    share: Tensor | tuple[float, float] | None = (2.0, 8.0),
    window: float | None = 5.0,
    shift: Shift = "joint",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""SupCon over values, with mixed negatives and positives and weights by label distance (arXiv 2309.16633).

    .. math::
        \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i} \frac{s_{ip}}{\tau}
        + \log \sum_{c \ne i} w(t_i - t_c) \, e^{s_{ic}/\tau}

    c runs over the other rows and over the mixtures of i (see `mixtures`); :math:`P_i` are the rows of its very label and
    its mixed positives. Mixtures are constants: they move their anchor only. All that is held is N x N; the positives are
    summed in pieces, over the rows within the window only (on GPUs over all, which needs no word from the device).

    Args:
        features: ``[N, d]``, or ``[N, V, d]`` with V views of each item.
        labels: ``[N]``, whole or floating; only exactly equal ones are positives without mixing.
        temperature: scalar or 0-d tensor.
        weight: see `distance_weight`.
        share: the anchor's share in its mixed negatives: parameters of a Beta distribution, from which every pair draws;
            or ``[rows, rows of all processes]``; None mixes no negatives.
        window: in label units, how far the two rows of a mixed positive may be from the anchor; None mixes none.
        shift: "joint" is the formula. "separate" is the released code: the logits of rows and of mixtures are each lowered by
            their own largest one before they meet, so that the hardest mixture counts as if its similarity were that of the
            hardest row (the anchor itself); and "L2_inv" is shifted for mixtures.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over anchors that have a positive, "sum", or "none" (0 where there is none); rows are view-major.

    Raises:
        InputError: wrong shape or type, an unknown weight or shift, a window that is not positive.
    """
    x, t = _rows(features, labels, temperature, weight, shift, normalize)
    if window is not None and not window > 0:
        raise InputError(f"window is a distance of labels and must be positive, not {window}")
    keys, everyone = gather(x), gather_plain(t).rows
    own = torch.arange(keys.start, keys.start + len(x), device=x.device)
    difference = t[:, None] - everyone
    logits = einsum("nd,md->nm", x, keys.rows) / temperature
    blocks = [_real(logits, difference, own, weight)]
    if share is not None or window is not None:
        constant = einsum("nd,md->nm", x, keys.rows.detach()) / temperature
        shifted = shift == "separate"
        if share is not None:
            part = _drawn(share, difference)
            blocks.append(_mixed_negatives(constant, difference, own, part, weight, shifted))
        if window is not None:
            blocks.append(_mixed_positives(constant, t, everyone, window, weight, shifted))
    return _joined(blocks, shift, reduction)


def weighted_sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    mixtures: Tensor | None = None,
    mask: Tensor | None = None,
    mixture_labels: Tensor | None = None,
    temperature: Temperature = 0.5,
    weight: Weight = "L1_inv",
    shift: Shift = "joint",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The loss of `supremix` with mixtures that are handed in, whatever they were made of; without any, weighted SupCon.

    Args:
        features: ``[N, d]``, or ``[N, V, d]`` with V views of each item.
        labels: ``[N]``.
        mixtures: constants ``[V * N, M, d]``, those of each anchor (view-major), used as they are.
        mask: ``[V * N, M]``, 1 for positives, 0 for negatives, -1 for places that are not used.
        mixture_labels: ``[V * N, M]``.
        temperature, weight, normalize, reduction: as in `supremix`.
        shift: as in `supremix`; the largest logit is that of all M places, used or not.

    Raises:
        InputError: wrong shape or type, or mixtures without mask and labels.
    """
    x, t = _rows(features, labels, temperature, weight, shift, normalize)
    keys, everyone = gather(x), gather_plain(t).rows
    own = torch.arange(keys.start, keys.start + len(x), device=x.device)
    logits = einsum("nd,md->nm", x, keys.rows) / temperature
    blocks = [_real(logits, t[:, None] - everyone, own, weight)]
    if mixtures is not None:
        shape = list(mixtures.shape[:2])
        if mask is None or mixture_labels is None or not shape == [*mask.shape] == [*mixture_labels.shape]:
            raise InputError(f"mixtures {shape} need a mask and labels of that shape")
        if mixtures.ndim != 3 or len(mixtures) != len(x) or mixtures.shape[2] != x.shape[1]:
            raise InputError(f"mixtures must be [{len(x)}, M, {x.shape[1]}], not {list(mixtures.shape)}")
        mixed = einsum("nd,nmd->nm", x, mixtures.detach().to(x.dtype)) / temperature
        difference = t[:, None] - mixture_labels.to(t.dtype)
        blocks.append(_block(mixed, difference, mask >= 0, mask == 1, weight, shift == "separate"))
    return _joined(blocks, shift, reduction)


def _rows(features, labels, temperature, weight, shift, normalize) -> tuple[Tensor, Tensor]:
    """Rows of all views, view-major, and the value of each, after the checks that both losses share."""
    if shift not in get_args(Shift):
        raise InputError(f'shift must be "joint" or "separate", not "{shift}"')
    distance_weight(torch.zeros(()), weight)
    t = _values(labels, len(features))
    if features.ndim == 3:
        t, features = t.repeat(features.shape[1]), features.transpose(0, 1).flatten(0, 1)
    check_matrix(features, "features")
    check_temperature(temperature, 1)
    x = unit(features) if normalize else wide(features)
    return x, t.to(x.dtype)


def _values(labels: Tensor, items: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.shape != (items,):
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"labels must be one value for each of {items} items, not {what}")
    return labels


def _within(distance: Tensor, window: float) -> Tensor:
    return (distance > 0) & (distance < window)


def _drawn(share: Tensor | tuple[float, float], like: Tensor) -> Tensor:
    if not isinstance(share, Tensor):
        if len(share) != 2 or min(share) <= 0:
            raise InputError(f"share needs the two positive parameters of a Beta distribution, not {share}")
        one, other = (torch._standard_gamma(torch.full_like(like, value)) for value in share)
        return one / (one + other)
    if share.shape != like.shape:
        raise InputError(f"share must be {list(like.shape)}, not {list(share.shape)}")
    return share.to(like.dtype)


def _block(logits, difference, used, positive, weight, shifted=False) -> _Block:
    counted = logits + distance_weight(difference, weight, shifted=shifted).log()
    return _Block(
        counted.masked_fill(~used, -torch.inf).logsumexp(1),
        logits.masked_fill(~positive, 0).sum(1),
        positive.sum(1),
        logits.detach().amax(1),
    )


def _real(logits: Tensor, difference: Tensor, own: Tensor, weight: Weight) -> _Block:
    others = torch.ones_like(difference, dtype=torch.bool).scatter_(1, own[:, None], False)
    return _block(logits, difference, others, (difference == 0) & others, weight)


def _mixed_negatives(logits, difference, own, share, weight, shifted) -> _Block:
    used = difference != 0
    mixed = share * logits.gather(1, own[:, None]) + (1 - share) * logits
    mixed = mixed.masked_fill(~used, -torch.inf)
    return _block(mixed, (1 - share) * difference, used, torch.zeros_like(used), weight, shifted)


def _mixed_positives(logits, t, everyone, window, weight, shifted) -> _Block:
    """The mixed positives of each anchor, without a tensor of them.

    Their log-sum-exp is a function of the logits whose gradient is known while it is computed: row j receives the sum of
    a times softmax over its mixtures. So N x N numbers carry everything to the backward pass.
    """
    order = everyone.argsort()
    near, value = logits.detach()[:, order], everyone[order]
    n, columns = near.shape
    difference = t[:, None] - value
    sides = [_within(difference, window), _within(-difference, window)]
    counts = torch.stack([side.sum(1) for side in sides])
    width = _reach(counts, columns)
    place = torch.arange(width, device=t.device)
    at = [(side.int().argmax(1)[:, None] + place).clamp(max=columns - 1) for side in sides]
    there = [place < count[:, None] for count in counts]
    log_sum, top = near.new_full((n,), -torch.inf), near.new_full((n,), -torch.inf)
    slope, each = torch.zeros_like(near), torch.zeros_like(near)
    for rows in torch.arange(n, device=t.device).split(max(1, TRIPLES.get(near.device.type, 2**20) // width**2)):
        lower, upper = (index[rows] for index in at)
        pair = there[0][rows, :, None] & there[1][rows, None]
        down, up = difference[rows].gather(1, lower)[:, :, None], -difference[rows].gather(1, upper)[:, None]
        part = (up / (down + up).clamp(min=1e-9)).masked_fill(~pair, 0)
        rest = (1 - part).masked_fill(~pair, 0)
        mixed = part * near[rows].gather(1, lower)[:, :, None] + rest * near[rows].gather(1, upper)[:, None]
        mixed = mixed.masked_fill(~pair, -torch.inf)
        top[rows] = mixed.amax((1, 2))
        log_sum[rows] = mixed.flatten(1).logsumexp(1)
        soft = (mixed - log_sum[rows, None, None].nan_to_num(neginf=0)).exp()
        for into, chance in ((slope, soft), (each, 1)):
            found = torch.zeros_like(near[rows])
            found.scatter_add_(1, lower, (part * chance).sum(2))
            into[rows] = found.scatter_add_(1, upper, (rest * chance).sum(1))
    chosen = logits[:, order]
    # the second term is zero and has the gradient
    counted = log_sum + (slope * (chosen - chosen.detach())).sum(1)
    own_weight = distance_weight(torch.zeros((), dtype=t.dtype), weight, shifted=shifted)
    return _Block(counted + math.log(float(own_weight)), (each * chosen).sum(1), counts[0] * counts[1], top)


def _reach(counts: Tensor, columns: int) -> int:
    """Places that hold all rows on one side of an anchor, which are neighbours once sorted; a GPU is not asked for them."""
    return columns if counts.is_cuda else max(1, int(counts.max()))


def _joined(blocks: list[_Block], shift: Shift, reduction: str) -> Tensor:
    if shift == "separate":
        real, *mixed = blocks
        top = torch.stack([block.top for block in mixed or blocks]).amax(0)
        top = top.masked_fill(top.isneginf(), 0)  # an anchor without mixtures
        blocks = [_lowered(real, real.top), *(_lowered(block, top) for block in mixed)]
    positives = torch.stack([block.positives for block in blocks]).sum(0)
    pull = torch.stack([block.pull for block in blocks]).sum(0) / positives.clamp(min=1)
    loss = torch.stack([block.log_sum for block in blocks]).logsumexp(0) - pull
    return reduce(torch.where(positives > 0, loss, 0.0), reduction, positives > 0)


def _lowered(block: _Block, by: Tensor) -> _Block:
    return block._replace(log_sum=block.log_sum - by, pull=block.pull - block.positives * by)


__all__ = ["Mixtures", "distance_weight", "mixtures", "supremix", "weighted_sup_con"]
