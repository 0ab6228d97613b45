import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from counterpoint import views
from counterpoint.errors import InputError
from counterpoint.views import ImageViews, image_views, montage, plain
from counterpoint.views.image import blur, colour, crop_boxes, resample, sampling_map, thickness

STILL = ImageViews(crop=None, flip=0, jitter_p=0, grey=0, blur=0)
NAMED = {
    name: getattr(views, name)
    for name in ("SIMCLR", "SIMCLR_SMALL", "MOCO_V2", "BYOL_1", "BYOL_2", "SIMSIAM", "HANDWRITING", "HALLUCINATOR_1")
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photos(count=4, channels=3, height=32, width=32, seed=0):
    """Smooth random images in uint8."""
    coarse = torch.rand(count, channels, 6, 6, generator=seeded(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8)


def pastel(count=3):
    """Colours so far from 0 and 1 that moderate changes need no clamp."""
    return 0.4 + 0.15 * photos(count).float() / 255


def full(count):
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, 4)


# ------------------------------------------------------------------------------------------------------------ geometry


def test_crop_is_the_sub_rectangle():
    image = photos(2).float()
    boxes = torch.tensor([[4, 8, 16, 16], [12, 0, 16, 16]]) / 32
    out = resample(image, sampling_map(boxes), 16, 16)
    torch.testing.assert_close(out[0], image[0, :, 8:24, 4:20], rtol=0, atol=1e-3)
    torch.testing.assert_close(out[1], image[1, :, 0:16, 12:28], rtol=0, atol=1e-3)


def test_crop_of_an_oblong_image_measures_each_axis_by_its_own_side():
    image = photos(1, height=20, width=40).float()
    out = resample(image, sampling_map(torch.tensor([[10 / 40, 5 / 20, 20 / 40, 10 / 20]])), 10, 20)
    torch.testing.assert_close(out[0], image[0, :, 5:15, 10:30], rtol=0, atol=1e-3)


def test_mirrored_crop_is_the_mirror_of_the_crop():
    image = photos(1).float()
    box = torch.tensor([[4, 8, 16, 16]]) / 32
    out = resample(image, sampling_map(box, flip=torch.tensor([True])), 16, 16)
    torch.testing.assert_close(out[0], image[0, :, 8:24, 4:20].flip(-1), rtol=0, atol=1e-3)


def test_flip_alone_is_an_exact_mirror():
    images = photos(64)
    out = image_views(images, replace(STILL, flip=0.5), seeded())
    mirrored = torch.tensor([torch.equal(o, i.flip(-1)) for o, i in zip(out, images / 255, strict=True)])
    same = torch.tensor([torch.equal(o, i) for o, i in zip(out, images / 255, strict=True)])
    assert bool((mirrored ^ same).all())
    assert 16 < int(mirrored.sum()) < 48


def test_nothing_asked_nothing_changed():
    images = photos()
    assert torch.equal(STILL(images), images / 255)


def test_quarter_turn_is_clockwise():
    image = photos(1).float()
    out = resample(image, sampling_map(full(1), angle=torch.tensor([math.pi / 2])), 32, 32)
    torch.testing.assert_close(out, image.rot90(-1, (2, 3)), rtol=0, atol=1e-2)


def test_turn_keeps_shapes_in_a_view_that_is_not_square():
    image = torch.zeros(1, 1, 40, 80)
    image[:, :, 10:30, 38:42] = 1  # 20 high, 4 wide
    out = resample(image, sampling_map(full(1), angle=torch.tensor([math.pi / 2]), aspect=2.0), 40, 80)
    assert out[0, 0].amax(1).gt(0.5).sum() == 4
    assert out[0, 0].amax(0).gt(0.5).sum() == 20


def test_shift_and_magnification_move_the_content_as_said():
    image = torch.zeros(1, 1, 32, 32)
    image[:, :, 12:20, 12:20] = 1
    right_down = resample(image, sampling_map(full(1), shift=torch.tensor([[0.25, 0.125]])), 32, 32)
    torch.testing.assert_close(right_down, image.roll((4, 8), (2, 3)), rtol=0, atol=1e-4)
    twice = resample(image, sampling_map(full(1), scale=torch.tensor([2.0])), 32, 32)
    assert twice[0, 0].gt(0.5).sum() == 16 * 16
    mirrored = resample(
        image, sampling_map(full(1), flip=torch.tensor([True]), shift=torch.tensor([[0.25, 0.0]])), 32, 32
    )
    torch.testing.assert_close(mirrored, image.roll(8, 3), rtol=0, atol=1e-4)


def test_affine_agrees_with_torchvision():
    image = photos(1).float()
    ours = resample(image, sampling_map(full(1), angle=torch.tensor([0.3]), scale=torch.tensor([1.5])), 32, 32)
    theirs = tv.affine(
        image, math.degrees(0.3), translate=[0, 0], scale=1.5, shear=[0.0], interpolation=tv.InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1)


def test_shear_moves_what_is_below_to_the_right_and_keeps_rows():
    image = torch.zeros(1, 1, 32, 32)
    image[:, :, 4:28, 15:17] = 1
    out = resample(image, sampling_map(full(1), shear=torch.tensor([math.radians(20)])), 32, 32)[0, 0]
    columns = (out * torch.arange(32)).sum(1) / out.sum(1).clamp_min(1e-6)
    steps = columns[5:27].diff()
    torch.testing.assert_close(steps.mean(), torch.tensor(math.tan(math.radians(20))), rtol=0.02, atol=0)
    assert out[3].sum() < 0.01 and out[4].sum() > 1


def test_equal_elastic_displacements_are_a_shift():
    image = photos(1).float()
    bumps = torch.zeros(1, 2, 4, 4)
    bumps[:, 0] = 0.125
    out = resample(image, sampling_map(full(1)), 32, 32, bumps)
    torch.testing.assert_close(out[..., :-4], image[..., 4:], rtol=0, atol=1e-2)


def test_elastic_moves_smoothly_and_about_as_far_as_asked():
    ramp = torch.linspace(0.5 / 64, 1 - 0.5 / 64, 64).expand(200, 1, 64, 64).contiguous()
    moved = image_views(ramp, replace(STILL, elastic=0.02), seeded()) - ramp
    inside = moved[..., 16:48, 16:48]
    assert 0.01 < float(inside.std()) < 0.025
    assert float(inside.diff(dim=-1).abs().max()) < 0.02


def test_crop_boxes_follow_the_recipe():
    draws = torch.rand(22, 4000, generator=seeded())
    x, y, w, h = crop_boxes(48, 64, (0.2, 1.0), (3 / 4, 4 / 3), draws).unbind(1)
    area, ratio = w * h, (w * 64) / (h * 48)
    assert float(area.min()) >= 0.2 - 1e-5 and float(area.max()) <= 1 + 1e-5
    assert float(ratio.min()) >= 3 / 4 - 1e-5 and float(ratio.max()) <= 4 / 3 + 1e-5
    assert float(x.min()) >= 0 and float((x + w).max()) <= 1 + 1e-5
    assert float(y.min()) >= 0 and float((y + h).max()) <= 1 + 1e-5
    torch.manual_seed(0)
    image = torch.empty(1, 480, 640)
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    top, left, height, width = torch.tensor(theirs).float().unbind(1)
    assert abs(float(area.mean() - (height * width).mean() / 480 / 640)) < 0.015
    assert abs(float(ratio.mean() - (width / height).mean())) < 0.015
    assert abs(float(x.mean() - left.mean() / 640)) < 0.015 and abs(float(y.mean() - top.mean() / 480)) < 0.015


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    box = crop_boxes(10, 100, (1.0, 1.0), (3 / 4, 4 / 3), torch.rand(22, 3, generator=seeded()))
    w = 4 / 3 * 10 / 100
    torch.testing.assert_close(box, torch.tensor([(1 - w) / 2, 0.0, w, 1.0]).expand(3, 4))


def test_much_larger_images_are_averaged_first():
    board = (torch.arange(128)[:, None] + torch.arange(128)) % 2
    out = image_views(board.float().expand(8, 1, 128, 128), replace(STILL, size=16, crop=(0.9, 1.0)), seeded())
    assert float((out - 0.5).abs().max()) < 0.05


def test_without_crop_an_oblong_image_is_cut_not_squeezed():
    images = photos(1, height=32, width=64)
    out = image_views(images, replace(STILL, size=32, rotate=1e-6), seeded())
    torch.testing.assert_close(out, images[..., 16:48] / 255, rtol=0, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- colour


def one(value, count=3):
    return torch.full((count,), float(value))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_single_factors_are_torchvisions(factor):
    x = pastel()
    still = one(1)
    torch.testing.assert_close(
        colour(x, one(factor), still, still, one(0)), tv.adjust_brightness(x, factor), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        colour(x, still, one(factor), still, one(0)), tv.adjust_contrast(x, factor), rtol=0, atol=2e-4
    )
    torch.testing.assert_close(
        colour(x, still, still, one(factor), one(0)), tv.adjust_saturation(x, factor), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("order", ["bcs", "scb", "csb"])
def test_composition_is_torchvisions_in_any_order(order):
    x = pastel()
    steps = {
        "b": lambda y: tv.adjust_brightness(y, 0.8),
        "c": lambda y: tv.adjust_contrast(y, 1.3),
        "s": lambda y: tv.adjust_saturation(y, 0.5),
    }
    expected = x
    for step in order:
        expected = steps[step](expected)
    torch.testing.assert_close(colour(x, one(0.8), one(1.3), one(0.5), one(0)), expected, rtol=0, atol=3e-4)


def test_factors_are_per_image():
    x = pastel(2)
    out = colour(x, torch.tensor([0.5, 1.2]), one(1, 2), one(1, 2), one(0, 2))
    torch.testing.assert_close(out, torch.stack((x[0] * 0.5, x[1] * 1.2)), rtol=0, atol=1e-5)


def test_greyscale_is_torchvisions():
    x = pastel()
    torch.testing.assert_close(
        colour(x, one(1), one(1), one(0), one(0.1)), tv.rgb_to_grayscale(x, 3), rtol=0, atol=2e-4
    )
    out = image_views(photos(), replace(STILL, grey=1.0))
    torch.testing.assert_close(out[:, 0], out[:, 2], rtol=0, atol=1e-5)


def test_hue_keeps_luma_and_greys_and_returns_after_a_full_turn():
    x = pastel()
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    still = one(1)
    for turn in (-0.3, 0.1, 0.5):
        turned = colour(x, still, still, still, one(turn))
        torch.testing.assert_close((turned * luma).sum(1), (x * luma).sum(1), rtol=0, atol=1e-5)
        assert float((turned - x).abs().max()) > 0.01
    torch.testing.assert_close(colour(x, still, still, still, one(1.0)), x, rtol=0, atol=1e-5)
    grey = x.mean(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(colour(grey, still, still, still, one(0.2)), grey, rtol=0, atol=1e-5)


def test_hue_turns_red_towards_green_as_torchvision_does():
    red = torch.tensor([0.7, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    ours = colour(red, one(1, 1), one(1, 1), one(1, 1), one(1 / 3, 1))[0, :, 0, 0]
    theirs = tv.adjust_hue(red, 1 / 3)[0, :, 0, 0]
    assert int(ours.argmax()) == int(theirs.argmax()) == 1


def test_clamped_once_at_the_end():
    x = torch.full((1, 3, 4, 4), 0.8)
    bright_then_flat = colour(x, one(1.5, 1), one(1, 1), one(1, 1), one(0, 1))
    assert float(bright_then_flat.max()) == 1.0
    # brightness alone would clamp at 1; together with a contrast that returns below, nothing is lost
    x[:, :, :2] = 0.4
    out = colour(x, one(1.5, 1), one(0.5, 1), one(1, 1), one(0, 1))
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([0.75, 0.75, 1.0, 1.0]), rtol=0, atol=1e-5)


def test_jitter_probability_and_range():
    flat = torch.full((2000, 3, 2, 2), 0.25)
    level = image_views(flat, replace(STILL, jitter=(0.4, 0, 0, 0), jitter_p=0.8), seeded())[:, 0, 0, 0] / 0.25
    changed = (level - 1).abs() > 1e-5
    assert 0.76 < float(changed.float().mean()) < 0.84
    assert 0.6 - 1e-4 <= float(level.min()) < 0.62 and 1.38 < float(level.max()) <= 1.4 + 1e-4


def test_one_channel_takes_brightness_and_contrast_only():
    x = pastel()[:, :1]
    torch.testing.assert_close(
        colour(x, one(0.8), one(1.3)), tv.adjust_contrast(tv.adjust_brightness(x, 0.8), 1.3), rtol=0, atol=1e-5
    )
    out = image_views(photos(channels=1), replace(STILL, jitter=(0, 0, 0.8, 0.2), jitter_p=1.0, grey=1.0))
    torch.testing.assert_close(out, photos(channels=1) / 255)


# -------------------------------------------------------------------------------------------- blur, solarise, thickness


@pytest.mark.parametrize(("side", "kernel"), [(16, 3), (32, 3), (64, 7), (224, 23)])
def test_blur_is_torchvisions(side, kernel):
    x = torch.rand(3, 3, side, side, generator=seeded())
    out = blur(x, torch.tensor([0.3, 1.0, 2.0]))
    for image, blurred, sigma in zip(x, out, (0.3, 1.0, 2.0), strict=True):
        torch.testing.assert_close(
            blurred, tv.gaussian_blur(image, [kernel, kernel], [sigma, sigma]), rtol=0, atol=1e-5
        )


def test_blur_of_sigma_zero_is_the_image_and_tiny_images_do_not_break():
    x = torch.rand(2, 1, 9, 9, generator=seeded())
    out = blur(x, torch.tensor([0.0, 1.5]))
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])
    assert blur(torch.rand(1, 1, 1, 1), torch.tensor([1.0])).shape == (1, 1, 1, 1)


def test_blur_probability():
    x = torch.rand(400, 1, 8, 8, generator=seeded())
    out = image_views(x, replace(STILL, blur=0.1, blur_sigma=(1.0, 2.0)), seeded(1))
    share = (out != x).flatten(1).any(1).float().mean()
    assert 0.05 < float(share) < 0.16


def test_solarise_inverts_above_one_half():
    x = torch.tensor([0.0, 0.45, 0.5, 0.75, 1.0]).view(1, 1, 1, 5).expand(200, 1, 2, 5)
    out = image_views(x, replace(STILL, solarise=0.2), seeded())
    inverted = (out[:, 0, 0] == torch.tensor([0.0, 0.45, 0.5, 0.25, 0.0])).all(1)
    assert bool((inverted | (out == x).flatten(1).all(1)).all())
    assert 0.1 < float(inverted.float().mean()) < 0.3


def test_thickness_grows_and_thins_whatever_the_polarity():
    stroke = torch.zeros(1, 1, 16, 16)
    stroke[..., 4:12, 6:10] = 1
    grown = thickness(stroke, torch.tensor([1.0]), torch.tensor([0.5]))
    thinned = thickness(stroke, torch.tensor([-1.0]), torch.tensor([0.5]))
    assert float(grown[0, 0, 3, 5]) == 0.5 and float(grown.sum()) == 32 + 0.5 * (60 - 32)
    assert float(thinned[0, 0, 4, 6]) == 0.5 and float(thinned.sum()) == 32 - 0.5 * (32 - 12)
    dark = thickness(1 - stroke, torch.tensor([-1.0]), torch.tensor([0.5]))
    torch.testing.assert_close(dark, 1 - grown)


def test_a_thin_stroke_is_not_erased():
    line = torch.full((2, 1, 16, 16), 0.1)
    line[..., 8] = 0.9
    out = thickness(line, torch.tensor([-1.0, 1.0]), torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(out, line)
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(thickness(flat, torch.tensor([1.0]), torch.tensor([0.8])), flat)


# --------------------------------------------------------------------------------------------------- the whole pipeline


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("channels", [1, 3])
def test_named_sets_run_on_grey_and_colour(name, channels):
    out = NAMED[name](photos(5, channels), seeded())
    assert out.shape == (5, channels, 32, 32) and out.dtype == torch.float32 and bool(out.isfinite().all())


@pytest.mark.parametrize("name", NAMED)
def test_same_seed_same_views_and_every_image_its_own(name):
    images = photos(1).expand(12, 3, 32, 32)
    first, again, other = (NAMED[name](images, seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(np.unique(first.flatten(1).numpy(), axis=0)) == 12


def test_global_generator_is_used_without_one():
    torch.manual_seed(7)
    first = views.SIMCLR(photos())
    torch.manual_seed(7)
    assert torch.equal(first, views.SIMCLR(photos()))


@pytest.mark.parametrize("name", NAMED)
def test_one_image_and_other_sizes(name):
    out = image_views(photos(1, height=40, width=50), replace(NAMED[name], size=24), seeded())
    assert out.shape == (1, 3, 24, 24)


def test_batch_is_not_changed():
    images = photos()
    floats = images / 255
    before, floats_before = images.clone(), floats.clone()
    for views_of in (*NAMED.values(), STILL):
        views_of(images)
        views_of(floats)
    assert torch.equal(images, before) and torch.equal(floats, floats_before)


def test_uint8_and_float_agree():
    images = photos()
    torch.testing.assert_close(views.SIMCLR(images, seeded()), views.SIMCLR(images / 255, seeded()), rtol=0, atol=1e-5)


def test_autocast_does_not_touch_the_geometry():
    images = photos()
    expected = views.BYOL_2(images, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = views.BYOL_2(images, seeded())
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize("name", NAMED)
def test_nothing_waits_for_the_device(name):
    # a tensor without data refuses every question about its values
    out = image_views(
        torch.empty(4, 3, 64, 64, dtype=torch.uint8, device="meta"), replace(NAMED[name], size=32, elastic=0.1)
    )
    assert out.device.type == "meta" and out.shape == (4, 3, 32, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", NAMED)
def test_on_a_gpu_without_synchronisation(name):
    images = photos().cuda()
    NAMED[name](images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = NAMED[name](images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = NAMED[name](images.cpu(), seeded())
    torch.testing.assert_close(NAMED[name](images, seeded()).cpu(), on_cpu, rtol=0, atol=2e-3)
    assert out.is_cuda


def test_plain_resizes_the_shorter_side_and_cuts_the_centre():
    images = photos(2, height=32, width=48)
    expected = tv.center_crop(tv.resize(images / 255, [16], antialias=True), [16, 16])
    torch.testing.assert_close(plain(images, 16), expected)
    assert torch.equal(plain(photos(), 32), photos() / 255)


def test_more_channels_where_no_colour_is_changed():
    assert image_views(photos(2, channels=5), replace(STILL, crop=(0.5, 1.0), blur=0.5)).shape == (2, 5, 32, 32)
    with pytest.raises(InputError, match="1 or 3 channels, got 5"):
        views.SIMCLR(photos(2, channels=5))


def test_bad_batches():
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        views.SIMCLR(torch.zeros(3, 32, 32))
    with pytest.raises(InputError, match="nothing empty"):
        views.SIMCLR(torch.zeros(0, 3, 32, 32))
    with pytest.raises(InputError, match="uint8"):
        views.SIMCLR(torch.zeros(1, 3, 32, 32, dtype=torch.int64))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("flip", 1.5),
        ("crop", (0.0, 1.0)),
        ("crop", (0.5, 1.5)),
        ("ratio", (2.0, 1.0)),
        ("jitter", (0.4, 0.4, 0.4, 0.9)),
        ("jitter", (-0.1, 0, 0, 0)),
        ("rotate", -3.0),
        ("elastic_smooth", 1),
        ("size", 0),
    ],
)
def test_choices_that_make_no_sense_are_named(option, value):
    with pytest.raises(InputError, match=option):
        ImageViews(**{option: value})


def test_montage_shows_originals_beside_views():
    images = photos(6)
    picture = montage(images, [STILL, replace(STILL, solarise=1.0)], rows=3, cols=2, generator=seeded())
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    gap, side = 2, 32
    for row in range(3):
        top = gap + row * (side + gap)
        original = images[row].permute(1, 2, 0).numpy()
        assert np.array_equal(picture[top : top + side, gap : gap + side], original)
        left = gap + side + 3 * gap
        assert np.array_equal(picture[top : top + side, left : left + side], original)
        left += side + gap
        assert picture[top : top + side, left : left + side].max() <= 128
    assert montage(photos(2, 1), views.HANDWRITING, 2, 3).shape[2] == 1


# ---- where a view lies -----------------------------------------------------------------------------------------------


def ramps(count: int, height: int = 64, width: int = 64) -> torch.Tensor:
    """Images that say where one looks: x and y, shares of the sides, in the first two channels."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)]).repeat(
        count, 1, 1, 1
    )


@pytest.mark.parametrize(
    ("crop", "size", "shape"),
    [((0.1, 0.6), 32, (64, 64)), ((0.1, 0.6), 16, (64, 48)), (None, 16, (64, 64)), (None, None, (40, 64))],
)
def test_the_geometry_of_a_view_says_what_it_shows(crop, size, shape):
    views = ImageViews(size=size, crop=crop, jitter_p=0.0, grey=0.0, blur=0.0)
    images = ramps(24, *shape)
    view, box = views.with_geometry(images, seeded())
    assert torch.equal(view, views(images, seeded()))  # the draws of a plain call
    left, top, right, bottom = box[:, :, None].unbind(1)
    assert 0 < int((left > right).sum()) < 24  # some are mirrored
    height, width = view.shape[-2:]
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    inside = slice(2, -2)  # the outermost pixels repeat the edge
    shown_x, shown_y = view[:, 0].mean(1), view[:, 1].mean(2)
    torch.testing.assert_close(shown_x[:, inside], (left + x * (right - left))[:, inside], rtol=0, atol=0.01)
    torch.testing.assert_close(shown_y[:, inside], (top + y * (bottom - top))[:, inside], rtol=0, atol=0.01)


def test_moves_that_four_numbers_cannot_tell_have_no_geometry():
    for moves in ({"rotate": 5.0}, {"translate": 0.1}, {"scale": (0.9, 1.1)}, {"elastic": 0.1}, {"shear": 3.0}):
        with pytest.raises(InputError, match="only crops and mirrors"):
            ImageViews(**moves).with_geometry(ramps(2))
