"""PixPro: what two views show of the same place of an image should agree, place by place."""

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from counterpoint import contrast, encoders, memory
from counterpoint.contrast.pixel import pixel_consistency, pixel_contrast
from counterpoint.encoders import Features, heads
from counterpoint.encoders.propagation import Propagation
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method
from counterpoint.views import BYOL_1, BYOL_2, ImageViews, plain


class PixPro(Method):
    r"""Locations of two crops that lie close in the image attract, one branch smoothed by what it finds alike in its own view.

    With q = the online map after propagation, k = the momentum map of the other view, and A = 1 where two locations are less
    than T bin diagonals apart in the image,

    .. math::
        \mathcal{L} = -2\, \mathbb{E}_b \frac{\sum_{ij} A_{ij} \cos(q^1_i, k^2_j)}{\sum_{ij} A_{ij}} + (1 \leftrightarrow 2),
        \qquad y_i = \sum_j \max(\cos(x_i, x_j), 0)^\gamma\, \frac{g(x_j)}{\lVert g(x_j) \rVert}

    There are no negatives; the momentum copy and the propagation on one side only keep the constant map from being reached.

    When to use it: the features shall serve detection or segmentation, where it matters what lies where. For whole
    images instance contrast is better; `instance` = 1 adds a BYOL branch and gives both.

    Defaults: T = 0.7, gamma = 2 and one layer g of the released scripts (its flags default to 1 and 0), projector 4096-256
    by 1 x 1 convolutions, momentum 0.99 to 1, BYOL's views. The released training is LARS at rate 1.0 per 256 images.

    Where codes differ: the paper averages -cos, the release takes -2 times the mean for each direction; we follow the
    release (the rate is scaled). It measures crops by the centres of their corner pixels, we by their edges, which puts the
    centres of bins where they are. Without propagation (`task` "consistency") and PixContrast ("contrast": InfoNCE among the
    locations of the other view; not released, after the paper's equation 2) are the paper's comparisons.

    Source: Xie et al. 2021, "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation
    Learning" (CVPR; arXiv 2011.10043), section 3; code zdaxie/PixPro at e390d6b.

    Args:
        encoder: "convnet", "convnet-32", or any timm model whose last features are a map.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        task: "propagation" (PixPro), "consistency" (the same without it) or "contrast" (PixContrast).
        near: T, largest distance of positive locations in diagonals of a bin.
        gamma: sharpness of the propagation.
        transform: layers of g, 0 to 2.
        temperature: of PixContrast.
        momentum: of the target at the start.
        instance: weight of the BYOL branch; 0 leaves it out.
        views: the first random view.
        other_views: the second random view.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (4096, 256),
        task: Literal["propagation", "consistency", "contrast"] = "propagation",
        near: float = 0.7,
        gamma: float = 2.0,
        transform: int = 1,
        temperature: float = 0.3,
        momentum: float = 0.99,
        instance: float = 0.0,
        views: ImageViews = BYOL_1,
        other_views: ImageViews = BYOL_2,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.task, self.near, self.temperature, self.instance = task, near, temperature, instance
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = heads.pixel_projector(self.encoder.dim, *projection)
        hidden, out = projection
        self.propagate = Propagation(out, gamma, layers=transform) if task == "propagation" else nn.Identity()
        self.target_encoder = memory.MomentumEncoder(self.encoder, momentum, final=1.0)
        self.target_projector = memory.MomentumEncoder(self.projector, momentum, final=1.0)
        if instance:
            self.instance_projector = heads.pixel_projector(self.encoder.dim, hidden, out)
            self.instance_predictor = heads.pixel_projector(out, hidden, out)
            self.target_instance = memory.MomentumEncoder(self.instance_projector, momentum, final=1.0)
        self.views = replace(views, size=image_size)
        self.other_views = replace(other_views, size=image_size)

    def loss(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        (view1, box1), (view2, box2) = (views.with_geometry(batch["image"]) for views in (self.views, self.other_views))
        online = [self.of(self.encoder(view)) for view in (view1, view2)]
        target = [self.of(self.target_encoder(view)) for view in (view1, view2)]
        q1, q2 = (self.propagate(self.projector(features)) for features in online)
        k1, k2 = (self.target_projector(features) for features in target)
        self.watch(q1.mean((2, 3)), k2.mean((2, 3)))
        pixel = self.compare(q1, k2, box1, box2) + self.compare(q2, k1, box2, box1)
        if not self.instance:
            return pixel
        p1, p2 = (self.instance_predictor(self.instance_projector(features)).mean((2, 3)) for features in online)
        z1, z2 = (self.target_instance(features).mean((2, 3)) for features in target)
        whole = 2 * self.instance * (contrast.negative_cosine(p1, z2) + contrast.negative_cosine(p2, z1))
        return {"pixel": pixel, "instance": whole}

    def compare(self, query: Tensor, key: Tensor, query_box: Tensor, key_box: Tensor) -> Tensor:
        """One direction of the pixel task."""
        if self.task == "contrast":
            return pixel_contrast(query, key, query_box, key_box, near=self.near, temperature=self.temperature)
        return pixel_consistency(query, key, query_box, key_box, near=self.near)

    def of(self, features: Features) -> Tensor:
        """The map of an encoder's features."""
        if features.map is None:
            raise InputError(f"{self.encoder.name} gives no feature map: choose a convolutional encoder")
        return features.map

    def projected(self, batch: Batch) -> Tensor:
        return self.projector(self.of(self.encoder(plain(batch["image"], self.image_size)))).mean((2, 3))

    def after_step(self) -> None:
        self.target_encoder.update(self.encoder, self.progress)
        self.target_projector.update(self.projector, self.progress)
        if self.instance:
            self.target_instance.update(self.instance_projector, self.progress)
