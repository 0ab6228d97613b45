"""Mined negatives: of each text the others that the encoder finds near, looked up anew from time to time (ANCE)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.contrast.operands import einsum, unit
from counterpoint.errors import InputError

SLACK = 32
"""Neighbours that are looked up beyond the window at first, since some of them will be left out."""
BLOCK = 2**25
"""Numbers that are held at once while near-duplicates are looked for."""


@dataclass(frozen=True)
class Mining:
    r"""Hard negatives from an index over all texts that is as old as the last refresh.

    Random negatives soon teach nothing: the encoder tells them apart, and their gradient is near 0. Here all texts are embedded
    by the encoder as it is, each anchor's nearest others are listed, and at every step some are drawn from a window of
    the ranks. What is near may be right, though: the own positive, whatever is nearly the same text, and with `below`
    whatever is nearly as similar to the anchor as its positive, are no negatives. Skipping the first ranks is the blunt
    way to the same.

    Args:
        count: negatives drawn for each anchor at each step; they are further keys of all queries.
        every: how long a list is used, in `unit`.
        unit: "epochs" or "steps" (of the optimiser).
        after: when the first list is made, in `unit`; before, training has no mined negatives.
        window: ranks that are drawn from, first and last exclusive; 0 is the nearest of those that are left.
        duplicate: cosine of a candidate and the anchor's positive, or of their anchors, from which it is no negative.
        below: most similarity of a negative to the anchor, as a share of that of the positive; None lets all in.

    Source: Xiong et al. 2021, "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval" (ICLR;
    arXiv 2007.00808), who search approximately, in a second process, every 10,000 steps or so, and draw from the first 200;
    here search is exact and training waits. `below` is that of Moreira et al. 2024 (arXiv 2407.15831), section 3.1, who take
    0.95; `duplicate` is ours.
    """

    count: int = 1
    every: int = 1
    unit: Literal["epochs", "steps"] = "epochs"
    after: int = 1
    window: tuple[int, int] = (0, 100)
    duplicate: float = 0.95
    below: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.every < 1 or self.after < 0:
            raise InputError(f"mining needs a count and every of 1 or more, and after of 0 or more, got {self}")
        if self.unit not in ("epochs", "steps"):
            raise InputError(f'lists are renewed every few "epochs" or "steps", not "{self.unit}"')
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1]:
            raise InputError(f"a window is two ranks, the first one below the last, not {self.window}")
        if self.window[1] - self.window[0] < self.count:
            raise InputError(
                f"{self.count} negatives cannot be drawn from the {self.window[1] - self.window[0]} ranks of the window"
            )


NAMED: dict[str, Mining] = {
    "ance": Mining(window=(0, 200)),
    "ance-filtered": Mining(window=(0, 200), below=0.95),
}
"""Ways to mine by name."""


class MinedNegatives(nn.Module):
    """The lists of a `Mining`, how old they are, and draws from them. All of it is in the buffers, and so in a checkpoint.

    Args:
        choice: how to mine.

    Attributes:
        ranked: int32 ``[N, W]``, for each anchor the rows that may be drawn, nearest first, -1 fills up; no rows before the
            first list.
        made: int64 scalar, the epoch (or step) whose weights made them; -1 before.
        steps: int64 scalar, optimiser steps so far.
    """

    ranked: Tensor
    made: Tensor
    steps: Tensor

    def __init__(self, choice: Mining):
        super().__init__()
        self.choice = choice
        self.register_buffer("ranked", torch.zeros(0, choice.window[1] - choice.window[0], dtype=torch.int32))
        self.register_buffer("made", torch.tensor(-1))
        self.register_buffer("steps", torch.tensor(0))

    def due(self, unit: str, now: int) -> bool:
        """Whether the lists are to be made anew at the start of this epoch, or after this many steps; once only."""
        since = now - self.choice.after
        right = unit == self.choice.unit and since >= 0 and since % self.choice.every == 0
        return right and int(self.made) != now

    def refresh(self, anchor: Tensor, positive: Tensor | None, now: int, groups: Tensor | None = None) -> None:
        """Make the lists anew.

        Args:
            anchor: ``[N, D]``, as the encoder embeds them now.
            positive: ``[N, D]``; None where each text is its own.
            now: epoch or step.
            groups: int64 ``[N]``; negatives then come from the anchor's own group.
        """
        options = {"window": self.choice.window, "duplicate": self.choice.duplicate, "below": self.choice.below}
        self.ranked = mine(anchor, positive, groups=groups, **options).to(self.ranked)  # type: ignore[arg-type]
        self.made.fill_(now)

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Rows int64 ``[B, count]`` drawn for the anchors at `index` ``[B]``, without putting back; None before the first list.

        An anchor of which too few are listed gets random others.
        """
        if not len(self.ranked):
            return None
        listed = self.ranked[index].long()
        order = torch.rand(listed.shape, generator=generator, device=listed.device).masked_fill(listed < 0, -1)
        chosen = listed.gather(1, order.argsort(1, descending=True)[:, : self.choice.count])
        other = torch.randint(1, len(self.ranked), chosen.shape, generator=generator, device=listed.device)
        return chosen.where(chosen >= 0, (index[:, None] + other) % len(self.ranked))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}ranked")
        if saved is not None and saved.ndim == 2:
            self.ranked = self.ranked.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def mine(
    anchor: Tensor,
    positive: Tensor | None = None,
    *,
    window: tuple[int, int] = (0, 100),
    duplicate: float = 0.95,
    below: float | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """For each anchor the other rows' positives that are near to it, as rows int64 ``[N, window]``; -1 where there are fewer.

    Args:
        anchor: ``[N, D]``, brought to the unit sphere here.
        positive: ``[N, D]``, row i the positive of anchor i; None takes the anchors.
        window, duplicate, below: as in `Mining`; ranks count those that are left.
        groups: int64 ``[N]``; only rows of the same group are near.

    Raises:
        InputError: shapes that differ, or a single row.
    """
    if anchor.ndim != 2 or len(anchor) < 2 or (positive is not None and positive.shape != anchor.shape):
        shapes = [list(x.shape) for x in (anchor, positive) if x is not None]
        raise InputError(f"mining needs two anchors or more, [N, D], and positives of their shape, got {shapes}")
    import faiss

    query = unit(anchor.float().cpu())
    corpus = query if positive is None else unit(positive.float().cpu())
    found = torch.full((len(query), window[1] - window[0]), -1, dtype=torch.int64)
    groups = torch.zeros(len(query), dtype=torch.int64) if groups is None else groups.cpu()
    for number in groups.unique().tolist():
        members = (groups == number).nonzero()[:, 0]
        index = faiss.IndexFlatIP(corpus.shape[1])
        index.add(corpus[members].numpy())
        left, count = members, min(window[1] + SLACK, len(members))
        while len(left):
            short = []
            for part in left.split(max(1, BLOCK // (count * corpus.shape[1]))):
                score, near = map(torch.from_numpy, index.search(query[part].numpy(), count))
                rows = members[near]
                own = corpus[part]
                out = (rows == part[:, None]) | (einsum("nd,nkd->nk", own, corpus[rows]) >= duplicate)
                if positive is not None:  # nearly the same question has nearly the same answers
                    out |= einsum("nd,nkd->nk", query[part], query[rows]) >= duplicate
                if below is not None:
                    out |= score > below * (query[part] * own).sum(1, keepdim=True)
                # those that are left, in their order
                order = out.long().argsort(dim=1, stable=True)[:, window[0] : window[1]]
                kept = rows.gather(1, order).masked_fill(out.gather(1, order), -1)
                found[part, : kept.shape[1]] = kept
                short.append(part[(~out).sum(1) < window[1]])
            # where too many were left out, look further
            left, count = (
                (torch.cat(short), min(4 * count, len(members))) if count < len(members) else (left[:0], count)
            )
    return found.to(anchor.device)
