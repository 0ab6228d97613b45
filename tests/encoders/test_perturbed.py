"""SiFT: the clean answer stays what it was, the perturbation climbs, and nothing of it stays in the model."""

from functools import partial

import pytest
import torch
from torch import nn

from counterpoint.contrast.adversarial import symmetric_cross_entropy
from counterpoint.encoders.perturbed import Sift, before, embedding_norm, normalised
from counterpoint.encoders.text import text
from counterpoint.errors import InputError
from counterpoint.train.chunks import in_chunks

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = {
    "bert": {},
    "deberta-v2": {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "roberta": {"max_position_embeddings": 64},
    "modernbert": {"global_attn_every_n_layers": 1, "local_attention": 16, "eos_token_id": 3, "bos_token_id": 2,
                   "cls_token_id": 2, "sep_token_id": 3},
}  # fmt: skip


class Classifier(nn.Module):
    def __init__(self, kind="bert", dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        own = {} if kind == "modernbert" else {"dropout": dropout}
        self.encoder = text({"model_type": kind, **TINY, **KINDS[kind]}, pooling="mean", **own)
        self.linear = nn.Linear(16, 3)
        nn.init.normal_(self.linear.weight)

    def scores(self, ids, mask):
        return self.linear(self.encoder.pooled(ids, mask))


def batch(rows=4, length=9):
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=g)).long()
    return torch.randint(5, 200, (rows, length), generator=g) * mask, mask


@pytest.mark.parametrize("kind", KINDS)
def test_clean_answers_are_what_they_were_and_every_weight_learns(kind):
    model = Classifier(kind)
    plain = model.scores(*batch())
    scores, penalty = Sift()(model.encoder, partial(model.scores, *batch()))
    torch.testing.assert_close(scores, plain, rtol=1e-2, atol=2e-3)  # two normalisations are one but for their eps
    (scores.sum() + penalty).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not embedding_norm(model.encoder)._forward_pre_hooks
    assert torch.equal(model.scores(*batch()), plain)


def test_without_noise_and_step_the_penalty_pulls_nowhere():
    model = Classifier()
    scores, penalty = Sift(weight=2.0, noise=0.0, rate=0.0)(model.encoder, partial(model.scores, *batch()))
    torch.testing.assert_close(penalty, 2 * symmetric_cross_entropy(scores, scores))
    for g in torch.autograd.grad(penalty, list(model.parameters())):
        assert g.abs().max() < 1e-5


def test_the_step_makes_answers_differ_more():
    """The penalty less its least value, at the same first noise, must grow with the step; a step downhill makes it smaller."""
    model = Classifier()
    excess = []
    for rate in (-0.005, 0.0, 0.005, 0.02):
        torch.manual_seed(5)
        part = Sift(weight=1.0, noise=0.01, rate=abs(rate))
        object.__setattr__(part, "rate", rate)
        scores, penalty = part(model.encoder, partial(model.scores, *batch(64)))
        excess.append((penalty - symmetric_cross_entropy(scores, scores)).item())
    assert excess[0] < excess[1] < excess[2] < excess[3] and excess[3] > 4 * max(excess[1], 1e-9)


def test_one_step_by_hand():
    model = Classifier()
    ids, mask = batch()
    norm, part = embedding_norm(model.encoder), Sift(weight=3.0, noise=0.1, rate=0.05)
    torch.manual_seed(9)
    scores, penalty = part(model.encoder, partial(model.scores, ids, mask))
    torch.manual_seed(9)
    caught = []
    with before(norm, lambda x: caught.append(x) or x):
        model.scores(ids, mask)
    x = normalised(caught[0]).detach()
    delta = (0.1 * torch.randn(x.shape)).clamp(-0.2, 0.2).requires_grad_()
    with before(norm, lambda _: x + delta):
        loss = -(scores.detach().softmax(1) * model.scores(ids, mask).log_softmax(1)).sum()
    g = torch.autograd.grad(loss, delta)[0]
    with before(norm, lambda _: x + delta.detach() + 0.05 * g / (1e-6 + g.abs().amax(-1, keepdim=True))):
        p, q = model.scores(ids, mask).softmax(1), scores.softmax(1)
    torch.testing.assert_close(penalty, -3 * (p * q.log() + q * p.log()).sum(1).mean(), rtol=1e-4, atol=1e-5)


def test_embeddings_learn_from_the_clean_answers_alone():
    """Where the clean answers are constants, the penalty moves the layers and no embedding."""
    model = Classifier()
    table, ids = model.encoder.model.get_input_embeddings().weight, batch()
    calls = []

    def answer():
        calls.append(1)
        scores = model.scores(*ids)
        return scores.detach().requires_grad_() if len(calls) == 1 else scores

    penalty = Sift(noise=0.3, rate=0.1)(model.encoder, answer)[1]
    layer, nothing = torch.autograd.grad(penalty, (model.linear.weight, table), retain_graph=True, allow_unused=True)
    assert len(calls) == 3 and layer.abs().max() > 0 and nothing is None
    penalty = Sift(noise=0.3, rate=0.1)(model.encoder, partial(model.scores, *ids))[1]
    assert torch.autograd.grad(penalty, table)[0].abs().max() > 0


def test_groups_of_like_length_meet_their_own_perturbation():
    model = Classifier()
    ids, mask = batch(40)
    assert Sift()(model.encoder, partial(model.scores, ids, mask))[1].isfinite()  # four calls of the encoder each


def test_smooth_answers_are_learned():
    """Where the penalty alone is trained, answers to moved embeddings come nearer to the clean ones."""
    model = Classifier()
    part, task = Sift(weight=1.0, noise=0.1, rate=0.1), partial(model.scores, *batch(16))

    def gap():
        torch.manual_seed(3)
        scores, penalty = part(model.encoder, task)
        return (penalty - symmetric_cross_entropy(scores, scores)).item()

    first = gap()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimiser.zero_grad()
        part(model.encoder, task)[1].backward()
        optimiser.step()
    assert 0 <= gap() < 0.5 * first


def test_bad_input_is_named():
    with pytest.raises(InputError, match="weight, noise and rate are not negative"):
        Sift(noise=-1.0)
    model = Classifier()
    with in_chunks(model, 2), pytest.raises(InputError, match="leave chunk out"):
        Sift()(model.encoder, partial(model.scores, *batch()))
    model.encoder.model.embeddings.LayerNorm = nn.Identity()
    del model.encoder.model.embeddings.LayerNorm
    with pytest.raises(InputError, match="does not normalise its embeddings in a place that we know"):
        embedding_norm(model.encoder)
