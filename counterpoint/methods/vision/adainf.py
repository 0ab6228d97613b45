"""AdaInf: generated images beside the real ones, with more weight on the real and weaker views."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.data import Images, load
from counterpoint.data.composites import inflate
from counterpoint.errors import InputError
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train.method import Batch
from counterpoint.views import with_strength


class AdaInf(SimCLR):
    r"""SimCLR on real and generated images: the real ones count `replication` times, and the views are weaker.

    .. math::
        D = r \cdot \text{real} \,\cup\, \text{generated}, \qquad
        \ell_i = -\log \frac{\sum_{j \ne i,\, id_j = id_i} e^{s_{ij}/\tau}}{\sum_{j \ne i} e^{s_{ij}/\tau}}

    Generated images lie slightly beside the distribution of the real ones, so that they must not drown them: of D real
    images have the share :math:`\beta = rN / (rN + M)`. And they make the data dense: neighbours connect what strong views
    would have had to connect, so that strong views are left with their harm. The loss is NT-Xent; an image that is drawn
    twice into a batch has four views there, which are each other's positives.

    When to use it: when you have a generator of your data (trained on it, not on the test set) and few real images. Train
    both ways for equally many ``steps``, not epochs: an epoch of D is longer. Without generated images keep the views strong.

    Defaults: r = 10 (1 with no generated images means the same as any other number); views half as strong as SimCLR's
    (crops from a fifth of the area, colour 0.4 with probability 0.4); temperature 0.2, projector 2048-256 without
    normalisation (which the paper's codebase has; here SimCLR's). The paper trains 100,000 steps of 2 x 256 with LARS.

    Where codes differ: the released code numbers images after replication, so that copies of one image that meet in a batch
    repel each other; ``duplicates="negatives"`` does that. They meet seldom. It copies the arrays; we draw each real image r
    times an epoch, which gives the same batches.

    Source: Wang et al. 2024, "Do Generated Data Always Help Contrastive Learning?" (ICLR; arXiv 2403.12448), section 5;
    released configurations for views and loss.

    Args:
        generated: images of a generator: whatever `counterpoint.data.load` takes as a name (an .npz or .npy file, a folder, a
            known name). None trains on the data alone.
        generated_limit: at most so many of them, a seeded random subset.
        replication: r, how often an epoch shows each real image.
        strength: of the views: 1 as they are, 0.5 the paper's; see `counterpoint.views.with_strength`.
        duplicates: whether further copies of an image in a batch are positives or negatives of it.
        **simclr: as in SimCLR; the objective is fixed.
    """

    def __init__(
        self,
        generated: str | None = None,
        generated_limit: int | None = None,
        replication: int = 10,
        strength: float = 0.5,
        duplicates: Literal["positives", "negatives"] = "positives",
        **simclr: Any,
    ):
        super().__init__(**simclr)
        if replication < 1:
            raise InputError(f"replication must be at least 1, not {replication}")
        if duplicates not in ("positives", "negatives"):
            raise InputError(f'duplicates must be "positives" or "negatives", not "{duplicates}"')
        if duplicates == "positives" and (
            self.objective is not contrast.nt_xent or self.mixing.parts or self.small_views is not None
        ):
            raise InputError(
                "AdaInf counts copies as positives in NT-Xent of two views only: take duplicates=negatives with another "
                "objective, mixing or small views"
            )
        self.generated, self.generated_limit, self.replication = generated, generated_limit, replication
        self.duplicates = duplicates
        self.views, self.other_views = (with_strength(views, strength) for views in (self.views, self.other_views))

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> Any:
        """The images of `data` (`limit` bounds these) `replication` times and the generated ones, whose label is -1."""
        real = self.read(data, limit=limit, seed=seed)
        if self.generated is None:
            return real
        if not isinstance(real, Images):
            raise InputError("data inflation needs images that fit in memory: bring them to a smaller size")
        options: dict[str, Any] = {"limit": self.generated_limit, "seed": seed, "resident": True}
        made = load(self.generated, size=real.image.shape[-1], **options)
        assert isinstance(made, Images)
        return inflate(real, replace(made.channels(self.channels), label=None), self.replication)

    def loss(self, batch: Batch) -> Tensor:
        if self.duplicates == "negatives":
            return super().loss(batch)
        z1, z2 = self.project(self.views(batch["image"])), self.project(self.other_views(batch["image"]))
        self.watch(z1, z2)
        z = torch.stack([z1, z2], dim=1)
        return contrast.sup_con(z, batch["index"], temperature=self.temperature, mean="none")
