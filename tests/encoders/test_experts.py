"""A converted encoder is the original one before training, and each text sees its own experts only."""

import copy

import pytest
import torch

from counterpoint.data.texts import load, tokenise
from counterpoint.encoders.experts import ROUTERS, ExpertEncoder, blended, routed, sentence_logits
from counterpoint.encoders.text import text
from counterpoint.errors import InputError

BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "bert": BERT,
    "roberta": {**BERT, "model_type": "roberta", "max_position_embeddings": 64},
    "mpnet": {**BERT, "model_type": "mpnet", "max_position_embeddings": 64},
    "electra": {**BERT, "model_type": "electra", "embedding_size": 16},
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    "modernbert": {**BERT, "model_type": "modernbert", "global_attn_every_n_layers": 1},
}
SENTENCES = [
    "A dog runs over the hill.",
    "It rains",
    "x",
    "Nobody asked for that, however long they might have waited.",
]
DOMAINS = ("cvd", "copd", "skin")

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(kind="bert", seed=0, **options):
    torch.manual_seed(seed)
    return text(dict(MODELS[kind]), **options).eval()


def converted(kind="bert", domains=DOMAINS, seed=0, **options):
    encoder = plain(kind, seed)
    torch.manual_seed(seed + 1)
    return ExpertEncoder(encoder, domains, **options).eval()


def batch_of(encoder, sentences=SENTENCES, domain=None):
    batch = tokenise(load(list(sentences), whole=True), encoder.tokenizer, 60).take(torch.arange(len(sentences)))
    return batch if domain is None else batch | {"domain": torch.tensor(domain)}


def shake(module, seed=5):
    """Let training happen to every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return module


# ------------------------------------------------------------------------------------------------------------- routing


def test_routed_is_each_row_through_its_expert():
    torch.manual_seed(0)
    experts = [torch.nn.Linear(3, 3) for _ in range(4)]
    x, assignment = torch.randn(9, 2, 3), torch.tensor([3, 0, 0, 1, 3, 3, 0, 1, 0])  # nobody goes to expert 2
    expected = torch.stack([experts[e](row) for row, e in zip(x, assignment, strict=True)])
    torch.testing.assert_close(routed(x, assignment, experts), expected)
    assert experts[2].weight.grad is None
    torch.testing.assert_close(routed(x, torch.full((9,), 2), experts), experts[2](x))


def test_experts_that_nobody_asks_are_not_computed():
    asked = []
    experts = [lambda x, e=e: asked.append((e, len(x))) or x for e in range(3)]
    routed(torch.zeros(5, 2, 1), torch.tensor([2, 0, 2, 2, 0]), experts)
    assert asked == [(0, 2), (2, 3)]


def test_blended_is_the_weighted_sum():
    torch.manual_seed(0)
    experts = [torch.nn.Linear(3, 3) for _ in range(3)]
    x, chosen, weight = torch.randn(4, 3), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]]), torch.rand(4, 2)
    expected = torch.stack([sum(weight[i, k] * experts[chosen[i, k]](x[i]) for k in range(2)) for i in range(4)])
    torch.testing.assert_close(blended(x, chosen, weight, experts), expected)


def test_padding_moves_the_plain_mean_only():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4)
    padded, mask = torch.nn.functional.pad(logits, (0, 0, 0, 5), value=9.0), torch.ones(2, 8)
    mask[:, 3:] = 0
    torch.testing.assert_close(sentence_logits(padded, mask), logits.mean(1))
    assert not torch.allclose(sentence_logits(padded), logits.mean(1))


# ----------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("where", ["all", "middle", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_before_training_the_converted_encoder_is_the_original_one_in_every_domain(kind, where):
    original, encoder = plain(kind), converted(kind, where=where)
    expected = original.embed(batch_of(original))
    for number in range(3):
        torch.testing.assert_close(encoder.embed(batch_of(encoder, domain=[number] * 4)), expected)
    torch.testing.assert_close(encoder.embed(batch_of(encoder)), expected)


def test_the_released_form_is_another_network_and_has_a_fresh_norm():
    encoder = converted(norm="pre")
    original = plain()
    assert not torch.allclose(encoder.embed(batch_of(encoder)), original.embed(batch_of(original)), atol=1e-3)
    block = encoder.model.encoder.layer[1].output
    assert block.pre and torch.equal(block.norm.weight, torch.ones(16))
    x = torch.randn(2, 3, 16)
    encoder.traffic.domain = torch.tensor([0, 2])
    expected = x + torch.stack([block.experts.experts[e](block.norm(row)) for e, row in zip((0, 2), x, strict=True)])
    torch.testing.assert_close(block(x, x), expected)


def test_experts_share_nothing_and_copy_biases():
    encoder = converted()
    layer = encoder.model.encoder.layer[0].output.experts.experts
    weights = [[*expert.parameters()] for expert in layer]
    assert len(weights) == 3 and len(weights[0]) == 4  # two weights and two biases
    assert len({w.data_ptr() for expert in weights for w in expert}) == 12
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    assert len(converted(where="middle").layers) == 1 and converted(where="middle").layers == [1]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_a_text_moves_only_with_the_experts_of_its_domain(kind):
    encoder = converted(kind)
    before = encoder.embed(batch_of(encoder, domain=[0, 1, 2, 1]))
    parts = [part for part in encoder.modules() if type(part).__name__ == "Experts"]
    for part in parts:
        shake(part.experts[1])
    after = encoder.embed(batch_of(encoder, domain=[0, 1, 2, 1]))
    moved = (before - after).abs().amax(1) > 1e-3
    assert len(parts) == 3 and moved.tolist() == [False, True, False, True]


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    encoder = shake(converted())
    domain = [2, 0, 1, 0]
    batch = batch_of(encoder, domain=domain)
    alone = [encoder.embed(batch_of(encoder, [s], [d])) for s, d in zip(SENTENCES, domain, strict=True)]
    torch.testing.assert_close(encoder.embed(batch), torch.cat(alone), atol=1e-5, rtol=1e-4)
    many = batch_of(encoder, SENTENCES * 10, domain * 10)
    ids = encoder.marked(many["input_ids"], many["domain"])
    pooled, routes = encoder.routed(ids, many["attention_mask"])
    torch.testing.assert_close(pooled, torch.cat(alone * 10), atol=1e-5, rtol=1e-4)
    assert routes is None


def test_a_domains_token_begins_as_cls_and_then_goes_its_own_way():
    encoder = converted()
    start = encoder.tokenizer.cls_token_id
    table = encoder.model.get_input_embeddings().weight
    assert (
        all(torch.equal(table[i], table[start]) for i in encoder.domain_ids)
        and len(set(encoder.domain_ids.tolist())) == 3
    )
    with torch.no_grad():
        table[encoder.domain_ids[1]] += torch.linspace(-1, 1, 16).square()
    domains = [encoder.embed(batch_of(encoder, domain=[n] * 4)) for n in range(3)]
    assert torch.allclose(domains[0], domains[2]) and not torch.allclose(domains[0], domains[1], atol=1e-3)
    silent = converted(tokens=False)
    with torch.no_grad():
        silent.model.get_input_embeddings().weight[silent.domain_ids] += torch.linspace(-1, 1, 16).square()
    torch.testing.assert_close(silent.embed(batch_of(silent, domain=[1] * 4)), silent.embed(batch_of(silent)))


def test_the_given_tokeniser_stays_as_it_was():
    encoder = plain()
    before, kept = len(encoder.tokenizer), encoder.tokenizer
    assert len(ExpertEncoder(encoder, DOMAINS).tokenizer) == before + 3 and len(kept) == before


# ------------------------------------------------------------------------------------------------------ learned routers


def test_learned_routers_report_what_they_decided():
    for router in ROUTERS[1:]:
        encoder = shake(converted(router=router, experts=4))
        batch = batch_of(encoder, SENTENCES * 10)
        pooled, routes = encoder.routed(batch["input_ids"], batch["attention_mask"])
        assert routes.shape == (3, 40, 4)
        alone = encoder(*(batch_of(encoder, SENTENCES[:1])[k] for k in ("input_ids", "attention_mask")))
        torch.testing.assert_close(routes[:, 20], alone.routes[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(pooled[20:21], alone.pooled, atol=1e-4, rtol=1e-3)


def test_a_switch_gives_its_gate_no_gradient_from_the_task():
    for router, learns in (("switch", False), ("sentence", True), ("token", True)):
        encoder = shake(converted(router=router))
        batch = batch_of(encoder)
        out = encoder(batch["input_ids"], batch["attention_mask"])
        gates = [part.gate.weight for part in encoder.modules() if type(part).__name__ == "Experts"]
        grads = torch.autograd.grad(out.pooled.square().sum(), gates, allow_unused=True, retain_graph=True)
        assert all((g is not None and g.abs().max() > 0) == learns for g in grads)
        assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.routes.sum(), gates, allow_unused=True))


def test_equal_experts_show_the_weights_of_each_router():
    """All experts are one function at the start: switch and token (weights sum to 1) return it, sentence a share of it."""
    original = plain()
    expected = original.embed(batch_of(original))
    for router, same in (("switch", True), ("token", True), ("sentence", False)):
        encoder = converted(router=router, experts=5)
        assert torch.allclose(encoder.embed(batch_of(encoder)), expected, atol=1e-5) == same
    everything = converted(router="sentence", experts=5, top_k=5)
    torch.testing.assert_close(everything.embed(batch_of(everything)), expected)


def test_padding_changes_the_route_only_where_it_is_averaged():
    for real in (True, False):
        encoder = shake(converted(router="switch", real=real))
        batch = batch_of(encoder, SENTENCES[1:2])
        wide = [torch.nn.functional.pad(batch[k], (0, 20)) for k in ("input_ids", "attention_mask")]
        narrow = encoder(batch["input_ids"], batch["attention_mask"]).routes
        assert torch.allclose(encoder(*wide).routes, narrow, atol=1e-5) == real


# ---------------------------------------------------------------------------------------------------------- one domain


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_one_domain_alone_is_a_stock_model(kind):
    encoder = shake(converted(kind))
    for number, name in enumerate(DOMAINS):
        alone = encoder.only(name).eval()
        assert not any(type(part).__module__.startswith("counterpoint") for part in alone.model.modules())
        torch.testing.assert_close(
            alone.embed(batch_of(alone)), encoder.embed(batch_of(encoder, domain=[number] * 4)), atol=1e-5, rtol=1e-4
        )
    with pytest.raises(InputError, match="there is no domain lung, only cvd, copd, skin"):
        encoder.only("lung")
    for options in ({"router": "switch"}, {"norm": "pre"}) if kind == "bert" else ():
        with pytest.raises(InputError, match="alone only under enforced routing with norm post"):
            converted(**options).only("cvd")


def test_a_copy_routes_by_itself():
    encoder = converted()
    other = copy.deepcopy(encoder)
    parts = [part for part in other.modules() if type(part).__name__ == "Experts"]
    assert all(part.traffic is other.traffic for part in parts) and other.traffic is not encoder.traffic
    torch.testing.assert_close(other.embed(batch_of(other)), encoder.embed(batch_of(encoder)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "random"}, 'router must be one of enforced, switch, sentence, token, not "random"'),
        ({"where": "first"}, "where must be one of all, middle, none"),
        ({"experts": 2}, "enforced routing needs one expert for each of the 3 domains, not 2"),
        ({"router": "token", "top_k": 4}, "top_k must lie between 1 and the 3 experts, not 4"),
        ({"domains": ("a", "a")}, "domains need a name each, not a, a"),
        ({"domains": ()}, "name the domains, or say how many experts there are"),
        ({"kind": "distilbert", "norm": "pre"}, 'norm="pre" is for blocks like BERT'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        converted(**options)


def test_models_and_tokenisers_that_do_not_fit():
    albert = {**BERT, "model_type": "albert", "embedding_size": 16}
    with pytest.raises(InputError, match="where that lies in albert is not known"):
        ExpertEncoder(text(albert), DOMAINS)
    encoder = plain()
    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
    encoder.tokenizer.cls_token = None
    with pytest.raises(InputError, match="does not begin its texts"):
        ExpertEncoder(encoder, DOMAINS)
