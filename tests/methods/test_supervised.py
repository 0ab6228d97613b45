"""Methods that learn from labels: Hydra's pairs and gates, fine-tuning and Core-tuning."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast.focal import focal_sup_con, mix_hard_pairs
from counterpoint.contrast.subspace import gated_similarity, partner_labels, partner_loss
from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.methods.vision.core_tuning import CoreTuning
from counterpoint.methods.vision.fine_tuning import FineTuning
from counterpoint.methods.vision.hydra import Hydra
from counterpoint.train import fit
from counterpoint.train.callbacks import geometry

SMALL = {"encoder": "convnet-4", "image_size": 16, "classes": 4}
NARROW = {"projection": (16, 8), "gate_widths": (6, 12)}


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=random)
    return {"image": image, "label": torch.randint(4, (16,), generator=random)}


def build(cls, **options):
    torch.manual_seed(0)
    return cls(**{**SMALL, **(NARROW if cls is Hydra else {}), **options})


def loss_at(method, batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return method.loss(batch)


def reaches(module, loss) -> bool:
    for p in module.parameters():
        p.grad = None
    loss.backward(retain_graph=True)
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


# ---- Hydra -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["arbitrary", "identical", "distinct"])
@pytest.mark.parametrize("two_views", [False, True])
def test_hydra_is_its_formula(batch, pairs, two_views):
    method = build(Hydra, pairs=pairs, two_views=two_views, variant="subspace", temperature=0.3)
    found = loss_at(method, batch)
    torch.manual_seed(7)
    features = method.encoder(method.views(batch["image"])).pooled
    query = key = method.projector(features)
    if two_views:
        key = method.projector(method.encoder(method.views(batch["image"])).pooled)
    partners = partner_labels(batch["label"], pairs, classes=4)
    gate = method.gate(batch["label"], partners)
    expected = partner_loss(query, key, gate, batch["label"], partners, temperature=0.3, variant="subspace")
    torch.testing.assert_close(found["pairs"], expected)
    torch.testing.assert_close(found["online head"], F.cross_entropy(method.online_head(features), batch["label"]))


def test_nothing_of_the_online_head_reaches_the_encoder(batch):
    method = build(Hydra)
    terms = loss_at(method, batch)
    assert reaches(method.online_head, terms["online head"]) and not reaches(method.encoder, terms["online head"])
    assert not reaches(method.projector, terms["online head"]) and not reaches(method.online_head, terms["pairs"])
    for part in (method.encoder, method.projector, method.gate):
        assert reaches(part, terms["pairs"])


def test_without_a_gate_there_is_nothing_to_learn_but_the_encoder(batch):
    gated, without = build(Hydra), build(Hydra, gated=False)
    assert {name.split(".")[0] for name in gated.state_dict()} == {"encoder", "projector", "gate", "online_head"}
    assert {name.split(".")[0] for name in without.state_dict()} == {"encoder", "projector", "online_head"}
    assert loss_at(without, batch)["pairs"] != loss_at(gated, batch)["pairs"]


def test_repeats_are_more_views_of_the_same_images(batch):
    method, seen = build(Hydra, repeats=3), []
    method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    loss_at(method, batch)
    assert seen[0].shape == (48, 3, 16, 16) and not torch.equal(seen[0][:16], seen[0][16:32])


def blobs(n: int = 96) -> Images:
    """Four classes: a bright spot in one of four corners, over noise."""
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 120, (n, 3, 16, 16), dtype=torch.uint8, generator=random)
    label = torch.arange(n) % 4
    for i, corner in enumerate(label.tolist()):
        top, left = 8 * (corner // 2), 8 * (corner % 2)
        image[i, :, top + 2 : top + 6, left + 2 : left + 6] = 240
    return Images(image, label, ("a", "b", "c", "d"), name="blobs")


def test_hydra_learns_and_its_online_head_is_measured(tmp_path):
    still = {"views": build(Hydra).views.__class__(crop=None, flip=0.0, jitter_p=0.0, grey=0.0, blur=0.0)}
    items = blobs()
    np.savez(tmp_path / "other.npz", image=blobs(60).image.numpy(), label=np.arange(60) % 4)
    method = build(Hydra, encoder="convnet-8", **still)
    options = {"epochs": 25, "batch_size": 32, "optimizer": "adam", "lr": 0.01, "progress": False, "log_every": 1}
    run = fit(method, items, run=tmp_path / "run", **options)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["terms"]["pairs"] for line in part) for part in (lines[:6], lines[-6:]))
    assert last < 0.8 * first and lines[0]["terms"].keys() == {"pairs", "online head"}
    found = evaluate(run, tmp_path / "other.npz", protocols=["online-head", "knn-200-0.1"])
    head = {result.subject: result for result in found if result.protocol == "online-head"}
    assert head.keys() == {"trained", "untrained"} and head["trained"].value > 80 > head["untrained"].value + 20
    assert head["trained"].detail["scatter"] < head["untrained"].detail["scatter"]


def test_hydra_needs_labels_of_its_classes(tmp_path):
    options = {"run": tmp_path / "run", "epochs": 1, "batch_size": 8, "progress": False}
    with pytest.raises(InputError, match="Hydra learns from labels, but images has none"):
        fit(build(Hydra), Images(blobs().image), **options)
    with pytest.raises(InputError, match="blobs has labels from 0 to 3, but Hydra was built for 2 classes"):
        fit(build(Hydra, classes=2), blobs(), **options)
    assert not (tmp_path / "run").exists()


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def test_fine_tuning_is_cross_entropy_with_contrast_beside_it(batch):
    method = build(FineTuning, eta=0.5, temperature=0.2)
    found = loss_at(method, batch)
    torch.manual_seed(7)
    features = method.features(batch)
    torch.testing.assert_close(found["cross entropy"], F.cross_entropy(method.classifier(features), batch["label"]))
    near = contrast.sup_con(method.contrastor(features), batch["label"], temperature=0.2)
    torch.testing.assert_close(found["contrast"], 0.5 * near)
    assert loss_at(build(FineTuning), batch).keys() == {"cross entropy"}
    assert method.classifier.bias is None


@pytest.mark.parametrize("mining", ["released", "masked"])
def test_core_tuning_is_its_formula(batch, mining):
    method = build(CoreTuning, mining=mining, eta=2.0, temperature=0.2, min_share=0.7)
    found = loss_at(method, batch)
    torch.manual_seed(7)
    features = method.features(batch)
    toward, away = torch.distributions.Beta(torch.ones(2, 16), torch.ones(2, 16)).sample()
    order = torch.randperm(16)
    shares = {"permutation": order, "lam_negative": toward, "lam_positive": away, "min_lam_negative": 0.7}
    mixed, targets = mix_hard_pairs(features, batch["label"], classes=4, mining=mining, **shares)
    soft = -(targets * method.classifier(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found["cross entropy"], soft)
    near = focal_sup_con(method.contrastor(mixed), targets, temperature=0.2)
    torch.testing.assert_close(found["contrast"], 2 * near)
    assert all(reaches(method.encoder, term) for term in found.values())


def test_the_two_minings_differ(batch):
    one, other = (build(CoreTuning, mining=mining) for mining in ("released", "masked"))
    assert loss_at(one, batch)["cross entropy"] != loss_at(other, batch)["cross entropy"]


def test_shares_are_drawn_for_each_row(batch):
    method = build(CoreTuning)
    torch.manual_seed(0)
    _, targets = method.mixed(torch.rand(64, 5), torch.arange(64) % 4)
    third = targets[128:]
    assert len(third.amax(1).unique()) > 30 and bool((targets[64:128].amax(1) >= 0.8 - 1e-6).all())
    torch.testing.assert_close(targets.sum(1), torch.ones(192))


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(InputError, match="alpha must be positive"):
        build(CoreTuning, alpha=0.0)


def test_core_tuning_learns(tmp_path):
    still = {"views": build(Hydra).views.__class__(crop=None, flip=0.0, jitter_p=0.0, grey=0.0, blur=0.0)}
    np.savez(tmp_path / "other.npz", image=blobs(60).image.numpy(), label=np.arange(60) % 4)
    options = {"epochs": 20, "batch_size": 32, "optimizer": "adam", "lr": 0.01, "progress": False}
    run = fit(build(CoreTuning, encoder="convnet-8", **still), blobs(), run=tmp_path / "run", **options)
    (trained,) = evaluate(run, tmp_path / "other.npz", protocols=["fine-tune"], trained_only=True)
    assert trained.value > 80 and trained.metric == "accuracy"


# ---- what is shown of them -------------------------------------------------------------------------------------------


def test_scores_of_labelled_pairs_are_means_over_their_pairs(batch):
    z, label = torch.randn(16, 8, generator=torch.Generator().manual_seed(3)), batch["label"]
    label[0] = 9  # alone in its class
    same = label[:, None] == label
    record = geometry(z, z, positive=same.clone().fill_diagonal_(False), negative=~same, temperature=0.5)
    s = (F.normalize(z) @ F.normalize(z).T).double()
    near, far, spread, soft, wins = [], [], [], [], []
    for i in range(1, 16):
        positive = torch.stack([s[i, j] for j in range(16) if j != i and label[j] == label[i]])
        negative = torch.stack([s[i, j] for j in range(16) if label[j] != label[i]])
        near.append(positive.mean()), far.append(negative.mean()), spread.append(negative.var())
        soft.append(0.5 * (negative / 0.5).exp().mean().log())
        wins += [float(value > negative.max()) for value in positive]
    expected = {"score_positive": near, "score_negative": far, "score_negative_variance": spread}
    for name, values in {**expected, "score_negative_soft": soft}.items():
        assert record[name] == pytest.approx(float(torch.stack(values).mean()), rel=1e-5), name
    assert record["score_positive_variance"] == pytest.approx(float(torch.stack(near).var()), rel=1e-5)
    assert record["proxy_accuracy"] == pytest.approx(np.mean(wins), rel=1e-5)
    assert sum(record["positive"]) == int(same.sum()) - 16 and sum(record["negative"]) == int((~same).sum())
    distances = [(F.normalize(z[i], dim=0) - F.normalize(z[j], dim=0)).square().sum()
                 for i in range(16) for j in range(16) if i != j and same[i, j]]  # fmt: skip
    assert record["alignment"] == pytest.approx(float(torch.stack(distances).mean()), rel=1e-4)


def test_hydra_shows_what_enters_its_loss(batch):
    """Similarities in the subspaces for the scores, cosines for the histograms; nothing is drawn or kept otherwise."""
    method = build(Hydra)
    loss_at(method, batch)
    assert not method.watched
    method.watching = True
    shown = (loss_at(method, batch), method.watched)[1]
    torch.manual_seed(7)
    z = method.projector(method.encoder(method.views(batch["image"])).pooled)
    partners = partner_labels(batch["label"], "arbitrary")
    score = gated_similarity(z, z, method.gate(batch["label"], partners))
    torch.testing.assert_close(shown["score"], score.detach())
    label, own = batch["label"], torch.eye(16, dtype=torch.bool)
    assert torch.equal(shown["positive"], (label == partners[:, None]) & ~own)
    assert torch.equal(shown["negative"], (label != partners[:, None]) & (label != label[:, None]))
