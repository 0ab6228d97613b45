"""Next-item ranking against the whole catalogue: protocol `loo-full-ranking`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from counterpoint.data.interactions import Histories
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Array, Result, bootstrap, checked_features

CUTOFFS = (5, 10, 20)
BLOCK = {"cpu": 2**20, "cuda": 2**26}  # scores held at once; on a CPU they stay in its cache, which is 3 times as fast


def target_ranks(users: Array, items: Array, target: Tensor, *, seen: Tensor | None = None) -> Tensor:
    """Rank of each user's target among all items, from 1: float64 [N].

    Items with the score of the target stand half before it, half behind it, so that constant scores give the middle and not
    the first place. Scores are computed for blocks of users on the device of `items`.

    Args:
        users: [N, D]
        items: [M + 1, D]; the score of item j for a user is their dot product; row 0 is padding and never ranked
        target: int64 [N], 1 ... M
        seen: int64 [N, S], items that are not ranked for that user (0 pads); the target always is

    Raises:
        InputError: NaN or infinite vectors, widths or lengths that differ, a target that is no item.
    """
    user, item = checked_features(users, "user"), checked_features(items, "item")
    if user.shape[1] != item.shape[1]:
        raise InputError(f"users have {user.shape[1]} columns but items {item.shape[1]}")
    if target.shape != (len(user),):
        raise InputError(f"there are {len(user):,} users but targets of shape {list(target.shape)}")
    if bool(((target < 1) | (target >= len(item))).any()):
        raise InputError(f"targets are item codes from 1 to {len(item) - 1:,}; leave out users whose target is no item")
    user, target = user.to(item.device), target.to(item.device)
    ranks = []
    step = max(1, BLOCK.get(item.device.type, 2**24) // len(item))
    for start in range(0, len(user), step):
        rows = slice(start, start + step)
        score = user[rows] @ item.T
        own = score.gather(1, target[rows, None])
        score[:, 0] = -torch.inf
        if seen is not None:
            score.scatter_(1, seen[rows].to(item.device), -torch.inf).scatter_(1, target[rows, None], own)
        ahead, level = (mark.sum(1, dtype=torch.int32) for mark in (score > own, score == own))
        ranks.append(1 + ahead + (level - 1).double() / 2)
    return torch.cat(ranks).cpu()


def ranking_metrics(rank: Tensor) -> dict[str, Tensor]:
    """What each user contributes to HR, NDCG and MRR at 5, 10 and 20: [N] each, between 0 and 1.

    With one relevant item NDCG is ``1 / log2(1 + rank)`` and MRR ``1 / rank``, 0 beyond the cut-off.
    """
    found: dict[str, Tensor] = {}
    for k in CUTOFFS:
        hit = (rank <= k).double()
        found |= {f"HR@{k}": hit, f"NDCG@{k}": hit / torch.log2(1 + rank), f"MRR@{k}": hit / rank}
    return found


def loo_full_ranking(
    users: Array, items: Array, target: Tensor, *, seen: Tensor | None = None, split: str = "test", subject: str = ""
) -> Result:
    """Leave-one-out next-item prediction over the full catalogue: protocol `loo-full-ranking`.

    Every user's held-out item is ranked among all items, also those of the user's own history. Validation targets
    (`split` "valid") make the protocol `loo-full-ranking-valid`, and leaving the history out of the ranking (`seen`) appends
    `-unseen`, because neither compares with the plain one.

    Args:
        users, items, target, seen: as `target_ranks`
        split: "test" or "valid"
        subject: what was measured

    Returns:
        NDCG@20 in %, with a bootstrap interval over users; `detail` holds all nine metrics in %.
    """
    if split not in ("test", "valid"):
        raise InputError(f'next items are held out in the splits test and valid, not "{split}"')
    rank = target_ranks(users, items, target, seen=seen)
    metrics = ranking_metrics(rank)
    gain = metrics[f"NDCG@{CUTOFFS[-1]}"].numpy()
    low, high = bootstrap(gain)
    detail: dict[str, Any] = {name: 100 * float(values.mean()) for name, values in metrics.items()}
    detail |= {"items": len(items) - 1, "mean_rank": float(rank.mean())}
    protocol = "loo-full-ranking" + ("-valid" if split == "valid" else "") + ("" if seen is None else "-unseen")
    return Result(protocol, "NDCG@20", 100 * float(gain.mean()), (100 * low, 100 * high), len(rank), subject, detail)


@torch.no_grad()
def user_vectors(method: Any, histories: Histories, *, batch_size: int = 1024) -> Tensor:
    """Embeddings [N, D] of rows of histories, on the method's device, computed in order of length."""
    training = method.training
    method.eval()
    try:
        histories = histories.to(method.device)
        order = histories.length.argsort()
        parts = [method.embed(histories.take(index)).float() for index in order.split(batch_size)]
    finally:
        method.train(training)
    found = torch.empty(len(histories), parts[0].shape[1], device=order.device)
    found[order] = torch.cat(parts)
    return found


def measure(
    subjects: Mapping[str, Any],
    data: Any,
    *,
    popularity: bool = True,
    splits: tuple[str, ...] = ("test",),
    limit: int | None = None,
    seed: int = 0,
    remove_history: bool = False,
) -> list[Result]:
    """`loo-full-ranking` of sequence methods, and of the popularity of items.

    Args:
        subjects: what to measure, by name: ``{"trained": method, "untrained": another}``, all with one catalogue.
        data: what the `read` of the first takes.
        popularity: also rank every user's items by how often the training parts hold them.
        splits: "valid" and "test".
        limit, seed: the subset of users that it was trained on.
        remove_history: do not rank what the user had before (another protocol, see `loo_full_ranking`).

    Returns:
        One result for each split and subject; `detail` also says how many targets the training parts never show, and how
        many users could not be measured because the model does not know their target.
    """
    results = []
    for split in splits:
        rows = next(iter(subjects.values())).read(data, split, limit=limit, seed=seed)
        batch = rows.take(torch.arange(len(rows)))
        seen = batch["item_seq"] if remove_history else None
        counts = rows.popularity()
        vectors = {}
        for subject, method in subjects.items():
            method.read(rows, split)  # so that one that was never trained has a row for each item
            vectors[subject] = user_vectors(method, rows), method.encoder.table.detach()
        if popularity:
            vectors["popularity"] = torch.ones(len(rows), 1), counts[:, None].float()
        about = {
            "targets_not_in_training": int((counts[batch["target"]] == 0).sum()),
            "users_not_measured": len(rows.users) - len(rows),
        }
        for subject, (users, items) in vectors.items():
            result = loo_full_ranking(users, items, batch["target"], seen=seen, split=split, subject=subject)
            result.detail.update(about)
            results.append(result)
    return results
