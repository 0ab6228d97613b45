"""Fine-tuning: an encoder that learned without labels goes on with few of them."""

from dataclasses import replace

from torch import Tensor, nn

from counterpoint import contrast, encoders
from counterpoint.contrast.operands import reduce
from counterpoint.encoders import heads
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method
from counterpoint.train.start import earlier_encoder, take_over
from counterpoint.views import FINE_TUNING, ImageViews


class FineTuning(Method):
    r"""All weights of an encoder, and a new linear classifier, follow the cross entropy of the labels.

    .. math:: \ell_i = -\log \mathrm{softmax}(W f_i)_{y_i} + \eta\, \ell^{\text{SupCon}}_i

    The second term, off by default, is supervised contrast of a small head's unit vectors
    (`counterpoint.contrast.sup_con`).

    When to use it: after a self-supervised run on many images, when some have labels:
    ``counterpoint train fine-tuning --data photos/ --start runs/simclr-1``. ``--limit 1000`` trains on that many of them. For
    tight classes take core-tuning. Evaluation reports the classifier on the test part as ``fine-tune``.

    Defaults: those of the Core-tuning script's cross-entropy baseline: classifier without bias; temperature 0.07 and 256
    dimensions where there is contrast. A tenth of pre-training's learning rate is usual (its recipes say so).

    Source: the baselines of Zhang et al. 2021 (arXiv 2102.06605), table 1; supervised contrast: Khosla et al. 2020
    (arXiv 2004.11362).

    Args:
        encoder: "convnet", "convnet-32", or any timm model; None takes that of `start`, or a resnet18.
        image_size: side of the views in pixels; None takes that of `start`, or 64.
        channels: 3 for colour, 1 for grey; None takes those of `start`, or 3.
        classes: how many classes the labels name, counted from 0.
        start: run folder, or encoder exported as safetensors, whose weights the training starts from; None starts from
            random ones.
        eta: weight of the contrast.
        temperature: of the contrast.
        contrast_dim: dimensions of the contrast's head.
        views: the random views.
        pretrained: start from timm's pretrained weights.
    """

    uses_labels = True
    classification = "fine-tune"

    def __init__(
        self,
        encoder: str | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        classes: int = 10,
        start: str | None = None,
        eta: float = 0.0,
        temperature: float = 0.07,
        contrast_dim: int = 256,
        views: ImageViews = FINE_TUNING,
        pretrained: bool = False,
    ):
        super().__init__()
        if start is not None and pretrained:
            raise InputError("start and pretrained both say where the encoder's weights come from: leave one out")
        earlier = None
        if start is not None:
            earlier = earlier_encoder(start, encoder=encoder, image_size=image_size, channels=channels)
            encoder, image_size, channels = earlier.name, earlier.image_size, earlier.channels
        name, size, depth = encoder or "resnet18", 64 if image_size is None else image_size, channels or 3
        # the run must say which encoder this is, also when the earlier one is gone
        self.arguments |= {"encoder": name, "image_size": size, "channels": depth}
        self.image_size, self.channels, self.classes = size, depth, classes
        self.encoder = encoders.image(name, image_size=size, channels=depth, pretrained=pretrained)
        self.classifier = nn.Linear(self.encoder.dim, classes, bias=False)
        self.contrastor = heads.mlp(self.encoder.dim, self.encoder.dim, contrast_dim) if eta else None
        self.views, self.eta, self.temperature = replace(views, size=size), eta, temperature
        if earlier is not None:
            take_over(self.encoder, earlier)

    def features(self, batch: Batch) -> Tensor:
        return self.encoder(self.views(batch["image"])).pooled

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        features, labels = self.features(batch), batch["label"]
        rows = nn.functional.cross_entropy(self.classifier(features), labels, reduction="none")
        terms = {"cross entropy": reduce(rows, "mean")}
        contrasted = features
        if self.contrastor is not None:
            contrasted = self.contrastor(features)
            terms["contrast"] = self.eta * contrast.sup_con(contrasted, labels, temperature=self.temperature)
        self.watch_classes(contrasted, labels)
        return terms

    def class_scores(self, batch: Batch) -> Tensor:
        return self.classifier(self.embed(batch))
