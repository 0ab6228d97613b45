"""Strategies in the loop: equal to plain loops without cache, batch or look-ahead; equal to each other at their limits."""

import pytest
import torch

from counterpoint.decoding import (
    LOL,
    Contrastive,
    ContrastiveSearch,
    DoLa,
    Greedy,
    Nucleus,
    Reader,
    TopK,
    answer_scores,
    beam,
    continued,
    decode,
    left_padded,
    shares_cache,
    strategy,
)
from counterpoint.encoders.causal import causal
from counterpoint.errors import InputError

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {  # whether candidates can share its cache
    "gpt2": ({"n_embd": 16, "n_layer": 3, "n_head": 2}, True),
    "llama": ({**SMALL, "num_key_value_heads": 1}, True),
    "gpt_neox": (SMALL, True),
    "bloom": ({"hidden_size": 16, "n_layer": 2, "n_head": 2}, False),  # positions are counted by the mask
    "mistral": ({**SMALL, "num_key_value_heads": 1, "sliding_window": 6}, False),
    "mamba": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, False),
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22], [30]]

pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind="gpt2", seed=1, **options):
    torch.manual_seed(seed)
    # larger weights than usual, so that the most probable token is a clear one
    settings = {"model_type": kind, **MODELS[kind][0], "initializer_range": 0.5, **options}
    return causal(settings, tokenizer="bytes", positions=64).eval()


@torch.no_grad()
def searched(lm, prompt, k, alpha, steps):
    """Contrastive search as it is written down: nothing is kept from one pass to the next."""
    ids = list(prompt)
    for _ in range(steps):
        answer = lm(torch.tensor([ids]))
        best, options = answer.logits[0, -1].softmax(0).topk(k)
        scores = []
        for share, token in zip(best, options, strict=True):
            state = lm(torch.tensor([[*ids, int(token)]])).hidden[0, -1]
            alike = max(torch.cosine_similarity(state, other, dim=0) for other in answer.hidden[0])
            scores.append(float((1 - alpha) * share - alpha * alike))
        ids.append(int(options[max(range(k), key=scores.__getitem__)]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", MODELS)
def test_contrastive_search_is_what_is_written_down(kind):
    lm = build(kind)
    assert shares_cache(lm) == MODELS[kind][1]
    found = decode(ContrastiveSearch(k=4), lm, PROMPTS, steps=10, stop=False)
    assert found == [searched(lm, prompt, 4, 0.6, 10) for prompt in PROMPTS]
    greedy = decode(Greedy(), lm, PROMPTS, steps=10, stop=False)
    assert found != greedy
    for limit in (ContrastiveSearch(k=4, alpha=0.0), ContrastiveSearch(k=1)):
        assert decode(limit, lm, PROMPTS, steps=10, stop=False) == greedy


def test_both_ways_of_looking_ahead_say_the_same():
    lm = build()
    batch, candidates = left_padded(PROMPTS, lm.filler), torch.tensor([[1, 2], [3, 4], [5, 6]])
    readers = [Reader(lm, *batch, shared=shared) for shared in (True, False)]
    with torch.no_grad():
        for _ in range(2):  # the second time on what the first one kept
            (one, one_logits), (two, two_logits) = (reader.look_ahead(candidates) for reader in readers)
            torch.testing.assert_close(one, two)
            torch.testing.assert_close(one_logits, two_logits)
            for reader in readers:
                reader.keep(torch.tensor([1, 0, 1]))
            torch.testing.assert_close(readers[0].logits, readers[1].logits)
            torch.testing.assert_close(readers[0].exit(1), readers[1].exit(1))
    assert readers[0].answer.cache.get_seq_length() == 8  # one token a step, not two


def test_greedy_is_transformers_greedy_and_beam_its_beam():
    lm = build(seed=3)
    ids, mask = left_padded(PROMPTS, lm.filler)
    stock = lm.model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=lm.filler, eos_token_id=-1
    )
    assert decode(Greedy(), lm, PROMPTS, steps=8, stop=False) == stock[:, ids.shape[1] :].tolist()
    assert beam(lm, PROMPTS, steps=5, width=1) == decode(Greedy(), lm, PROMPTS, steps=5)


@pytest.mark.parametrize("chosen", [Greedy(), ContrastiveSearch(k=3), Nucleus(top_p=1e-6), TopK(top_k=1), DoLa()])
def test_a_batch_is_its_prompts_one_by_one(chosen):
    lm = build()
    together = decode(chosen, lm, PROMPTS, steps=8, stop=False)
    assert together == [decode(chosen, lm, [prompt], steps=8, stop=False)[0] for prompt in PROMPTS]


def test_lol_without_weights_is_contrastive_decoding_and_dola_has_its_own_amateur():
    lm, other = build(), build(seed=2)
    options = {"steps": 8, "stop": False, "amateur": other}
    plain = decode(Contrastive(), lm, PROMPTS, **options)
    told = [[40, 41, *prompt] for prompt in PROMPTS]
    assert decode(LOL(lower_weight=0.0, refocus_weight=0.0), lm, PROMPTS, instructed=told, **options) == plain
    # another layer, or an instruction, is another text (weights that would be no different are no part of this)
    assert decode(LOL(lower_weight=2.0, refocus_weight=0.0), lm, PROMPTS, **options) != plain
    assert decode(LOL(lower_weight=0.0, refocus_weight=2.0), lm, PROMPTS, instructed=told, **options) != plain
    assert decode(LOL(lower_weight=0.0, refocus_weight=2.0), lm, PROMPTS, **options) == plain  # nothing to refocus by
    assert decode(DoLa(), lm, PROMPTS, steps=8, stop=False) != decode(Greedy(), lm, PROMPTS, steps=8, stop=False)
    greedy = decode(Contrastive(relative_top=1.0), lm, PROMPTS, **options)
    assert greedy == decode(Greedy(), lm, PROMPTS, steps=8, stop=False)  # only the best is plausible


def test_given_answers_score_what_the_model_says_token_by_token():
    lm, other = build(), build(seed=2)
    prompts, answers = [[5, 6, 7], [20], [30, 31]], [[8, 9], [21, 22, 23, 24], [32]]
    found = answer_scores(Greedy(), lm, prompts, answers)
    for value, prompt, answer in zip(found, prompts, answers, strict=True):
        shares = lm(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1).detach()
        expected = sum(float(shares[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert float(value) == pytest.approx(expected, rel=1e-5)
    plain = answer_scores(Contrastive(relative_top=0.0, post_softmax=False), lm, prompts, answers, amateur=other)
    difference = answer_scores(Greedy(), lm, prompts, answers) - answer_scores(Greedy(), other, prompts, answers)
    torch.testing.assert_close(plain, difference, rtol=1e-5, atol=1e-5)
    # an instruction only moves where the answer stands
    told = [[40, 41, *prompt] for prompt in prompts]
    lol = LOL(lower_weight=0.0, refocus_weight=1.0, relative_top=0.0, post_softmax=False)
    refocused = answer_scores(lol, lm, prompts, answers, amateur=other, instructed=told)
    effect = answer_scores(Greedy(), lm, told, answers) - answer_scores(Greedy(), lm, prompts, answers)
    torch.testing.assert_close(refocused, plain + effect, rtol=1e-5, atol=1e-5)
    masked = answer_scores(
        Contrastive(relative_top=1.0, relative_top_value=-1000.0), lm, prompts, answers, amateur=other
    )
    assert (masked <= -1000).all()


def test_texts_end_one_by_one():
    lm = build()
    free = decode(Greedy(), lm, PROMPTS, steps=12, stop=False)
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(free[0][3])
    seen = []
    found = decode(Greedy(), lm, PROMPTS, steps=12, watch=lambda new: seen.append(list(new)))
    for ours, whole in zip(found, free, strict=True):
        assert ours == (whole[: whole.index(lm.end)] if lm.end in whole else whole)
    assert len(found[0]) == 3 and [step[0] for step in seen[:5]] == [*free[0][:3], None, None]


def test_drawing_depends_on_the_seed_alone():
    lm = build()
    one, two, three = (decode(Nucleus(), lm, PROMPTS, steps=8, stop=False, seed=seed) for seed in (0, 0, 1))
    assert one == two != three


def test_pieces_make_the_text_also_of_letters_of_several_tokens():
    lm = build(seed=5)
    said: dict[int, str] = {}

    def say(row, piece):
        said[row] = said.get(row, "") + piece

    prompts = ["ab", "\u00e9t\u00e9", "c"]
    found = continued(Greedy(), lm, prompts, steps=20, batch_size=2, stop=False, say=say)
    assert [said.get(row, "") for row in range(3)] == found
    assert continued(Greedy(), lm, prompts[2:], steps=20, stop=False) == found[2:]


def test_a_text_without_a_prompt_starts_at_the_beginning_of_texts():
    lm = build()
    assert continued(Greedy(), lm, [""], steps=3, stop=False) == continued(
        Greedy(), lm, ["<|endoftext|>"], steps=3, stop=False
    )


def test_a_vocabulary_without_pad_and_end_is_enough():
    lm = build()
    before = decode(ContrastiveSearch(k=3), lm, PROMPTS, steps=6, stop=False)
    lm.tokenizer.eos_token = lm.tokenizer.pad_token = lm.tokenizer.bos_token = None
    assert lm.end is None and decode(ContrastiveSearch(k=3), lm, PROMPTS, steps=6) == before
    with pytest.raises(InputError, match="prompt 1 is empty"):
        continued(Greedy(), lm, [""], steps=3)


def test_a_continuation_ends_where_the_model_takes_no_more(caplog):
    lm = build()
    assert len(decode(ContrastiveSearch(k=3), lm, [[5] * 60], steps=20, stop=False)[0]) == 4
    assert "the continuation ends after 4" in caplog.text


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: decode(Greedy(), build(), [[5] * 64], steps=4), "prompt 1 has 64 tokens, but .* takes 64"),
        (lambda: decode(Greedy(), build(), [], steps=4), "there is no prompt"),
        (lambda: decode(Greedy(), build(), [[1], []], steps=4), "prompt 2 is empty"),
        (lambda: decode(Greedy(), build(), [[1]], steps=0), "max_new_tokens must be at least 1"),
        (lambda: decode(ContrastiveSearch(k=999), build(), [[1]], steps=4), "k is 999, but the vocabulary has 258"),
        (lambda: decode(Contrastive(), build(), [[1]], steps=4), "contrasts two models: name the other one"),
        (lambda: decode(Greedy(), build(), [[1]], steps=4, amateur=build()), "no use for an amateur"),
        (lambda: decode(DoLa(layers=(3,)), build(), [[1]], steps=4), "layers must lie between 0 and 2"),
        (lambda: decode(DoLa(layers="middle"), build(), [[1]], steps=4), '"high" or "low", not "middle"'),
        (lambda: strategy("contrastive-serch"), "did you mean contrastive-search"),
        (lambda: strategy("greedy", k=4), 'greedy has no setting "k".*it has none'),
        (lambda: strategy("nucleus", top_q=0.9), "did you mean top_"),
        (lambda: strategy("contrastive-search", alpha=2.0), "alpha lies between 0 and 1"),
        (lambda: answer_scores(Nucleus(), build(), [[1]], [[2]]), "does not score given answers"),
        (lambda: answer_scores(Greedy(), build(), [[1]], [[]]), "neither may be empty"),
        (lambda: continued(Greedy(), build(), []), "there is no prompt"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_an_amateur_of_another_tokeniser_is_refused_and_told_why():
    lm, other = build(), build(seed=2)
    from counterpoint.encoders.causal import pair_encoding

    other.tokenizer = pair_encoding(["aa bb aa bb"] * 4, 262)
    with pytest.raises(InputError, match=r"different tokenisers \(258 tokens and 26\d\)"):
        decode(Contrastive(), lm, PROMPTS, steps=2, amateur=other)
    shallow = build(n_layer=1)
    with pytest.raises(InputError, match="the amateur has 1 layers, so no layer 2"):
        decode(LOL(), lm, PROMPTS, steps=2, amateur=shallow)
