"""Scorers compare every pair, each by its formula, and only some can tell x from y."""

import pytest
import torch

from counterpoint.encoders.scorers import scorer
from counterpoint.errors import InputError

X, Y = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 3))


def pairwise(function):
    return torch.stack([torch.stack([function(x, y) for y in Y]) for x in X])


def test_each_pair_by_its_formula():
    torch.testing.assert_close(scorer("dot", 4)(X, Y), pairwise(torch.dot))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(scorer("cosine", 4)(X, Y), pairwise(lambda x, y: cosine(x, y, dim=0)))
    torch.testing.assert_close(scorer("distance", 4)(X, Y), pairwise(lambda x, y: -(x - y).square().sum()))
    bilinear = scorer("bilinear", 4)
    torch.testing.assert_close(bilinear(X, Y), X @ Y.T)  # as it starts
    with torch.no_grad():
        bilinear.weight.add_(torch.arange(16.0).view(4, 4))
    torch.testing.assert_close(bilinear(X, Y), pairwise(lambda x, y: x @ bilinear.weight @ y))
    match = scorer("match", 4)
    alone = pairwise(lambda x, y: match(x[None], y[None])[0, 0])
    torch.testing.assert_close(match(X, Y), alone)
    hidden = match.of_x(X[1]) + match.of_y(Y[2]) + match.of_both(X[1] * Y[2])
    torch.testing.assert_close(alone[1, 2], match.last(hidden.relu())[0])


@pytest.mark.parametrize("name", ["bilinear", "match"])
def test_learned_ones_need_not_be_symmetric_and_all_their_weights_learn(name):
    part = scorer(name, 4)
    with torch.no_grad():
        next(part.parameters()).add_(torch.randn(4, 4))
    assert (part(X, X) - part(X, X).T).abs().max() > 1e-3
    part(X, Y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_an_unknown_name():
    with pytest.raises(InputError, match='no scorer named "cosin"; did you mean cosine'):
        scorer("cosin", 4)
