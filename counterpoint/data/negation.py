"""Words that deny, and what a sentence says without them."""

NEGATIONS = frozenset(
    (
        "not",
        "n't",
        "no",
        "never",
        "none",
        "nothing",
        "nobody",
        "nowhere",
        "nor",
        "neither",
        "without",
        "cannot",
        "hardly",
    )
)
"""Words whose absence turns a statement around."""
AFFIRMED = {"cannot": "can", "can't": "can", "won't": "will", "shan't": "shall"}
"""What is left of those that lose more than their end."""


def affirmed(word: str) -> str:
    """What is left of a word when it does not deny: "do" of "don't", nothing of "not", and any other word itself."""
    plain = word.lower().strip(',.;:!?"()').replace("\u2019", "'")
    if plain not in NEGATIONS and not plain.endswith("n't"):
        return word
    return AFFIRMED.get(plain, "" if plain in NEGATIONS else plain.removesuffix("n't"))


def denies(sentence: str) -> bool:
    """Whether some word of a sentence turns its meaning around."""
    return any(affirmed(word) != word for word in sentence.split())
