"""Protocols for language models: how well they predict, how their states lie, what they write, and which facts they tell."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from counterpoint.contrast import geometry
from counterpoint.data import corpus, facts
from counterpoint.decoding import answer_scores, beam, decode, encoded, strategy
from counterpoint.decoding.loop import left_padded
from counterpoint.encoders.causal import CausalLM
from counterpoint.errors import InputError, nearest
from counterpoint.evaluate.protocols import Result, bootstrap

log = logging.getLogger("counterpoint")

LENGTH, TEXTS = 128, 200
"""Of perplexity and isotropy: tokens that a text is cut to, and most texts."""

PROMPTS, PROMPT, NEW = 100, 32, 96
"""Of ``open-ended``: how many prompts of how many tokens, and how many tokens to write."""

WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", {}),
    "beam": ("beam", {}),
    "top-k": ("top-k", {"top_k": 50}),
    "nucleus": ("nucleus", {"top_p": 0.95}),
    "contrastive-search": ("contrastive-search", {"k": 5, "alpha": 0.6}),
    "dola": ("dola", {}),
    "contrastive": ("contrastive", {}),
    "lol": ("lol", {"refocus_weight": 0.0}),
}
"""Of ``open-ended``: name after the colon, strategy and its settings."""

# for given answers the release leaves no token out (one such would decide) and does not normalise
OF_ANSWERS: dict[str, Any] = {"relative_top": 0.0, "post_softmax": False}
RATERS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", {}),
    "dola": ("dola", OF_ANSWERS),
    "contrastive": ("contrastive", OF_ANSWERS),
    "lol-lower": ("lol", {**OF_ANSWERS, "refocus_weight": 0.0}),
    "lol-refocus": ("lol", {**OF_ANSWERS, "lower_weight": 0.0}),
    "lol": ("lol", OF_ANSWERS),
}
"""Of ``facts-mc1``: name after the colon, strategy and its settings."""

Ids = Sequence[Sequence[int]]


def repetition(texts: Sequence[Sequence[Any]], n: int) -> float:
    """Share of the n-grams of texts that occurred in the same text before, in % and rounded to two decimals.

    Both counts are sums over texts. As in the released code, the last n-gram of each text is not looked at.

    Args:
        texts: words (or ids) of each.
        n: words of an n-gram.

    Raises:
        InputError: no text has an n-gram.

    Source: Su et al. 2022 (arXiv 2202.06417), section 4.2; yxuansu/SimCTG at 3a91449, `simctg/evaluation.py`.
    """
    grams = [[tuple(words[i : i + n]) for i in range(len(words) - n)] for words in texts]
    total = sum(map(len, grams))
    if total == 0:
        raise InputError(f"no text has more than {n} words, so repetition of {n}-grams is not defined")
    return round(100 * (1 - sum(len(set(found)) for found in grams) / total), 2)


def diversity(texts: Sequence[Sequence[Any]]) -> tuple[float, dict[str, float]]:
    r"""How little texts repeat themselves, :math:`\prod_{n=2}^4 (1 - \mathrm{rep}_n / 100)`, 0 to 1; and the three `repetition`s.

    Source: as `repetition`.
    """
    found = {f"rep{n}": repetition(texts, n) for n in (2, 3, 4)}
    return math.prod(1 - value / 100 for value in found.values()), found


@torch.inference_mode()
def log_probabilities(lm: CausalLM, texts: Ids, starts: Sequence[int]) -> list[Tensor]:
    """Of each text the log-probabilities of its tokens from place `starts` on, float32."""
    found = []
    device = lm.model.get_input_embeddings().weight.device
    for first in range(0, len(texts), 16):
        rows = texts[first : first + 16]
        ids, mask = left_padded(rows, lm.filler, device)
        shares = log_softmax(lm(ids, mask).logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        for row, text, start in zip(shares, rows, starts[first:], strict=False):
            found.append(row[len(row) + start - len(text) :].cpu() if start < len(text) else row[:0].cpu())
    return found


def perplexity(lm: CausalLM, documents: Sequence[str], *, subject: str = "") -> Result:
    """exp of the mean negative log-probability of a token of held-out documents: protocol `perplexity`; low is good.

    At most 200 documents, each cut to 128 tokens; the first is given. Depends on the tokeniser; the detail's `bits_per_byte`
    does not.

    Raises:
        InputError: no document with a token to predict.
    """
    rows = _rows(lm, documents)
    each = log_probabilities(lm, rows, [1] * len(rows))
    total, count = -float(sum(x.sum() for x in each)), sum(map(len, each))
    if count == 0:
        raise InputError("the held-out text has no token to predict")
    size = sum(len(lm.tokenizer.decode(row[1:]).encode()) for row in rows)
    detail = {"bits_per_byte": total / math.log(2) / max(size, 1), "tokens": float(count)}
    return Result("perplexity", "perplexity", math.exp(min(total / count, 700.0)), None, count, subject, detail)


@torch.inference_mode()
def isotropy(lm: CausalLM, documents: Sequence[str], *, subject: str = "") -> Result:
    """1 minus the mean cosine of the last layer's states of two tokens of a text: protocol `isotropy`.

    At most 200 held-out documents, each cut to 128 tokens. Contrastive search works where it is about 0.55 or more.

    Source: Su and Xu 2023 (arXiv 2210.14140); see `counterpoint.contrast.isotropy`.
    """
    rows = _rows(lm, documents)
    states, lengths = [], []
    device = lm.model.get_input_embeddings().weight.device
    for first in range(0, len(rows), 16):
        ids, mask = left_padded(rows[first : first + 16], lm.filler, device)
        states.append(lm(ids, mask).hidden[mask.bool()])
        lengths.append(mask.sum(1))
    value = float(geometry.isotropy(torch.cat(states), torch.cat(lengths)))
    return Result("isotropy", "isotropy", value, None, len(rows), subject)


def _rows(lm: CausalLM, documents: Sequence[str]) -> list[list[int]]:
    """Ids of each document, from its beginning."""
    return [row[:LENGTH] for row in encoded(lm, documents[:TEXTS])]


def open_ended(
    lm: CausalLM,
    documents: Sequence[str],
    writer: str,
    *,
    amateur: CausalLM | None = None,
    scorer: CausalLM | None = None,
    subject: str = "",
) -> Result:
    """Diversity x 100 of what a model writes behind the beginnings of held-out documents: protocol `open-ended:WRITER`.

    100 prompts of 32 tokens (fewer where fewer documents are held out), 96 new tokens each, without an end; words are what white
    space separates. The detail holds `rep2`, `rep3`, `rep4`; with a scorer `coherence`, the mean over texts of the mean
    log-probability of a continuation's tokens under another language model; and both for the documents' own continuations as
    `reference_diversity` and `reference_coherence`.

    Args:
        lm: what writes.
        documents: held-out text.
        writer: one of `WRITERS`.
        amateur: for the writers that contrast two models.
        scorer: the other language model.
        subject: for the record.

    Raises:
        InputError: no such writer, or no document that is long enough.

    Source: Su and Xu 2023 (arXiv 2210.14140), section 4; its scorer is OPT-2.7B, its prompts are WebText's.
    """
    if writer not in WRITERS:
        raise InputError(
            f'open-ended has no writer "{writer}"; there are {", ".join(WRITERS)}{nearest(writer, WRITERS)}'
        )
    name, settings = WRITERS[writer]
    rows = [row for row in encoded(lm, documents) if len(row) >= PROMPT + NEW][:PROMPTS]
    if not rows:
        raise InputError(f"no held-out document has {PROMPT + NEW} tokens: open-ended needs longer ones")
    prompts, own = [row[:PROMPT] for row in rows], [row[PROMPT : PROMPT + NEW] for row in rows]
    new: list[list[int]] = []
    chosen = None if name == "beam" else strategy(name, **settings)
    for first in range(0, len(prompts), 25):
        batch = prompts[first : first + 25]
        if chosen is None:
            new += beam(lm, batch, steps=NEW)
        else:
            other = amateur if chosen.needs_amateur else None
            new += decode(chosen, lm, batch, steps=NEW, amateur=other, stop=False, seed=first)
    detail: dict[str, Any] = {}
    starts = [lm.tokenizer.decode(prompt) for prompt in prompts]
    for key, ids in (("", new), ("reference_", own)):
        texts = [lm.tokenizer.decode(row) for row in ids]
        value, repeated = diversity([text.split() for text in texts])
        detail |= {f"{key}diversity": 100 * value, **({} if key else repeated)}
        if scorer is not None:
            detail[f"{key}coherence"] = coherence(scorer, starts, texts)
    return Result(f"open-ended:{writer}", "diversity", detail.pop("diversity"), None, len(rows), subject, detail)


def coherence(scorer: CausalLM, prompts: Sequence[str], continuations: Sequence[str]) -> float:
    """Mean over texts of the mean log-probability of a continuation's tokens behind its prompt, under another model.

    Source: Su and Xu 2023 (arXiv 2210.14140), section 4.
    """
    before, after = encoded(scorer, prompts), corpus.tokens(continuations, scorer.tokenizer)
    rows = [[*a, *b][: scorer.positions] for a, b in zip(before, after, strict=True)]
    each = log_probabilities(scorer, rows, [len(a) for a in before])
    means = [float(x.mean()) for x in each if len(x)]
    if not means:
        raise InputError("no continuation has a token for the scorer to judge")
    return sum(means) / len(means)


def facts_mc1(
    lm: CausalLM, questions: Sequence[facts.Question], rater: str, *, amateur: CausalLM | None = None, subject: str = ""
) -> Result:
    """Share of questions whose right answer scores above all wrong ones: protocol `facts-mc1:RATER`.

    An answer's score is the sum over its tokens behind the question. The detail holds `mc2`, the share of right answers in the
    sum of exp(score), `mc3`, the share of right answers above the best wrong one (all x 100), and `chance`. Raters with an
    instruction read every question also behind the prefix that the training had before true sentences.

    Args:
        lm: the model.
        questions: from `counterpoint.data.facts`.
        rater: one of `RATERS`.
        amateur: for the raters that contrast two models.
        subject: for the record.

    Raises:
        InputError: no such rater, or no amateur.

    Source: Lin et al. 2022 (arXiv 2109.07958), whose MC1 looks at the best right answer alone; MC3: Chuang et al. 2024 (arXiv
    2309.03883).
    """
    if rater not in RATERS:
        raise InputError(f'facts-mc1 has no rater "{rater}"; there are {", ".join(RATERS)}{nearest(rater, RATERS)}')
    name, settings = RATERS[rater]
    chosen = strategy(name, **settings)
    flat = [(question.prompt, answer) for question in questions for answer in (*question.right, *question.wrong)]
    prompts = encoded(lm, [prompt for prompt, _ in flat])
    told = encoded(lm, [facts.PREFIX + prompt for prompt, _ in flat])
    answers = corpus.tokens([answer for _, answer in flat], lm.tokenizer)
    other = amateur if chosen.needs_amateur else None
    parts = []
    for first in range(0, len(flat), 256):
        at = slice(first, first + 256)
        instructed = told[at] if chosen.takes_instruction else None
        parts.append(answer_scores(chosen, lm, prompts[at], answers[at], amateur=other, instructed=instructed))
    scores = torch.cat(parts).cpu().numpy()
    each: dict[str, list[float]] = {"mc1": [], "mc2": [], "mc3": []}
    chance, place = [], 0
    for question in questions:
        right = scores[place : place + len(question.right)]
        wrong = scores[place + len(question.right) : place + len(question.right) + len(question.wrong)]
        place += len(right) + len(wrong)
        share = np.exp(np.concatenate([right, wrong]) - max(right.max(), wrong.max()))
        each["mc1"].append(float(right[0] > wrong.max()))
        each["mc2"].append(float(share[: len(right)].sum() / share.sum()))
        each["mc3"].append(float((right > wrong.max()).mean()))
        chance.append(1 / (1 + len(wrong)))
    detail = {key: 100 * float(np.mean(values)) for key, values in each.items()} | {
        "chance": 100 * float(np.mean(chance))
    }
    hits = np.array(each["mc1"])
    between = bootstrap(hits)
    return Result(
        f"facts-mc1:{rater}",
        "accuracy",
        detail.pop("mc1"),
        (100 * between[0], 100 * between[1]),
        len(hits),
        subject,
        detail,
    )


def measure(
    subjects: Mapping[str, Any],
    source: Any,
    names: Sequence[str] | None = None,
    *,
    split: str = "test",
    scorer: Any = None,
) -> Iterator[Result]:
    """Protocols on every subject: `perplexity` and `isotropy` of held-out text, or `facts-mc1` where the data are facts.

    Args:
        subjects: methods by what they are called; "trained" is one of them.
        source: what a run was trained on, or is to be measured on.
        names: protocols; None measures those that fit (what is written, `open-ended:WRITER`, only where it is asked for).
        split: part of the source that was held out.
        scorer: language model that judges what is written.

    Raises:
        InputError: no such protocol, or one that does not fit the data.
    """
    trained = subjects["trained"]
    about_facts = isinstance(source, str) and source in facts.NAMES
    if names is None:
        fitting = [
            key
            for key, (kind, _) in RATERS.items()
            if not strategy(kind).needs_amateur or trained.models[1] is not None
        ]
        names = [f"facts-mc1:{key}" for key in fitting] if about_facts else ["perplexity", "isotropy"]
    for method in subjects.values():
        for own in method.models:
            if own is not None:  # a fresh tokeniser knows bytes alone
                own.set_extra_state(trained.encoder.get_extra_state())
    documents = None if about_facts else corpus.load(source, split)
    for name in names:
        kind, _, which = name.partition(":")
        if kind not in ("perplexity", "isotropy", "open-ended", "facts-mc1"):
            known = ", ".join(("perplexity", "isotropy", "open-ended:WRITER", "facts-mc1:RATER"))
            raise InputError(f'no protocol named "{name}"; there are {known}')
        if about_facts != (kind == "facts-mc1"):
            raise InputError(
                f"{name} does not fit {source}: it needs {'text' if about_facts else 'one of ' + ', '.join(facts.NAMES)}"
            )
        for subject, method in subjects.items():
            lm, amateur = method.models
            if kind == "facts-mc1":
                yield facts_mc1(lm, facts.questions(source), which, amateur=amateur, subject=subject)
            elif kind == "open-ended" and subject != "untrained":
                written = open_ended(lm, documents or [], which, amateur=amateur, scorer=scorer, subject=subject)
                yield written
                if "untrained" in subjects and subject == "trained":  # what nobody had to learn
                    own = {
                        key.removeprefix("reference_"): n for key, n in written.detail.items() if "reference_" in key
                    }
                    yield replace(written, value=own.pop("diversity"), subject="held-out text", detail=own)
            elif kind in ("perplexity", "isotropy"):
                yield (perplexity if kind == "perplexity" else isotropy)(lm, documents or [], subject=subject)
