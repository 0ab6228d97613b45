r"""Random views of a batch of images: crop, flip, affine, elastic, stroke thickness, colour, blur, solarise.

One function, `image_views`, and named argument sets for the published recipes. Each sample draws its own parameters, on
the device of the batch and without waiting for it, in at most one resampling and one colour matrix per image:

* **Geometry** (crop, flip, affine, elastic) is one sampling grid. Every coordinate is a linear combination of fixed
  basis images (x, y, 1 and the smooth bumps of the elastic control points), so the grids of a whole batch are one
  matrix product.
* **Colour** (brightness b, contrast c, saturation s, hue rotation H, greyscale) is one 3 x 4 matrix per image. With G
  the projection on the grey axis, G H = H G = G, so that all of these operations commute, and

      out = b c (s H + (1 - s) G) x  +  b (1 - c) mean(luma(x)),          greyscale: s = 0.

  torchvision clamps to [0, 1] after each operation, which is the only reason why its (random) order matters; here the
  clamp comes once, at the end. Hue turns the chroma plane of YIQ, which keeps luma; torchvision turns HSV's hue, which
  does not. The sense and the unit (shares of a full turn) are the same.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from counterpoint.errors import InputError

if TYPE_CHECKING:
    import numpy as np

LUMA = (0.299, 0.587, 0.114)

_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
_CROP_TRIES = 10
_CENTRE_TRIES = 16  # of which each succeeds with a probability of at least one half
_FRAME = 0.75  # seen beside white paper as well as beside black


def _hue_parts() -> tuple[float, ...]:
    """H = G + cos * Q + sin * R: the 3 x 3 parts of a turn of the chroma plane; G is also the projection on grey."""
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    # rows of I and Q sum to zero exactly, so that greys stay grey to the last bit that matters
    to_yiq[1:] -= to_yiq[1:].mean(dim=1, keepdim=True)
    from_yiq = torch.linalg.inv(to_yiq)
    still = from_yiq[:, :1] @ to_yiq[:1]
    even = from_yiq[:, 1:] @ to_yiq[1:]
    odd = from_yiq[:, 1:2] @ to_yiq[2:] - from_yiq[:, 2:] @ to_yiq[1:2]
    return tuple(torch.stack((still, even, odd)).flatten().tolist())


_HUE_PARTS = _hue_parts()


@dataclass(frozen=True)
class ImageViews:
    """The choices that make a random view of an image; calling it applies them to a batch (see `image_views`).

    Every probability and every draw is per image. The defaults are SimCLR's for ImageNet. A choice that is switched off
    (None, 0, or a scale of (1, 1)) costs nothing.

    Args:
        size: side of the square output in pixels; None keeps the input's height and width.
        crop: smallest and largest share of the image's area kept by the random resized crop; None for no crop.
        ratio: smallest and largest width / height of the crop, drawn log-uniformly.
        crop_centre: bounds of the crop's centre along both axes, shares of the side; (0.25, 0.75) is the central quarter of the
            image. A crop that would stand out of the image is moved back into it. None: any place inside.
        crop_beta: shape a of the distribution Beta(a, a) of the centre between these bounds: 1 is even, less prefers the
            bounds to what lies between (0.1: nearly always one of the corners).
        flip: probability of a left-right mirror.
        jitter: strengths s of (brightness, contrast, saturation, hue); factors are drawn from [max(0, 1 - s), 1 + s],
            the hue from [-s, s] of a full turn. One-channel images use the first two.
        jitter_p: probability that the colour jitter is applied at all.
        grey: probability of losing the colour.
        blur: probability of a Gaussian blur, whose kernel covers a tenth of the side.
        blur_sigma: smallest and largest standard deviation of the blur, in output pixels.
        solarise: probability of inverting all values above one half.
        rotate: largest rotation in degrees, either way.
        shear: largest shear in degrees, either way.
        translate: largest shift along each axis as a share of the side.
        scale: smallest and largest magnification of the content.
        elastic: size of the smooth random displacements as a share of the side: each control point moves by a normal
            deviate of this standard deviation along each axis.
        elastic_smooth: control points per side; fewer are smoother.
        thickness: probability of growing or thinning strokes (3 x 3 dilation or erosion, blended in by a random share).
    """

    size: int | None = None
    crop: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.2)
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    elastic: float = 0.0
    elastic_smooth: int = 4
    thickness: float = 0.0
    crop_centre: tuple[float, float] | None = None
    crop_beta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter_p", "grey", "blur", "solarise", "thickness"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"views: {name} is a probability between 0 and 1, got {getattr(self, name)}")
        for name in ("ratio", "scale", "blur_sigma", "crop"):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or not 0 < pair[0] <= pair[1]):
                raise InputError(f"views: {name} needs two values with 0 < smallest <= largest, got {pair}")
        if self.crop is not None and self.crop[1] > 1:
            raise InputError(f"views: crop is a share of the image's area, at most 1, got {self.crop}")
        if self.crop_centre is not None and (
            self.crop is None or len(self.crop_centre) != 2 or not 0 <= self.crop_centre[0] <= self.crop_centre[1] <= 1
        ):
            raise InputError(
                f"views: crop_centre needs two shares with 0 <= smallest <= largest <= 1, and a crop, got {self.crop_centre}"
            )
        if not 0 < self.crop_beta <= 1:
            raise InputError(f"views: crop_beta lies above 0 and is at most 1, got {self.crop_beta}")
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise InputError(
                "views: jitter needs four strengths (brightness, contrast, saturation, hue), none negative and hue at"
                f" most 0.5, got {self.jitter}"
            )
        for name in ("rotate", "shear", "translate", "elastic"):
            if getattr(self, name) < 0:
                raise InputError(f"views: {name} is a largest size and cannot be negative, got {getattr(self, name)}")
        if self.shear >= 90:
            raise InputError(f"views: shear is an angle below 90 degrees, got {self.shear}")
        if self.elastic_smooth < 2:
            raise InputError(
                f"views: elastic_smooth (control points per side) is at least 2, got {self.elastic_smooth}"
            )
        if self.size is not None and self.size < 1:
            raise InputError(f"views: size is a number of pixels, at least 1, got {self.size}")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random view of each image: [B, C, H, W] -> float32 [B, C, size, size]."""
        return image_views(images, self, generator)

    def with_geometry(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """One random view of each image, the same as a call draws, and where in the image it lies.

        Returns:
            The views, and float32 [B, 4]: left, top, right and bottom edge of each view as shares of the image's width and
            height. Of a mirrored view left and right are exchanged, so that left + share * (right - left) always says where a
            place of the view comes from.

        Raises:
            InputError: views that turn, slant or bend, so that four numbers could not say where they lie.
        """
        if self.rotate or self.shear or self.translate or self.elastic or tuple(self.scale) != (1.0, 1.0):
            raise InputError("views: only crops and mirrors have a geometry of four numbers; leave the other moves out")
        with _full_precision(images.device):
            view, boxes, flip = _view(images, self, generator)
            x, y, w, h = boxes.unbind(1)
            left, right = (x, x + w) if flip is None else (torch.where(flip, x + w, x), torch.where(flip, x, x + w))
            return view, torch.stack((left, y, right, y + h), dim=1)


SIMCLR = ImageViews()
"""Chen et al. 2020 (arXiv 2002.05709), appendix A: colour strength 1, blur half of the time."""

SIMCLR_SMALL = replace(SIMCLR, jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0)
"""Chen et al. 2020, appendix B.9 (CIFAR-10): colour strength 0.5, no blur."""

MOCO_V1 = replace(SIMCLR, crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, blur=0.0)
"""He et al. 2020 (arXiv 1911.05722), section 3.3; strengths as in the released code, without its order (grey first)."""

MOCO_V2 = replace(SIMCLR, crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1))
"""Chen et al. 2020 (arXiv 2003.04297), section 3; strengths as in the released code."""

BYOL_1 = replace(SIMCLR, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0)
"""Grill et al. 2020 (arXiv 2006.07733), table 6, first view: always blurred, never solarised."""

BYOL_2 = replace(BYOL_1, blur=0.1, solarise=0.2)
"""Grill et al. 2020, table 6, second view: seldom blurred, sometimes solarised."""

BYOL = (BYOL_1, BYOL_2)

SIMSIAM = MOCO_V2
"""Chen and He 2021 (arXiv 2011.10566), section 4, baseline settings: MoCo v2's views."""

SWAV = replace(SIMCLR, crop=(0.14, 1.0))
"""Caron et al. 2020 (arXiv 2006.09882), large views beside small ones, as released; without small ones they take SIMCLR."""

SWAV_SMALL = replace(SIMCLR_SMALL, crop=(0.3, 1.0))
"""The same for small images, whose small views then show less than the large ones (multi-crop-small). Ours."""

SIMCLR_ADAINF = replace(SIMCLR, crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.4)
"""Wang et al. 2024 (arXiv 2403.12448), released symmetric_adainf: milder crops, half of SIMCLR's colour, half as often."""

BYOL_ADAINF_1 = ImageViews(crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.4, blur=0.0)
"""Wang et al. 2024, released asymmetric_adainf, first view."""

BYOL_ADAINF_2 = replace(BYOL_ADAINF_1, solarise=0.2)
"""Wang et al. 2024, released asymmetric_adainf, second view."""

CLOTHES = replace(SIMCLR_SMALL, crop=(0.3, 1.0), grey=0.0)
"""For small centred grey pictures such as Fashion-MNIST: milder crops, brightness and contrast only. Ours."""

UPRIGHT = replace(CLOTHES, crop=(0.5, 1.0), ratio=(1.0, 1.0), flip=0.0)
"""For pictures whose direction is what is to be known: `CLOTHES` without mirror and uneven crops. Ours."""

SUPERVISED = replace(SIMCLR_SMALL, crop=(0.7, 1.0), grey=0.0)
"""For training with labels: most of the image, mirror, brightness and colour. Crop as in erow/vitookit's CIFAR-10 recipe."""

FINE_TUNING = ImageViews(
    crop=(0.88, 0.89),
    ratio=(1.0, 1.0),
    jitter=(0.0, 0.0, 0.0, 0.0),
    jitter_p=0.0,
    grey=0.0,
    blur=0.0,
    rotate=15.0,
)
"""Zhang et al. 2021 (arXiv 2102.06605), released script: 256 of 272 pixels at random, turned by up to 15 degrees, mirror."""

HANDWRITING = ImageViews(
    crop=None,
    flip=0.0,
    jitter=(0.0, 0.0, 0.0, 0.0),
    jitter_p=0.0,
    grey=0.0,
    blur=0.0,
    rotate=20.0,
    shear=15.0,
    translate=0.12,
    scale=(0.7, 1.3),
    elastic=0.04,
    thickness=0.5,
)
"""Our own choice for drawn characters: what varies between two drawings of the same character, and nothing that could
turn one character into another (no mirror, no small crop)."""


HALLUCINATOR_2 = replace(SIMCLR_SMALL, crop=(0.2, 1.0))
"""Wu et al. 2023 (arXiv 2307.12168), released configurations for small images: MoCo v2's views without blur."""

HALLUCINATOR_1 = replace(HALLUCINATOR_2, crop_centre=(0.25, 0.75), crop_beta=0.1)
"""The same with a centre-suppressed crop (Peng et al. 2022, arXiv 2202.03278, whose box is the centre here)."""


def with_strength(views: ImageViews, strength: float) -> ImageViews:
    """The same views, stronger or weaker by one number: 1 leaves them, 0.5 turns SIMCLR into SIMCLR_ADAINF.

    The colour jitter, its probability and its strengths both, is multiplied by `strength`; the smallest crop is multiplied
    by 2.5 for each half that `strength` is below 1 (0.08, 0.2, 0.5).

    Raises:
        InputError: a negative strength.
    """
    if not 0 <= strength < math.inf:
        raise InputError(f"views: the strength is a number from 0 on, got {strength}")
    crop = views.crop
    if crop is not None:
        crop = (min(crop[0] * 6.25 ** (1 - strength), crop[1]), crop[1])
    brightness, contrast, saturation, hue = (strength * each for each in views.jitter)
    jitter, probability = (brightness, contrast, saturation, min(0.5, hue)), min(1.0, strength * views.jitter_p)
    return replace(views, crop=crop, jitter=jitter, jitter_p=probability)


def without_overlay(batch: dict[str, Tensor], p: float, generator: torch.Generator | None = None) -> Tensor:
    """The images of a batch, each with probability p without what was painted over it (``batch["background"]``).

    Each call draws anew, so that two views of an image may differ in it.

    Args:
        batch: with "image" and "background", uint8 [B, C, H, W]; see `counterpoint.data.composites`.
        p: probability of losing the overlay.
        generator: source of the draws; None is the global generator of the images' device.

    Raises:
        InputError: images without anything painted over them, or no probability.
    """
    if not 0 <= p <= 1:
        raise InputError(f"views: the probability of losing the overlay must be between 0 and 1, got {p}")
    if p == 0:
        return batch["image"]
    if "background" not in batch:
        raise InputError("these images have no overlay to lose: take a composite such as cifar-fashion, or p = 0")
    lost = _uniform(batch["image"], 1, generator)[0] < p
    return torch.where(lost[:, None, None, None], batch["background"], batch["image"])


def image_views(images: Tensor, views: ImageViews, generator: torch.Generator | None = None) -> Tensor:
    r"""One random view of each image of a batch.

    Order: geometry, stroke thickness, colour, clamp to [0, 1], blur, solarise, normalise. Outside the image the nearest
    edge pixel is repeated. An image of which a view shows more than twice as many pixels as it has is first averaged
    down to twice its size, because bilinear sampling alone would alias.

    Args:
        images: uint8 (0 to 255) or floating (0 to 1) [B, C, H, W]; C is 1 or 3, any C where no colour is changed.
        views: the choices.
        generator: source of all draws; None is the global generator of the images' device. Draws of a generator of
            another device are moved.

    Returns:
        float32 [B, C, size, size] on the images' device, [B, C, H, W] when `views.size` is None.

    Raises:
        InputError: not a batch of images, no images, or a number of channels that the choices do not fit.
    """
    return _view(images, views, generator)[0]


def _view(images: Tensor, views: ImageViews, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The view, and the boxes (x, y, w, h) and mirrors it was sampled by."""
    _check(images, views)
    with _full_precision(images.device):
        x = _unit_range(images)
        x, boxes, flip = _geometry(x, views, generator)
        if views.thickness:
            x = thickness(x, *_thickness_draws(x, views, generator))
        if _changes_colour(views):
            x = colour(x, *_colour_draws(x, views, generator))
        if views.blur:
            x = blur(x, _blur_draws(x, views, generator))
        if views.solarise:
            apply = _uniform(x, 1, generator)[0] < views.solarise
            x = torch.where(apply[:, None, None, None] & (x >= 0.5), 1 - x, x)
        return x, boxes, flip


def plain(
    images: Tensor,
    size: int | None = None,
) -> Tensor:
    """The images without randomness: shorter side resized to `size` (antialiased), centre crop.

    Args:
        images: uint8 (0 to 255) or floating (0 to 1) [B, C, H, W].
        size: side of the output in pixels; None keeps height and width.

    Returns:
        float32 [B, C, size, size] in 0 to 1: normalising is the encoder's business.

    Raises:
        InputError: not a batch of images.
    """
    _check(images, None)
    with _full_precision(images.device):
        return _resize(_unit_range(images), size)


def montage(
    images: Tensor,
    views: ImageViews | Sequence[ImageViews],
    rows: int = 8,
    cols: int = 8,
    generator: torch.Generator | None = None,
) -> "np.ndarray":
    """A picture of what the network sees: per row one original (left, framed off), then `cols` random views of it.

    Args:
        images: [B, C, H, W]; the first `rows` of them are shown.
        views: one argument set, or several that alternate from column to column.

    Returns:
        uint8 array [height, width, C].
    """
    sets = (views,) if isinstance(views, ImageViews) else tuple(views)
    shown = images[:rows]
    columns = [sets[i % len(sets)](shown, generator) for i in range(cols)]
    height, width = columns[0].shape[-2:] if columns else shown.shape[-2:]
    original = _unit_range(shown)
    if original.shape[-2:] != (height, width):
        original = _resize(original, height)
    gap = max(2, width // 16)
    tiles = [F.pad(original, (gap, 3 * gap, gap, 0), value=_FRAME)]
    tiles += [F.pad(column, (0, gap, gap, 0), value=_FRAME) for column in columns]
    picture = torch.cat(tiles, dim=3).permute(0, 2, 3, 1).flatten(0, 1)
    picture = F.pad(picture, (0, 0, 0, 0, 0, gap), value=_FRAME)
    result: np.ndarray = picture.mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return result


# ---------------------------------------------------------------------------------------------------------- geometry


def crop_boxes(height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], draws: Tensor) -> Tensor:
    """Random resized crops (x, y, w, h), shares of width and height, from uniform draws [2 * tries + 2, B].

    Area share uniform, aspect ratio log-uniform; the first of the tries that fits inside the image counts, and if none
    does, the largest centred box whose ratio is within bounds (Szegedy et al. 2015, as torchvision has it, but not
    rounded to whole pixels).
    """
    tries = (draws.shape[0] - 2) // 2
    share = area[0] + (area[1] - area[0]) * draws[:tries]
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[tries : 2 * tries])
    aspect = aspect * (height / width)
    w, h = torch.sqrt(share * aspect), torch.sqrt(share / aspect)
    fits = (w <= 1) & (h <= 1)
    first = fits.int().argmax(dim=0, keepdim=True)
    found = fits.any(dim=0)
    limit = min(max(width / height, ratio[0]), ratio[1]) * (height / width)
    w = torch.where(found, w.gather(0, first)[0], min(1.0, limit))
    h = torch.where(found, h.gather(0, first)[0], min(1.0, 1 / limit))
    # the fallback box is centred: both draws count as one half there
    left, top = torch.where(found, draws[-2:], 0.5)
    return torch.stack((left * (1 - w), top * (1 - h), w, h), dim=1)


def centred_boxes(boxes: Tensor, centre: tuple[float, float], beta: float, draws: Tensor) -> Tensor:
    """Crops of the same sizes whose centres are drawn between bounds, from uniform draws [2, 2 * tries, B].

    The bounds of the upper left corner are those of the centre less half the crop, moved into the image; between them it
    falls by Beta(beta, beta), drawn by Johnk's rejection (Peng et al. 2022, arXiv 2202.03278, not rounded to whole pixels).
    """
    size = boxes[:, 2:].T
    low, high = ((bound - size / 2).clamp(min=0).minimum(1 - size) for bound in centre)
    one, other = draws.clamp(min=torch.finfo(draws.dtype).tiny).log().div(beta).chunk(2, dim=1)
    accepted = torch.logaddexp(one, other) <= 0
    # of draws that were all rejected the first counts; a probability of 2 ** -tries at most
    first = accepted.int().argmax(dim=1, keepdim=True)
    place = torch.sigmoid(one - other).gather(1, first)[:, 0]
    return torch.cat((low + (high - low) * place, size)).T


def sampling_map(
    boxes: Tensor,
    flip: Tensor | None = None,
    angle: Tensor | None = None,
    shear: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    aspect: float = 1.0,
) -> Tensor:
    """Where in the input each output position lies: affine maps [B, 2, 3] in grid_sample's coordinates (-1 to 1).

    Args:
        boxes: [B, 4] (x, y, w, h) as shares of the input's width and height: the part shown when nothing else is asked.
        flip: [B] bool, mirror left and right.
        angle: [B] radians, clockwise turn of the content.
        shear: [B] radians, slant of the content along x: what is below moves to the right.
        scale: [B] magnification of the content.
        shift: [B, 2] movement of the content to the right and down, shares of the side.
        aspect: width / height of the output, so that a turn is a turn in a view that is not square.
    """
    count, device = boxes.shape[0], boxes.device
    zero, one = torch.zeros(count, device=device), torch.ones(count, device=device)
    angle = zero if angle is None else angle
    slant = zero if shear is None else torch.tan(shear)
    zoom = one if scale is None else scale
    side = one if flip is None else 1 - 2 * flip.to(torch.float32)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # the inverse of content = rotate(shear(zoom * .)): output position -> content position
    a, b = cos + slant * sin, sin - slant * cos
    c, d = -sin, cos
    b, c = b / aspect, c * aspect
    tx, ty = (zero, zero) if shift is None else (-2 * shift[:, 0], -2 * shift[:, 1])
    ox, oy = a * tx + b * ty, c * tx + d * ty
    x, y, w, h = boxes.unbind(1)
    # the crop is mirrored first, so that its content then turns and moves as asked
    across = w * side
    rows = (across * a, across * b, across * ox + 2 * x + w - 1, h * c, h * d, h * oy + 2 * y + h - 1)
    return torch.stack(rows, dim=1).view(count, 2, 3)


def resample(images: Tensor, maps: Tensor, height: int, width: int, bumps: Tensor | None = None) -> Tensor:
    """Images [B, C, H, W] through affine maps [B, 2, 3], after an optional smooth displacement of the output positions.

    Args:
        bumps: [B, 2, k, k] displacement of k x k control points in x and y, shares of the side, interpolated
            bicubically in between.
    """
    basis = _basis(height, width, 0 if bumps is None else bumps.shape[-1], images.device)
    if bumps is not None:
        maps = torch.cat((maps, maps[:, :, :2] @ (2 * bumps.flatten(2))), dim=2)
    grid = (maps.flatten(0, 1) @ basis).view(-1, 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@lru_cache(maxsize=32)
def _basis(height: int, width: int, points: int, device: torch.device) -> Tensor:
    """What every grid is made of: x, y, 1 and one bump per control point, [3 + points^2, height * width]."""
    with torch.inference_mode(False), torch.no_grad():
        x = (2 * torch.arange(width, device=device, dtype=torch.float32) + 1) / width - 1
        y = (2 * torch.arange(height, device=device, dtype=torch.float32) + 1) / height - 1
        rows = [x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width, device=device)]
        if points:
            unit = torch.eye(points**2, device=device).view(1, points**2, points, points)
            rows += list(F.interpolate(unit, (height, width), mode="bicubic", align_corners=True)[0])
        return torch.stack(rows).flatten(1)


def _geometry(x: Tensor, views: ImageViews, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor | None]:
    height, width = x.shape[-2:]
    out_height, out_width = (height, width) if views.size is None else (views.size, views.size)
    affine = bool(views.rotate or views.shear or views.translate or tuple(views.scale) != (1.0, 1.0))
    count, device = x.shape[0], x.device
    # the part that fills the view without stretching it
    w, h = (1.0, 1.0) if views.size is None else (min(1.0, height / width), min(1.0, width / height))
    boxes = _constant(((1 - w) / 2, (1 - h) / 2, w, h), device).expand(count, 4)

    if not (views.crop or affine or views.elastic):
        x = _resize(x, views.size)
        mirrored = _uniform(x, 1, generator)[0] < views.flip if views.flip else None
        if mirrored is not None:
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, boxes, mirrored

    # of a small crop more detail is shown than of the whole
    shown = math.sqrt(views.crop[1]) if views.crop else 1.0
    enough = max(2 * out_height / height, 2 * out_width / width) / shown
    if enough < 1:
        x = F.interpolate(x, (math.ceil(height * enough), math.ceil(width * enough)), mode="area")

    if views.crop:
        draws = _uniform(x, 2 * _CROP_TRIES + 2, generator)
        boxes = crop_boxes(height, width, views.crop, views.ratio, draws)
        if views.crop_centre:
            draws = _draw(torch.rand, (2, 2 * _CENTRE_TRIES, count), device, generator)
            boxes = centred_boxes(boxes, views.crop_centre, views.crop_beta, draws)

    flip = _uniform(x, 1, generator)[0] < views.flip if views.flip else None
    angle = shear = scale = shift = None
    if affine:
        u = _uniform(x, 5, generator)
        angle = math.radians(views.rotate) * (2 * u[0] - 1)
        shear = math.radians(views.shear) * (2 * u[1] - 1)
        # log-uniform: half as large is as likely as twice as large
        scale = views.scale[0] * torch.exp(math.log(views.scale[1] / views.scale[0]) * u[2])
        shift = views.translate * (2 * u[3:5].T - 1)
    maps = sampling_map(boxes, flip, angle, shear, scale, shift, aspect=out_width / out_height)
    bumps = None
    if views.elastic:
        k = views.elastic_smooth
        bumps = views.elastic * _draw(torch.randn, (count, 2, k, k), device, generator)
    return resample(x, maps, out_height, out_width, bumps), boxes, flip


def _resize(x: Tensor, size: int | None) -> Tensor:
    height, width = x.shape[-2:]
    if size is None or (height, width) == (size, size):
        return x
    short = min(height, width)
    new = (max(size, round(height * size / short)), max(size, round(width * size / short)))
    if new != (height, width):
        x = F.interpolate(x, new, mode="bilinear", antialias=True, align_corners=False)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return x[..., top : top + size, left : left + size]


# ------------------------------------------------------------------------------------------------- strokes and colour


def _thickness_draws(x: Tensor, views: ImageViews, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    u = _uniform(x, 3, generator)
    # at full strength a stroke of one pixel would be thinned to nothing
    return torch.where(u[0] < 0.5, -1.0, 1.0), torch.where(u[1] < views.thickness, 0.8 * u[2], 0.0)


def thickness(x: Tensor, sign: Tensor, strength: Tensor) -> Tensor:
    """Blend with the 3 x 3 maximum (sign +1) or minimum (sign -1): bright strokes grow or thin, dark ones the reverse.

    The darkest and the brightest value of each image are kept, so that a thinned stroke is thin and not faint.

    Args:
        x: [B, C, H, W].
        sign: [B], +1 or -1.
        strength: [B] from 0 (unchanged) to below 1.
    """
    wide_sign, wide_strength = sign[:, None, None, None], strength[:, None, None, None]
    # the minimum is the negative maximum of the negative, so one pooling serves both; separable: two passes of 3
    pooled = F.max_pool2d(F.max_pool2d(x * wide_sign, (1, 3), 1, (0, 1)), (3, 1), 1, (1, 0))
    y = torch.lerp(x, pooled.mul_(wide_sign), wide_strength)
    old_low, old_high = torch.aminmax(x.flatten(1), dim=1)
    low, high = torch.aminmax(y.flatten(1), dim=1)
    gain = (old_high - old_low) / (high - low).clamp_min(1e-6)
    # an image that became constant has no range to restore
    gain = torch.where((high - low > 1e-6) & (strength > 0), gain, 1.0)
    offset = torch.where(gain == 1.0, 0.0, old_low - low * gain)
    return torch.addcmul(offset[:, None, None, None], y, gain[:, None, None, None])


def _changes_colour(views: ImageViews) -> bool:
    return bool(views.grey or (views.jitter_p and any(views.jitter)))


def _colour_draws(
    x: Tensor, views: ImageViews, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    u = _uniform(x, 6, generator)
    low = _constant((*(max(0.0, 1 - s) for s in views.jitter[:3]), -views.jitter[3]), x.device)[:, None]
    high = _constant((*(1 + s for s in views.jitter[:3]), views.jitter[3]), x.device)[:, None]
    still = _constant((1.0, 1.0, 1.0, 0.0), x.device)[:, None]
    factors = torch.where(u[4] < views.jitter_p, low + (high - low) * u[:4], still)
    brightness, contrast, saturation, hue = factors
    if x.shape[1] != 3:
        return brightness, contrast, None, None
    return brightness, contrast, torch.where(u[5] < views.grey, 0.0, saturation), hue


def colour(
    x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor | None = None, hue: Tensor | None = None
) -> Tensor:
    """Brightness, contrast, saturation and hue in one affine colour matrix per image, then clamped to [0, 1].

    Args:
        x: [B, 1 or 3, H, W] in 0 to 1.
        brightness: [B] factor.
        contrast: [B] factor about the mean luma of the image.
        saturation: [B] factor about the luma of each pixel; 0 is greyscale. Only for three channels.
        hue: [B] shares of a full turn, in the direction red, yellow, green. Only for three channels.
    """
    gain, lift = brightness * contrast, brightness * (1 - contrast)
    if x.shape[1] == 1:
        offset = lift * x.mean(dim=(1, 2, 3))
        return torch.addcmul(offset[:, None, None, None], x, gain[:, None, None, None]).clamp_(0, 1)
    flat = x.flatten(2)
    offset = lift * (flat.mean(dim=2) @ _constant(LUMA, x.device))
    matrix = gain[:, None, None] * _colour_matrix(saturation, hue, x.shape[0], x.device)
    return torch.baddbmm(offset[:, None, None], matrix, flat).view(x.shape).clamp_(0, 1)


def _colour_matrix(saturation: Tensor | None, hue: Tensor | None, count: int, device: torch.device) -> Tensor:
    """s H + (1 - s) G, [B, 3, 3]."""
    still, even, odd = _constant(_HUE_PARTS, device).view(3, 3, 3)
    if hue is None:
        turned = (still + even).expand(count, 3, 3)
    else:
        angle = (2 * math.pi * hue)[:, None, None]
        turned = still + torch.cos(angle) * even + torch.sin(angle) * odd
    if saturation is None:
        return turned
    return torch.lerp(still.expand(count, 3, 3), turned, saturation[:, None, None])


# ------------------------------------------------------------------------------------------------------------- blur


def _blur_draws(x: Tensor, views: ImageViews, generator: torch.Generator | None) -> Tensor:
    u = _uniform(x, 2, generator)
    sigma = views.blur_sigma[0] + (views.blur_sigma[1] - views.blur_sigma[0]) * u[1]
    return torch.where(u[0] < views.blur, sigma, 0.0)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma (pixels) per image, 0 leaves the image as it is; edges reflect.

    The kernel covers a tenth of the shorter side, an odd number of pixels and at least 3 (SimCLR, appendix A).
    """
    batch, channels, height, width = x.shape
    reach = max(1, round((min(height, width) / 10 - 1) / 2))
    steps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    spread = torch.where(sigma > 0, sigma, 1.0)
    taps = torch.exp(-0.5 * (steps / spread[:, None]) ** 2)
    taps = torch.where(sigma[:, None] > 0, taps / taps.sum(dim=1, keepdim=True), (steps == 0).to(x.dtype))
    taps = taps.repeat_interleave(channels, dim=0)[:, None, :, None]
    flat = x.reshape(1, batch * channels, height, width)
    # replicated edges only where a side is too short to reflect
    mode = "reflect" if reach < min(height, width) else "replicate"
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode=mode), taps, groups=batch * channels)
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode=mode), taps.transpose(2, 3), groups=batch * channels)
    return flat.view(x.shape)


# ----------------------------------------------------------------------------------------------------- in and out


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    # under autocast the matrix product that makes the grid would run in 8 bits of mantissa: off by whole pixels
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _draw(
    kind: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    source = device if generator is None else generator.device
    return kind(shape, generator=generator, device=source).to(device, non_blocking=True)


def _uniform(x: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
    """Uniform draws [rows, B] on the device of x."""
    return _draw(torch.rand, (rows, x.shape[0]), x.device, generator)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small float32 vector, kept: copying one to a GPU anew makes the host wait for everything queued there."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _unit_range(images: Tensor) -> Tensor:
    if images.is_floating_point():
        return images.to(torch.float32)
    return images.to(torch.float32).div_(255)


def _check(images: Tensor, views: ImageViews | None) -> None:
    if images.dim() != 4 or 0 in images.shape:
        raise InputError(f"images must be a batch [B, C, H, W] with nothing empty, got shape {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputError(f"images must be uint8 (0 to 255) or floating point (0 to 1), got {images.dtype}")
    if views is not None and _changes_colour(views) and images.shape[1] not in (1, 3):
        raise InputError(
            f"colour jitter and greyscale need 1 or 3 channels, got {images.shape[1]}; set jitter_p=0 and grey=0"
        )
