"""Crops whose centre is bound: where they lie, how they are drawn, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch

from counterpoint import views
from counterpoint.errors import InputError
from counterpoint.views import ImageViews
from counterpoint.views.image import centred_boxes, crop_boxes

BOX = (0.25, 0.75)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes(count: int, size: float | None = None) -> torch.Tensor:
    if size is not None:
        return torch.tensor([0.0, 0.0, size, size]).expand(count, 4)
    return crop_boxes(32, 32, (0.2, 1.0), (3 / 4, 4 / 3), torch.rand(22, count, generator=seeded(9)))


def moved(given: torch.Tensor, beta: float = 0.1, centre: tuple[float, float] = BOX, seed: int = 0) -> torch.Tensor:
    return centred_boxes(given, centre, beta, torch.rand(2, 32, len(given), generator=seeded(seed)))


def test_crops_keep_their_size_and_stay_inside():
    given = boxes(5000)
    found = moved(given)
    assert torch.equal(found[:, 2:], given[:, 2:])
    assert float(found[:, :2].min()) >= 0 and float((found[:, :2] + found[:, 2:]).max()) <= 1 + 1e-6


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_centres_of_small_crops_lie_between_the_bounds(beta):
    found = moved(boxes(5000, size=0.3), beta)
    centre = found[:, :2] + 0.15
    assert float(centre.min()) >= 0.25 - 1e-6 and float(centre.max()) <= 0.75 + 1e-6
    assert float(centre.min()) < 0.26 and float(centre.max()) > 0.74


def test_large_crops_reach_from_edge_to_edge():
    """A crop over half as large as the side cannot have its centre at the bound: it is moved back into the image."""
    found = moved(boxes(5000, size=0.8))
    assert float(found[:, 0].min()) == pytest.approx(0, abs=1e-4) and float(found[:, 0].max()) == pytest.approx(
        0.2, abs=1e-4
    )
    assert torch.equal(moved(boxes(10, size=1.0))[:, :2], torch.zeros(10, 2))


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.6, 1.0])
def test_the_place_follows_the_symmetric_beta_distribution(beta):
    """Mean 1/2, variance 1 / (4 (2 a + 1)), and its whole distribution against torch's own sampler."""
    place = (moved(boxes(40000, size=0.2), beta)[:, :2] - 0.15) / 0.5
    assert abs(float(place.mean()) - 0.5) < 0.01
    assert float(place.var()) == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.03)
    torch.manual_seed(0)
    theirs = torch.distributions.Beta(beta, beta).sample((80000,))
    grid = torch.linspace(0.01, 0.99, 50)
    ours = (place.flatten()[:, None] < grid).float().mean(0)
    assert float((ours - (theirs[:, None] < grid).float().mean(0)).abs().max()) < 0.012
    across, down = place.T
    assert abs(float(torch.corrcoef(torch.stack([across, down]))[0, 1])) < 0.02


def test_a_small_shape_suppresses_the_centre():
    at_border = []
    for beta in (0.1, 0.6, 1.0):
        place = (moved(boxes(5000, size=0.2), beta)[:, :2] - 0.15) / 0.5
        at_border.append(float(((place < 0.05) | (place > 0.95)).float().mean()))
    assert at_border[0] > 0.7 > at_border[1] > 0.2 > at_border[2]


def test_bounds_that_meet_centre_every_crop():
    found = moved(boxes(1000), centre=(0.5, 0.5))
    torch.testing.assert_close(found[:, :2] + found[:, 2:] / 2, torch.full((1000, 2), 0.5))


def test_views_show_what_the_crop_says_and_draw_it_per_image():
    ramp = torch.linspace(0.5 / 32, 1 - 0.5 / 32, 32).expand(400, 1, 32, 32).contiguous()
    still = ImageViews(
        crop=(0.09, 0.09), ratio=(1.0, 1.0), flip=0, jitter_p=0, grey=0, blur=0, crop_centre=BOX, crop_beta=0.1
    )
    middle = still(ramp, seeded()).mean((1, 2, 3))
    near = ((middle - 0.25).abs() < 0.05) | ((middle - 0.75).abs() < 0.05)
    assert float(near.float().mean()) > 0.7 and float(middle.min()) > 0.24 and float(middle.max()) < 0.76
    assert len(middle.unique()) > 100
    assert torch.equal(still(ramp, seeded()), still(ramp, seeded()))
    torch.manual_seed(3)
    one = still(ramp)
    torch.manual_seed(3)
    assert torch.equal(one, still(ramp))


def test_without_bounds_the_views_are_what_they_were():
    images = torch.rand(8, 3, 32, 32, generator=seeded(1))
    assert torch.equal(views.MOCO_V2(images, seeded()), replace(views.MOCO_V2, crop_beta=0.1)(images, seeded()))
    assert not torch.equal(views.MOCO_V2(images, seeded()), replace(views.MOCO_V2, crop_centre=BOX)(images, seeded()))


def test_the_two_named_views_differ_in_the_place_of_the_crop_alone():
    one, other = views.NAMED["hallucinator-1"], views.NAMED["hallucinator-2"]
    assert replace(one, crop_centre=None, crop_beta=1.0) == other
    assert one(torch.zeros(2, 3, 24, 24), seeded()).shape == (2, 3, 24, 24)


@pytest.mark.parametrize(
    "option",
    [{"crop_centre": (0.7, 0.3)}, {"crop_centre": (-0.1, 0.5)}, {"crop_centre": (0.2, 0.8), "crop": None},
     {"crop_beta": 0.0}, {"crop_beta": 2.0}],
)  # fmt: skip
def test_choices_that_make_no_sense_are_named(option):
    with pytest.raises(InputError, match=next(iter(option))):
        ImageViews(**option)
