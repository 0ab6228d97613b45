"""The definitions, written as plainly as the formulas: float64, one anchor after the other, every candidate in a list."""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def info_nce(
    query,
    key,
    *,
    temperature,
    positives=None,
    negatives=None,
    hard_negatives=None,
    ignore=None,
    in_batch=True,
    decoupled=False,
    label_smoothing=0.0,
    symmetric=False,
    normalize=True,
) -> Tensor:
    """Loss of every query `[N]`; `positives` is a list of key rows for every query."""
    rules = {"temperature": temperature, "decoupled": decoupled, "label_smoothing": label_smoothing}
    if symmetric:
        there = info_nce(query, key, ignore=ignore, normalize=normalize, **rules)
        back = info_nce(key, query, ignore=None if ignore is None else ignore.T, normalize=normalize, **rules)
        return (there + back) / 2
    if normalize:
        query, key = unit(query), unit(key)
        negatives = None if negatives is None else unit(negatives)
        hard_negatives = None if hard_negatives is None else unit(hard_negatives)
    losses = []
    for i, anchor in enumerate(query):
        tau = temperature[i] if isinstance(temperature, Tensor) and temperature.ndim else temperature
        mine = [i] if positives is None else positives[i]
        logits = key @ anchor / tau
        candidates = []
        if in_batch:
            for j in range(len(key)):
                if j in mine:
                    if not decoupled:
                        candidates.append(logits[j])
                elif ignore is None or not ignore[i, j]:
                    candidates.append(logits[j])
        elif not decoupled:
            candidates += [logits[p] for p in mine]
        if negatives is not None:
            candidates += list(negatives @ anchor / tau)
        if hard_negatives is not None:
            candidates += list(hard_negatives[i] @ anchor / tau)
        candidates = torch.stack(candidates)
        attraction = torch.stack([logits[p] for p in mine]).mean()
        attraction = (1 - label_smoothing) * attraction + label_smoothing * candidates.mean()
        losses.append(candidates.logsumexp(0) - attraction)
    return torch.stack(losses)


def nt_xent(z1, z2, *, temperature, normalize=True) -> Tensor:
    """Loss of the 2N anchors."""
    x = torch.cat([unit(z1), unit(z2)] if normalize else [z1, z2])
    n = len(z1)
    losses = []
    for i in range(2 * n):
        logits = x @ x[i] / temperature
        everyone_else = torch.stack([logits[j] for j in range(2 * n) if j != i])
        losses.append(everyone_else.logsumexp(0) - logits[(i + n) % (2 * n)])
    return torch.stack(losses)


def dcl(z1, z2, *, temperature, weighted=False, sigma=0.5, detach_weight=True, one_way=False, normalize=True) -> Tensor:
    """Loss of the 2N anchors, or of the first view's N."""
    if normalize:
        z1, z2 = unit(z1), unit(z2)
    n = len(z1)
    similarity = (z1 * z2).sum(1)
    weight = 2 - n * torch.softmax(similarity / sigma, dim=0) if weighted else torch.ones_like(similarity)
    if detach_weight:
        weight = weight.detach()
    losses = []
    for anchors, others in [(z1, z2)] if one_way else [(z1, z2), (z2, z1)]:
        for i in range(n):
            same_view = [anchors[j] @ anchors[i] / temperature for j in range(n) if j != i]
            other_view = [others[j] @ anchors[i] / temperature for j in range(n) if j != i]
            losses.append(torch.stack(same_view + other_view).logsumexp(0) - weight[i] * similarity[i] / temperature)
    return torch.stack(losses)


def dclw(z1, z2, **options) -> Tensor:
    return dcl(z1, z2, weighted=True, **options)


def sup_con(features, labels, *, temperature, mean="outside", normalize=True) -> Tensor:
    """Loss of every anchor; 0 where it has no positive."""
    x = unit(features) if normalize else features
    losses = []
    for i in range(len(x)):
        logits = x @ x[i] / temperature
        mine = [p for p in range(len(x)) if p != i and labels[p] == labels[i]]
        others = [j for j in range(len(x)) if j != i]
        if not mine:
            losses.append(x.new_zeros(()))
            continue
        log_p = torch.stack([logits[p] for p in mine]) - torch.stack([logits[j] for j in others]).logsumexp(0)
        losses.append(-log_p.mean() if mean == "outside" else -log_p.exp().mean().log())
    return torch.stack(losses)


def clip_loss(image, text, *, temperature, label_smoothing=0.0, normalize=True) -> Tensor:
    """Loss of every pair."""
    if normalize:
        image, text = unit(image), unit(text)
    target = torch.arange(len(image))
    logits = image @ text.T / temperature
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    there = torch.nn.functional.cross_entropy(logits, target, **options)
    return (there + torch.nn.functional.cross_entropy(logits.T, target, **options)) / 2


def sigmoid_loss(image, text, *, temperature, bias=-10.0, normalize=True) -> Tensor:
    """Loss of every image."""
    if normalize:
        image, text = unit(image), unit(text)
    losses = []
    for i in range(len(image)):
        terms = []
        for j in range(len(text)):
            sign = 1 if i == j else -1
            logit = sign * (image[i] @ text[j] / temperature + bias)
            terms.append(torch.logaddexp(torch.zeros_like(logit), -logit))
        losses.append(torch.stack(terms).sum())
    return torch.stack(losses)


def alignment(x, y, *, alpha=2.0, normalize=True) -> Tensor:
    if normalize:
        x, y = unit(x), unit(y)
    return torch.stack([(a - b).square().sum() ** (alpha / 2) for a, b in zip(x, y, strict=True)]).mean()


def uniformity(x, *, t=2.0, normalize=True) -> Tensor:
    if normalize:
        x = unit(x)
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    return torch.stack([torch.exp(-t * (x[i] - x[j]).square().sum()) for i, j in pairs]).mean().log()


def effective_rank(x) -> Tensor:
    values = torch.linalg.svdvals(x.double())
    share = [v / values.sum() for v in values if v > 0]
    return torch.exp(-sum(p * torch.log(p) for p in share))
