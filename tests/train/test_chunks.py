"""`chunk` computes large batches in little memory, and nothing else changes."""

import pytest
import torch
from torch import nn

from counterpoint.errors import InputError
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.methods.vision.byol import BYOL
from counterpoint.methods.vision.moco import MoCo
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Method, fit, resume
from counterpoint.train.chunks import in_chunks


@pytest.fixture
def images():
    return torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def simclr(norm: bool = True, cls=SimCLR, **options) -> Method:
    torch.manual_seed(0)
    method = cls(encoder="convnet-4", image_size=16, projection=(16, 8), **options)
    if not norm:
        for name, part in [*method.named_modules()]:
            if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
                parent, _, child = name.rpartition(".")
                method.get_submodule(parent).__setattr__(child, nn.Identity())
    return method


def gradients(method: Method, batch, chunk: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    method.zero_grad()
    torch.manual_seed(7)
    with in_chunks(method, chunk):
        loss = method.loss(batch)
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [2, 5, 16, 47])
def test_loss_and_gradient_are_those_of_the_whole_batch(images, chunk):
    """Without batch normalisation there is nothing that a chunk could not know."""
    method = simclr(norm=False)
    loss, whole = gradients(method, {"image": images}, None)
    same, parts = gradients(method, {"image": images}, chunk)
    torch.testing.assert_close(same, loss)
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def by_hand(encoder, x, chunk):
    parts = x.tensor_split(-(-len(x) // chunk))
    return torch.cat([encoder(part).pooled for part in parts])


def test_the_second_pass_repeats_the_first(images):
    """Dropout and batch statistics of a chunk are the same in both passes: the gradient is that of a graph that was kept."""
    method = simclr()
    encoder = method.encoder
    encoder.stages.append(nn.Dropout(0.5))
    x = images.float() / 255

    def gradient(vectors) -> list[torch.Tensor]:
        encoder.zero_grad()
        (vectors * torch.arange(vectors.shape[1])).square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters()]

    torch.manual_seed(3)
    kept = gradient(by_hand(encoder, x, 10))
    torch.manual_seed(3)
    with in_chunks(method, 10):
        again = gradient(encoder(x).pooled)
    for one, two in zip(kept, again, strict=True):
        torch.testing.assert_close(one, two)


def test_running_statistics_count_every_chunk_once(images):
    plain, chunked = simclr().encoder, simclr()
    x = images.float() / 255
    by_hand(plain, x, 12).sum().backward()
    with in_chunks(chunked, 12):
        chunked.encoder(x).pooled.sum().backward()
    one, two = dict(plain.named_buffers()), dict(chunked.encoder.named_buffers())
    assert any("num_batches_tracked" in name for name in one)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_activations_are_not_kept(images):
    def kept(chunk) -> int:
        sizes = []
        method = simclr()
        with (
            in_chunks(method, chunk),
            torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x),
        ):
            method.loss({"image": images}).backward()
        return sum(sizes)

    # hooks inside a checkpoint see nothing, so what is left are the heads and the loss
    assert kept(8) < kept(None) / 5


@pytest.mark.parametrize("cls", [SimCLR, MoCo, BYOL])
def test_every_method_of_encoders_trains_and_resumes(images, tmp_path, cls):
    options = {"epochs": 2, "batch_size": 24, "progress": False, "chunk": 7, "checkpoint_seconds": 0, "lr": 0.01}
    method = simclr(cls=cls, **({"queue": 48} if cls is MoCo else {}))
    run = fit(method, images, run=tmp_path / "a", **options)
    assert not any("forward" in vars(part) for part in method.modules())
    original = cls.training_step

    def step(self, batch, batch_idx):
        if self.trainer.current_epoch == 1:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(cls, "training_step", step)
        fit(
            simclr(cls=cls, **({"queue": 48} if cls is MoCo else {})),
            images,
            run=tmp_path / "b",
            **options,
        )
    again = resume(tmp_path / "b", images)
    one, two = run.model().state_dict(), again.model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_histories_too(tmp_path):
    lists = [[str((start + i) % 12) for i in range(7)] for start in range(12)] * 3
    weights = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        method = SASRec(dim=16, layers=1, heads=1, hidden=32, dropout=0.0, attention_dropout=0.0, max_length=8)
        options = {"epochs": 1, "batch_size": 32, "lr": 0.05, "progress": False}
        weights.append(fit(method, lists, run=tmp_path / str(chunk), chunk=chunk, **options).method.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


def test_what_has_no_encoder_of_ours_cannot(images, tmp_path):
    class Flat(Method):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 2)

        def loss(self, batch):
            return self.encoder.weight.sum()

    with pytest.raises(InputError, match="leave chunk out"), in_chunks(Flat(), 4):
        pass


def test_a_chunk_holds_two_items(images, tmp_path):
    with pytest.raises(InputError, match="chunk must be at least 2"):
        fit(simclr(), images, run=tmp_path / "run", chunk=1)
