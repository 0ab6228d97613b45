"""The SASRec encoder against a plain implementation of its card, and what it must not see."""

import math

import pytest
import torch
from torch.nn import functional as F

from counterpoint.encoders.sequence import SASRecEncoder
from counterpoint.errors import InputError


def build(items=30, **options):
    torch.manual_seed(0)
    encoder = SASRecEncoder(items, dim=16, heads=2, hidden=32, max_length=12, **options).eval()
    with torch.no_grad():  # far from the small start, so that differences show
        for name, p in encoder.named_parameters():
            p.mul_(1 if "norm" in name else 8).add_(0.1 * torch.randn_like(p))
    return encoder


def batch(size=6, width=12, items=30):
    length = torch.tensor([1, 3, 12, 7, 2, 5])[:size]
    seq = torch.randint(1, items + 1, (size, width), generator=torch.Generator().manual_seed(1))
    return seq.masked_fill(torch.arange(width) >= length[:, None], 0), length


def reference(encoder, seq, length):
    """States [B, L, D], with the whole padded batch and scores plus -10000, step by step."""
    size, width = seq.shape
    x = encoder.item.weight[seq] + encoder.position.weight[:width]
    x = F.layer_norm(x, (16,), encoder.norm.weight, encoder.norm.bias, 1e-12)
    allowed = torch.ones(width, width).tril().bool() & (seq != 0)[:, None]
    bias = torch.where(allowed, 0.0, -10000.0)[:, None]
    for block in encoder.blocks:
        key, value = block.key_value(x).chunk(2, -1)
        heads = [part.view(size, width, 2, 8).transpose(1, 2) for part in (block.query(x), key, value)]
        score = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(8) + bias
        context = (score.softmax(-1) @ heads[2]).transpose(1, 2).reshape(size, width, 16)
        x = F.layer_norm(x + block.out(context), (16,), block.attention_norm.weight, block.attention_norm.bias, 1e-12)
        wide = block.widen(x)
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        x = F.layer_norm(x + block.narrow(wide), (16,), block.norm.weight, block.norm.bias, 1e-12)
    return x


@pytest.mark.parametrize("packed", [None, False])
@pytest.mark.parametrize("masked", [False, True])
def test_states_are_those_of_the_plain_form(masked, packed):
    encoder, (seq, length) = build(), batch()
    if masked:  # a masked last place is read out all the same, a masked first place sees nothing at all
        seq[2, [0, 4, 11]], seq[3, [1, 6]] = 0, 0
    expected = reference(encoder, seq, length)
    last = expected[torch.arange(len(seq)), length - 1]
    torch.testing.assert_close(encoder(seq, length, packed=packed).pooled, last, rtol=1e-4, atol=1e-5)
    features = encoder(seq, length, tokens=True, packed=packed)
    torch.testing.assert_close(features.pooled, last, rtol=1e-4, atol=1e-5)
    if not masked:  # without any key the plain form averages over padding too, which nothing reads
        inside = torch.arange(12) < length[:, None]
        torch.testing.assert_close(features.tokens[inside], expected[inside], rtol=1e-4, atol=1e-5)
        assert features.tokens.shape == (6, 12, 16)
        assert (features.tokens[~inside] == 0).all()


def test_gradients_are_those_of_the_plain_form():
    encoder, (seq, length) = build(), batch()
    probe = torch.randn(6, 16)
    loss = (encoder(seq, length).pooled * probe).sum()
    ours = torch.autograd.grad(loss, list(encoder.parameters()))
    loss = (reference(encoder, seq, length)[torch.arange(6), length - 1] * probe).sum()
    for (name, _), a, b in zip(
        encoder.named_parameters(), ours, torch.autograd.grad(loss, list(encoder.parameters())), strict=True
    ):
        if name == "item.weight":  # the look-up gives the padding no gradient
            assert (a[0] == 0).all()
            a, b = a[1:], b[1:]
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_half_precision_stays_close():
    encoder, (seq, length) = build(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(seq, length).pooled
    torch.testing.assert_close(half.float(), encoder(seq, length).pooled, rtol=0.1, atol=0.1)


def test_padding_changes_nothing():
    encoder, (seq, length) = build(), batch()
    pooled = encoder(seq, length).pooled
    for row in range(len(seq)):
        alone = encoder(seq[row : row + 1, : length[row]], length[row : row + 1]).pooled[0]
        torch.testing.assert_close(pooled[row], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(seq[:2, :5], length[:2]).pooled, pooled[:2], rtol=1e-5, atol=1e-6)


def test_later_items_do_not_change_earlier_states():
    encoder = build()
    seq, length = torch.randint(1, 31, (4, 12)), torch.full((4,), 12)
    before = encoder(seq, length, tokens=True).tokens
    changed = seq.clone()
    changed[:, 7:] = seq[:, 7:] % 30 + 1
    after = encoder(changed, length, tokens=True).tokens
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-6)
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(2) > 1e-3).all()
    prefix = encoder(seq, torch.full((4,), 7)).pooled  # what lies behind the length does not count
    torch.testing.assert_close(prefix, before[:, 6], rtol=1e-5, atol=1e-6)


def test_masked_items_are_no_keys_but_the_last_place_reads_the_padding_row():
    encoder = build()
    seq, length = torch.tensor([[4, 0, 6, 7]]), torch.tensor([4])
    before = encoder(seq, length).pooled
    with torch.no_grad():
        encoder.item.weight[0] = torch.randn(16)
    torch.testing.assert_close(encoder(seq, length).pooled, before)
    seq[0, 3] = 0
    before = encoder(seq, length).pooled
    with torch.no_grad():
        encoder.item.weight[0] = torch.randn(16)
    assert (encoder(seq, length).pooled - before).abs().max() > 1e-3


def test_the_start_is_that_of_the_card():
    torch.manual_seed(0)
    encoder = SASRecEncoder(500)
    assert encoder.item.weight.shape == (502, 64) and encoder.item.padding_idx == 0 and encoder.items == 500
    assert encoder.table.shape == (501, 64) and encoder.position.weight.shape == (50, 64)
    assert encoder.item.weight[0].abs().max() > 0
    for name, p in encoder.named_parameters():
        if "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert abs(p.std().item() - 0.02) < 0.002 and abs(p.mean().item()) < 0.002
    assert encoder.norm.eps == encoder.blocks[0].norm.eps == encoder.blocks[1].attention_norm.eps == 1e-12


def test_dropout_works_in_training_only():
    encoder, (seq, length) = build(dropout=0.5, attention_dropout=0.5), batch()
    assert torch.equal(encoder(seq, length).pooled, encoder(seq, length).pooled)
    encoder.train()
    assert not torch.equal(encoder(seq, length).pooled, encoder(seq, length).pooled)


def test_the_table_may_come_later_and_is_the_same():
    torch.manual_seed(3)
    now = SASRecEncoder(4)
    torch.manual_seed(3)
    later = SASRecEncoder(0)
    with pytest.raises(InputError, match="how many items there are is not known yet"):
        later(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    later.name_items(["a", "b", "cö", "d e"])
    assert later.catalogue == ("a", "b", "cö", "d e") and now.catalogue == ()
    for name, p in now.named_parameters():
        assert torch.equal(p, later.get_parameter(name))
    with pytest.raises(InputError, match="built for 4 items, but the data has 3"):
        now.name_items(["a", "b", "c"])


def test_a_state_brings_table_and_names_along():
    source = SASRecEncoder(0)
    source.name_items(["x", "yy"])
    copy = SASRecEncoder(0)
    copy.load_state_dict(source.state_dict())
    assert copy.catalogue == ("x", "yy") and torch.equal(copy.table, source.table)


def test_bad_input():
    encoder = build()
    with pytest.raises(InputError, match="a history has 13 items, but the encoder's positions end at 12"):
        encoder(torch.ones(1, 13, dtype=torch.int64), torch.tensor([13]))
    with pytest.raises(InputError, match="a history without any item"):
        encoder(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 0]))
    with pytest.raises(InputError, match="heads divides"):
        SASRecEncoder(3, dim=15)
