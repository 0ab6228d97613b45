"""Image-text encoders: an image tower and a text tower that end in one space, made of our parts or loaded by open_clip."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.encoders.image import ImageEncoder
from counterpoint.encoders.image import image as image_encoder
from counterpoint.encoders.text import TextEncoder, folders_pooling, place_of
from counterpoint.encoders.text import text as text_encoder
from counterpoint.errors import InputError, nearest, one_line
from counterpoint.views import plain

OPEN_CLIP = "open_clip:"

TEXT = "transformer-256-4"
"""The text tower beside one of our image towers, when none is named."""

DIM, IMAGE_SIZE, MAX_LENGTH, TEMPERATURE = 512, 64, 77, 0.07
"""What our own towers take where nothing is said; 512, 77 and 0.07 are CLIP's."""


class Towers(nn.Module):
    """Two nets that end in one space.

    Attributes:
        dim: length of the vectors.
        image_size: side in pixels of the images.
        channels: channels of the images.
        max_length: tokens that a text is cut to.
        positions: most tokens that the text tower can take.
        tokenizer: of the texts; called as one of transformers.
        temperature: that training starts from; a checkpoint brings the one it learned.
        name: what the towers were built from.
    """

    dim: int
    image_size: int
    channels: int
    max_length: int
    positions: int
    tokenizer: Any
    temperature: float
    name: str

    def image(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0 to 1 -> [B, dim], not normalised."""
        raise NotImplementedError

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask [B, L] -> [B, dim], not normalised."""
        raise NotImplementedError

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Vectors [B, dim] of whole images, brought to the tower's size without any random view."""
        return self.image(plain(batch["image"], self.image_size))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        # nothing calls the pair itself: what is called are the nets inside
        for part in self.children():
            part.compile(*args, **kwargs)


class TwoTowers(Towers):
    """An image encoder and a text encoder, each with a linear map into the common space (no bias, as in CLIP).

    Args:
        images: the image encoder.
        texts: the text encoder.
        dim: length of the common vectors.
        max_length: tokens that a text is cut to.
    """

    def __init__(self, images: ImageEncoder, texts: TextEncoder, dim: int, max_length: int):
        super().__init__()
        self.images, self.texts = images, texts
        self.image_projection = _projection(images.dim, dim)
        self.text_projection = _projection(texts.dim, dim)
        self.name = f"{images.name} and {texts.name}"
        self.dim, self.image_size, self.channels = dim, images.image_size, images.channels
        self.tokenizer, self.max_length, self.positions = texts.tokenizer, max_length, texts.positions
        self.temperature = TEMPERATURE

    def image(self, images: Tensor) -> Tensor:
        return self.image_projection(self.images(images).pooled)

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text_projection(self.texts.pooled(input_ids, attention_mask))


class OpenClipTowers(Towers):
    """A model of open_clip; `model` is that model itself.

    Pixels are normalised by the mean and deviation that the model was made for. Texts are filled up to the context that its
    positions reach, as its own tokeniser does.

    Args:
        model: of open_clip, with any text tower.
        tokenizer: of the same model.
        dim: length of its vectors.
        max_length: tokens that a text is cut to.
        name: what it was loaded as.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: "OpenClipTokenizer", dim: int, max_length: int, name: str):
        super().__init__()
        self.model, self.tokenizer, self.name, self.dim = model, tokenizer, name, dim
        size = model.visual.image_size
        self.image_size, self.channels = int(size if isinstance(size, int) else size[0]), 3
        self.positions, self.max_length = tokenizer.context, max_length
        self.temperature = float((-model.logit_scale.detach()).exp())
        for key, values in (("mean", model.visual.image_mean), ("std", model.visual.image_std)):
            self.register_buffer(key, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        # the method owns the scale that is trained, and CoCa's decoder has no part in contrast
        for idle in ("logit_scale", "logit_bias", "text_decoder"):
            if getattr(model, idle, None) is not None:
                getattr(model, idle).requires_grad_(False)

    def image(self, images: Tensor) -> Tensor:
        return self.model.encode_image((images - self.mean) / self.std, normalize=False)

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        entire = F.pad(input_ids, (0, self.positions - input_ids.shape[1]), value=self.tokenizer.pad_token_id)
        return self.model.encode_text(entire, normalize=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        for part in self.model.children():
            part.compile(*args, **kwargs)


class OpenClipTokenizer:
    """A tokeniser of open_clip that is called, and answers, as one of transformers.

    Args:
        tokenizer: of open_clip.
        context: length to which it fills texts up.

    Attributes:
        pad_token_id: what it fills up with.
    """

    is_fast = False

    def __init__(self, tokenizer: Any, context: int):
        self.tokenizer, self.context = tokenizer, context
        self.pad_token_id = int(tokenizer([""], context_length=context)[0, -1])

    def __call__(
        self, sentences: str | Sequence[str], *, truncation: bool = True, max_length: int | None = None, **options: Any
    ) -> dict[str, list[list[int]]]:
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        if truncation:
            rows = list(self.tokenizer(sentences, context_length=max_length or self.context)) if sentences else []
        else:  # a text has no more tokens than bytes, its ends aside
            rows = [self.tokenizer([text], context_length=len(text.encode()) + 3)[0] for text in sentences]
        return {"input_ids": [row[: _used(row, self.pad_token_id)].tolist() for row in rows]}


def towers(
    image: str = "resnet18",
    text: str | dict[str, Any] | None = None,
    *,
    dim: int | None = None,
    image_size: int | None = None,
    channels: int = 3,
    max_length: int | None = None,
    pretrained: bool = False,
) -> Towers:
    """Build an image tower and a text tower.

    Args:
        image: "convnet", "convnet-32" or any timm model; or "open_clip:NAME", "open_clip:NAME/TAG" with pretrained weights,
            or "open_clip:NAME/FILE" with those of a local checkpoint. NAME may also be open_clip's "local-dir:FOLDER" or
            "hf-hub:OWNER/MODEL".
        text: the text tower as `counterpoint.encoders.text` takes it: "transformer-W-L" for a fresh one that reads bytes
            (without dropout, as in CLIP), a transformers model by name or folder, or a configuration. Its tokens are
            averaged unless a sentence-transformers folder says otherwise: the first token of a model that reads from left
            to right has seen nothing. None is "transformer-256-4". A model of open_clip brings its own.
        dim: length of the common vectors; None is 512, or the open_clip model's own.
        image_size: side in pixels; None is 64, or the open_clip model's own.
        channels: of the images; open_clip takes 3.
        max_length: tokens that texts are cut to; None is 77, or the open_clip model's own.
        pretrained: load timm's weights into the image tower. (Which weights an open_clip model gets is said by its tag.)

    Raises:
        InputError: nothing of that name, sizes that do not fit, a tokeniser that cannot pad, weights that cannot be had, or
            a package that is not installed.
    """
    if dim is not None and dim < 1:
        raise InputError(f"dim must be at least 1, not {dim}")
    if image.startswith(OPEN_CLIP):
        if text is not None:
            raise InputError(f"{image} brings its own text tower: leave text out, not {text!r}")
        if channels != 3:
            raise InputError(f"{image} takes images of 3 channels, not {channels}")
        return _open_clip(image, dim, image_size, max_length, pretrained)
    fresh = text is None or (isinstance(text, str) and re.fullmatch(r"transformer(-\d+-\d+)?", text) is not None)
    pooling = None if fresh or not isinstance(text, str) else folders_pooling(Path(place_of(text)).expanduser())
    texts = text_encoder(text or TEXT, pooling=pooling or "mean", dropout=0.0 if fresh else None)
    max_length = min(MAX_LENGTH, texts.positions) if max_length is None else max_length
    _check_length(max_length, texts.positions, texts.name)
    if texts.fresh:  # it never learns what a later position means
        texts.max_length = max_length
    side = IMAGE_SIZE if image_size is None else image_size
    images = image_encoder(image, image_size=side, channels=channels, pretrained=pretrained)
    return TwoTowers(images, texts, DIM if dim is None else dim, max_length)


def _projection(width: int, dim: int) -> nn.Linear:
    linear = nn.Linear(width, dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def _check_length(max_length: int, positions: int, name: str) -> None:
    if not 3 <= max_length <= positions:
        raise InputError(f"max_length of {name} must lie between 3 and {positions}, not {max_length}")


def _used(row: Tensor, pad: int) -> int:
    """How many tokens are left without the padding at the end."""
    inside = (row != pad).nonzero()
    return int(inside[-1]) + 1 if len(inside) else 0


def _open_clip(
    image: str, dim: int | None, image_size: int | None, max_length: int | None, pretrained: bool
) -> OpenClipTowers:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise InputError(f"{image} needs the package open_clip_torch: pip install counterpoint[image-text]") from error
    name, weights = name_and_weights(image.removeprefix(OPEN_CLIP), open_clip)
    if pretrained and not weights and ":" not in name:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise InputError(f"say which weights: {OPEN_CLIP}{name}/TAG, with one of the tags {tags}, or a file for TAG")
    with silent():
        try:
            model = open_clip.create_model(
                name, pretrained=weights or None, force_image_size=image_size, pretrained_text=bool(weights)
            )
            width = open_clip.get_model_config(name)["embed_dim"]
            context = int(model.context_length)
            tokenizer = OpenClipTokenizer(open_clip.get_tokenizer(name), context)
        except Exception as error:  # files, hubs and configurations each fail in their own way
            raise InputError(f"{image} could not be loaded: {one_line(error)}") from error
    if dim is not None and dim != width:
        raise InputError(f"the vectors of {image} have {width} dimensions: leave dim out, or say {width}, not {dim}")
    max_length = context if max_length is None else max_length
    _check_length(max_length, context, image)
    return OpenClipTowers(model, tokenizer, width, max_length, image)


def name_and_weights(given: str, open_clip: Any) -> tuple[str, str]:
    """("ViT-B-32", "laion2b_s34b_b79k") from "ViT-B-32/laion2b_s34b_b79k"; "" where no weights are named.

    Raises:
        InputError: no such model, or neither a tag of it nor a file.
    """
    if given.startswith(("hf-hub:", "local-dir:")):
        return given, ""
    known = open_clip.list_models()
    pieces = given.split("/")
    # from the longest, because names of models were once written with a slash: ViT-B/32
    name, weights = next(
        (
            ("-".join(pieces[:i]), "/".join(pieces[i:]))
            for i in range(len(pieces), 0, -1)
            if "-".join(pieces[:i]) in known
        ),
        ("", ""),
    )
    if not name:
        raise InputError(
            f'open_clip has no model "{pieces[0]}"{nearest(pieces[0], known)} (open_clip.list_models() lists them)'
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not weights or _plain_tag(weights) in map(_plain_tag, tags):
        return name, weights
    file = Path(weights).expanduser()
    if not file.is_file():
        listed = ", ".join(tags) or "none"
        raise InputError(
            f'"{weights}" is neither a file nor weights of {name}{nearest(weights, tags)}; its tags are {listed}'
        )
    return name, str(file)


def _plain_tag(tag: str) -> str:
    return tag.lower().replace("-", "_")


@contextmanager
def silent() -> Iterator[None]:
    """Without open_clip's running commentary, which it gives to the root logger (and would set that up)."""
    root, ignored = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(ignored)
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(ignored)
