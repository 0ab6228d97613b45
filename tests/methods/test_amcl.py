"""AMCL and Barlow Twins as methods: their formulas, what they are made of, resume, and learning."""

import math

import pytest
import torch
from torch.nn import functional as F

from counterpoint.encoders.several import AdaptiveHeads
from counterpoint.errors import InputError
from counterpoint.methods.vision.amcl import AMCL
from counterpoint.methods.vision.barlow_twins import BarlowTwins
from counterpoint.train import fit
from counterpoint.views import ImageViews

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}
MILD = ImageViews(
    crop=(0.7, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=(0.5, 0.5, 0.0, 0.0), jitter_p=1.0, grey=0.0, blur=0.0
)


def build(cls, **options):
    torch.manual_seed(0)
    return cls(**{**SMALL, **options})


def images(n: int = 12, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, 16, 16), dtype=torch.uint8, generator=generator)


def both(method, items):
    torch.manual_seed(7)
    views = method.views(items), method.other_views(items)
    return tuple(method.project(view) for view in views)


def loss_at(method, items):
    torch.manual_seed(7)
    return method.loss({"image": items})


def test_amcl_is_its_formula():
    """Anchor by anchor, in double precision, from the method's own network."""
    method, items = build(AMCL, count=2, beta=0.3, temperature=0.4), images(5)
    found, (z1, z2) = loss_at(method, items), both(method, items)
    z = F.normalize(torch.cat([z1, z2]).unflatten(1, (2, 8)), dim=-1)
    tau = method.heads.temperature.between(z, z).double()
    omega, s = 4 * tau.log() + 1 / tau, torch.einsum("ncd,mcd->cnm", z, z).double()
    total = 0.0
    for c in range(2):
        for i in range(10):
            partner = (i + 5) % 10
            rest = [j for j in range(10) if j not in (i, partner)]
            logits = s[c, i, rest] / tau[c, i, rest]
            repelled = logits.logsumexp(0) - 0.3 * (logits.softmax(0) * omega[c, i, rest]).sum()
            total = total - s[c, i, partner] / tau[c, i, partner] + 0.3 * omega[c, i, partner] + repelled
    torch.testing.assert_close(found.double(), total / 10, rtol=1e-4, atol=1e-4)


def test_amcl_is_simclr_with_adaptive_heads():
    method = build(AMCL, count=4, hardest=2, tau=(0.1, 1.0), network="product", shared=False)
    assert method.heads.choice == AdaptiveHeads(4, 0.1, (0.1, 1.0), 2, network="product", shared=False)
    assert len(method.projector.heads) == 4 == len(method.heads.temperature.nets)
    assert AMCL(encoder="convnet-4").projector.heads[0][0].out_features == 512
    with pytest.raises(InputError, match="AMCL says itself which heads there are"):
        build(AMCL, heads=AdaptiveHeads())


def test_the_kept_embedding_knows_no_head():
    method = build(AMCL).eval()
    assert method.embed({"image": images()}).shape == (12, method.encoder.dim)


def test_barlow_twins_is_its_formula():
    method, items = build(BarlowTwins, redundancy=0.02), images(9)
    found, (z1, z2) = loss_at(method, items), both(method, items)
    z1, z2 = (F.batch_norm(z.double(), None, None, training=True) for z in (z1, z2))
    c = z1.T @ z2 / 9
    off = c.square().sum() - c.diagonal().square().sum()
    expected = (1 - c.diagonal()).square().sum() + 0.02 * off
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    linear = [layer for layer in method.projector if hasattr(layer, "in_features")]
    assert len(linear) == 3 and all(layer.bias is None for layer in linear)


def gratings() -> torch.Tensor:
    """Waves of eight directions and four lengths: uint8 [32, 1, 16, 16]."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = [torch.sin(2 * math.pi / length * (math.cos(turn) * x + math.sin(turn) * y))
             for length in (2.5, 3.5, 5.0, 8.0) for turn in (math.pi * angle / 8 for angle in range(8))]  # fmt: skip
    return (127 + 100 * torch.stack(waves)[:, None]).to(torch.uint8)


def found_again(method, items) -> float:
    """Share of views whose nearest other view shows the same image (chance: 1 / 32)."""
    method.eval()
    generator, right = torch.Generator().manual_seed(3), []
    with torch.no_grad():
        for _ in range(5):
            one, two = (F.normalize(method.encoder(MILD(items, generator)).pooled, dim=1) for _ in range(2))
            right.append((one @ two.T).argmax(1) == torch.arange(len(items)))
    return torch.stack(right).float().mean().item()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AMCL, {"projection": (32, 16)}),
        (BarlowTwins, {"projection": (64, 16), "other_views": MILD, "redundancy": 0.05}),
    ],
)
def test_they_learn(cls, options, tmp_path):
    items = gratings()
    method = build(cls, **{"encoder": "convnet-8", "channels": 1, "projection": (64, 32), "views": MILD, **options})
    before = found_again(method, items)
    settings = {
        "batch_size": 32,
        "epochs": 60 if cls is AMCL else 150,
        "optimizer": "adam",
        "lr": 0.005,
        "weight_decay": 0.0,
    }
    fit(method, items, run=tmp_path / "run", progress=False, **settings)
    assert found_again(method, items) > before + 0.05
