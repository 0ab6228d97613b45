"""Pools hold the true neighbours, and every candidate leads to its own row."""

import pytest
import torch

from counterpoint.contrast import unit
from counterpoint.data.surface import numbered_words
from counterpoint.data.texts import Ragged
from counterpoint.errors import InputError
from counterpoint.memory import candidates
from counterpoint.memory.candidates import VariedSentences, make_pools, nearest_in_shards

SENTENCES = ["a red dog runs", "the red dog runs", "a cat", "no cat at all", "it rains"]


def vectors(n=23, d=4, seed=0):
    return unit(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def items(copies=2):
    """Variant v of sentence i has the tokens [100 v + i, 7]."""
    n = len(SENTENCES)
    rows = [[100 * v + i, 7] for v in range(1 + copies) for i in range(n)]
    words = numbered_words([f"{s} {'x ' * v}" for v in range(1 + copies) for s in SENTENCES])[0]
    return VariedSentences({"anchor": Ragged.of(rows[:n])}, 0, variants=Ragged.of(rows), words_of=words)


@pytest.mark.parametrize("block", [40, 2**25])
def test_neighbours_are_those_of_a_full_search(block, monkeypatch):
    monkeypatch.setattr(candidates, "SIMILARITIES", block)
    x = vectors()
    found, cosine = nearest_in_shards(x, 5)
    full = (x @ x.T).fill_diagonal_(-9).topk(5, dim=1)
    torch.testing.assert_close(cosine, full.values)
    assert torch.equal(found, full.indices)


def test_shards_are_random_even_and_seeded():
    x = vectors(24)
    draw = [nearest_in_shards(x, 9, shard=6, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draw[0][0], draw[1][0]) and not torch.equal(draw[0][0], draw[2][0])
    found = draw[0][0]
    assert found.shape == (24, 5)  # all others of a shard of six
    together = {frozenset([i, *row]) for i, row in enumerate(found.tolist())}
    assert len(together) == 4 and all(len(group) == 6 for group in together)
    with pytest.raises(InputError, match="neighbours need two rows"):
        nearest_in_shards(x[:1], 1)


def test_pools_line_up():
    data = items()
    x = [vectors(5, seed=v) for v in range(3)]
    pools = make_pools(data, x, size=3)
    assert pools.semantic.shape == pools.surface.shape == (5, 3 + 1 + 2)
    index = torch.tensor([4, 0])
    columns = torch.tensor([[0, 2, 3, 4, 5], [5, 4, 3, 1, 0]])
    rows = pools.rows(index, columns)
    assert rows[0, 2:].tolist() == [4, 9, 14] and rows[1, :3].tolist() == [10, 5, 0]
    assert torch.equal(rows[0, :2], pools.neighbours[4, [0, 2]])
    ids, _ = data.variants.padded(rows[0], 0)
    assert ids[2:, 0].tolist() == [4, 104, 204]
    everyone = torch.cat(x)
    for i in range(5):
        for c in range(6):
            row = int(pools.rows(torch.tensor([i]), torch.tensor([[c]])))
            assert pools.semantic[i, c].item() == pytest.approx(float(x[0][i] @ everyone[row]), abs=1e-6)
    assert torch.allclose(pools.surface[:, 3], torch.ones(5)) and (pools.surface[:, 4] > pools.surface[:, 5]).all()
    assert pools.quantile(0.0) == pytest.approx(pools.semantic[:, :3].min().item())
    assert pools.quantile(1.0) == pytest.approx(pools.semantic[:, :3].max().item())


def test_a_subset_keeps_its_variants():
    few = items().subset([3, 1])
    assert few.copies == 2 and len(few) == 2 and few.nbytes < items().nbytes
    every = few.variants.padded(torch.arange(6), 0)[0][:, 0]
    assert every.tolist() == [3, 1, 103, 101, 203, 201]
    assert few.variant(1).take(torch.tensor([0, 1]))["input_ids"][:, 0].tolist() == [103, 101]
    assert few.to("cpu").copies == 2 and items(copies=0).copies == 0
