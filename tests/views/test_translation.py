"""There and back: any function, any translation model, and what is said when it is none."""

import sys
from types import ModuleType

import pytest
import torch

from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError
from counterpoint.views.translation import back_translated, round_trip, translator


def test_functions_there_and_back():
    there = lambda sentences: [sentence.upper() for sentence in sentences]  # noqa: E731
    assert back_translated(["a b", "c"], there, lambda x: [s[::-1] for s in x]) == ["B A", "C"]
    assert back_translated(["a b"], there) == ["A B"] and back_translated([], there) == []


@pytest.mark.parametrize("wrong", [lambda x: x[:-1], lambda x: [1] * len(x)])
def test_what_is_no_translation_is_refused(wrong):
    with pytest.raises(InputError, match="a translation of 2 sentences must be as many strings"):
        back_translated(["a", "b"], wrong)


@pytest.fixture
def model():
    import transformers

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    made = transformers.T5ForConditionalGeneration(config)
    for weights in made.parameters():  # so that what it says depends on what it reads
        torch.nn.init.normal_(weights)
    return made, tokenizer


def test_a_model_translates_each_sentence_in_its_place(model):
    sentences = ["a much longer sentence than the others", "b", "some words", "b"]
    whole = translator("tiny", model=model[0], tokenizer=model[1], max_length=12)(sentences)
    alone = [
        translator("tiny", model=model[0], tokenizer=model[1], max_length=12, batch_size=1)([s])[0] for s in sentences
    ]
    assert whole == alone and whole[1] == whole[3] and all(isinstance(sentence, str) for sentence in whole)
    assert len({*whole}) > 1  # it reads what it is given


def test_models_by_name_from_a_folder(model, tmp_path):
    model[0].save_pretrained(tmp_path / "m")
    model[1].save_pretrained(tmp_path / "m")
    way = translator(str(tmp_path / "m"))
    found = round_trip(f"{tmp_path}/m+{tmp_path}/m")(["a dog"])
    assert found == [*way([*way(["a dog"])])]


def test_a_function_of_ones_own_by_name(monkeypatch):
    mine = ModuleType("mine")
    mine.shout = lambda sentences: [sentence + "!" for sentence in sentences]
    monkeypatch.setitem(sys.modules, "mine", mine)
    assert round_trip("mine:shout")(["a", "b"]) == ["a!", "b!"]
    for name, message in (
        ("mine:whisper", "cannot be imported"),
        ("nowhere:shout", "cannot be imported"),
        ("shout", r"back-translation is MODEL\+MODEL"),
        ("./none+./none", "there is no folder ./none"),
    ):
        with pytest.raises(InputError, match=message):
            round_trip(name)
