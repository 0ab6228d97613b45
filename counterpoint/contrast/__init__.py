"""The mathematics: pure functions of tensors; imports torch alone."""

from collections.abc import Callable

from torch import Tensor

from counterpoint.contrast import distributed
from counterpoint.contrast.clustering import assign, sinkhorn, swapped_prediction
from counterpoint.contrast.geometry import alignment, effective_rank, isotropy, score_stats, uniformity
from counterpoint.contrast.kernels import executor, log_sum_exp, softmax_mean
from counterpoint.contrast.margin import pair_margin, triplet
from counterpoint.contrast.noise import binary_nce, ranking_nce
from counterpoint.contrast.operands import unit
from counterpoint.contrast.pairs import Pairs
from counterpoint.contrast.prediction import negative_cosine
from counterpoint.contrast.ranking import mnr, n_pair, relabelled_clip
from counterpoint.contrast.redundancy import barlow_twins
from counterpoint.contrast.regression import supremix, weighted_sup_con
from counterpoint.contrast.relation import Listed, Mask, Relation, Same
from counterpoint.contrast.scored import (
    SCORED_OBJECTIVES,
    scored_binary,
    scored_objective,
    scored_ranking,
    scored_triplet,
)
from counterpoint.contrast.sigmoid import sigmoid_loss
from counterpoint.contrast.softmax import clip_loss, coupling, dcl, dclw, info_nce, nt_xent, sup_con
from counterpoint.contrast.spectral import spectral_contrastive
from counterpoint.contrast.tokens import token_margin
from counterpoint.errors import InputError, nearest

Objective = Callable[..., Tensor]

PAIR_OBJECTIVES: dict[str, Objective] = {
    "info_nce": info_nce,
    "nt_xent": nt_xent,
    "dcl": dcl,
    "dclw": dclw,
    "clip_loss": clip_loss,
    "relabelled_clip": relabelled_clip,
    "sigmoid_loss": sigmoid_loss,
    "binary_nce": binary_nce,
    "ranking_nce": ranking_nce,
    "triplet": triplet,
    "pair_margin": pair_margin,
    "n_pair": n_pair,
}
"""Objectives of two paired sets of embeddings, ``f(z1, z2, temperature=...)``: any method of pairs takes any of them."""


def objective(name: str | Objective) -> Objective:
    """The objective called `name`, or `name` itself when it is already a function.

    Raises:
        InputError: no objective has that name.
    """
    if callable(name):
        return name
    if name not in PAIR_OBJECTIVES:
        hint = nearest(name, PAIR_OBJECTIVES) or f"; there are {', '.join(PAIR_OBJECTIVES)}"
        raise InputError(f'no objective named "{name}"{hint}')
    return PAIR_OBJECTIVES[name]


__all__ = [
    "PAIR_OBJECTIVES",
    "SCORED_OBJECTIVES",
    "Listed",
    "Mask",
    "Objective",
    "Pairs",
    "Relation",
    "Same",
    "alignment",
    "assign",
    "barlow_twins",
    "binary_nce",
    "clip_loss",
    "coupling",
    "dcl",
    "dclw",
    "distributed",
    "effective_rank",
    "executor",
    "info_nce",
    "isotropy",
    "log_sum_exp",
    "mnr",
    "n_pair",
    "negative_cosine",
    "nt_xent",
    "objective",
    "pair_margin",
    "ranking_nce",
    "relabelled_clip",
    "score_stats",
    "scored_binary",
    "scored_objective",
    "scored_ranking",
    "scored_triplet",
    "sigmoid_loss",
    "sinkhorn",
    "softmax_mean",
    "spectral_contrastive",
    "sup_con",
    "supremix",
    "swapped_prediction",
    "token_margin",
    "triplet",
    "uniformity",
    "unit",
    "weighted_sup_con",
]
