"""Single locations are named by the cell they lie in: an encoder that sees colours knows them, one that averages does not."""

import pytest
import torch
from torch.nn import functional as F

from counterpoint.data import Images
from counterpoint.data.composites import imbalanced, mosaic
from counterpoint.errors import InputError
from counterpoint.evaluate.dense import dense_linear, patches


def coloured(count=60, seed=0, side=8):
    """Images of one of three colours each, and which."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (count,), generator=generator)
    image = 200 * F.one_hot(label, 3)[:, :, None, None].expand(-1, -1, side, side)
    return Images(
        (image + torch.randint(0, 50, image.shape, generator=generator)).to(torch.uint8), label, ("r", "g", "b")
    )


def mosaics(count=60, seed=0, side=2):
    order = torch.randint(0, 60, (count, side**2), generator=torch.Generator().manual_seed(seed))
    return mosaic(coloured(seed=seed), order)


def grid(images):
    return F.avg_pool2d(images.float(), 4)


def test_a_mosaic_holds_its_images_where_its_labels_say():
    source = coloured()
    order = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    made = mosaic(source, order)
    assert made.image.shape == (2, 3, 16, 16) and made.label is None
    for i in range(2):
        for cell in range(4):
            y, x = 8 * (cell // 2), 8 * (cell % 2)
            assert torch.equal(made.image[i, :, y : y + 8, x : x + 8], source.image[order[i, cell]])
            assert made.factors["cell"][i, cell // 2, cell % 2] == source.label[order[i, cell]]
    assert torch.equal(made.subset([1]).factors["cell"], made.factors["cell"][1:])
    with pytest.raises(InputError, match="3 images make no square mosaic"):
        mosaic(source, order[:, :3])


@pytest.mark.parametrize("side", [2, 3])
def test_maps_that_keep_places_apart_are_right_and_averages_are_not(side):
    train, test = mosaics(side=side), mosaics(seed=1, side=side)
    local = dense_linear(grid, train, test)
    whole = dense_linear(lambda x: grid(x).mean((2, 3), keepdim=True).expand(-1, -1, 2 * side, 2 * side), train, test)
    assert local.value == 100 and whole.value < 80
    assert local.protocol == "dense-linear:cell" and local.n == 60 * min(16, 4 * side**2)
    assert local.detail["within"] > 0.99 > local.detail["across"]
    assert whole.detail["across"] == pytest.approx(1) and whole.detail["within"] == pytest.approx(1)
    assert local.detail["train"] == 60  # one location of each image


def test_the_baseline_sees_patches():
    images = mosaics().image
    assert patches(images).shape == (60, 3 * 64, 2, 2)
    torch.testing.assert_close(patches(images)[0, :, 0, 1].view(3, 8, 8), images[0, :, :8, 8:].float() / 255)


def test_what_cannot_be_measured_is_refused():
    train = mosaics()
    with pytest.raises(InputError, match="maps of 1 x 1 locations cannot tell 2 x 2 cells apart"):
        dense_linear(lambda x: grid(x).mean((2, 3), keepdim=True), train, train)
    with pytest.raises(InputError, match='has no label map "cell"'):
        dense_linear(grid, coloured(), coloured())


def test_imbalance_thins_out_the_first_classes():
    label = torch.arange(10).repeat(100)
    items = Images(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), label)
    assert imbalanced(items).label.bincount().tolist() == [10 * (i + 1) for i in range(10)]
    rare = imbalanced(items, "exponential").label.bincount()
    assert rare[9] == 100 and rare[8] == 37 and rare[0] == 1
    assert torch.equal(imbalanced(items).label, imbalanced(items).label)
    with pytest.raises(InputError, match="has no labels"):
        imbalanced(Images(items.image))


def test_a_run_on_images_with_label_maps_is_measured_at_single_locations(tmp_path):
    from counterpoint.evaluate.runs import evaluate
    from counterpoint.methods.vision.simclr import SimCLR
    from counterpoint.train import fit

    items = mosaics(80)
    torch.manual_seed(0)
    method = SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8))
    run = fit(method, items, run=tmp_path / "run", batch_size=16, epochs=1, progress=False)
    found = evaluate(run, items, protocols=["dense-linear:cell"])
    assert [result.subject for result in found] == ["trained", "untrained", "raw pixels"]
    assert all(result.protocol == "dense-linear:cell" and result.n == 16 * 4 for result in found)
    assert "held out by us" in found[0].detail["note"]
    everything = {result.protocol for result in evaluate(run, items)}
    assert everything == {"dense-linear:cell", "geometry"}
