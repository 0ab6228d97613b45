"""Views of text by translation: there and back again says the same in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from counterpoint.encoders.text import place_of, quiet
from counterpoint.errors import InputError, one_line

Translate = Callable[[list[str]], Sequence[str]]


def back_translated(sentences: Sequence[str], there: Translate, back: Translate | None = None) -> list[str]:
    """Each sentence, translated and translated back.

    Args:
        sentences: N sentences.
        there: from a list of sentences to their translations; without `back`, all of the way.
        back: from these to sentences of the first language.

    Raises:
        InputError: a translation that has another number of sentences, or something that is no text.
    """
    found: Sequence[str] = [*sentences]
    for translate in (there, back):
        if translate is None:
            continue
        found = translate([*found])
        if len(found) != len(sentences) or not all(isinstance(sentence, str) for sentence in found):
            raise InputError(f"a translation of {len(sentences)} sentences must be as many strings")
    return [*found]


def translator(
    name: str, *, batch_size: int = 16, max_length: int = 128, model: Any = None, tokenizer: Any = None
) -> Translate:
    """A translation model of transformers as a function of sentences; it takes the most likely word each time.

    Args:
        name: of a sequence-to-sequence model (``Helsinki-NLP/opus-mt-en-de``), by hub name or folder.
        batch_size: sentences at a time.
        max_length: tokens that a sentence and its translation are cut to.
        model, tokenizer: ready ones instead.

    Raises:
        InputError: no such model here.
    """
    if model is None:
        import transformers

        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(place_of(name))
                model = transformers.AutoModelForSeq2SeqLM.from_pretrained(place_of(name))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(f"{name} is no translation model that can be had here ({one_line(error)})") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)

    @torch.no_grad()
    def translate(sentences: list[str]) -> list[str]:
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        found = [""] * len(sentences)
        for at in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
            tokens = tokenizer([sentences[i] for i in at], **options)
            given = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
            said = model.generate(**given, max_new_tokens=max_length, num_beams=1, do_sample=False)
            for i, sentence in zip(at, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True):
                found[i] = sentence
        return found

    return translate


def round_trip(name: str) -> Callable[[Sequence[str]], list[str]]:
    """Back-translation by name.

    Args:
        name: two translation models with a plus between them (``Helsinki-NLP/opus-mt-en-de+Helsinki-NLP/opus-mt-de-en``), or
            ``module:function`` of a function of one's own that goes all of the way.

    Raises:
        InputError: neither, or something that cannot be had here.
    """
    models = name.split("+")
    if len(models) == 2:
        there, back = map(translator, models)
        return lambda sentences: back_translated(sentences, there, back)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(
            f"back-translation is MODEL+MODEL (there and back), or module:function of your own, not {name}"
        )
    try:
        own = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the back-translation {name} cannot be imported: {error}") from error
    return lambda sentences: back_translated(sentences, own)
