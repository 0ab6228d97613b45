"""CLIP: an image picks its caption among all captions of the batch, and a caption its image."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint import contrast
from counterpoint.data import NAMES, ImageFiles, Images, captions, load, texts
from counterpoint.data.images import chosen
from counterpoint.encoders.image_text import towers
from counterpoint.encoders.several import Heads, Several
from counterpoint.errors import InputError
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.batches import Batches
from counterpoint.train.method import Batch, Method
from counterpoint.views import ImageViews

VIEWS = ImageViews(crop=(0.9, 1.0), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, grey=0.0, blur=0.0)
"""A random crop and nothing else: a mirror would turn "left" into "right", a jitter "red" into "brown"."""

MOST_SCALE = math.log(100)
"""Largest logarithm of the logit scale."""


class CLIP(Method):
    r"""Images pick their captions among all captions of the batch, and captions their images.

    .. math::
        \ell_i = \tfrac12 \Big[ -2 s\, u_i \cdot v_i + \log\sum_j e^{s\, u_i \cdot v_j} + \log\sum_j e^{s\, u_j \cdot v_i} \Big]

    with u the unit vectors of the images, v those of the captions, each from its own tower, and s the logit scale that is
    learned with them: its logarithm is a parameter, at most log 100, without weight decay. Of an image with several captions
    each step draws one.

    When to use it: pairs of images and texts, when images shall be found, sorted or named by words, also by words that no
    label list foresaw. It wants many pairs and large batches; with few, start from weights of open_clip.

    Defaults: temperature 0.07 at the start, 512 dimensions, texts of 77 tokens, a random crop as the only augmentation, all
    from the paper; the crop keeps at least 90 % of the area as in open_clip. Towers are of a size for one machine: a ResNet-18
    and a transformer of width 256 with 4 layers. The paper's batch of 32,768, AdamW with weight decay 0.2 and a rate of 5e-4
    (ViT-B/32) are a recipe, not a default.

    Equal captions in a batch are negatives of each other in the paper. Where captions repeat (made from class names, taken
    from product titles), ``duplicates="masked"`` leaves those pairs out of the sums.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020),
    sections 2.3 to 2.5 and figure 3; default crop: open_clip.

    Args:
        encoder: image tower: "convnet", "convnet-32" or any timm model; or both towers at once: "open_clip:NAME",
            "open_clip:NAME/TAG" or "open_clip:NAME/FILE"; see `counterpoint.encoders.image_text.towers`.
        text: text tower: "transformer-W-L" for a fresh one that reads bytes, a transformers model by name or folder, or a
            configuration; None takes "transformer-256-4", or the open_clip model's own.
        dim: length of the vectors; None is 512, or the open_clip model's own.
        image_size: side of the images in pixels; None is 64, or the open_clip model's own.
        channels: 3 for colour, 1 for grey.
        max_length: tokens that captions are cut to; None is 77, or the open_clip model's own.
        temperature: of the softmax, at the start; None is 0.07, or what an open_clip checkpoint learned.
        objective: "clip_loss", or any other objective of two views by name ("info_nce" is images to captions only,
            "sigmoid_loss", "nt_xent", "dcl" ...).
        duplicates: "negatives", or "masked": pairs with equal captions do not count as negatives.
        mixing: parts that make the pairs harder, by name ("mochi"); see `counterpoint.memory.mixing`.
        heads: several heads, by name ("several", "amcl"); see `counterpoint.encoders.several`. They share the `dim` dimensions:
            each is an even part of both towers' last linear layers, and stays when the model is used.
        views: the random views of the images.
        pretrained: start the image tower from timm's pretrained weights.
    """

    family = "pairs"

    def __init__(
        self,
        encoder: str = "resnet18",
        text: str | dict[str, Any] | None = None,
        dim: int | None = None,
        image_size: int | None = None,
        channels: int = 3,
        max_length: int | None = None,
        temperature: float | None = None,
        objective: str = "clip_loss",
        duplicates: Literal["negatives", "masked"] = "negatives",
        mixing: tuple[Mixing, ...] = (),
        heads: Heads | None = None,
        views: ImageViews = VIEWS,
        pretrained: bool = False,
    ):
        super().__init__()
        options: dict[str, Any] = {"dim": dim, "image_size": image_size, "channels": channels, "max_length": max_length}
        self.encoder = towers(encoder, text, pretrained=pretrained, **options)
        self.image_size, self.channels = self.encoder.image_size, channels
        if temperature is not None and not 0.01 <= temperature < math.inf:
            raise InputError(f"temperature must be a number from 0.01 (a logit scale of 100) on, not {temperature}")
        scale = 1 / (self.encoder.temperature if temperature is None else temperature)
        self.logit_scale = nn.Parameter(torch.tensor(min(math.log(scale), MOST_SCALE)))
        self.views = replace(views, size=self.image_size)
        self.objective, self.duplicates = contrast.objective(objective), duplicates
        self.mixing = Mixed(mixing, self.encoder.dim, type(self).__name__)
        self.heads = Several(heads, self.encoder.dim // (heads.count if heads else 1), 1 / scale, mixing)
        if self.heads.width != self.encoder.dim:
            raise InputError(
                f"{self.heads.count} heads cannot share {self.encoder.dim} dimensions evenly: choose another dim"
            )
        self.logit_scale.requires_grad_(not self.heads.adaptive)  # pairs then have temperatures of their own
        if duplicates not in ("negatives", "masked"):
            raise InputError(f'duplicates must be "negatives" or "masked", not "{duplicates}"')
        if duplicates == "masked" and "ignore" not in inspect.signature(self.objective).parameters:
            raise InputError(f"{objective} cannot leave pairs out: take clip_loss or info_nce, or duplicates=negatives")

    @property
    def temperature(self) -> Tensor:
        """1 / the logit scale, as the softmax takes it now."""
        # not clamp: its gradient is 0 at the bound itself, and a scale that arrived there would never come back
        return torch.where(self.logit_scale > MOST_SCALE, 0.01, (-self.logit_scale).exp())

    @property
    def stored_size(self) -> int:
        """Side to which larger images are brought once: the smallest crop still finds all the detail that it shows."""
        least = self.views.crop[0] if self.views.crop else 1.0
        usual = super().stored_size or self.image_size
        return min(usual, math.ceil(self.image_size / math.sqrt(least)))

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> Any:
        """Pairs to train on; images that were read already stay what they are, to be embedded."""
        if isinstance(data, Images | ImageFiles):
            return data.channels(self.channels)
        if isinstance(data, captions.PairItems | captions.PairFiles):
            return data if limit is None or limit >= len(data) else data.subset(chosen(len(data), limit, seed))
        self._check_pairs(data)
        options: dict[str, Any] = {"size": self.stored_size, "channels": self.channels, "resident": resident}
        pairs = captions.load(data, split, limit=limit, seed=seed, **options)
        return pairs.tokenised(self.encoder.tokenizer, self.encoder.max_length)

    def loss(self, batch: Batch) -> Tensor:
        image = self.encoder.image(self.views(batch["image"]))
        ids, mask, caption = drawn(batch)
        text = self.encoder.text(ids, mask)
        items = caption if self.duplicates == "masked" else None
        pairs = self.mixing(contrast.Pairs.under(self.objective, image, text, items=items), self.current_epoch)
        self.watch(image, text, pairs)
        return self.heads(pairs, self.objective, temperature=self.temperature)

    def after_step(self) -> None:
        with torch.no_grad():
            self.logit_scale.clamp_(max=MOST_SCALE)

    def encode(self, data: Any, *, split: str = "train", batch_size: int = 512) -> np.ndarray:
        """Embeddings float32 [N, dim] of images, not normalised.

        Args:
            data: whatever `counterpoint.data.load` takes; of pairs, the images.
            split: which part of a data set that has several.
            batch_size: images per forward pass.
        """
        if isinstance(data, captions.Pairs):
            data = data.images
        elif not isinstance(data, Images | ImageFiles | captions.PairItems | captions.PairFiles):
            data = self.images(data, split)
        return super().encode(data, batch_size=batch_size)

    def images(self, data: Any, split: str = "train") -> Images | ImageFiles:
        """The images of any data that has some: what `counterpoint.data.load` takes, or pairs."""
        try:
            return load(data, split, size=self.stored_size)
        except (InputError, TypeError) as first:
            try:
                return captions.load(data, split, size=self.stored_size).images
            except InputError:
                raise first from None

    @torch.no_grad()
    def encode_text(self, sentences: str | Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Embeddings float32 [N, dim] of texts, not normalised.

        Args:
            sentences: strings.
            batch_size: texts per forward pass.
        """
        rows = texts.Texts({"anchor": [sentences] if isinstance(sentences, str) else [*sentences]}, name="texts")
        if not len(rows):
            return np.zeros((0, self.encoder.dim), np.float32)
        tokens = texts.tokenise(rows, self.encoder.tokenizer, self.encoder.max_length)
        batches = Batches(tokens, batch_size, shuffle=False).to(self.device)
        training = self.training
        self.eval()
        try:
            found = [self.encoder.text(b["input_ids"], b["attention_mask"]).float().cpu()
                     for b in map(self.to_device, batches)]  # fmt: skip
        finally:
            self.train(training)
        return torch.cat(found)[batches.order().argsort()].numpy()

    def _check_pairs(self, data: Any) -> None:
        """Name what is missing from data that we know to hold images or texts alone."""
        needs = "CLIP learns from images with captions"
        if isinstance(data, np.ndarray | Tensor):
            raise InputError(
                f"{needs}, but an array holds images only: hand in a table with the columns image and caption"
            )
        if isinstance(data, texts.Texts | texts.Sentences) or (
            isinstance(data, str) and data.partition(":")[0] in texts.NAMES
        ):
            raise InputError(f"{needs}, but {getattr(data, 'name', data)} holds sentences only")
        if isinstance(data, str) and data in NAMES:
            made = f"{data}-captions"
            hint = f": say {made} to have captions made from its class names" if made in captions.NAMES else ""
            raise InputError(f"{needs}, but {data} has none{hint}")


def drawn(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """One caption of each image, drawn evenly: ids and mask [B, L] and the number of the text [B].

    Raises:
        InputError: a batch without captions.
    """
    if "caption" not in batch:
        raise InputError(
            "CLIP learns from images with captions, but these have none: hand in a table with the columns image and caption, "
            "or captions made from class names (counterpoint.data.captions.from_classes)"
        )
    caption = batch["caption"]
    if caption.shape[1] == 1:
        return batch["input_ids"][:, 0], batch["attention_mask"][:, 0], caption[:, 0]
    at = torch.rand(caption.shape, device=caption.device).masked_fill(caption < 0, -1).argmax(1)
    row = torch.arange(len(at), device=at.device)
    return batch["input_ids"][row, at], batch["attention_mask"][row, at], caption[row, at]
