"""Heads side by side, temperatures of pairs, and the part on every baseline that takes it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import counterpoint as cp
from counterpoint import contrast
from counterpoint.contrast import Pairs
from counterpoint.encoders.heads import Beside, TemperatureNetwork, mlp
from counterpoint.encoders.several import NAMED, AdaptiveHeads, Several, SeveralHeads
from counterpoint.errors import InputError
from counterpoint.memory.mixing import HardMixing
from counterpoint.methods.language.esimcse import ESimCSE
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.vision.barlow_twins import BarlowTwins
from counterpoint.recipes import experiment

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}
IMAGES = [(cp.SimCLR, {}), (cp.MoCo, {"queue": 32}), (cp.SimSiam, {"bottleneck": 4}), (BarlowTwins, {})]
CHOICES = [
    SeveralHeads(2),
    AdaptiveHeads(2),
    AdaptiveHeads(2, hardest=1),
    AdaptiveHeads(2, network="product", shared=False),
    AdaptiveHeads(2, hardest=3, decoupled=False),
]


def build(cls, seed: int = 0, **options):
    torch.manual_seed(seed)
    return cls(**{**SMALL, **options})


def batch(n: int = 12) -> dict[str, torch.Tensor]:
    shape, generator = (n, 3, 16, 16), torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}


def loss_at(method, items):
    torch.manual_seed(7)
    return method.loss(items)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def still(network: TemperatureNetwork) -> None:
    """Let the pair have no say: the last layers give zero."""
    for net in network.nets:
        nn.init.zeros_(net[-1].weight)
        if net[-1].bias is not None:
            nn.init.zeros_(net[-1].bias)


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_heads_stand_side_by_side_and_start_apart():
    torch.manual_seed(0)
    heads = Beside([mlp(6, 8, 4) for _ in range(3)])
    x = torch.randn(5, 6)
    z = heads(x)
    assert z.shape == (5, 12)
    for c in range(3):
        torch.testing.assert_close(z[:, 4 * c : 4 * c + 4], heads.heads[c](x))
    assert not torch.equal(z[:, :4], z[:, 4:8])
    after = Beside([mlp(4, 8, 4) for _ in range(3)], apart=True)
    (gradient,) = torch.autograd.grad(after(z)[:, 4:8].sum(), z)
    assert not gradient[:, :4].any() and not gradient[:, 8:].any() and bool(gradient[:, 4:8].any())


@pytest.mark.parametrize("form", ["product", "concat"])
@pytest.mark.parametrize("shared", [True, False])
def test_all_pairs_at_once_are_the_pairs_one_by_one(form, shared, monkeypatch):
    from counterpoint.encoders import heads

    monkeypatch.setitem(heads.BLOCK, True, 2 * 7 * 5)  # several blocks
    torch.manual_seed(0)
    network = TemperatureNetwork(4, 3, hidden=5, form=form, shared=shared)
    x, y = vectors(6, 3, 4).requires_grad_(), vectors(7, 3, 4, seed=1).requires_grad_()
    found = network.between(x, y)
    expected = network(x[:, None].expand(6, 7, 3, 4), y[None].expand(6, 7, 3, 4)).permute(2, 0, 1)
    torch.testing.assert_close(found, expected)
    given, weight = (x, y, *network.parameters()), torch.randn(3, 6, 7)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), given),
        torch.autograd.grad((expected * weight).sum(), given),
        strict=True,
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)


def test_the_concatenating_network_reads_both_in_order_and_the_product_forgets_it():
    x, y = vectors(6, 1, 4), vectors(6, 1, 4, seed=1)
    torch.manual_seed(0)
    concat, product = (TemperatureNetwork(4, 1, form=form) for form in ("concat", "product"))
    net = concat.nets[0]
    by_hand = net[2].weight @ (net[0].weight @ torch.cat([x, y], -1)[:, 0].T + net[0].bias[:, None]).relu()
    expected = 0.05 + 1.95 * torch.sigmoid(by_hand[0] + concat.offset)
    torch.testing.assert_close(concat(x, y)[:, 0], expected)
    assert (concat(x, y) - concat(y, x)).abs().max() > 1e-3
    torch.testing.assert_close(product(x, y), product(y, x))


@pytest.mark.parametrize("form", ["product", "concat"])
def test_temperatures_stay_between_their_bounds_and_start_where_they_are_told(form):
    torch.manual_seed(0)
    network = TemperatureNetwork(4, 2, bounds=(0.1, 1.5), start=0.2, form=form)
    for p in network.parameters():
        p.data.mul_(50)
    tau = network.between(vectors(20, 2, 4), vectors(20, 2, 4, seed=1))
    assert 0.1 <= float(tau.detach().min()) < float(tau.detach().max()) <= 1.5
    fresh = TemperatureNetwork(4, 2, bounds=(0.1, 1.5), start=0.2, form=form)
    still(fresh)
    tau = fresh(vectors(5, 2, 4), vectors(5, 2, 4, seed=1))
    torch.testing.assert_close(tau, torch.full((5, 2), 0.2))


def test_temperatures_are_float32_under_autocast():
    network, x = TemperatureNetwork(4, 2), vectors(5, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tau = network.between(x.bfloat16().float(), x)
    assert tau.dtype == torch.float32
    torch.testing.assert_close(tau, network.between(x.bfloat16().float(), x))


# ---- on the baselines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "options"), IMAGES)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_baseline_takes_every_choice_and_all_of_it_learns(cls, options, choice):
    method = build(cls, **options, heads=choice)
    loss = loss_at(method, batch())
    loss.backward()
    assert bool(loss.isfinite())
    learned = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in learned.values())
    parts = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert {id(p) for p in method.parameters() if p.requires_grad} == parts
    assert any("heads.temperature" in name for name in learned) == isinstance(choice, AdaptiveHeads)


@pytest.mark.parametrize(("cls", "options"), IMAGES)
def test_one_head_is_the_baseline(cls, options):
    plain, one = build(cls, **options), build(cls, **options, heads=SeveralHeads(1))
    renamed = {name.replace(".heads.0.", "."): value for name, value in one.state_dict().items()}
    plain.load_state_dict(renamed)
    torch.testing.assert_close(loss_at(one, batch()), loss_at(plain, batch()))


@pytest.mark.parametrize(("cls", "options"), IMAGES)
def test_several_heads_add_up(cls, options):
    """Each head alone, in the place of the one head of the baseline."""
    method, total = build(cls, **options, heads=SeveralHeads(3)), 0.0
    state = {name: value.clone() for name, value in method.state_dict().items()}
    for c in range(3):
        alone = build(cls, **options)
        own = {name.replace(f".heads.{c}.", "."): value for name, value in state.items()}
        if "queue.bank" in own:  # one queue for each head, here the parts of one row
            own["queue.bank"] = F.normalize(own["queue.bank"].chunk(3, dim=1)[c], dim=1)
        alone.load_state_dict({name: value for name, value in own.items() if name in alone.state_dict()})
        total = total + loss_at(alone, batch())
    torch.testing.assert_close(loss_at(method, batch()), total)


def test_constant_temperatures_without_price_are_dcl_and_the_plain_loss():
    for cls, options, decoupled, plain in (
        (cp.SimCLR, {"temperature": 0.3}, True, "dcl"),
        (cp.SimCLR, {"temperature": 0.3}, False, "nt_xent"),
        (cp.SimCLR, {"temperature": 0.3, "objective": "info_nce"}, False, "info_nce"),
        (cp.MoCo, {"temperature": 0.3, "queue": 32}, False, None),
        (cp.SimSiam, {}, True, None),
        (BarlowTwins, {}, True, None),
    ):
        method = build(cls, **options, heads=AdaptiveHeads(2, beta=0.0, decoupled=decoupled))
        still(method.heads.temperature)
        other = build(cls, **{**options, **({"objective": plain} if plain else {})}, heads=SeveralHeads(2))
        state = {name: value for name, value in method.state_dict().items() if "heads.temperature" not in name}
        other.load_state_dict(state)
        torch.testing.assert_close(loss_at(method, batch()), loss_at(other, batch()), rtol=1e-4, atol=1e-4)


def test_without_heads_nothing_changes():
    method = build(cp.SimCLR)
    assert not [*method.heads.parameters()] and isinstance(method.projector, nn.Sequential)
    assert not any("heads" in name for name in method.state_dict())


def test_mocos_queue_and_momentum_copy_hold_every_head():
    method = build(cp.MoCo, queue=16, heads=AdaptiveHeads(3))
    assert method.queue.keys.shape == (16, 24) and len(method.key_projector.module.heads) == 3
    before = method.queue.keys.clone()
    loss_at(method, batch())
    after = method.queue.keys.unflatten(1, (3, 8))
    assert not torch.equal(before[:12], method.queue.keys[:12])
    assert float((after[:12, 0] - after[:12, 1]).abs().max()) > 0.01


def test_the_temperature_network_learns_to_tell_pairs_apart():
    """Positives as far as some negatives are: one temperature cannot part them, one for each pair can."""
    torch.manual_seed(0)
    part, z = Several(AdaptiveHeads(1, beta=0.1), 64, 0.5), vectors(32, 64)
    optimiser = torch.optim.Adam(part.parameters(), lr=0.01)
    pairs = Pairs.under(contrast.nt_xent, z, z + 1.5 * vectors(32, 64, seed=1))
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        loss = part(pairs, contrast.nt_xent, temperature=0.5)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    one, other = (contrast.adaptive.apart(x, 1) for x in (pairs.query, pairs.key))
    with torch.no_grad():
        positive, every = part.temperature(one, other), part.temperature.between(one, other)
    assert losses[-1] < losses[0] - 10
    assert float(positive.max()) < 0.1 and float(every.mean()) > 1  # the lower and the upper bound


def sentences(cls, **options):
    torch.manual_seed(0)
    return cls(encoder="transformer-16-1", max_length=8, heads=options.pop("heads", None), **options)


@pytest.mark.parametrize("choice", [SeveralHeads(2), AdaptiveHeads(2), AdaptiveHeads(2, hardest=2)])
@pytest.mark.parametrize("cls", [SimCSE, ESimCSE])
def test_sentences_take_heads_too(cls, choice):
    method = sentences(cls, heads=choice, temperature=0.1)
    items = {"input_ids": torch.randint(5, 20, (6, 8)), "attention_mask": torch.ones(6, 8, dtype=torch.long)}
    for _ in range(2):  # the second step meets the queue
        loss = method.loss(items)
    loss.backward()
    assert bool(loss.isfinite()) and all(p.grad is not None for p in method.head.parameters())
    if cls is ESimCSE:
        assert method.queue.keys.shape[1] == 32


@pytest.mark.parametrize("duplicates", ["negatives", "masked"])
def test_clip_shares_its_dimensions_among_heads(duplicates):
    torch.manual_seed(0)
    options = {"encoder": "convnet-4", "text": "transformer-16-1", "image_size": 16, "max_length": 8}
    items = {
        **batch(4),
        "input_ids": torch.randint(5, 20, (4, 1, 8)),
        "attention_mask": torch.ones(4, 1, 8, dtype=torch.long),
        "caption": torch.tensor([[0], [1], [1], [2]]),
    }
    for choice in (SeveralHeads(2), AdaptiveHeads(2)):
        method = cp.CLIP(**options, dim=12, heads=choice, duplicates=duplicates)
        method.loss(items).backward()
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
        assert method.logit_scale.requires_grad == isinstance(choice, SeveralHeads)
    with pytest.raises(InputError, match="5 heads cannot share 12 dimensions evenly"):
        cp.CLIP(**options, dim=12, heads=SeveralHeads(5))


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_heads_are_chosen_by_name_or_by_their_fields():
    assert experiment("moco", heads="amcl").model["heads"] == AdaptiveHeads() == NAMED["amcl"]
    built = experiment("simclr", heads="{count: 2, beta: 0.3, tau: [0.1, 1.0]}", **SMALL).build(0)
    assert built.heads.choice == AdaptiveHeads(2, 0.3, (0.1, 1.0))
    assert experiment("simclr", heads={"count": 4}, **SMALL).build(0).heads.choice == SeveralHeads(4)
    with pytest.raises(InputError, match='no heads named "amlc"; did you mean amcl'):
        experiment("moco", heads="amlc")
    with pytest.raises(InputError, match="has no field"):
        experiment("moco", heads="{count: 2, bata: 1}", **SMALL).build(0)


def test_what_does_not_go_together_is_refused_with_the_reason():
    with pytest.raises(InputError, match="several heads and mixing do not go together"):
        build(cp.SimCLR, heads=SeveralHeads(), mixing=(HardMixing(),))
    with pytest.raises(InputError, match=r"start at 0\.05, which must lie between their bounds 0\.05 and 2"):
        build(cp.SimCLR, heads=AdaptiveHeads(), temperature=0.05)
    with pytest.raises(InputError, match="two positive bounds"):
        build(cp.SimCLR, heads=AdaptiveHeads(tau=(1.0, 0.5)))
    with pytest.raises(InputError, match="not sigmoid_loss"):
        build(cp.SimCLR, heads=AdaptiveHeads(), objective="sigmoid_loss").loss(batch())
    with pytest.raises(InputError, match="at least one head"):
        SeveralHeads(0)
    with pytest.raises(InputError, match="positive numbers"):
        AdaptiveHeads(hardest=0)
    with pytest.raises(InputError, match="need a head"):
        sentences(SimCSE, heads=SeveralHeads(), head=False)
    with pytest.raises(InputError, match='"concat" or "product"'):
        TemperatureNetwork(4, 1, form="sum")
    assert math.isfinite(float(build(BarlowTwins, heads=SeveralHeads(2)).loss(batch()).detach()))
