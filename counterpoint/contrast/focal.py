"""Contrast for fine-tuning: hard pairs mixed from a labelled batch, and a supervised contrast that looks at what is hard."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather, gather_plain
from counterpoint.contrast.operands import reduce, unit
from counterpoint.errors import InputError


def hardest_pairs(features: Tensor, labels: Tensor, *, mining: str = "masked") -> tuple[Tensor, Tensor]:
    """For each row its least similar positive and its most similar negative (cosine): positions, int64 ``[B]`` each.

    Args:
        features: ``[B, D]``.
        labels: int64 ``[B]``.
        mining: "masked" looks among the rows that qualify; a row without positive (or negative) gets itself. "released" is
            what the official code does: the similarities of rows that do not qualify count as 0, the first of equals
            wins, and a hard positive at position 0 is replaced by the row itself. With features that are never negative
            (after a ReLU) it is therefore no true positive: nearly always the row itself, for classmates of row 0 a
            stranger.

    Raises:
        InputError: an unknown mining, or labels that do not fit.
    """
    if mining not in ("masked", "released"):
        raise InputError(f'mining must be "masked" or "released", not "{mining}"')
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise InputError(f"features must be [B, D] and labels [B], not {list(features.shape)}, {list(labels.shape)}")
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        x = unit(features)
        similarity = x @ x.T
        own = torch.arange(len(x), device=x.device)
        other = labels[:, None] != labels
        same = (~other).fill_diagonal_(False)
        if mining == "released":
            positive, negative = (similarity * same).min(1).indices, (similarity * other).max(1).indices
            return torch.where(positive == 0, own, positive), negative
        positive = similarity.masked_fill(~same, torch.inf).min(1).indices
        negative = similarity.masked_fill(~other, -torch.inf).max(1).indices
        return torch.where(same.any(1), positive, own), torch.where(other.any(1), negative, own)


def mix_hard_pairs(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    permutation: Tensor,
    lam_negative: Tensor,
    lam_positive: Tensor,
    min_lam_negative: float = 0.8,
    mining: str = "masked",
) -> tuple[Tensor, Tensor]:
    r"""A batch three times: as it is, as semi-hard negatives, as hard positives; with soft labels mixed alike.

    .. math::
        \text{negatives: } (1 - \lambda) f_i + \lambda f_{\pi(i)}, \; \lambda \ge 0.8 \qquad
        \text{positives: } \lambda f_{hp(i)} + (1 - \lambda) f_{hn(i)}

    hp and hn are the `hardest_pairs`. The first block carries no gradient; the others do, to all rows that they mix.

    Args:
        features: ``[B, D]``.
        labels: int64 ``[B]``.
        classes: K.
        permutation: int64 ``[B]``, each row's partner in the second block.
        lam_negative: ``[B]``, share of that partner, raised to at least `min_lam_negative`.
        lam_positive: ``[B]``, share of the hard positive in the third block.
        min_lam_negative: see there.
        mining: as in `hardest_pairs`.

    Returns:
        Features ``[3B, D]`` (at least float32) and targets ``[3B, K]``, float32.

    Raises:
        InputError: as `hardest_pairs`.

    Source: Core-tuning (arXiv 2102.06605), section 4; Vanint/Core-tuning at f70e1bf, ``feature_mixup``.
    """
    features = wide(features)
    positive, negative = hardest_pairs(features, labels, mining=mining)
    target = torch.nn.functional.one_hot(labels, classes).to(torch.float32)
    toward, away = (
        share.to(features.dtype)[:, None] for share in (lam_negative.clamp(min=min_lam_negative), lam_positive)
    )
    mixed = [features.detach(), torch.lerp(features, features[permutation], toward)]
    mixed.append(torch.lerp(features[negative], features[positive], away))
    # lerp between equals is exact, so that mixtures within a class keep the very target of that class
    targets = [target, torch.lerp(target, target[permutation], toward.float())]
    targets.append(torch.lerp(target[negative], target[positive], away.float()))
    return torch.cat(mixed), torch.cat(targets)


def focal_sup_con(
    features: Tensor,
    targets: Tensor,
    *,
    temperature: float = 0.07,
    gamma: float = 1.0,
    divide_by: str = "rows",
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Supervised contrast with soft labels, in which pairs that agree already count little.

    .. math::
        \ell_a = \frac{1}{M} \sum_{b \in P_a} -(1 - p_{ab})^\gamma \log p_{ab}, \qquad
        p_{ab} = \frac{e^{s_{ab}/\tau}}{\sum_{c \ne a} e^{s_{ac}/\tau}}

    Rows are positives of each other if their targets are equal, entry by entry. The weight is differentiated too. All M x M
    pairs are held at once, since each positive has a weight of its own.

    Args:
        features: ``[M, d]``.
        targets: ``[M, K]``, (soft) labels.
        temperature: of the softmax.
        gamma: strength of the focus; 0 is no focus.
        divide_by: "rows" divides each anchor's sum by M, as the released code; "positives" by its number of positives, as the
            paper (with gamma 0 this is `sup_con`). The second is M / P times larger, which the loss's weight must answer.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over anchors that have a positive (0 when none has), "sum", or "none".

    Raises:
        InputError: shapes that differ, a gamma between 0 and 1 (its gradient is infinite at p = 1) or below 0.

    Source: Core-tuning (arXiv 2102.06605), section 4; Vanint/Core-tuning at f70e1bf, ``focal_SupConLoss``.
    """
    if features.ndim != 2 or targets.ndim != 2 or len(targets) != len(features):
        raise InputError(
            f"features must be [M, d] and targets [M, K], not {list(features.shape)} and {list(targets.shape)}"
        )
    if gamma < 1 and gamma != 0:
        raise InputError(f"gamma must be 0 or at least 1, not {gamma}")
    if divide_by not in ("rows", "positives"):
        raise InputError(f'divide_by must be "rows" or "positives", not "{divide_by}"')
    x = unit(features) if normalize else wide(features)
    keys, everyone = gather(x), gather_plain(targets).rows
    columns = torch.arange(len(everyone), device=x.device)
    itself = columns == columns[keys.start : keys.start + len(x), None]
    with torch.autocast(x.device.type, enabled=False):
        logits = (x @ keys.rows.T / temperature).masked_fill(itself, -torch.inf)
        # the largest difference of any entry is 0 only for equal rows, and needs no M x M x K tensor
        apart = torch.cdist(wide(targets), wide(everyone), p=torch.inf)
    positive = (apart == 0) & ~itself
    log_p = logits.log_softmax(1).masked_fill(~positive, 0.0)
    weight = (-torch.expm1(log_p)).pow(gamma) if gamma else 1.0
    count = positive.sum(1)
    over = len(everyone) if divide_by == "rows" else count.clamp(min=1)
    return reduce(-(weight * log_p).sum(1) / over, reduction, count > 0)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
