"""Causal language models: tokens learned from text, states, early exits, positions, and a state that holds all of it."""

import copy

import pytest
import torch

from counterpoint.encoders.causal import causal, pair_encoding
from counterpoint.errors import InputError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "Ω is a letter of two bytes"] * 3
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name="decoder-32-3", seed=0, **options):
    torch.manual_seed(seed)
    return causal(name, **{"tokenizer": "bytes", "positions": 32, **options}).eval()


def test_tokens_are_learned_the_same_way_every_time_and_give_the_text_back():
    one, two = pair_encoding(TEXTS, 300), pair_encoding(iter(TEXTS), 300)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str() and 258 < len(one) <= 300
    for text in [*TEXTS, "words it has never seen, \u00e9 \u4e2d \U0001f600", ""]:
        assert one.decode(one(text)["input_ids"]) == text
    assert len(one("the cat")["input_ids"]) < len(pair_encoding((), 258)("the cat")["input_ids"])


def test_the_state_holds_what_the_tokeniser_has_learned():
    lm, other = build(tokenizer="bpe-300"), build(tokenizer="bpe-300", seed=1)
    assert not lm.learned
    lm.learn(TEXTS)
    assert lm.learned and other.tokenizer("the cat")["input_ids"] != lm.tokenizer("the cat")["input_ids"]
    other.load_state_dict(lm.state_dict())
    assert other.tokenizer("the cat")["input_ids"] == lm.tokenizer("the cat")["input_ids"] and other.end == lm.end
    assert build().learned  # "bytes" has nothing to learn


@pytest.mark.parametrize("name", ["decoder-32-3", LLAMA])
def test_early_exits_end_where_the_model_ends(name):
    lm = build(name)
    answer = lm(torch.arange(10).view(2, 5))
    assert len(answer.layers) == lm.depth + 1 and torch.equal(answer.layers[-1], answer.hidden)
    torch.testing.assert_close(lm.exit(answer.layers, lm.depth), answer.logits)
    head = lm.model.get_output_embeddings()
    low = lm.exit(answer.layers, 1)
    torch.testing.assert_close(low, head(lm.final_norm(answer.layers[1])))
    assert not torch.allclose(low, head(answer.layers[1]), atol=1e-3)  # it is normalised
    # a model cut after that layer says the same
    cut = copy.deepcopy(lm)
    blocks = cut.model.transformer.h if name != LLAMA else cut.model.model.layers
    del blocks[1:]
    cut.model.config.num_hidden_layers = 1
    torch.testing.assert_close(cut(torch.arange(10).view(2, 5)).logits, low)
    with pytest.raises(InputError, match="no layer"):
        lm.exit(answer.layers, lm.depth + 1)


def test_a_model_whose_scores_are_more_than_its_head_cannot_be_left_early():
    gemma = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "initializer_range": 0.5}
    lm = build(gemma)
    with pytest.raises(InputError, match="cannot be left early"):
        lm.exit(lm(torch.arange(4)[None]).layers, 1)


@pytest.mark.parametrize("name", ["decoder-32-3", LLAMA])
def test_padding_on_the_left_moves_nothing(name):
    lm = build(name)
    ids = torch.tensor([[7, 8, 9]])
    padded = torch.tensor([[1, 1, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(lm(padded, mask).logits[:, 2:], lm(ids).logits)
    assert lm(padded, mask, last_only=True).logits.shape[1] == 1
    one = {"input_ids": padded, "attention_mask": mask}
    torch.testing.assert_close(lm.embed(one), lm(ids).hidden.mean(1))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("no/such/model", {"tokenizer": None}, "there is no folder no/such/model"),
        ({"model_type": "nonsense"}, {}, "is no language model of transformers"),
        ("decoder-32-2", {"tokenizer": "bpe-20"}, "bpe-20 has too few tokens"),
        (
            {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100},
            {},
            "scores 100 tokens, but its tokeniser has 258",
        ),
        ("some-model", {"tokenizer": "bytes"}, "has a tokeniser of its own"),
    ],
)
def test_it_refuses(name, options, message):
    with pytest.raises(InputError, match=message):
        build(name, **options)
