"""The registered operators: the same numbers with and without kept terms, under compile and checkpointing; the weighted mean."""

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from counterpoint import contrast
from counterpoint.contrast import Listed, Mask, Same, clip_loss, info_nce, nt_xent, operands, sigmoid_loss
from counterpoint.contrast.kernels import blocked, executor, log_sum_exp, softmax_mean, softplus_sum
from counterpoint.contrast.relation import Transposed, pack, unpack
from counterpoint.errors import InputError


def data(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(value: torch.Tensor, inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value, inputs, retain_graph=True)


# Relations as words and tensors


@pytest.mark.parametrize("name", ["none", "listed", "same", "mask", "not", "nested", "transposed"])
def test_a_relation_survives_being_taken_apart(name):
    listed, same = Listed(torch.tensor([[1, -1], [0, 2], [3, 3]])), Same(torch.arange(3) % 2, torch.arange(4) % 2)
    mask = Mask(data(3, 4) > 0)
    relation = {
        "none": None,
        "listed": listed,
        "same": same,
        "mask": mask,
        "not": ~same,
        "nested": (~(listed | same) & mask) | ~~listed,
        "transposed": Transposed(Mask(data(4, 3) > 0)) & same,
    }[name]
    again = unpack(*pack(relation))
    if relation is None:
        assert again is None
    else:
        whole = slice(0, 3), slice(0, 4)
        assert torch.equal(again.holds(*whole), relation.holds(*whole))


# What a small batch keeps


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(9, 9), (14, 9), (5, 21)])
@pytest.mark.parametrize("itself", [False, True])
def test_kept_terms_change_nothing(itself, shape, columns, monkeypatch):
    monkeypatch.setitem(blocked.TILE, "cpu", (4, 6))
    n, m = shape
    query, key = data(n, 5).requires_grad_(), None if itself else data(m, 5, seed=1).requires_grad_()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = [x for x in (query, key, temperature) if x is not None]

    def result():
        without = Listed(torch.arange(n)) if itself else None
        found = log_sum_exp(query, key, temperature=temperature, without=without, columns=columns)
        weight = data(n + (0 if not columns else n if itself else m), seed=2)
        return (torch.cat(found if columns else (found,)) * weight).sum()

    kept = result()
    twice = gradients(kept, inputs), gradients(kept, inputs)  # what is kept must survive the first backward pass
    monkeypatch.setattr(blocked, "KEPT", 0)
    fresh = result()
    torch.testing.assert_close(kept, fresh)
    for found in twice:
        torch.testing.assert_close(found, gradients(fresh, inputs))


def test_only_small_batches_keep_terms_and_only_for_a_backward_pass():
    """With many keys the gradients are made ahead: what is kept then is as large as the operands that want one."""
    query = data(8, 3)
    scale = query.new_ones(())
    many = 10**6
    for rows, keep, size in (
        (8, "both", 64),
        (8, "", 0),
        (many, "", 0),
        (many, "both", 8 * 4 + 3 * many),
        (many, "query", 32),
    ):
        kept = blocked.forward(query, data(rows, 3), scale, None, None, False, keep)[2]
        assert (0 if kept is None else len(kept)) == size


# Gradients that the forward pass makes ahead


@pytest.fixture
def ahead(monkeypatch):
    """Bands of two rows, tiles of three columns; counts the tiles of logits."""
    monkeypatch.setattr(operands, "SMALL", 0)
    monkeypatch.setattr(blocked, "KEPT", 0)
    monkeypatch.setattr(blocked, "BAND", 30)
    monkeypatch.setitem(blocked.TILE, "cpu", (4, 3))
    visited, logits = [], blocked._Tiles.logits
    monkeypatch.setattr(blocked._Tiles, "logits", lambda *a: visited.append(a[1:]) or logits(*a))
    return visited


def held(form, query, key, temperature, without):
    logits = query @ key.T / temperature
    if form == "softplus":
        return functional.softplus(logits - 0.3).sum(1)
    return logits.masked_fill(without.holds(slice(0, len(query)), slice(0, len(key))), -torch.inf).logsumexp(1)


def tiled(form, query, key, temperature, without):
    if form == "softplus":
        return softplus_sum(query, key, scale=1 / temperature, bias=-0.3)
    return log_sum_exp(query, key, temperature=temperature, without=without)


@pytest.mark.parametrize("form", ["log_sum_exp", "softplus"])
@pytest.mark.parametrize("weights", ["mean", "different"])
@pytest.mark.parametrize("of", ["both", "query", "key"])
def test_gradients_made_ahead_are_those_of_plain_operations(form, weights, of, ahead):
    query, key = data(9, 4), data(13, 4, seed=1)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = [x.requires_grad_() for name, x in (("query", query), ("key", key)) if of in (name, "both")]
    weight = torch.full((9,), 1 / 9) if weights == "mean" else data(9, seed=2)
    without = Listed(torch.arange(9))
    expected = (held(form, query, key, temperature, without) * weight).sum()
    found = (tiled(form, query, key, temperature, without) * weight).sum()
    torch.testing.assert_close(found, expected)
    seen = len(ahead)
    assert seen == (5 if form == "log_sum_exp" else 3) * 5  # bands of two rows, tiles of four; five tiles across
    for _ in range(2):  # what was kept survives
        torch.testing.assert_close(
            gradients(found, [*inputs, temperature]), gradients(expected, [*inputs, temperature])
        )
    recomputed = weights == "different" and of != "query"
    assert len(ahead) - seen == (2 * 15 if recomputed else 0)


def test_rows_without_a_pair_do_not_make_weights_unequal(ahead):
    query, key = data(6, 4).requires_grad_(), data(5, 4, seed=1).requires_grad_()
    nothing = torch.zeros(6, 5, dtype=torch.bool)
    nothing[2] = True
    rows = log_sum_exp(query, key, without=Mask(nothing))
    assert rows[2] == -torch.inf
    seen = len(ahead)
    found = gradients(rows[rows > -torch.inf].mean(), [query, key])
    assert len(ahead) == seen  # its weight is 0, that of the others a fifth
    there = [0, 1, 3, 4, 5]
    expected = gradients((query[there] @ key.T).logsumexp(1).mean(), [query, key])
    torch.testing.assert_close(found, expected)


def test_no_gradient_is_made_ahead_where_none_is_wanted(ahead, monkeypatch):
    def refused(*arguments):
        raise AssertionError("gradients were made")

    monkeypatch.setattr(blocked, "_Ahead", refused)
    query, key = data(6, 4).requires_grad_(), data(5, 4, seed=1)
    with torch.no_grad():
        log_sum_exp(query, key)
        softplus_sum(query, key)
    log_sum_exp(query.detach(), key)


# What small problems do instead of tiles


@pytest.mark.parametrize("loss", [info_nce, nt_xent, clip_loss, sigmoid_loss, "smoothed"])
def test_small_problems_take_plain_operations_to_the_same_numbers(loss, monkeypatch):
    query, key = data(7, 5).requires_grad_(), data(7, 5, seed=1).requires_grad_()
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def result():
        smoothed = {"label_smoothing": 0.2} if loss == "smoothed" else {}
        function = info_nce if loss == "smoothed" else loss
        found = function(query, key, temperature=temperature, reduction="none", **smoothed)
        return found, torch.autograd.grad((found * data(len(found), seed=2)).sum(), [query, key, temperature])

    def refused(*arguments, **named):
        raise AssertionError("a small problem went through the tiles")

    tiled = result()
    monkeypatch.setattr(operands, "SMALL", 1000)
    monkeypatch.setattr(blocked, "forward", refused)
    monkeypatch.setattr(blocked, "softplus_forward", refused)
    torch.testing.assert_close(result(), tiled)


def test_a_chosen_executor_computes_small_problems_too(monkeypatch):
    monkeypatch.setattr(operands, "SMALL", 100)
    asked = []
    monkeypatch.setattr(blocked, "forward", lambda *a, real=blocked.forward: asked.append(1) or real(*a))
    with executor("blocked"):
        info_nce(data(7, 5), data(7, 5, seed=1))
    assert asked


# Operators


def losses():
    labels = torch.arange(6) // 2
    return {
        "nt_xent": lambda x, y, t: contrast.nt_xent(x, y, temperature=t),
        "clip_loss": lambda x, y, t: contrast.clip_loss(x, y, temperature=t),
        "sup_con": lambda x, y, t: contrast.sup_con(x, labels, temperature=t),
        "sigmoid_loss": lambda x, y, t: contrast.sigmoid_loss(x, y, temperature=t),
    }


@pytest.mark.parametrize("name", losses())
def test_one_compiled_graph_holds_the_whole_loss(name):
    loss = losses()[name]
    x, y, t = data(6, 4).requires_grad_(), data(6, 4, seed=1).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    compiled = torch.compile(lambda *z: loss(*z), backend="aot_eager", fullgraph=name != "sup_con")
    torch.testing.assert_close(compiled(x, y, t), loss(x, y, t))
    used = (x, t) if name == "sup_con" else (x, y, t)
    torch.testing.assert_close(gradients(compiled(x, y, t), used), gradients(loss(x, y, t), used))


def test_checkpointing_recomputes_the_loss():
    x, y = data(6, 4).requires_grad_(), data(6, 4, seed=1).requires_grad_()
    plain = contrast.nt_xent(x, y)
    again = checkpoint(contrast.nt_xent, x, y, use_reentrant=False)
    torch.testing.assert_close(gradients(plain, (x, y)), gradients(again, (x, y)))


@pytest.mark.parametrize("keep", ["", "both"])
def test_the_operators_keep_the_rules_of_operators(keep):
    query, key = data(5, 3).requires_grad_(), data(7, 3, seed=1).requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0))
    operators, how = torch.ops.counterpoint, (keep, "blocked", "")
    for columns in (False, True):
        arguments = (query, key, scale, None, "Listed", [torch.arange(5)[:, None]], columns, *how)
        torch.library.opcheck(operators.log_sum_exp.default, arguments)
    torch.library.opcheck(operators.softplus_sum.default, (query, key, scale, bias, *how))


def test_an_unknown_executor_is_named():
    with pytest.raises(InputError, match='no executor named "cuda"; there are blocked'), executor("cuda"):
        pass


# The weighted mean


def dense(query, key, temperature, dropped=None, log_weight=None):
    logits = query @ key.T / (temperature.reshape(-1, 1) if temperature.numel() > 1 else temperature)
    logits = logits if log_weight is None else logits + log_weight
    logits = logits if dropped is None else logits.masked_fill(dropped, -torch.inf)
    share = logits.softmax(1)
    return logits.logsumexp(1), (share * logits.masked_fill(logits == -torch.inf, 0)).sum(1)


@pytest.mark.parametrize("temperature", [0.4, 0.01])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_under_the_softmax_is_exact(temperature, per_row, weighted, tiles, compare):
    n, m = 9, 13
    relation = Listed(torch.arange(n)) | Same(torch.arange(n) % 3, torch.arange(m) % 5)
    dropped = relation.holds(slice(0, n), slice(0, m))
    inputs = {"query": data(n, 5) / 3, "key": data(m, 5, seed=1) / 3}
    inputs["temperature"] = temperature * (1 + torch.arange(n) / n if per_row else torch.tensor(1.0))
    if weighted:
        inputs["log_weight"] = data(m, seed=3)

    def ours(query, key, temperature, log_weight=None):
        found = softmax_mean(query, key, temperature=temperature, without=relation, log_weight=log_weight)
        return torch.cat(found)

    def plain(query, key, temperature, log_weight=None):
        return torch.cat(dense(query, key, temperature, dropped, log_weight))

    result = compare(ours, plain, inputs, torch.float64)
    result.close(torch.float64, temperature, terms=8)  # a logit times a softmax term that carries its error


def test_the_mean_of_an_empty_row_is_zero_and_teaches_nothing():
    query, key = data(3, 4).requires_grad_(), data(5, 4, seed=1).requires_grad_()
    empty = torch.zeros(3, 5, dtype=torch.bool)
    empty[1] = True
    row, mean = softmax_mean(query, key, without=Mask(empty))
    assert row[1] == -torch.inf and mean[1] == 0
    found = torch.autograd.grad((row.masked_fill(row == -torch.inf, 0) + mean).sum(), (query, key))
    assert all(bool(gradient.isfinite().all()) for gradient in found) and bool((found[0][1] == 0).all())


def test_row_minus_mean_is_the_entropy():
    row, mean = softmax_mean(torch.zeros(2, 3), data(8, 3, dtype=torch.float32))
    torch.testing.assert_close(row - mean, torch.full((2,), 8.0).log())


def test_a_chosen_executor_that_cannot_says_so():
    x = data(4, 3).requires_grad_()
    with executor("blocked"):
        expected = log_sum_exp(x)
    assert torch.equal(expected, log_sum_exp(x))
    with pytest.raises(InputError, match="the executor triton"), executor("triton"):
        log_sum_exp(x)  # float64 on a CPU
