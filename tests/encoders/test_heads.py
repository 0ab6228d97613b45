import pytest
import torch
from torch import nn

from counterpoint.encoders import heads
from counterpoint.errors import InputError


def kinds(head):
    return [type(part).__mro__[1 if isinstance(part, heads.FeatureNorm) else 0].__name__ for part in head]


def linears(head):
    return [
        (part.in_features, part.out_features, part.bias is not None) for part in head if isinstance(part, nn.Linear)
    ]


L, B, R = "Linear", "BatchNorm1d", "ReLU"


@pytest.mark.parametrize(
    ("head", "layers", "shapes"),
    [
        (lambda: heads.simclr_projector(24, 32, 8), [L, B, R, L], [(24, 32, False), (32, 8, True)]),
        (lambda: heads.moco_projector(24, out=8), [L, R, L], [(24, 24, True), (24, 8, True)]),
        (lambda: heads.byol_projector(24, 32, 8), [L, B, R, L], [(24, 32, True), (32, 8, False)]),
        (lambda: heads.byol_predictor(8, 32), [L, B, R, L], [(8, 32, True), (32, 8, False)]),
        (
            lambda: heads.simsiam_projector(24, 32, 16),
            [L, B, R, L, B, R, L, B],
            [(24, 32, False), (32, 32, False), (32, 16, False)],
        ),
        (lambda: heads.simsiam_predictor(16, 4), [L, B, R, L], [(16, 4, False), (4, 16, True)]),
    ],
)
def test_heads_are_the_papers(head, layers, shapes):
    head = head()
    assert kinds(head) == layers
    assert linears(head) == shapes
    x = torch.randn(6, shapes[0][0], requires_grad=True)
    out = head(x)
    assert out.shape == (6, shapes[-1][1])
    out.square().sum().backward()
    assert all(p.grad is not None for p in head.parameters()) and x.grad is not None


def test_paper_sizes_are_the_defaults():
    assert linears(heads.simclr_projector(512)) == [(512, 2048, False), (2048, 128, True)]
    assert linears(heads.byol_projector(512)) == [(512, 4096, True), (4096, 256, False)]
    assert linears(heads.byol_predictor()) == [(256, 4096, True), (4096, 256, False)]
    assert linears(heads.simsiam_predictor()) == [(2048, 512, False), (512, 2048, True)]


def test_last_norm_of_simsiam_has_no_scale_and_normalises():
    head = heads.simsiam_projector(8, 16, 4)
    assert not head[-1].affine
    out = head(torch.randn(64, 8))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(4), rtol=0, atol=1e-2)
    assert heads.mlp(4, 4, 4, last_norm="bn")[-1].affine


def test_mlp_layers_and_biases():
    assert kinds(heads.mlp(4, 8, 2, layers=1)) == [L]
    assert kinds(heads.mlp(4, 8, 2, layers=3)) == [L, R, L, R, L]
    assert linears(heads.mlp(4, 8, 2, norm="bn", bias=True, last_bias=False)) == [(4, 8, True), (8, 2, False)]
    with pytest.raises(InputError, match="hidden 0"):
        heads.mlp(4, 0, 2)


def test_one_sample_cannot_be_normalised_in_training():
    head = heads.simclr_projector(8, 16, 4)
    with pytest.raises(InputError, match="at least two samples"):
        head(torch.randn(1, 8))
    assert head.eval()(torch.randn(1, 8)).shape == (1, 4)
