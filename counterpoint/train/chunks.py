"""Large batches in little memory: encoders see a batch chunk by chunk, and keep none of what they computed on the way."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from counterpoint.encoders import ImageEncoder, SASRecEncoder, TextEncoder
from counterpoint.errors import InputError


@contextmanager
def in_chunks(method: nn.Module, size: int | None) -> Iterator[None]:
    """Let the encoders of `method` pass at most `size` items at a time, twice: once for the result, once for the gradient.

    The first pass keeps the inputs and results of the chunks only. The loss, on the vectors of the whole batch, is what it
    was: every item meets the same negatives. In the backward pass each chunk is computed again just before its gradient is
    needed, with the random numbers of its first pass (dropout) and in the same precision. Activations of one chunk at a time
    are in memory, for about a third more time.

    Batch normalisation inside an encoder takes the statistics of a chunk, as it would in batches of that size, and counts
    them into its running statistics once. Heads are small and still see the whole batch, so theirs are those of the batch.

    Args:
        method: whose encoders change how they are called; their weights and names stay.
        size: items per chunk, at least 2; None changes nothing.

    Raises:
        InputError: the method has no encoder that can be called in chunks.

    Source: the idea is that of Gao et al. 2021 (arXiv 2101.06983); here the graph itself recomputes, so that it needs no
    second version of a method, and gradients of several losses, processes and precisions are what autograd makes them.
    """
    if size is None:
        yield
        return
    found = [module for module in method.modules() if isinstance(module, ImageEncoder | TextEncoder | SASRecEncoder)]
    if not found:
        raise InputError(f"{type(method).__name__} has no encoder that can take a batch in chunks: leave chunk out")
    for encoder in found:
        encoder.forward = partial(_forward, encoder, encoder.forward, size)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for encoder in found:
            del encoder.forward  # the class's own shows again


def _forward(encoder: nn.Module, whole: Any, size: int, *inputs: Tensor, **options: Any) -> Any:
    """`whole(*inputs)` in chunks; the inputs are cut along their first axis, into parts that are as even as can be."""
    count = -(-len(inputs[0]) // size)
    if count <= 1:
        return whole(*inputs, **options)
    call = partial(whole, **options)
    parts = zip(*(x.tensor_split(count) for x in inputs), strict=True)
    if torch.is_grad_enabled():
        again: Any = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _counted_already(encoder))}
        results = [checkpoint(call, *part, **again) for part in parts]
    else:
        results = [call(*part) for part in parts]
    leaves, forms = zip(*(tree_flatten(result) for result in results), strict=True)
    joined = [None if fields[0] is None else torch.cat(fields) for fields in zip(*leaves, strict=True)]
    return tree_unflatten(joined, forms[0])


@contextmanager
def _counted_already(encoder: nn.Module) -> Iterator[None]:
    """The second pass normalises as the first did, but does not count its batch into the running statistics again."""
    norms = [part for part in encoder.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # not track_running_stats: autograd wants to save the same tensors as in the first pass
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
