"""Views of text: what is repeated, left out or replaced, how often, and where."""

import random

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.views.text import delete_words, emit, repeat_bound, repeat_tokens, repeat_words, soft_replace, stack


def rows(*lengths, width=None):
    """Row i counts up from 100 i, padded with -1."""
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), -1)
    for i, length in enumerate(lengths):
        ids[i, :length] = 100 * i + torch.arange(length)
    return ids, (ids >= 0).long()


def seen(ids, mask):
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def marked(shape, *places):
    positions = torch.zeros(shape, dtype=torch.bool)
    for place in places:
        positions[place] = True
    return positions


def test_given_positions_are_said_twice_in_place():
    ids, mask = rows(6, 4, 5, width=7)
    positions = marked(ids.shape, (0, 1), (0, 4), (2, 3))
    out, real = repeat_tokens(ids, mask, rate=0.5, positions=positions)
    assert seen(out, real) == [[0, 1, 1, 2, 3, 4, 4, 5], [100, 101, 102, 103], [200, 201, 202, 203, 203, 204]]
    assert out.shape == real.shape == (3, 8) and real.dtype == torch.int64


def test_a_row_too_short_for_the_rate_stays_as_it_is():
    ids, mask = rows(3, 4)
    positions = marked(ids.shape, (0, 1), (1, 1))
    out, real = repeat_tokens(ids, mask, rate=0.32, positions=positions)  # int(0.96) = 0, int(1.28) = 1
    assert seen(out, real) == [[0, 1, 2], [100, 101, 101, 102, 103]]


@pytest.mark.parametrize("place", [(0, 0), (0, 5), (1, 3), (1, 5)])
def test_ends_and_padding_are_never_repeated(place):
    ids, mask = rows(6, 4)
    with pytest.raises(InputError, match="between the first and the last"):
        repeat_tokens(ids, mask, rate=0.9, positions=marked(ids.shape, place))


@pytest.mark.parametrize("rate", [0.28, 0.3, 0.32, 1.0])
def test_the_bound_is_pythons_own_product(rate):
    lengths = torch.arange(2, 400)
    assert repeat_bound(lengths, rate).tolist() == [min(10, int(rate * n)) for n in range(2, 400)]
    assert repeat_bound(torch.tensor([50]), rate, most=4).tolist() == [min(4, int(rate * 50))]


def test_the_draw_is_uniform_below_the_bound_and_over_inner_positions():
    n, length = 6000, 14
    ids, mask = torch.arange(length).expand(n, -1), torch.ones(n, length, dtype=torch.long)
    out, real = repeat_tokens(ids, mask, generator=torch.Generator().manual_seed(0))  # bound int(0.32 * 14) = 4
    count = real.sum(1) - length
    share = torch.bincount(count, minlength=5) / n
    assert share[4:].sum() == 0 and (share[:4] - 1 / 4).abs().max() < 0.03
    repeats = torch.stack([((out == token) & (real == 1)).sum(1) - 1 for token in range(length)], 1)
    assert set(repeats.unique().tolist()) == {0, 1}  # distinct positions
    assert repeats[:, 0].sum() == repeats[:, -1].sum() == 0
    inner = repeats[:, 1:-1].float().mean(0)
    assert (inner - 1.5 / 12).abs().max() < 0.025
    assert torch.equal(out.gather(1, real.sum(1, keepdim=True) - 1)[:, 0], torch.full((n,), length - 1))


def test_at_most_nine_are_repeated_and_each_row_has_its_own_draw():
    ids, mask = rows(300, 4, 300)
    counts = []
    for seed in range(40):
        _, real = repeat_tokens(ids, mask, rate=0.32, generator=torch.Generator().manual_seed(seed))
        counts.append((real.sum(1) - mask.sum(1)).tolist())
    first, short, second = zip(*counts, strict=True)
    assert max(first) == 9 and min(first) == 0 and set(short) == {0} and first != second


def test_the_generator_decides_the_draw():
    ids, mask = rows(30, 20)
    one, two, other = (repeat_tokens(ids, mask, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and (one.shape != other.shape or not torch.equal(one, other))


def test_nothing_to_repeat():
    ids, mask = rows(2, 1)
    out, real = repeat_tokens(ids, mask, rate=1.0)
    assert seen(out, real) == seen(ids, mask)
    with pytest.raises(InputError, match="rate between 0 and 1"):
        repeat_tokens(ids, mask, rate=1.5)


WORDS = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, -1], [-1, 0, 1, -1, -1, -1, -1, -1]])


def test_words_are_repeated_with_all_their_tokens():
    ids, mask = rows(8, 4)
    out, real = repeat_words(ids, mask, WORDS, positions=marked((2, 3), (0, 0), (0, 2), (1, 1)))
    assert seen(out, real) == [[0, 1, 2, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7], [100, 101, 102, 102, 103]]


def test_the_word_draw_leaves_the_last_word_alone():
    n, count = 3000, 8
    ids = torch.arange(count + 2).expand(n, -1)
    words = torch.arange(-1, count + 1).masked_fill(torch.arange(-1, count + 1) == count, -1).expand(n, -1)
    out, real = repeat_words(ids, torch.ones_like(ids), words, generator=torch.Generator().manual_seed(0))
    extra = real.sum(1) - (count + 2)  # bound min(10, 8, max(2, int(0.32 * 8) = 2)) = 2
    assert set(extra.tolist()) == {0, 1} and abs(extra.float().mean() - 0.5) < 0.04
    repeats = (
        torch.stack([((out == token) & (real == 1)).sum(1) - 1 for token in range(1, count + 1)], 1).float().mean(0)
    )
    assert repeats[-1] == 0 and (repeats[:-1] - 0.5 / 7).abs().max() < 0.02


def test_words_are_left_out_but_never_all():
    ids, mask = rows(8, 4)
    out, real = delete_words(ids, mask, WORDS, positions=marked((2, 3), (0, 0), (0, 1)))
    assert seen(out, real) == [[0, 4, 5, 6, 7], [100, 101, 102, 103]]
    kept = 0
    for seed in range(200):
        out, real = delete_words(ids, mask, WORDS, rate=0.9, generator=torch.Generator().manual_seed(seed))
        first, second = seen(out, real)
        assert first[0] == 0 and first[-1] == 7 and len(first) > 2 and len(second) > 2
        kept += 3 in first
    assert 20 < kept < 120  # 1 - 0.9 alone, more often as the word that stays in any case
    assert seen(*delete_words(ids, mask, WORDS, rate=0.0)) == seen(ids, mask)


def test_emit_against_plain_python():
    random.seed(0)
    ids, mask = rows(9, 5, 1, 7)
    times = mask * torch.tensor([[random.randrange(4) for _ in range(9)] for _ in range(4)])
    out, real = emit(ids, times)
    expected = [
        [t for t, n in zip(row, many, strict=True) for _ in range(n)]
        for row, many in zip(ids.tolist(), times.tolist(), strict=True)
    ]
    assert seen(out, real) == expected


def test_stack_joins_batches_of_different_width():
    first, second = rows(3, 2), rows(5)
    ids, mask = stack([first, second], pad=7)
    assert ids.tolist() == [[0, 1, 2, 7, 7], [100, 101, 7, 7, 7], [0, 1, 2, 3, 4]]
    assert mask.sum(1).tolist() == [3, 2, 5]


def test_soft_replacement_by_given_numbers():
    ids = torch.arange(12).view(2, 6)
    allowed = torch.ones_like(ids, dtype=torch.bool)
    allowed[:, 0] = False
    one = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.2, 0.3]] * 2)
    two = torch.tensor([[0.0, 0.1, 0.9, 0.9, 0.1, 0.1], [0.0, 0.8, 0.79, 0.9, 0.1, 0.1]])
    three = torch.tensor([[0.0, 0.0, 0.0, 0.6, 0.0, 0.0], [0.0, 0.6, 0.0, 0.5, 0.0, 0.0]])
    random_ids = torch.full_like(ids, 50)
    found = soft_replace(ids, allowed, 99, rate=0.3, random_ids=random_ids, draws=(one, two, three))
    assert found.tolist() == [[0, 99, 50, 3, 99, 5], [6, 7, 99, 9, 99, 11]]
    into = 100 + ids
    assert soft_replace(ids, allowed, into, rate=0.3, draws=(one, two, three)).tolist() == [
        [0, 101, 2, 3, 104, 5],
        [6, 7, 108, 9, 110, 11],
    ]


def test_soft_replacement_has_the_shares_that_it_promises_and_is_seeded():
    ids = torch.zeros(200, 500, dtype=torch.long)
    allowed = torch.arange(500) % 2 == 0
    draw = [
        soft_replace(ids, allowed.expand(200, -1), 1, random_ids=ids + 2, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    share = [(draw[0][:, allowed] == value).float().mean().item() for value in (1, 2)]
    assert share[0] == pytest.approx(0.08, abs=0.003) and share[1] == pytest.approx(0.01, abs=0.002)
    assert (draw[0][:, ~allowed] == 0).all() and torch.equal(soft_replace(ids, ids == 0, 1, rate=0.0), ids)
    with pytest.raises(InputError, match="between 0 and 1"):
        soft_replace(ids, ids == 0, 1, rate=1.2)
