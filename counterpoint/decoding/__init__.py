"""Contrast at inference: decoding loops over transformers' causal language models, and answers rated by the same scores."""

from counterpoint.decoding.answers import answer_scores
from counterpoint.decoding.loop import decode, left_padded
from counterpoint.decoding.reader import Reader, shares_cache
from counterpoint.decoding.strategies import (
    LOL,
    STRATEGIES,
    Contrastive,
    ContrastiveSearch,
    DoLa,
    Greedy,
    Nucleus,
    Readers,
    TopK,
    check_amateur,
    strategy,
)
from counterpoint.decoding.texts import beam, continued, encoded

__all__ = [
    "LOL",
    "STRATEGIES",
    "Contrastive",
    "ContrastiveSearch",
    "DoLa",
    "Greedy",
    "Nucleus",
    "Reader",
    "Readers",
    "TopK",
    "answer_scores",
    "beam",
    "check_amateur",
    "continued",
    "decode",
    "encoded",
    "left_padded",
    "shares_cache",
    "strategy",
]
