"""Pairs that are close in a subspace only: each anchor has a gate in (0, 1) per dimension, and a partner class."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather, gather_plain
from counterpoint.contrast.operands import reduce, unit
from counterpoint.errors import InputError, nearest

PAIRS = ("arbitrary", "identical", "distinct")
VARIANTS = ("gate_squared", "subspace")


def partner_labels(labels: Tensor, pairs: str = "arbitrary", *, classes: int | None = None) -> Tensor:
    """The class that each item is to be close to: int64 ``[B]``.

    Args:
        labels: int64 ``[B]``.
        pairs: "arbitrary" takes another item's class (a permutation of the batch), "identical" the item's own,
            "distinct" any other of all classes, of which the batch may hold no item.
        classes: how many there are; only "distinct" needs it.

    Raises:
        InputError: an unknown kind of pairs, or "distinct" without two classes.
    """
    match pairs:
        case "identical":
            return labels
        case "arbitrary":
            return labels[torch.randperm(len(labels), device=labels.device)]
        case "distinct":
            if classes is None or classes < 2:
                raise InputError(f"distinct pairs need at least two classes, not {classes}")
            return (labels + torch.randint(1, classes, labels.shape, device=labels.device)) % classes
    raise InputError(f'no pairs named "{pairs}"{nearest(pairs, PAIRS)}; there are {", ".join(PAIRS)}')


def gated_similarity(query: Tensor, key: Tensor, gate: Tensor, *, variant: str = "gate_squared") -> Tensor:
    r"""Similarity of every query with every key in the query's own subspace: ``[N, M]``, two matrix products at most.

    .. math::
        \text{gate\_squared: } s_{ij} = \Big\langle \frac{q_i}{|q_i|} g_i^2, \frac{k_j}{|k_j|} \Big\rangle \qquad
        \text{subspace: } s_{ij} = \cos(q_i g_i, k_j g_i)
        = \frac{(q_i g_i^2) \cdot k_j}{|q_i g_i| \sqrt{g_i^2 \cdot k_j^2}}

    The second gates both sides with the anchor's gate, so that the key's length differs from row to row; written like this it
    needs no tensor ``[N, M, d]``.

    Args:
        query: ``[N, d]``, of any length.
        key: ``[M, d]``, of any length.
        gate: ``[N, d]``.
        variant: "gate_squared" (bounded by the largest squared gate) or "subspace" (a cosine).

    Raises:
        InputError: shapes that differ, or an unknown variant.
    """
    if query.ndim != 2 or gate.shape != query.shape or key.shape[1:] != query.shape[1:]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, gate))
        raise InputError(f"query and gate must be [N, d] and key [M, d], not {shapes}")
    if variant not in VARIANTS:
        raise InputError(f'no variant named "{variant}"{nearest(variant, VARIANTS)}; there are {", ".join(VARIANTS)}')
    query, key = unit(query), unit(key)
    gate = gate.to(query.dtype)
    if variant == "subspace":  # a cosine does not see the gate's scale, but squares of small gates would vanish
        gate = gate / gate.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
    squared = gate.square()
    with torch.autocast(query.device.type, enabled=False):
        similarity = (query * squared) @ key.T
        if variant == "gate_squared":
            return similarity
        lengths = (query.square() * squared).sum(1, keepdim=True) * (squared @ key.square().T)
        # where the gate shuts out everything there is no direction: similarity 0 and no gradient
        alive = lengths > torch.finfo(lengths.dtype).tiny
        return torch.where(alive, similarity * lengths.where(alive, 1.0).rsqrt(), 0.0)


def partner_loss(
    query: Tensor,
    key: Tensor,
    gate: Tensor | None,
    labels: Tensor,
    partners: Tensor,
    *,
    temperature: float = 0.1,
    variant: str = "gate_squared",
    reduction: str = "pair",
) -> Tensor:
    r"""Items of an anchor's partner class attract it; items of neither its own class nor its partner's repel it.

    .. math::
        t_{ij} = \log \Big( e^{s_{ij}/\tau} + \sum_{n:\, y_n \notin \{y_i, p_i\}} e^{s_{in}/\tau} \Big) - s_{ij}/\tau,
        \quad y_j = p_i

    Each positive competes with the negatives alone, not with other positives. The anchor's own class is left out, unless it
    is the partner; then the anchor itself, where it is among the keys, is a positive too. An anchor without negatives
    gives 0.

    Queries and keys are all B x B pairs at once, since each positive has a softplus of its own.

    Args:
        query: ``[B, d]``.
        key: ``[B, d]``, of the same items.
        gate: ``[B, d]`` of each anchor; None opens all (then both variants are the cosine).
        labels: int64 ``[B]``.
        partners: int64 ``[B]``, the class that each anchor is to be close to.
        temperature: of the softmax.
        variant: as in `gated_similarity`.
        reduction: "pair" divides the sum by the number of positive pairs; "row" averages over each anchor's positives
            first, then over all anchors (those without positives count 0). Either is 0 if there is no positive pair.

    Raises:
        InputError: shapes that differ, an unknown variant or reduction.

    Source: Hydra (SimLAP; arXiv 2410.18200). erow/vitookit at f6a8057 is "gate_squared" with "pair", at e22b502 "subspace"
    with "pair"; erow/FastSSL at a04150d reduces by "row".
    """
    if reduction not in ("pair", "row"):
        raise InputError(f'reduction must be "pair" or "row", not "{reduction}"')
    if labels.shape != query.shape[:1] or partners.shape != labels.shape or len(key) != len(query):
        raise InputError(
            f"{len(query)} queries need as many keys, labels and partners, not {len(key)}, {len(labels)}, {len(partners)}"
        )
    keys, classes = gather(key).rows, gather_plain(labels).rows
    open_gate = torch.ones_like(query) if gate is None else gate
    logits = gated_similarity(query, keys, open_gate, variant=variant) / temperature
    positive = classes == partners[:, None]
    negative = ~positive & (classes != labels[:, None])
    some = negative.any(1, keepdim=True)
    # a row without negatives keeps its entries: the gradient of an empty log-sum is not a number
    repulsion = logits.masked_fill(~negative & some, -torch.inf).logsumexp(1, keepdim=True)
    terms = torch.where(positive & some, torch.nn.functional.softplus(repulsion - logits), 0.0).sum(1)
    count = positive.sum(1)
    if reduction == "row":
        return reduce(terms / count.clamp(min=1), "mean")
    total = count.sum().to(terms.dtype)
    pairs = gather_plain(total[None]).rows.sum()
    return reduce(terms, "sum") / pairs.clamp(min=1)
