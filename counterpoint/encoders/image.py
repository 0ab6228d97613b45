"""Image encoders: any timm model by name, and one small convolutional net that two CPU cores can train."""

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterpoint.contrast import unit
from counterpoint.errors import InputError, nearest
from counterpoint.views import plain

SMALL_IMAGE = 64
"""Largest image side, in pixels, at which a ResNet gets the stem for small images."""

log = logging.getLogger("counterpoint")


class Features(NamedTuple):
    """What an encoder returns.

    Attributes:
        pooled: [B, D], one vector an image.
        tokens: [B, N, D] for models whose last features are a sequence (vision transformers), prefix tokens included.
        map: [B, D, H, W] for models whose last features are an image (convolutional nets).
    """

    pooled: Tensor
    tokens: Tensor | None = None
    map: Tensor | None = None


class ImageEncoder(nn.Module):
    """A net from images [B, C, H, W] to `Features`.

    Attributes:
        dim: length D of the pooled vector.
        name: the name it was built by.
        image_size: side in pixels of the images it was built for.
        channels: channels of the images.
        small_stem: whether the stem was replaced by the one for small images.
    """

    dim: int
    name: str
    image_size: int
    channels: int
    small_stem: bool = False

    def forward(self, images: Tensor) -> Features:
        raise NotImplementedError

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled vectors [B, D] of whole images, brought to the encoder's size without any random view."""
        return self(plain(batch["image"], self.image_size)).pooled

    @torch.no_grad()
    def takes(self, size: int) -> bool:
        """Whether images of another side go through as well: one is tried, which changes no statistics."""
        training, some = self.training, next(self.parameters())
        self.eval()
        try:
            return bool(self(some.new_zeros(1, self.channels, size, size)).pooled.isfinite().all())
        except (RuntimeError, AssertionError, ValueError, IndexError):
            return False
        finally:
            self.train(training)


def image(
    name: str = "resnet18", *, image_size: int = 224, channels: int = 3, pretrained: bool = False
) -> ImageEncoder:
    """Build an image encoder without a classifier.

    Up to 64 pixels a ResNet gets the stem that is usual for small images: its first convolution keeps the resolution
    (7 x 7 with stride 2 becomes 3 x 3 with stride 1) and the max-pooling after it goes, because the ordinary stem would
    shrink a 32-pixel image to 8 pixels before the first block. The log says so (logger "counterpoint").

    Source: Chen et al. 2020 (arXiv 2002.05709), appendix B.9, for the stem.

    Args:
        name: "convnet" or "convnet-W" (ours, W channels in the first stage) or any name that timm knows.
        image_size: side of the images in pixels; decides the stem, and the position embeddings of models that have
            a fixed size.
        channels: channels of the images.
        pretrained: load timm's pretrained weights (needs the network or timm's cache).

    Raises:
        InputError: an unknown name, sizes that make no sense, or pretrained weights that do not exist or cannot be had.
    """
    if image_size < 1 or channels < 1:
        raise InputError(
            f"an image encoder needs image_size and channels of at least 1, got {image_size} and {channels}"
        )
    if ours := re.fullmatch(r"convnet(?:-(\d+))?", name):
        if pretrained:
            raise InputError(f"{name} has no pretrained weights; leave pretrained out or choose a timm model")
        return ConvNet(width=int(ours[1] or 16), channels=channels, image_size=image_size, name=name)
    return TimmEncoder(name, image_size=image_size, channels=channels, pretrained=pretrained)


def integrated(parts: Sequence[Tensor]) -> Tensor:
    """One embedding from several of the same items: raw vectors [B, D_k] one after another, then L2-normalised once.

    A part counts by the length of its vectors, which normalising each first would take away.

    Source: Zhang et al. 2024 (arXiv 2402.11816), released notebook.
    """
    return unit(torch.cat(list(parts), dim=1))


class Concatenated(ImageEncoder):
    """Several encoders of one image size as one, see `integrated`; D is the sum of theirs."""

    def __init__(self, parts: Sequence[ImageEncoder]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.name = " + ".join(part.name for part in parts)
        self.dim = sum(part.dim for part in parts)
        self.image_size, self.channels = parts[0].image_size, parts[0].channels

    def forward(self, images: Tensor) -> Features:
        return Features(pooled=integrated([part(images).pooled for part in self.parts]))


class ConvNet(ImageEncoder):
    """Our small net: widths w, 2w, 4w, 8w at 1/2, 1/2, 1/4, 1/8 of the image's side; D = 8w.

    Stem and stages are 3 x 3 convolutions with batch normalisation and ReLU; the last two stages add a residual one.
    Everything costly happens at low resolution: the stem is pooled before it is normalised, and stages pool before they
    widen. Made for images up to 64 pixels; of larger ones the stem takes fewer positions. Channels-last inside, the
    faster layout on CPUs too.

    Args:
        width: channels of the first stage.
        channels: channels of the images.
        image_size: side of the images in pixels.
    """

    def __init__(self, width: int = 16, channels: int = 3, image_size: int = 32, name: str | None = None) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"convnet: the width is a number of channels, at least 1, got {width}")
        self.name = name or f"convnet-{width}"
        self.dim, self.image_size, self.channels = 8 * width, image_size, channels
        stride = max(1, image_size // SMALL_IMAGE)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 2 * stride + 1, stride, stride, bias=False),
            _Halve(),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential(
            _conv_bn(width, 2 * width),
            _Halve(),
            _conv_bn(2 * width, 4 * width),
            _Residual(_conv_bn(4 * width, 4 * width)),
            _Halve(),
            _conv_bn(4 * width, 8 * width),
            _Residual(_conv_bn(8 * width, 8 * width)),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Features:
        x = self.stages(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return Features(pooled=x.mean(dim=(2, 3)), map=x)


class _Halve(nn.Module):
    """2 x 2 max-pooling, unless a side is a single pixel already."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _conv_bn(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class TimmEncoder(ImageEncoder):
    """A timm model without its classifier; `model` is the timm model itself.

    Images in 0 to 1 are normalised by the mean and deviation that timm gives for that model.

    Args:
        name: a name that timm knows, with or without a pretraining tag.
        image_size: side of the images in pixels.
        channels: channels of the images.
        pretrained: load timm's weights for that name.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, image_size: int = 224, channels: int = 3, pretrained: bool = False) -> None:
        super().__init__()
        self.name, self.image_size, self.channels = name, image_size, channels
        self.model = _timm_model(name, image_size, channels, pretrained)
        self.dim = self.model.head_hidden_size if hasattr(self.model, "head_hidden_size") else self.model.num_features
        self._channels_last_output = getattr(self.model, "output_fmt", None) == "NHWC"
        if image_size <= SMALL_IMAGE and _is_resnet(self.model):
            replaced = _small_stem(self.model, channels)
            self.small_stem = True
            new = "; that convolution is new, so its pretrained weights are not used" if replaced and pretrained else ""
            log.info(
                "%s: images of %d px are small, so the stem keeps their resolution (3x3 convolution, no pooling)%s",
                name,
                image_size,
                new,
            )
        mean, std = (
            self.model.pretrained_cfg.get(key) or default for key, default in (("mean", (0.5,)), ("std", (0.5,)))
        )
        if channels not in (1, len(mean)):
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        for key, values in (("mean", mean), ("std", std)):
            statistic = torch.tensor(values).reshape(-1, 1, 1)
            statistic = statistic.mean(0, keepdim=True) if channels == 1 else statistic
            self.register_buffer(key, statistic, persistent=False)

        self.model.to(memory_format=torch.channels_last)  # convolutions are faster so, on a CPU too

    def forward(self, images: Tensor) -> Features:
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        last = self.model.forward_features(images)
        pooled = self.model.forward_head(last, pre_logits=True).flatten(1)
        if last.dim() == 3:
            return Features(pooled=pooled, tokens=last)
        if last.dim() == 4:
            return Features(pooled=pooled, map=last.permute(0, 3, 1, 2) if self._channels_last_output else last)
        return Features(pooled=pooled)


def _timm_model(name: str, image_size: int, channels: int, pretrained: bool) -> Any:
    import timm

    on_a_hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not on_a_hub and not timm.is_model(name):
        known = ["convnet", *timm.list_models()]
        raise InputError(f'no image encoder named "{name}"{nearest(name, known)} (timm.list_models() lists them)')
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": channels}
    fixed = None if on_a_hub else timm.get_pretrained_cfg(name, allow_unregistered=True)
    # nets without a fixed size do not know the argument, and some with one do not either
    sized = fixed is not None and fixed.fixed_input_size and fixed.input_size[-1] != image_size
    try:
        if sized:
            with suppress(TypeError):
                model: nn.Module = timm.create_model(name, **options, img_size=image_size)
                return model
        model = timm.create_model(name, **options)
        return model
    except Exception as error:
        if not pretrained:
            raise InputError(
                f"{name} cannot be built for images of {image_size} px and {channels} channels: {error}"
            ) from error
        raise InputError(f"the pretrained weights of {name} could not be loaded: {error}") from error


def _is_resnet(model: nn.Module) -> bool:
    return isinstance(getattr(model, "maxpool", None), nn.Module) and isinstance(
        getattr(model, "conv1", None), nn.Conv2d | nn.Sequential
    )


def _small_stem(model: nn.Module, channels: int) -> bool:
    """Make the stem keep the resolution; whether that took a new convolution."""
    stem = model.conv1
    if isinstance(stem, nn.Sequential):
        # a deep stem is 3x3 already: only its stride goes
        for layer in stem:
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
    else:
        assert isinstance(stem, nn.Conv2d)
        fresh = nn.Conv2d(channels, stem.out_channels, kernel_size=3, stride=1, padding=1, bias=stem.bias is not None)
        nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = fresh
    model.maxpool = nn.Identity()
    return not isinstance(stem, nn.Sequential)
