"""MCL: stage after stage learns what the stages before it left out, because its negatives are alike in what they learned."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from counterpoint import encoders, memory, methods
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method, construct
from counterpoint.train.optimise import build_optimiser
from counterpoint.views import ImageViews

log = logging.getLogger("counterpoint")


class MCL(Method):
    r"""Several stages of a contrastive learner; from the second on, all items of a batch are alike to the stages before.

    .. math::
        \ell_i^{(m)} = -\frac{s_{i,i'}}{\tau} + \log \sum_{j \in B(i)} e^{s_{ij}/\tau}, \quad
        B(i) \subset \{j : c_k(j) = c_k(i) \;\forall k < m\}, \qquad
        z = \frac{[e^{(0)}, \dots, e^{(S-1)}]}{\lVert \cdot \rVert}

    Contrast stops where the easiest features (a colour, a big shape) tell the items of a batch apart; others stay unlearned.
    So after each stage k-means puts the training set into clusters :math:`c_k` of its embedding, and batches of the next stage
    come from one group of items that all clusterings so far have together: what was learned cannot tell them apart
    any more. Each stage has an encoder of its own, that starts from the same weights; the embedding is all of them side by
    side. Neither the loss nor the architecture changes.

    When to use it: when probes show that something you need is missing from the embedding although it is plain to see in the
    data. It costs S encoders at inference. On ordinary images the gain is small.

    Defaults: four stages (the base and three more) and k = 10 clusters as released. `epochs` is shared evenly among the stages,
    and each has a whole schedule of the learning rate. Groups multiply (at most :math:`10^m` in stage m): groups smaller than a
    batch are never seen in that stage, so take few stages, few clusters or small batches (the log says how large they are).

    Where codes differ: the released script keeps the clusters of the last stage only (``labels="last"``), where the paper
    intersects all; the same for two stages. The paper trains a stage for one pass after another through the groups; we cut that
    to the steps of an ordinary epoch. The released CLIP stages lock the text tower and most of the image tower; here both train.
    From which weights a later stage starts is not stated.

    Source: Zhang et al. 2024, "Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning" (ECCV;
    arXiv 2402.11816), section 4.

    Args:
        base: the learner of each stage: its negatives must be those of the batch.
        stages: S, how many; 1 is the base alone.
        clusters: k of k-means after each stage.
        labels: groups of a stage: what "all" clusterings so far have together, or the clusters of the "last" one.
        negatives: "clusters", or "batch": stages without any grouping, a control for what several encoders give alone.
        start: weights of every stage before its training: the same "initial" ones, or "fresh" ones.
        encoder: of the base.
        image_size: side of the views in pixels.
        channels: 3 for colour, 1 for grey.
        views: the random views; None takes the base's own.
        options: other arguments of the base by name, for example ``{projection: [512, 128], temperature: 0.1}``.
    """

    parts_rest = True

    def __init__(
        self,
        base: Literal["simclr", "dcl", "clip"] = "simclr",
        stages: int = 4,
        clusters: int = 10,
        labels: Literal["all", "last"] = "all",
        negatives: Literal["clusters", "batch"] = "clusters",
        start: Literal["initial", "fresh"] = "initial",
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        views: ImageViews | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        if stages < 1 or clusters < 2:
            raise InputError(f"MCL needs at least one stage and two clusters, got {stages} and {clusters}")
        for name, value, known in (
            ("base", base, ("simclr", "dcl", "clip")),
            ("labels", labels, ("all", "last")),
            ("negatives", negatives, ("clusters", "batch")),
            ("start", start, ("initial", "fresh")),
        ):
            if value not in known:
                raise InputError(f'{name} must be one of {", ".join(known)}, not "{value}"')
        given: dict[str, Any] = {"encoder": encoder, "image_size": image_size, "channels": channels, **(options or {})}
        if views is not None:
            given["views"] = views
        first = construct(methods.get(base), given)
        for stage in range(stages):
            again = construct(methods.get(base), given) if start == "fresh" else copy.deepcopy(first)
            self.add_module(f"stage_{stage}", first if stage == 0 else again)
        self.clusterings = memory.Clusterings()
        self.clusters, self.labels, self.negatives = clusters, labels, negatives
        self.family, self.image_size, self.channels = first.family, first.image_size, first.channels
        if first.family == "images":  # not registered: the weights are those of the stages
            object.__setattr__(self, "encoder", encoders.Concatenated([stage.encoder for stage in self.stages]))

    @property
    def stages(self) -> list[Method]:
        """The learners, one a stage."""
        return [part for name, part in self.named_children() if name.startswith("stage_")]  # type: ignore[misc]

    def stage_of(self, epoch: int) -> int:
        """Which stage an epoch belongs to."""
        return epoch * len(self.stages) // (self.trainer.max_epochs or 1)

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        stage = self.stages[self.stage_of(self.current_epoch) if self._trainer else 0]
        stage.watching = self.watching
        loss = stage.loss(batch)
        self.watched, stage.watched = stage.watched, {}
        return loss

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        """Groups of this epoch's stage; at its first epoch the stage before is embedded and clustered."""
        stage = self.stage_of(epoch)
        if epoch == 0 and self.negatives == "clusters":
            self.warn_of_small_groups(len(items))
        if stage == 0 or self.negatives == "batch":
            return None
        if len(self.clusterings) < stage:
            vectors = torch.from_numpy(self.stages[stage - 1].encode(items))
            label = memory.kmeans(vectors, self.clusters, seed=stage)[0].to(self.device)
            if self.trainer.world_size > 1:  # all ranks must draw their batches from the same groups
                torch.distributed.broadcast(label, src=0)
            self.clusterings.add(label)
            groups = self.clusterings.groups(self.labels == "last")
            sizes = groups.bincount().tolist()
            found = (stage + 1, len(self.stages), len(sizes), min(sizes), max(sizes))
            log.info("stage %d of %d: batches come from %d groups of %d to %d items", *found)
        return self.clusterings.groups(self.labels == "last")

    def warn_of_small_groups(self, items: int) -> None:
        """Say before the training what would end it after the first stage."""
        splits = min(len(self.stages) - 1, 1 if self.labels == "last" else len(self.stages))
        loader: Any = self.trainer.train_dataloader
        mean, batch = items / self.clusters**splits, loader.batch_size
        if splits and mean < batch:
            log.warning(
                "groups of the last stage will have %.1f items on average, fewer than a batch of %d, and smaller groups are "
                "never seen: lower clusters, stages or batch_size",
                *(mean, batch),
            )

    def after_step(self) -> None:
        for stage in self.stages:
            stage.after_step()

    def configure_optimizers(self) -> Any:
        count, epochs = len(self.stages), self.trainer.max_epochs
        if not epochs or epochs % count or self.trainer.max_steps > 0:
            raise InputError(
                f"MCL shares the epochs evenly among its {count} stages: say a multiple of {count} as epochs, and no steps"
            )
        each = int(self.trainer.estimated_stepping_batches) // count
        built = build_optimiser(
            self.parameter_groups(), self.optimisation, each, fused=self.trainer.precision != "16-mixed"
        )
        schedule = built["lr_scheduler"]["scheduler"]
        schedule.lr_lambdas = [_again(factor, each) for factor in schedule.lr_lambdas]
        return built

    # ---- embedding --------------------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        return encoders.integrated([stage.embed(batch) for stage in self.stages])

    def encode(self, data: Any, *, split: str = "train", batch_size: int = 512) -> np.ndarray:
        """Embeddings float32 [N, D] of a data set: those of all stages side by side, on the unit sphere.

        Args:
            data: whatever the base takes.
            split: which part of a data set that has several.
            batch_size: items per forward pass.
        """
        parts = [torch.from_numpy(stage.encode(data, split=split, batch_size=batch_size)) for stage in self.stages]
        return encoders.integrated(parts).numpy()

    def encode_text(self, sentences: str | Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Embeddings float32 [N, D] of texts, where the base reads texts.

        Raises:
            InputError: the base embeds images only.
        """
        parts = [torch.from_numpy(stage.encode_text(sentences, batch_size=batch_size)) for stage in self._readers()]
        return encoders.integrated(parts).numpy()

    def images(self, data: Any, split: str = "train") -> Any:
        """The images of any data that has some."""
        first = self.stages[0]
        return first.images(data, split) if self.family == "pairs" else first.read(data, split)  # type: ignore[operator]

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> Any:
        return self.stages[0].read(data, split, limit=limit, seed=seed, resident=resident)

    @property
    def stored_size(self) -> int | None:
        return self.stages[0].stored_size

    def _readers(self) -> list[Any]:
        if self.family != "pairs":
            raise InputError("this MCL embeds images only: take base clip to embed texts")
        return self.stages


def _again(factor: Any, steps: int) -> Any:
    """A schedule that begins anew after so many steps."""
    return lambda step: factor(step % steps)
