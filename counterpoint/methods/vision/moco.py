"""MoCo v2: negatives from a queue that a slowly moving encoder fills."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from counterpoint import contrast, encoders, memory
from counterpoint.encoders.heads import moco_projector
from counterpoint.encoders.several import Heads, Several
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.method import Batch, Method
from counterpoint.views import MOCO_V2, ImageViews, MultiCrop, by_size, crops


class MoCo(Method):
    r"""A query picks its key, made by a momentum copy of the encoder, among the keys of many earlier batches.

    .. math::
        \ell_i = -\frac{q_i \cdot k_i}{\tau}
        + \log \Big( e^{q_i \cdot k_i / \tau} + \sum_{n \in \text{queue}} e^{q_i \cdot n / \tau} \Big)

    The copy moves by :math:`\theta_k \leftarrow m\,\theta_k + (1 - m)\,\theta_q`, so that keys of different age agree.

    When to use it: when many negatives help but the batch must stay small.

    Defaults: MoCo v2: projector with a hidden layer, temperature 0.2, queue 65,536, momentum 0.999. A small data set
    wants a queue well below its size (4,096) and a faster copy (0.99). MoCo v1 is ``layers=1, temperature=0.07`` with
    ``views=moco-v1``, also below the methods that extend MoCo. The paper shuffles batches between GPUs so that batch
    normalisation cannot leak which key belongs to which query; over several GPUs we synchronise the statistics instead.

    Source: He et al. 2020 (arXiv 1911.05722), algorithm 1; Chen et al. 2020 (arXiv 2003.04297).

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        layers: of the projector; 1 is the linear head of MoCo v1, which has no hidden width.
        temperature: of the softmax.
        queue: number of keys kept.
        momentum: of the key encoder.
        mixing: parts that make the pairs harder, by name ("mochi"); see `counterpoint.memory.mixing`.
        heads: several projection heads, by name ("several", "amcl"); see `counterpoint.encoders.several`.
        views: the random views.
        other_views: the random views of the key; None: as `views`.
        small_views: further small views (multi-crop), by name ("multi-crop", "multi-crop-small") or as (count, size, crop);
            each is one more query of the same key.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (2048, 128),
        layers: int = 2,
        temperature: float = 0.2,
        queue: int = 65536,
        momentum: float = 0.999,
        mixing: tuple[Mixing, ...] = (),
        heads: Heads | None = None,
        views: ImageViews = MOCO_V2,
        other_views: ImageViews | None = None,
        small_views: MultiCrop | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels, self.temperature = image_size, channels, temperature
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.heads = Several(heads, projection[1], temperature, mixing)
        self.projector = self.heads.each(partial(moco_projector, self.encoder.dim, *projection, layers=layers))
        self.key_encoder = memory.MomentumEncoder(self.encoder, momentum)
        self.key_projector = memory.MomentumEncoder(self.projector, momentum)
        self.queue = memory.Queue(self.heads.width, queue)
        self.mixing = Mixed(mixing, projection[1], type(self).__name__)
        self.views = replace(views, size=image_size)
        self.other_views = replace(other_views or views, size=image_size)
        self.small_views = small_views and small_views.check(self.encoder)

    def loss(self, batch: Batch) -> Tensor:
        queries = by_size(self.project, crops(batch["image"], (self.views,), self.small_views))
        with torch.no_grad():
            key = contrast.unit(self.key_projector(self.key_encoder(self.other_views(batch["image"])).pooled))
        pairs = contrast.Pairs(
            torch.cat(queries), key.repeat(len(queries), 1), negatives=self.queue.keys, in_batch=False
        )
        pairs = self.mixing(pairs, self.current_epoch)
        self.watch(queries[0], key, pairs)
        loss = self.heads(pairs, contrast.info_nce, temperature=self.temperature)
        self.remember(key)
        return loss

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images).pooled)

    def remember(self, key: Tensor) -> None:
        self.queue.enqueue(key)

    def after_step(self) -> None:
        self.key_encoder.update(self.encoder)
        self.key_projector.update(self.projector)
