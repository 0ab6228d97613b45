"""Prefixes and LoRA: what a layer computes by hand, what learns, what is left when the updates are merged, what is refused."""

import copy
import pickle

import pytest
import torch

from counterpoint.encoders.text import marks_pairs, text
from counterpoint.encoders.tuned import LoRAEncoder, PrefixEncoder, tuned
from counterpoint.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 8}
OWN = {
    "roberta": {"max_position_embeddings": 64},
    "deberta-v2": {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {"global_attn_every_n_layers": 1, "local_attention": 16, "eos_token_id": 3, "bos_token_id": 2,
                   "cls_token_id": 2, "sep_token_id": 3},
}  # fmt: skip


def encoder(kind="bert", **changes):
    torch.manual_seed(0)
    dropout = {} if kind == "modernbert" else {"dropout": 0.0}
    return text({"model_type": kind, **TINY, **OWN.get(kind, {}), **changes}, pooling="mean", **dropout).eval()


def rows():
    ids = torch.randint(5, 200, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return ids, mask


def learned(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_prefixed_layer_by_hand():
    found = PrefixEncoder(encoder(num_hidden_layers=1), length=4).eval()
    found.segments = True
    ids, mask = rows()
    ids[:, 2] = found.tokenizer.sep_token_id
    model = found.model.get_base_model()
    places, segment = torch.arange(4, 11)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    x = model.embeddings(input_ids=ids, position_ids=places, token_type_ids=segment)
    layer = model.encoder.layer[0]
    own = layer.attention.self
    query, key, value = (part(x).view(3, 7, 3, 4).transpose(1, 2) for part in (own.query, own.key, own.value))
    prefix = found.table.view(4, 2, 3, 4).permute(1, 2, 0, 3)[:, None].expand(-1, 3, -1, -1, -1)
    key, value = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
    real = torch.cat([torch.ones(3, 4), mask], 1)[:, None, None]
    weight = (query @ key.transpose(2, 3) / 2).masked_fill(real == 0, -torch.inf).softmax(-1)
    hidden = layer.attention.output((weight @ value).transpose(1, 2).reshape(3, 7, 12), x)
    by_hand = layer.output(layer.intermediate(hidden), hidden)
    torch.testing.assert_close(found(ids, mask).tokens[mask.bool()], by_hand[mask.bool()])


def test_keys_and_values_lie_in_the_table_layer_by_layer():
    found = PrefixEncoder(encoder(), length=4, dropout=0.0)
    keys, values = found.keys_values(2)
    assert keys.shape == values.shape == (2, 2, 3, 4, 4)
    table = found.table.view(4, 2, 2, 3, 4)  # place, layer, key or value, head, dimension
    for layer in range(2):
        for row in range(2):
            assert torch.equal(keys[layer, row], table[:, layer, 0].transpose(0, 1))
            assert torch.equal(values[layer, row], table[:, layer, 1].transpose(0, 1))


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_only_the_prefix_learns_and_padding_changes_nothing(kind):
    found = PrefixEncoder(encoder(kind), length=4, dropout=0.0)
    assert learned(found) == {"model.prompt_encoder.default.embedding.weight"}
    ids, mask = rows()
    found(ids, mask).pooled.square().sum().backward()
    assert (found.table.grad.view(4, 4, 12).abs().sum((0, 2)) > 0).all()  # every layer's keys and values
    torch.testing.assert_close(found(ids[:1, :5], mask[:1, :5]).pooled, found(ids, mask).pooled[:1])
    assert found.max_length == found.positions == encoder(kind).positions - 4


def test_dropout_of_the_prefix_is_for_training_only():
    found = PrefixEncoder(encoder(), length=4, dropout=0.5)
    assert torch.equal(found.eval()(*rows()).pooled, found(*rows()).pooled)
    assert not torch.equal(found.train()(*rows()).pooled, found(*rows()).pooled)
    again = pickle.loads(pickle.dumps(copy.deepcopy(found)))
    assert torch.equal(again.eval()(*rows()).pooled, found.eval()(*rows()).pooled)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", "mpnet", "modernbert"])
def test_lora_starts_as_nothing_and_merges_into_an_ordinary_model(kind):
    plain, found = encoder(kind), LoRAEncoder(encoder(kind), rank=2)
    torch.testing.assert_close(found(*rows()).pooled, plain(*rows()).pooled)
    names = learned(found)
    assert names and all("lora_" in name for name in names)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.normal_()
    stock = found.stock()
    assert type(stock.model) is type(plain.model) and stock.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(found(*rows()).pooled, plain(*rows()).pooled, atol=1e-3)
    torch.testing.assert_close(stock(*rows()).pooled, found(*rows()).pooled, rtol=1e-4, atol=1e-5)
    assert learned(found) == names  # the encoder itself goes on as it was


def test_lora_is_its_formula():
    plain, found = encoder(), LoRAEncoder(encoder(), rank=2, alpha=6.0, targets=("value",))
    layer = found.model.base_model.model.encoder.layer[1].attention.self.value
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    merged = found.stock().model.encoder.layer[1].attention.self.value.weight
    update = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged, plain.model.encoder.layer[1].attention.self.value.weight + update)


def test_what_learns_under_each_tuning():
    whole = encoder().train()
    assert len(learned(tuned(whole, "full"))) == len([*whole.parameters()])
    assert not learned(tuned(encoder(), "head"))
    assert type(tuned(encoder(), "lora")) is LoRAEncoder and type(tuned(encoder(), "prefix")) is PrefixEncoder


@pytest.mark.parametrize(
    ("kind", "how", "options", "message"),
    [
        ("bert", "adapter", {}, 'tuning must be one of full, prefix, lora, head, not "adapter"'),
        ("distilbert", "prefix", {}, "a prefix needs a model that takes earlier keys and values"),
        ("deberta-v2", "prefix", {}, "take tuning lora, or another encoder"),
        ("bert", "prefix", {"length": 510}, "a prefix needs 1 to 509 places of the 512"),
        ("bert", "prefix", {"length": 0}, "a prefix needs 1 to 509 places"),
        ("bert", "prefix", {"dropout": 1.0}, "dropout of the prefix must lie between 0 and 1"),
        ("bert", "lora", {"rank": 0}, "LoRA needs a rank of 1 or more"),
        ("bert", "lora", {"targets": ("no_such",)}, "LoRA does not fit a fresh model"),
    ],
)
def test_what_cannot_be_tuned_so_is_said(kind, how, options, message):
    with pytest.raises(InputError, match=message):
        tuned(encoder(kind), how, **options)


def test_a_prefix_is_no_part_of_an_ordinary_model():
    with pytest.raises(InputError, match="counterpoint embed RUN writes its vectors"):
        PrefixEncoder(encoder(), length=4).stock()


def test_segments_are_those_of_the_tokeniser():
    found = encoder()
    assert marks_pairs(found)
    assert not marks_pairs(encoder("roberta", type_vocab_size=1)) and not marks_pairs(encoder("distilbert"))
    tokens = found.tokenizer("ab", "cd", return_tensors="pt", return_token_type_ids=True)
    expected = found.model(**tokens).last_hidden_state
    assert not torch.allclose(found(tokens["input_ids"]).tokens, expected)
    found.segments = True
    torch.testing.assert_close(found(tokens["input_ids"]).tokens, expected)
    alone = found.tokenizer("ab", return_tensors="pt")["input_ids"]
    marked = found(alone).pooled
    found.segments = False
    assert torch.equal(found(alone).pooled, marked)
