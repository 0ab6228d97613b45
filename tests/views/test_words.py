"""Easy data augmentation: what each operator may change, how often, and which words are near."""

from collections import Counter

import pytest
import torch

from counterpoint.data.negation import denies
from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError
from counterpoint.views.words import (
    EDA,
    REWORDINGS,
    core,
    delete_words,
    dressed,
    drop_negations,
    insert_words,
    looked_up,
    neighbours,
    replace_words,
    reword,
    swap_words,
    synonyms_of,
)

WORDS = ["The", "old", "Film", "was", "dull,", "and", "the", "old", "actor", "slept", "soundly", "."]
SIMILAR = looked_up({"old": ["aged", "ancient"], "film": ["movie"], "dull": ["boring"], "the": ["an"]})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(found):
    return sum(a != b for a, b in zip(found, WORDS, strict=True))


def test_replacement_keeps_place_case_and_punctuation():
    found = replace_words(WORDS, 9, SIMILAR, seeded())
    assert found[2] == "Movie" and found[4] == "boring," and found[0] == "The"  # "the" says nothing: it stays
    assert found[1] == found[7] and found[1] in ("aged", "ancient")  # one word, wherever it stands
    assert changed(found) == 4
    counts = Counter(changed(replace_words(WORDS, 1, SIMILAR, seeded(s))) for s in range(30))
    assert counts.keys() == {1, 2} and replace_words(WORDS, 3, looked_up({}), seeded()) == WORDS


def test_insertion_adds_similar_words_anywhere():
    places = set()
    for seed in range(40):
        found = insert_words(WORDS, 2, SIMILAR, seeded(seed))
        new = list(found)
        for word in WORDS:
            new.remove(word)
        assert len(new) == 2 and {*new} <= {"aged", "ancient", "movie", "boring", "an"}
        places |= {i for i, word in enumerate(found) if word in new}
    assert {0, len(WORDS)} <= places
    assert insert_words(WORDS, 2, looked_up({}), seeded()) == WORDS


def test_swaps_change_the_order_only():
    for seed in range(20):
        found = swap_words(WORDS, 1, seeded(seed))
        assert sorted(found) == sorted(WORDS) and changed(found) in (0, 2)  # 0 where both are the same word
    assert swap_words(["alone"], 3, seeded()) == ["alone"]


@pytest.mark.parametrize("name", REWORDINGS)
def test_rewordings_change_little_and_are_seeded(name):
    long = " ".join([*(f"w{i}" for i in range(19)), "not"])
    one, again = (reword([long, "word"], name, seeded(3)) for _ in range(2))
    assert one == again and one[1].split()[0] == "word"
    words = one[0].split()
    assert words != long.split() and {*words} <= {*long.split()}
    assert len(words) == {"repeat": 22, "delete": 18, "swap": 20, "negation": 19}[name]


def test_rewordings_change_the_share_that_is_asked_for():
    long = " ".join(f"w{i}" for i in range(20))
    assert len(reword([long], "delete", seeded(), rate=0.5)[0].split()) == 10
    assert len(reword([long], "repeat", seeded(), rate=0.5)[0].split()) == 30
    assert reword(["a b"], "delete", seeded(), rate=0.99)[0] in ("a", "b")
    with pytest.raises(InputError, match="no rewording named"):
        reword([long], "invert")
    with pytest.raises(InputError, match="between 0 and 1, not 1"):
        reword([long], "delete", rate=1)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("do n't go", "do go"),
        ("I DON'T like it .", "I do like it ."),
        ("It is not, never, good", "It is good"),
        ("they can\u2019t and cannot and wo n't", "they can and can and wo"),
        ("without them we won't", "them we will"),
        ("a knot of notes", "a knot of notes"),
        ("nothing", "nothing"),
    ],
)
def test_negations_are_left_out_and_nothing_else_is(said, left):
    assert " ".join(drop_negations(said.split())) == left
    assert denies(said) == (said != "a knot of notes")


def test_deletion_takes_its_share_and_leaves_a_word():
    left = [len(delete_words(WORDS, 0.3, seeded(seed))) for seed in range(300)]
    assert abs(sum(left) / 300 / len(WORDS) - 0.7) < 0.03 and min(left) < max(left)
    found = {delete_words(["a", "b"], 0.999, seeded(seed))[0] for seed in range(20)}
    assert found == {"a", "b"}


def test_copies_are_spread_over_the_operators_and_follow_the_seed():
    eda = EDA(copies=6, operators=("swap", "delete"), alpha=0.2)
    sentence = " ".join(WORDS)
    copies = eda(sentence, looked_up({}), seeded())
    assert len(copies) == 6 and copies == eda(sentence, looked_up({}), seeded()) != eda(
        sentence, looked_up({}), seeded(1)
    )
    assert sum(sorted(copy.split()) == sorted(WORDS) for copy in copies) in (3, 4)  # a deletion may take nothing
    assert eda("", looked_up({}), seeded()) == [""] * 6
    kinds = Counter(len(copy.split()) - len(WORDS) for copy in EDA(copies=400)(sentence, SIMILAR, seeded()))
    assert kinds[1] == 100 and kinds[0] >= 200  # a quarter inserts; a quarter each replaces and swaps


def test_the_number_of_changes_is_the_share_of_the_words():
    long = " ".join(f"w{i}" for i in range(40))
    copies = EDA(copies=30, alpha=0.1, operators=("insert",))(long, lambda word: ["new"], seeded())
    assert {len(copy.split()) for copy in copies} == {44}
    assert len(EDA(copies=1, operators=("insert",))("a b", lambda word: ["new"], seeded())[0].split()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "EDA makes 1 copy or more"),
        ({"alpha": 0.0}, "alpha between 0 and 1"),
        ({"operators": ("swap", "shuffle")}, "operators are some of replace, insert, swap, delete, not swap, shuffle"),
        ({"operators": ()}, "not none"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EDA(**options)


def test_punctuation_is_no_word():
    assert [core(word) for word in ("Film,", "(old)", "...", "don't", "A")] == ["film", "old", "", "don't", "a"]
    assert dressed("movie", '"Film."') == '"Movie."'


def test_synonyms_come_from_groups(tmp_path):
    file = tmp_path / "s.txt"
    file.write_text("quick, fast\trapid\n\nfast, Steady\nlonely\n")
    found = synonyms_of(file)
    assert found["quick"] == ["fast", "rapid"] and found["fast"] == ["quick", "rapid", "steady"] and not found["lonely"]
    with pytest.raises(InputError, match="there is no file of synonyms"):
        synonyms_of(tmp_path / "none.txt")
    file.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="holds no synonyms"):
        synonyms_of(file)


class Tokens:
    """A tokeniser of whole words."""

    def __init__(self, tokens, special):
        self.tokens, self.all_special_tokens = tokens, special

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]


def test_neighbours_are_the_nearest_whole_words():
    words = ["film", "movie", "dog", "cat", "house", "tree"]
    pieces = ["[CLS]", "##ing", "12", "ox", *words]
    table = torch.randn(10, 8, generator=seeded())
    table[1] = table[4] + 1e-3  # a piece next to "film" is no word
    unit = torch.nn.functional.normalize(table[4:], dim=1)
    near = (unit @ unit.T - 2 * torch.eye(6)).argsort(1, descending=True)
    expected = {word: [words[i] for i in near[at, :3].tolist()] for at, word in enumerate(words)}
    found = neighbours([*words, "film", "ing", "elephant"], Tokens(pieces, ["[CLS]"]), table, count=3)
    assert found == expected
    marked = Tokens(
        ["<s>", "ing", "Ġ12", "Ġox", *(f"Ġ{word}" for word in words)], ["<s>"]
    )  # where words begin is marked
    assert neighbours(words, marked, table, count=3) == expected


def test_bytes_have_no_neighbours():
    with pytest.raises(InputError, match="the tokens of this encoder are no words"):
        neighbours(["film"], byte_tokenizer(), torch.randn(300, 4))
