"""Multi-crop: small views beside large ones, each size through the encoder once, in any method."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from counterpoint import encoders
from counterpoint.contrast import barlow_twins, info_nce, unit
from counterpoint.errors import InputError
from counterpoint.memory.mixing import NAMED as MIXINGS
from counterpoint.methods.vision.barlow_twins import BarlowTwins
from counterpoint.methods.vision.byol import BYOL
from counterpoint.methods.vision.moco import MoCo
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.methods.vision.simsiam import SimSiam
from counterpoint.views import NAMED, SIMCLR_SMALL, ImageViews, MultiCrop, by_size, crops
from counterpoint.views.multicrop import compared, predicted

SMALL = MultiCrop(count=3, size=8, crop=(0.1, 0.3))
STILL = ImageViews(size=16, flip=0, jitter_p=0, grey=0, blur=0)


def images(count=6, side=16, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def test_large_views_come_first_and_small_ones_share_their_colours():
    views = crops(images(), replace(SIMCLR_SMALL, size=16), SMALL)
    assert [view.shape[-1] for view in views] == [16, 16, 8, 8, 8]
    small = SMALL.of(replace(SIMCLR_SMALL, size=16))
    assert small == replace(SIMCLR_SMALL, size=8, crop=(0.1, 0.3))
    assert len(crops(images(), SIMCLR_SMALL)) == 2


def test_every_view_and_every_image_is_drawn_anew_and_by_the_generator():
    same = images(1).expand(4, 3, 16, 16)

    def drawn():
        return crops(same, replace(SIMCLR_SMALL, size=16), SMALL, torch.Generator().manual_seed(5))

    for first, again in zip(drawn(), drawn(), strict=True):
        assert torch.equal(first, again)
    small = torch.cat(drawn()[2:]).flatten(1)
    assert len(small.unique(dim=0)) == 12


def test_small_views_show_less_of_the_image():
    """On a ramp the range of a crop is its width."""
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)
    views = crops(ramp, replace(STILL, size=32), MultiCrop(count=1, size=14, crop=(0.05, 0.14)))
    large, small = ((view.amax((1, 2, 3)) - view.amin((1, 2, 3))) for view in (views[0], views[2]))
    assert small.max() < 0.14**0.5 * (4 / 3) ** 0.5 + 0.02 < large.mean()


def test_a_small_crop_of_a_large_image_keeps_its_detail():
    """Stripes of two pixels in an image of 256: a crop of a tenth of it at 96 pixels still shows them."""
    stripes = (torch.arange(256) // 2 % 2).float().expand(4, 3, 256, 256)
    view = MultiCrop(count=1, size=96, crop=(0.1, 0.1))(stripes, replace(STILL, size=224, ratio=(1, 1)))[0]
    assert view.std(dim=(1, 2, 3)).min() > 0.3


def test_the_side_follows_the_large_views_where_none_is_given():
    assert [MultiCrop().side(large) for large in (224, 64, 32)] == [96, 27, 14]
    assert MultiCrop(size=18).side(32) == 18
    with pytest.raises(InputError, match="take their size from the large ones"):
        MultiCrop().of(ImageViews())
    assert isinstance(NAMED["multi-crop"], MultiCrop) and NAMED["multi-crop-small"].count == 4


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 0}, {"crop": (0.3, 0.1)}, {"crop": (0.0, 1.0)}])
def test_choices_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match="small views: "):
        MultiCrop(**wrong)


def test_each_size_is_one_pass_in_the_order_of_the_views():
    seen = []

    def encode(x):
        seen.append(tuple(x.shape))
        return x.mean((1, 2, 3))[:, None]

    views = [torch.rand(n, 3, side, side) for n, side in ((2, 8), (2, 4), (3, 8), (1, 4))]
    found = by_size(encode, views)
    assert seen == [(5, 3, 8, 8), (3, 3, 4, 4)]
    for rows, view in zip(found, views, strict=True):
        torch.testing.assert_close(rows, view.mean((1, 2, 3))[:, None])


def test_batch_statistics_are_those_of_each_size():
    norm = nn.BatchNorm2d(3, affine=False)
    views = [torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), 5 + torch.rand(4, 3, 4, 4)]
    one, other, small = by_size(lambda x: norm(x), views)
    together = torch.cat([one, other])
    for rows in (together, small):
        torch.testing.assert_close(rows.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert one.mean().abs() > 1e-4  # not those of the view alone


def test_pairs_hold_a_large_view_and_come_once():
    assert compared(2) == [(0, 1)]
    assert compared(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


@pytest.mark.parametrize("name", ["convnet-4", "resnet10t"])
def test_convolutional_encoders_take_small_views_and_keep_their_state(name):
    encoder = encoders.image(name, image_size=32)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert MultiCrop().check(encoder) == MultiCrop() and encoder.training
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_an_encoder_of_one_size_is_refused():
    encoder = encoders.image("vit_tiny_patch16_224", image_size=32)
    with pytest.raises(InputError, match="takes images of 32 px only, not small views of 16 px"):
        MultiCrop(size=16).check(encoder)
    assert MultiCrop(size=32).check(encoder).count == 6  # nothing smaller is asked of it
    with pytest.raises(InputError, match="vit_tiny_patch16_224 takes images of 32 px only"):
        SimCLR("vit_tiny_patch16_224", image_size=32, projection=(16, 8), small_views=MultiCrop(size=16))


def simclr(**options):
    torch.manual_seed(0)
    return SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8), **options)


def test_simclr_with_small_views_is_the_mean_over_pairs_of_views():
    method, batch = simclr(small_views=SMALL), {"image": images()}
    torch.manual_seed(7)
    found = method.loss(batch)
    torch.manual_seed(7)
    z = by_size(method.project, crops(batch["image"], method.views, SMALL))
    losses = [method.objective(z[i], z[j], temperature=0.2) for i, j in compared(5)]
    assert len(losses) == 7
    torch.testing.assert_close(found, torch.stack(losses).mean())
    found.backward()
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("objective", ["dcl", "info_nce", "sigmoid_loss"])
def test_any_objective_of_two_views_takes_small_ones(objective):
    loss = simclr(small_views=SMALL, objective=objective).loss({"image": images()})
    assert bool(loss.isfinite())


@pytest.mark.parametrize("mixing", MIXINGS)
def test_it_goes_with_every_part_that_changes_pairs(mixing):
    loss = simclr(small_views=SMALL, mixing=(MIXINGS[mixing],)).loss({"image": images()})
    assert bool(loss.isfinite())


def other(cls, **options):
    torch.manual_seed(0)
    return cls(encoder="convnet-4", image_size=16, projection=(16, 8), small_views=SMALL, **options)


def drawn(method):
    """The loss on one batch, and the views that it saw."""
    torch.manual_seed(7)
    found = method.loss({"image": images()})
    torch.manual_seed(7)
    return found, images()


def test_small_views_are_further_queries_of_moco():
    method = other(MoCo, queue=20)
    bank = method.queue.keys.clone()
    found, batch = drawn(method)
    queries = by_size(method.project, crops(batch, (method.views,), SMALL))
    with torch.no_grad():
        key = unit(method.key_projector(method.key_encoder(method.other_views(batch)).pooled))
    assert len(queries) == 4
    losses = [info_nce(query, key, negatives=bank, in_batch=False, temperature=0.2) for query in queries]
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_small_views_predict_the_targets_of_large_ones():
    assert predicted(2) == [(0, 1), (1, 0)]
    assert predicted(4) == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    method = other(BYOL)
    found, batch = drawn(method)
    views = crops(batch, (method.views, method.other_views), SMALL)
    p, z = by_size(method.predict, views), [method.target(view) for view in views[:2]]
    losses = [2 - 2 * torch.cosine_similarity(p[i], z[j]).mean() for i, j in predicted(5)]
    assert len(losses) == 8
    torch.testing.assert_close(found, 2 * torch.stack(losses).mean())

    method = other(SimSiam, bottleneck=4)
    found, batch = drawn(method)
    z = by_size(method.project, crops(batch, (method.views, method.other_views), SMALL))
    p = by_size(method.predictor, z)
    losses = [-torch.cosine_similarity(p[i], z[j].detach()).mean() for i, j in predicted(5)]
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_small_views_are_correlated_with_large_ones():
    method = other(BarlowTwins, redundancy=0.1)
    found, batch = drawn(method)
    z = by_size(method.project, crops(batch, (method.views, method.other_views), SMALL))
    losses = [barlow_twins(z[i], z[j], weight=0.1) for i, j in compared(5)]
    torch.testing.assert_close(found, torch.stack(losses).mean())
