"""CoCoSoDa's contrasts against a plain computation, their limits, and where gradient goes."""

import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast.multimodal import Queues, multimodal_contrast, multimodal_pairs

B, K, D = 5, 9, 6


def given(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(B, D, generator=generator, dtype=dtype) for _ in range(4)]
    queues = Queues(*(F.normalize(torch.randn(K, D, generator=generator, dtype=dtype), dim=1) for _ in range(4)))
    return vectors, queues


def plain(vectors, queues, temperature, intra, scale):
    c, q, kc, kq = (F.normalize(x, dim=1) for x in vectors)
    rows = []
    wanted = [(c, q, queues.query), (c, kq, queues.query_key), (q, c, queues.code), (q, kc, queues.code_key)]
    wanted += [(c, kc, queues.code_key), (q, kq, queues.query_key)] if intra else []
    for x, keys, old in wanted:
        logits = torch.cat([scale * (x @ keys.T), x @ old.T], 1) / temperature
        rows.append(F.cross_entropy(logits, torch.arange(B), reduction="none"))
    return torch.cat(rows).mean()


@pytest.mark.parametrize("intra", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_loss_is_the_mean_cross_entropy_of_all_rows(intra, scale):
    vectors, queues = given()
    found = multimodal_contrast(*vectors, queues, temperature=0.2, intra=intra, scale=scale)
    torch.testing.assert_close(found, plain(vectors, queues, 0.2, intra, scale))
    assert len(multimodal_pairs(*vectors, queues, intra=intra)) == (6 if intra else 4)


def test_without_copies_and_queues_it_is_the_contrast_in_both_directions():
    """c' = c and q' = q, no queue, no terms within: each direction twice."""
    (code, query, *_), _ = given()
    found = multimodal_contrast(code, query, code, query, temperature=0.1, intra=False)
    torch.testing.assert_close(found, contrast.clip_loss(code, query, temperature=0.1))


def test_keys_and_queues_are_constants_and_both_online_sides_learn():
    vectors, queues = given(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in vectors]
    multimodal_contrast(*leaves, queues).backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves[:2]) and all(x.grad is None for x in leaves[2:])


def test_roles_of_code_and_query_are_symmetric():
    (code, query, code_key, query_key), queues = given(3)
    there = multimodal_contrast(code, query, code_key, query_key, queues)
    turned = Queues(queues.query, queues.code, queues.query_key, queues.code_key)
    torch.testing.assert_close(there, multimodal_contrast(query, code, query_key, code_key, turned))


def test_each_queue_repels_only_where_it_belongs():
    vectors, queues = given(1)
    baseline = [pairs.loss(contrast.info_nce, temperature=0.1) for pairs in multimodal_pairs(*vectors, queues)]
    touched = {"code": [2], "query": [0], "code_key": [3, 4], "query_key": [1, 5]}
    for name, places in touched.items():
        changed = queues._replace(**{name: F.normalize(vectors[0] + vectors[1], dim=1)})
        found = [pairs.loss(contrast.info_nce, temperature=0.1) for pairs in multimodal_pairs(*vectors, changed)]
        assert [i for i in range(6) if not torch.isclose(found[i], baseline[i])] == places


def test_a_batch_of_one_has_the_queue_and_without_it_nothing_to_learn():
    vectors, queues = given()
    one = [x[:1] for x in vectors]
    assert multimodal_contrast(*one, queues, temperature=0.1) > 0
    assert multimodal_contrast(*one, temperature=0.1).item() == pytest.approx(0, abs=1e-6)
