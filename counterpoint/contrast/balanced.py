"""InfoNCE whose similarities are balanced first, so that no sentence attracts everybody."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather, gather_plain
from counterpoint.contrast.operands import Temperature, check_pair, check_temperature, logit_matrix, reduce, unit, wide
from counterpoint.errors import InputError


def balanced_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 0.05,
    rounds: int = 1,
    positives: Tensor | None = None,
    ignore: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy of each query's own key after a few rounds of Sinkhorn scaling of :math:`e^{s/\tau}`.

    .. math::
        \ell_i = -\log \frac{e^{s_{ii}/\tau} v_i}{\sum_j e^{s_{ij}/\tau} v_j}, \qquad
        u_i = \frac1{\sum_j e^{s_{ij}/\tau} v_j}, \quad v_j = \frac1{\sum_i u_i e^{s_{ij}/\tau}}

    from :math:`u = 1`, v and u in turn. A key that is near to all queries (a hub, as short or frequent-worded sentences are)
    gets a small v and counts less for each. No rounds: InfoNCE. Holds the N x M similarities of all processes.

    Ours: the paper of DebCSE (arXiv 2309.07396) is said to normalise rows and columns in turn; its formula was out of reach.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        temperature: scalar or 0-d tensor.
        rounds: how often keys are balanced.
        positives: int64 ``[N]``, the key row of each query; None pairs row i with key i.
        ignore: bool ``[N, M]`` (over several processes: ``[N, M of all]``), pairs that do not count. Own pairs always do.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean", "sum" or "none".

    Raises:
        InputError: wrong shape or type, or a negative number of rounds.
    """
    check_pair(query, key, temperature)
    check_temperature(temperature, 1)
    if rounds < 0:
        raise InputError(f"rounds must not be negative, got {rounds}")
    if positives is None and len(query) != len(key):
        raise InputError(f"{len(query)} queries and {len(key)} keys: positives must say which key belongs to whom")
    mine = torch.arange(len(query), device=query.device) if positives is None else positives
    if mine.shape != (len(query),):
        raise InputError(f"positives must be int64 [{len(query)}], one key row a query, not {[*mine.shape]}")
    query, key = (unit(query), unit(key)) if normalize else (wide(query), wide(key))
    queries, keys = gather(query), gather(key)
    logits = logit_matrix(queries.rows, keys.rows, temperature)
    own = gather_plain(mine + keys.start).rows[:, None]
    out = torch.zeros_like(logits, dtype=torch.bool)
    if ignore is not None:
        wanted = [len(query), len(keys.rows)]
        if [*ignore.shape] != wanted:
            raise InputError(f"ignore must mark queries x keys, {wanted}, not {[*ignore.shape]}")
        out = gather_plain(ignore).rows.scatter(1, own, False)
    balanced = logits.masked_fill(out, -torch.inf)
    nobodys = out.all(0)  # keys that all queries ignore: there is nothing to balance
    for _ in range(rounds):
        balanced = balanced - balanced.masked_fill(nobodys, 0.0).logsumexp(0).masked_fill(nobodys, 0.0)
        balanced = balanced - balanced.logsumexp(1, keepdim=True)
    rows = balanced.logsumexp(1) - balanced.gather(1, own)[:, 0]
    return reduce(rows[queries.start : queries.start + len(query)], reduction)
