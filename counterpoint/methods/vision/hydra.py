"""Hydra (SimLAP): any two classes attract each other, each pair in a subspace of its own."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint import encoders
from counterpoint.contrast.operands import reduce
from counterpoint.contrast.subspace import gated_similarity, partner_labels, partner_loss
from counterpoint.encoders import heads
from counterpoint.encoders.gates import PairGate
from counterpoint.train.method import Batch, Method
from counterpoint.views import SUPERVISED, ImageViews


class Hydra(Method):
    r"""Samples of any two classes are positives, in a subspace that a gate chooses for that pair of classes.

    .. math::
        \ell_{ij} = \log \Big( e^{s_{ij}/\tau} + \sum_{n:\, y_n \notin \{y_i, p_i\}} e^{s_{in}/\tau} \Big) - s_{ij}/\tau,
        \quad y_j = p_i, \qquad s_{ij} = \Big\langle \frac{z_i}{|z_i|} g_i^2, \frac{z_j}{|z_j|} \Big\rangle,
        \quad g_i = \mathrm{gate}(y_i, p_i) \in (0, 1)^D

    Usual contrast holds that some pairs are alike and all others are not. Here every item i gets a random partner class
    :math:`p_i`: a snake and a lamp share something too. A small network looks at the two labels and opens the dimensions in
    which the two classes agree and the rest stands apart. Without the gate the same pairs destroy the representation. After
    training gate and projector are dropped; or look at the gate to see which classes have much in common
    (``method.gate.between(first, second)``).

    A linear head learns the classes beside it, without telling the encoder; evaluation reports it as ``online-head``.

    When to use it: labelled images, and an embedding for more than these labels: pairs of classes teach what the classes
    share. It is no self-supervised method: labels choose gates and positives.

    Defaults: those of both released trainers: projector 2048-256 with a final LayerNorm, temperature 0.1, gate with class
    embeddings of 512 and hidden width 1024, arbitrary pairs, one view. The released CIFAR-10 recipe takes each image
    three times a batch (``repeats``), Adam at 0.001 and 50 epochs.

    Where codes differ: the paper describes ``variant="subspace"``, a cosine after gating both sides, as did the code at
    e22b502; the default is that of f6a8057, cheaper and no cosine, with the same reported accuracy. vitookit divides by all
    positive pairs (``reduction="pair"``), FastSSL averages within each anchor first ("row") and contrasts two views
    (``two_views``), queries of the first with keys of the second. RandAugment is not among our views: the default has
    mild crops and colour instead. The learned global repulsion, the temperature and the stochastic gates that FastSSL can
    learn, all off there, are left out.

    Source: "Rethinking Positive Pairs in Contrastive Learning" (arXiv 2410.18200); code of the first author, erow/vitookit
    and erow/FastSSL.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        classes: how many classes the labels name, counted from 0.
        projection: hidden and output width of the projector.
        temperature: of the softmax.
        pairs: "arbitrary" takes the class of another item of the batch as partner, "distinct" any other class, "identical"
            the item's own (supervised contrast).
        gated: False opens all dimensions for every pair.
        variant: similarity in the subspace, "gate_squared" or "subspace".
        reduction: "pair" or "row".
        fuse: the gate looks at the mean of two class embeddings; False multiplies the gates of the two classes.
        gate_widths: of the class embeddings and of the gate's hidden layer.
        repeats: views of each image in a batch, as items of their own.
        two_views: queries and keys come from different views.
        views: the random views.
        pretrained: start from timm's pretrained weights.
    """

    uses_labels = True
    classification = "online-head"

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        classes: int = 10,
        projection: tuple[int, int] = (2048, 256),
        temperature: float = 0.1,
        pairs: Literal["arbitrary", "identical", "distinct"] = "arbitrary",
        gated: bool = True,
        variant: Literal["gate_squared", "subspace"] = "gate_squared",
        reduction: Literal["pair", "row"] = "pair",
        fuse: bool = True,
        gate_widths: tuple[int, int] = (512, 1024),
        repeats: int = 1,
        two_views: bool = False,
        views: ImageViews = SUPERVISED,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels, self.classes = image_size, channels, classes
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        layers = heads.mlp(self.encoder.dim, *projection, norm="bn", bias=True, last_bias=False)
        self.projector = nn.Sequential(*layers, nn.LayerNorm(projection[1]))
        self.gate = PairGate(classes, projection[1], *gate_widths, fuse=fuse) if gated else None
        self.online_head = nn.Linear(self.encoder.dim, classes)
        self.views, self.repeats, self.two_views = replace(views, size=image_size), repeats, two_views
        self.pairs, self.temperature, self.variant, self.reduction = pairs, temperature, variant, reduction

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["image"].repeat(self.repeats, 1, 1, 1)
        labels = batch["label"].repeat(self.repeats)
        features = self.encoder(self.views(images)).pooled
        query = key = self.projector(features)
        if self.two_views:
            key = self.projector(self.encoder(self.views(images)).pooled)
        partners = partner_labels(labels, self.pairs, classes=self.classes)
        gate = None if self.gate is None else self.gate(labels, partners)
        self.show(query, key, gate, labels, partners)
        options: Any = {"temperature": self.temperature, "variant": self.variant, "reduction": self.reduction}
        rows = nn.functional.cross_entropy(self.online_head(features.detach()), labels, reduction="none")
        return {
            "pairs": partner_loss(query, key, gate, labels, partners, **options),
            "online head": reduce(rows, "mean"),
        }

    @torch.no_grad()
    def show(self, query: Tensor, key: Tensor, gate: Tensor | None, labels: Tensor, partners: Tensor) -> None:
        """Cosines and, as what enters the loss, similarities in the subspaces; the partner class belongs to an anchor."""
        if self.watching:
            positive, own = (labels == wanted[:, None] for wanted in (partners, labels))
            score = gated_similarity(query, key, torch.ones_like(query) if gate is None else gate, variant=self.variant)
            if key is query:
                positive.fill_diagonal_(False)
            self.watch(query, key, positive=positive, negative=~(labels == partners[:, None]) & ~own, score=score)

    def class_scores(self, batch: Batch) -> Tensor:
        return self.online_head(self.embed(batch))
