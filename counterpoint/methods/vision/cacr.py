"""Contrastive attraction and contrastive repulsion: far positives and near negatives weigh most, each among themselves."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint import contrast, encoders, memory
from counterpoint.contrast.attraction import attraction, momentum_euclidean, momentum_rbf, queue_repulsion, repulsion
from counterpoint.encoders import heads
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method
from counterpoint.views import BYOL_1, BYOL_2, SIMCLR, ImageViews, MultiCrop, by_size, crops

VIEWS = replace(SIMCLR, crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0, blur=0.0)
"""The released code's views of small images: every view is coloured, none blurred."""


class CACR(Method):
    r"""Each view pulls its far positives most and pushes its near negatives most, with distances for costs and no log.

    With :math:`d(x, y) = \lVert x - y \rVert^2` on the sphere and K + 1 views of every image,

    .. math::
        \mathcal{L} = \mathbb{E}_{b, v} \sum_{u \ne v} \pi^+_{u}\, d(z^v_b, z^u_b)
        - \mathbb{E}_{b, x < y} \sum_{j \ne b} \pi^-_{j}\, d(z^x_b, z^y_j), \quad
        \pi^+ = \mathrm{softmax}(+\tau_+ d), \; \pi^- = \mathrm{softmax}(-\tau_- d)

    Positives are compared with positives and negatives with negatives: how hard a negative is says nothing about the weight of
    a positive, and negatives are not taken for a uniform sample of the data. The repulsion is a softmax-weighted mean of
    similarities, one tiled pass. The loss lies between -4 and 4 and may be negative.

    When to use it: several views of each image are affordable, or classes are imbalanced and nobody has curated the
    data. With one positive (`positives` = 1) the first distribution is trivial: alignment plus soft hard-negative repulsion.

    Defaults: K = 4, both factors 1, sharpness 1 for positives and 0.9 for negatives (CIFAR-10; CIFAR-100, STL-10 and
    the queue take 2), views and all as in the released small-scale code. Its batch is 128 at a rate of 0.06 (SGD); its
    encoder is an AlexNet whose layer before the last is probed, ours is any encoder with SimCLR's projector.

    A queue makes it the paper's form on MoCo v2: the positives of a view are the momentum keys of the other views, the
    negatives the queue together with the other images of the same view, in one distribution; the weights of positives and of
    the queue are then constants. `MomentumCACR` is the form on MoCo v3.

    Where codes differ: in the released queue form a cached product lets the first view's similarities to the queue serve every
    view; each view has its own here. A debiased and a Gaussian-cost variant are left out.

    Source: Zheng et al. 2023, "Contrastive Attraction and Contrastive Repulsion for Representation Learning" (TMLR; arXiv
    2105.03746); code JegZheng/CACR-SSL at fbc9d94.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        positives: K, further views of each image.
        tau_pos: sharpness of the weights of positives.
        tau_neg: sharpness of the weights of negatives.
        alpha: factor of the attraction.
        beta: factor of the repulsion.
        uniform: which of the two distributions is even instead (the paper's ablations).
        queue: number of momentum keys kept as negatives; 0 for none, and no momentum copy.
        momentum: of the key encoder.
        views: the random views.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (2048, 128),
        positives: int = 4,
        tau_pos: float = 1.0,
        tau_neg: float = 0.9,
        alpha: float = 1.0,
        beta: float = 1.0,
        uniform: Literal["none", "positives", "negatives", "both"] = "none",
        queue: int = 0,
        momentum: float = 0.999,
        views: ImageViews = VIEWS,
        pretrained: bool = False,
    ):
        super().__init__()
        if positives < 1:
            raise InputError(f"positives must be at least 1, not {positives}")
        self.image_size, self.channels, self.positives = image_size, channels, positives
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = heads.simclr_projector(self.encoder.dim, *projection)
        self.pull: dict[str, Any] = {"tau": tau_pos, "alpha": alpha, "uniform": uniform in ("positives", "both")}
        self.push: dict[str, Any] = {"tau": tau_neg, "beta": beta, "uniform": uniform in ("negatives", "both")}
        self.queue = memory.Queue(projection[1], queue) if queue else None
        if self.queue is not None:
            self.key_encoder = memory.MomentumEncoder(self.encoder, momentum)
            self.key_projector = memory.MomentumEncoder(self.projector, momentum)
        self.views = replace(views, size=image_size)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        views = [self.views(batch["image"]) for _ in range(self.positives + 1)]
        z = torch.stack([self.projector(self.encoder(view).pooled) for view in views])
        if self.queue is None:
            self.watch(z[0], z[1])
            return {"attraction": attraction(z, **self.pull), "repulsion": repulsion(z, **self.push)}
        keys = contrast.unit(torch.stack([self.key_projector(self.key_encoder(view).pooled) for view in views]))
        seen = contrast.Pairs(z[0], keys[1], negatives=self.queue.keys, in_batch=False, within=True)
        self.watch(z[0], keys[1], seen)
        terms = {
            "attraction": attraction(z, keys, stop=True, **self.pull),
            "repulsion": queue_repulsion(z, self.queue.keys, **self.push),
        }
        self.queue.enqueue(keys[-1])
        return terms

    def after_step(self) -> None:
        if self.queue is not None:
            self.key_encoder.update(self.encoder)
            self.key_projector.update(self.projector)


class MomentumCACR(Method):
    r"""CACR on MoCo v3: several query views against one momentum key, the far ones weighing most.

    For each key, with :math:`P_v = \mathrm{softmax}_v(\lVert q^v - k \rVert^2 / T)` over the other views of its image,

    .. math:: \ell = \sum_v P_v\, \ell^v, \qquad \ell^v = 2T\, \mathrm{InfoNCE}_T(q^v, k) \;\text{(rbf)} \quad\text{or}\quad
        C^v_{bb} - \sum_{j \ne b} \pi_{bj} C^v_{bj}, \; C = 1 - \langle q, k \rangle \;\text{(euclidean)}

    averaged over keys; all weights are constants. With two views in all each key meets one query, and the rbf form is MoCo v3
    itself: the small views make it CACR.

    When to use it: instead of MoCo v3 with multi-crop.

    Defaults: the paper's for ImageNet: T = 1 (0.2 for a vision transformer), momentum 0.996 to 1, projector and predictor
    4096-256, views of BYOL with crops of at least a fifth, six small views that are queries only ("light"; `full` makes
    them keys too).

    Where codes differ: the released euclidean form sums over the batch; the mean here keeps the rate independent of its size.

    Source: as `CACR`; MoCo v3: Chen et al. 2021 (arXiv 2104.02057).

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of projector and predictor.
        form: "rbf" or "euclidean".
        temperature: T.
        momentum: of the key encoder at the start.
        full: whether small views are keys too.
        views: the first random view.
        other_views: the second random view.
        small_views: the small ones beside them; None for none.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet50",
        image_size: int = 224,
        channels: int = 3,
        projection: tuple[int, int] = (4096, 256),
        form: Literal["rbf", "euclidean"] = "rbf",
        temperature: float = 1.0,
        momentum: float = 0.996,
        full: bool = False,
        views: ImageViews = replace(BYOL_1, crop=(0.2, 1.0)),  # noqa: B008
        other_views: ImageViews = replace(BYOL_2, crop=(0.2, 1.0)),  # noqa: B008
        small_views: MultiCrop | None = MultiCrop(),  # noqa: B008
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels, self.full = image_size, channels, full
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = heads.mlp(self.encoder.dim, *projection, norm="bn", last_norm="bn-noaffine")
        self.predictor = heads.mlp(projection[1], *projection, norm="bn")
        self.key_encoder = memory.MomentumEncoder(self.encoder, momentum, final=1.0)
        self.key_projector = memory.MomentumEncoder(self.projector, momentum, final=1.0)
        self.objective = {"rbf": momentum_rbf, "euclidean": momentum_euclidean}[form]
        self.temperature = temperature
        self.views = (replace(views, size=image_size), replace(other_views, size=image_size))
        self.small_views = small_views and small_views.check(self.encoder)

    def loss(self, batch: Batch) -> Tensor:
        views = crops(batch["image"], self.views, self.small_views)
        queries = torch.stack(by_size(self.query, views))
        keys = by_size(self.key, views if self.full else views[:2])
        self.watch(queries[0], keys[1])
        losses = []
        for i, key in enumerate(keys):
            others = torch.cat([queries[:i], queries[i + 1 :]])
            losses.append(self.objective(others, key, temperature=self.temperature))
        return torch.stack(losses).mean()

    def query(self, view: Tensor) -> Tensor:
        return self.predictor(self.projector(self.encoder(view).pooled))

    def key(self, view: Tensor) -> Tensor:
        return self.key_projector(self.key_encoder(view).pooled)

    def after_step(self) -> None:
        self.key_encoder.update(self.encoder, self.progress)
        self.key_projector.update(self.projector, self.progress)
