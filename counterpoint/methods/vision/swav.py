"""SwAV: each view predicts to which clusters another view of the same image belongs."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint import contrast, encoders, memory
from counterpoint.encoders import heads
from counterpoint.train.method import Batch, Method
from counterpoint.views import SWAV, ImageViews, MultiCrop, by_size, crops


class SwAV(Method):
    r"""Views are assigned to learned prototypes, all used equally; each view predicts the assignments of the others.

    .. math::
        \ell = \frac{1}{2(V - 1)} \sum_{a=1}^{2} \sum_{v \ne a}
        - \sum_k q_{ak} \log \mathrm{softmax}_k (z_v \cdot c_k / \tau),
        \qquad q_a = \mathrm{Sinkhorn}(z_a \cdot c / \epsilon)

    The codes q of a batch solve a small transport problem: sharp for each image, yet every prototype gets about the same
    share, so that not all images can fall into one. There are no negatives and no momentum copy. Only the two large views
    are assigned; further small ones (multi-crop) only predict, and cost little.

    When to use it: when batches are small or medium and you can afford more views; multi-crop is most of its lead
    (about 5 points in the official tables). Fewer prototypes for small data (100 to 300 for ten classes).
    A loss that stays at ln K has collapsed: lower epsilon, freeze the prototypes longer, soften the views. With
    batches well below the number of prototypes give it a queue.

    Defaults: 3,000 prototypes, temperature 0.1, epsilon 0.05, 3 iterations, projector 2048-128, two large and six small views
    (96 pixels beside 224), prototypes frozen for 313 steps (one epoch of ImageNet at batch 4096), as released
    (facebookresearch/swav at 06b1b7c). The queue is off, as there for large batches; for batch 256 it holds 3,840
    embeddings of each assigned view, from epoch 15 on. Optimiser there: LARS, 4.8 for batch 4096, 10 epochs warm-up.

    Where codes differ: the official code keeps each process its part of the queue; here all hold the whole one and account
    for a share each, which is the same transport problem and does not depend on the number of processes. There the queue's
    length is rounded down to a multiple of the batch; here it is kept exactly.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (NeurIPS;
    arXiv 2006.09882), sections 3.1 and 3.2.

    Args:
        encoder: "convnet", "convnet-32", or any timm model that takes images of any size.
        image_size: side of the large views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        prototypes: K, number of clusters.
        temperature: of the prediction; the codes do not see it.
        epsilon: sharpness of the codes, smaller is sharper.
        iterations: of Sinkhorn.
        codes: "sinkhorn", or "softmax": no balance, which shows what the balance is for (it collapses).
        frozen_steps: optimiser steps in which the prototypes do not move.
        queue: earlier embeddings of each assigned view that take part in the balance; 0 for none.
        queue_start: epochs before the queue begins to fill; it is used once it is full.
        views: the two large views.
        small_views: the small ones, by name ("multi-crop", "multi-crop-small") or as (count, size, crop); "none".
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (2048, 128),
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        codes: Literal["sinkhorn", "softmax"] = "sinkhorn",
        frozen_steps: int = 313,
        queue: int = 0,
        queue_start: int = 15,
        views: ImageViews = SWAV,
        small_views: MultiCrop | None = MultiCrop(),  # noqa: B008 a frozen record
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels, self.temperature = image_size, channels, temperature
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = heads.mlp(self.encoder.dim, *projection, norm="bn", bias=True)
        self.prototypes = memory.Prototypes(projection[1], prototypes, frozen_steps)
        lengths = [queue] * 2 if queue else []
        self.queues = nn.ModuleList(memory.Queue(projection[1], length, start="empty") for length in lengths)
        self.queue_start = queue_start
        self.transport: dict[str, Any] = {"epsilon": epsilon, "iterations": iterations, "balanced": codes == "sinkhorn"}
        self.views = replace(views, size=image_size)
        self.small_views = small_views and small_views.check(self.encoder)

    def loss(self, batch: Batch) -> Tensor:
        z = self.project(crops(batch["image"], self.views, self.small_views))
        self.watch(z[0], z[1])
        scores = self.prototypes(z)
        codes = torch.stack([self.assign(z[view], view) for view in range(2)])
        return contrast.swapped_prediction(scores, codes, temperature=self.temperature)

    def project(self, views: list[Tensor]) -> Tensor:
        """Unit embeddings ``[V, B, d]``: the encoder sees the views size by size, the projector all at once."""
        pooled = by_size(lambda images: self.encoder(images).pooled, views)
        return contrast.unit(self.projector(torch.cat(pooled))).unflatten(0, (len(views), -1))

    def assign(self, z: Tensor, view: int) -> Tensor:
        """Codes of one view, balanced together with the queue once it is full; the queue then moves on."""
        queue: Any = self.queues[view] if self.queues and self.current_epoch >= self.queue_start else None
        full = queue is not None and len(queue) == queue.size
        earlier = queue.keys if full else None
        codes = contrast.assign(z, self.prototypes.weight, queue=earlier, **self.transport)
        if queue is not None:
            queue.enqueue(z.detach())
        return codes

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.prototypes.before_step()
