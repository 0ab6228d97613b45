"""Losses of routers: which expert a sentence should go to, and that all experts get some."""

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.distributed import sum_over_ranks
from counterpoint.contrast.operands import reduce, wide
from counterpoint.errors import InputError


def specified_expert(router_logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Cross entropy of the logits' mean over layers with the expert that a sentence belongs to.

    Args:
        router_logits: ``[layers, N, E]``.
        labels: int64 ``[N]``, below E.
        reduction: "mean", "sum" or "none" ``[N]``.

    Raises:
        InputError: wrong shape.

    Source: Hallee et al. 2024 (arXiv 2401.15713), released ``specified_expert_loss`` (9738dfe).
    """
    logits = _checked(router_logits).mean(0)
    if labels.shape != logits.shape[:1]:
        raise InputError(f"labels must be int64 [{len(logits)}], one for each sentence, not {list(labels.shape)}")
    return reduce(functional.cross_entropy(logits, labels, reduction="none"), reduction)


def load_balancing(router_logits: Tensor) -> Tensor:
    r"""E times the sum over experts of mean probability times share of the sentences; 1 when all are used alike.

    .. math:: E \sum_e \bar p_e f_e, \qquad f_e = \tfrac{1}{n} |\{i : \arg\max p_i = e\}|

    Means are over the sentences of all layers and processes. Only the probabilities carry gradient.

    Args:
        router_logits: ``[layers, N, E]``.

    Source: Fedus et al. 2021 (arXiv 2101.03961), equation 4; pooled over layers as released by Hallee et al.
    """
    logits = _checked(router_logits).flatten(0, 1)
    experts = logits.shape[1]
    count = sum_over_ranks(logits.new_tensor(float(len(logits))))
    probability = sum_over_ranks(logits.softmax(1).sum(0)) / count
    with torch.no_grad():
        first = functional.one_hot(logits.max(1).indices, experts).to(logits.dtype).sum(0)
        share = sum_over_ranks(first) / count
    return experts * (probability * share).sum()


def _checked(router_logits: Tensor) -> Tensor:
    if router_logits.ndim != 3 or 0 in router_logits.shape:
        raise InputError(f"router logits are [layers, sentences, experts], not {list(router_logits.shape)}")
    return wide(router_logits)
