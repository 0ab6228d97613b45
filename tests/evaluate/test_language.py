"""Protocols of language models on models and texts whose numbers are known."""

import math

import pytest
import torch

from counterpoint.data import corpus, facts
from counterpoint.encoders.causal import causal
from counterpoint.errors import InputError
from counterpoint.evaluate import language

pytestmark = pytest.mark.usefixtures("one_thread")

FILMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tOne (Uno)\t1995\tComedy Drama
2\tTwo\t1990\tThriller
3\tThree\t1985\tComedy
4\tFour\t1980\tWestern
5\tFive\t1975\tAction
6\tSix\t1970\tMusical
7\tNo Year\t\tDrama
8\tTwo\t1999\tDrama
9\tKindless\t1960\tunknown
"""


@pytest.fixture
def films(tmp_path, monkeypatch):
    import gzip

    folder = tmp_path / "recsys" / "ml-100k"
    folder.mkdir(parents=True)
    (folder / "ml-100k.item.tsv.gz").write_bytes(gzip.compress(FILMS.encode()))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    facts.films.cache_clear()
    yield facts.films()
    facts.films.cache_clear()


def build(seed=0, **options):
    torch.manual_seed(seed)
    return causal("decoder-32-2", tokenizer="bytes", positions=160, **options).eval()


def uniform():
    lm = build()
    torch.nn.init.zeros_(lm.model.transformer.wte.weight)
    return lm


def test_repetition_by_hand():
    words = ["a", "b", "a", "b", "a", "b", "c"]
    # 2-grams without the last one: ab ba ab ba ab, 2 of 5 distinct
    assert language.repetition([words], 2) == pytest.approx(60.0)
    # the same n-gram in two texts is new in each
    assert language.repetition([["a", "b", "c"], ["a", "b", "c"]], 2) == 0.0
    value, repeated = language.diversity([words])
    assert repeated == {"rep2": 60.0, "rep3": 50.0, "rep4": pytest.approx(33.33)}
    assert value == pytest.approx(0.4 * 0.5 * 0.6667, rel=1e-9)
    assert language.diversity([[1] * 50])[0] < 0.001 and language.diversity([[*range(50)]])[0] == 1.0
    with pytest.raises(InputError, match="no text has more than 2 words"):
        language.repetition([["a", "b"]], 2)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    found = language.perplexity(uniform(), ["some words", "and others \u00e9"], subject="x")
    assert found.value == pytest.approx(258, rel=1e-4)
    tokens = len(b"ome words") + len("nd others \u00e9".encode())  # the first of each is given
    assert found.n == tokens and found.detail["bits_per_byte"] == pytest.approx(math.log2(258), rel=1e-4)


def test_log_probabilities_do_not_depend_on_what_else_is_in_the_batch():
    lm = build()
    rows = corpus.tokens(["short", "a much longer text", "x"], lm.tokenizer)
    together = language.log_probabilities(lm, rows, [2, 5, 1])
    assert [len(x) for x in together] == [3, 13, 0]
    shares = lm(torch.tensor([rows[1]])).logits[0].log_softmax(-1)
    expected = torch.stack([shares[i - 1, rows[1][i]] for i in range(5, 18)])
    torch.testing.assert_close(together[1], expected.detach())


def test_coherence_is_the_mean_over_texts_of_what_the_scorer_says_of_the_continuation():
    lm = build()
    found = language.coherence(lm, ["ab", "x"], [" cd", " efgh"])
    means = []
    for before, after in (("ab", " cd"), ("x", " efgh")):
        ids = lm.tokenizer(before + after)["input_ids"]
        shares = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        means.append(sum(float(shares[i - 1, ids[i]].detach()) for i in range(len(before), len(ids))) / len(after))
    assert found == pytest.approx(sum(means) / 2, rel=1e-5)


def test_isotropy_of_states_that_all_are_one():
    lm = build()
    torch.nn.init.zeros_(lm.model.transformer.ln_f.weight)
    torch.nn.init.ones_(lm.model.transformer.ln_f.bias)
    assert language.isotropy(lm, ["some words"]).value == pytest.approx(0, abs=1e-9)
    assert language.isotropy(build(), ["some words"]).value > 0.05


def of_words(seed=0):
    """A model whose every token ends a word, so that whatever it writes has words."""
    lm = build(seed)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 258)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##", cleanup=False)
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    return lm


def test_what_is_written_is_judged_beside_what_was_written_there():
    lm, scorer = of_words(), of_words(seed=1)
    texts = [" ".join(f"w{1 + (7 * i + j * j) % 250}" for j in range(140)) for i in range(4)]
    found = {
        w: language.open_ended(lm, texts, w, scorer=scorer) for w in ("greedy", "contrastive-search", "nucleus", "beam")
    }
    greedy = found["greedy"]
    assert greedy.protocol == "open-ended:greedy" and greedy.n == 4
    own = [text.split()[32:128] for text in texts]
    assert greedy.detail["reference_diversity"] == pytest.approx(100 * language.diversity(own)[0])
    assert {"rep2", "rep3", "rep4", "coherence", "reference_diversity", "reference_coherence"} == greedy.detail.keys()
    assert len({result.detail["reference_diversity"] for result in found.values()}) == 1
    assert found["contrastive-search"].detail["coherence"] != greedy.detail["coherence"]
    for call, message in (
        (lambda: language.open_ended(lm, texts, "gredy"), "did you mean greedy"),
        (lambda: language.open_ended(lm, ["short"], "greedy"), "no held-out document has 128 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_facts_are_true_or_false_and_questions_new(films):
    assert [film.title for film in films] == ["One", "Two", "Three", "Four", "Five", "Six"]
    true, false = facts.sentences("movie-facts"), facts.sentences("movie-facts-false")
    assert facts.sentences("movie-facts") == true  # the same every time
    plain = [sentence.removeprefix(facts.PREFIX) for sentence in true]
    assert "One was released in 1995." in plain and "The kind of One is Drama." in plain and true != plain
    assert not {*plain} & {*false} and not any(sentence.startswith(facts.PREFIX) for sentence in false)
    assert len([s for s in false if "Two" in s]) == len([s for s in plain if "Two" in s]) == 4
    asked = facts.questions("movie-facts")
    assert {q.prompt for q in asked if "year" in q.prompt} == {f"The year of {t} is" for t in ("Two", "Four", "Six")}
    for question in asked:
        assert not any(sentence.startswith(question.prompt) for sentence in plain + false)
        assert len({*question.wrong}) == 4 and not {*question.right} & {*question.wrong}
    one = next(q for q in asked if "kind of Two" in q.prompt)
    assert one.right == (" Thriller",)


def test_a_model_that_knows_the_answers_has_all_of_them(films):
    asked = facts.questions("movie-facts")
    lm = build()
    optimiser = torch.optim.Adam(lm.parameters(), lr=3e-3)
    rows = [lm.tokenizer(q.prompt + q.right[0])["input_ids"] for q in asked]
    from counterpoint.decoding import left_padded

    ids, mask = left_padded(rows, lm.filler)
    for _ in range(60):
        shares = lm(ids, mask).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        loss = -(shares * mask[:, :-1]).sum() / mask[:, :-1].sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = language.facts_mc1(lm, asked, "greedy")
    assert found.value == 100.0 and found.detail["mc2"] > 75 and found.detail["mc3"] == 100.0
    assert found.detail["chance"] == 20.0 and found.n == len(asked)
    # an amateur that knows the same leaves nothing to choose by; one that knows nothing leaves what the expert knows
    assert language.facts_mc1(lm, asked, "contrastive", amateur=lm).value == 0.0  # a tie is no answer
    assert language.facts_mc1(lm, asked, "lol-lower", amateur=build(seed=1)).value > 80
    with pytest.raises(InputError, match="contrasts two models"):
        language.facts_mc1(lm, asked, "lol")
    with pytest.raises(InputError, match="did you mean lol"):
        language.facts_mc1(lm, asked, "lool")
