"""A language model that reads a batch of texts as they grow: its cache, masks and positions, and a look ahead."""

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from counterpoint.encoders.causal import CausalLM
from counterpoint.errors import InputError


class Reader:
    """A model and what it has read of B texts.

    Texts of different length are padded on the left; padding is masked, and positions count from the first token of each text.

    A look ahead reads K candidates for the next token of every text in one pass, without copying the cache K times: they stand
    one after the other as K tokens of the same position, each of which sees the text and itself alone. Models that cannot be
    read so (those that count positions by themselves, windows, recurrent states) get a cache that is copied for each candidate
    and narrowed to the chosen one. Which it is, `shares_cache` finds out by comparing the two.

    Args:
        lm: the model.
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, 0 for padding, which stands on the left.
        shared: whether candidates share the cache; None finds out when it is first needed.

    Attributes:
        answer: what the model made of the tokens it read last.
        mask: ``[B, S]`` of all tokens so far.
    """

    def __init__(self, lm: CausalLM, input_ids: Tensor, attention_mask: Tensor, *, shared: bool | None = None):
        self.lm, self.mask, self.shared = lm, attention_mask.long(), shared
        self.answer = lm(input_ids, self.mask, use_cache=True, last_only=True)
        if self.answer.cache is None:
            raise InputError(
                f"{lm.name} ({type(lm.model).__name__}) returns no cache: it cannot be read token by token"
            )
        self.ahead, self.choice = 0, cast(Tensor | None, None)

    @property
    def logits(self) -> Tensor:
        """``[B, V]``, of the next token."""
        return self._kept(self.answer.logits)[:, -1]

    @property
    def hidden(self) -> Tensor:
        """``[B, T, E]``, the last layer's states of the tokens that were read last."""
        return self._kept(self.answer.hidden)

    def exit(self, layer: int) -> Tensor:
        """Logits ``[B, V]`` of the next token after that layer; see `CausalLM.exit`."""
        layers = self.answer.layers if self.choice is None else tuple(map(self._kept, self.answer.layers))
        return self.lm.exit(layers, layer, slice(-1, None))[:, -1]

    def _kept(self, states: Tensor) -> Tensor:
        """Of what belongs to all candidates of the last look ahead, that of the one that was kept ``[B, 1, ...]``."""
        if self.choice is None:
            return states
        at = torch.arange(len(self.choice), device=states.device), self.choice
        return states.view(len(self.choice), self.ahead, -1)[at][:, None]

    def read(self, tokens: Tensor) -> None:
        """Read the next token ``[B]`` of every text."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.answer = self.lm(tokens[:, None], self.mask, cache=self.answer.cache, use_cache=True, last_only=True)
        self.ahead, self.choice = 0, None

    def look_ahead(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Read each of the candidates ``[B, K]`` as the next token: states ``[B, K, E]`` and logits ``[B, K, V]`` after it.

        One of them has to be kept (`keep`) before anything else is read.
        """
        if self.shared is None:
            self.shared = shares_cache(self.lm)
        self.ahead, self.choice = candidates.shape[1], None
        return self._side_by_side(candidates) if self.shared else self._copied(candidates)

    def keep(self, choice: Tensor) -> None:
        """The candidates at `choice` ``[B]`` are the next tokens."""
        cache = self.answer.cache
        if self.shared:
            for layer in cache.layers:
                if layer.keys is not None and layer.keys.numel():
                    layer.keys, layer.values = (narrowed(x, choice, self.ahead) for x in (layer.keys, layer.values))
        else:
            cache.reorder_cache(torch.arange(len(choice), device=choice.device) * self.ahead + choice)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.choice = choice

    def _side_by_side(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        k, past = candidates.shape[1], self.mask.bool()
        own = torch.eye(k, dtype=torch.bool, device=candidates.device).expand(len(past), -1, -1)
        seen = torch.cat([past[:, None].expand(-1, k, -1), own], 2)[:, None]
        kind = self.answer.hidden.dtype
        mask = torch.zeros(seen.shape, dtype=kind, device=seen.device).masked_fill_(~seen, torch.finfo(kind).min)
        at = past.sum(1, keepdim=True).expand(-1, k)
        self.answer = self.lm(candidates, mask, position_ids=at, cache=self.answer.cache, use_cache=True)
        return self.answer.hidden, self.answer.logits

    def _copied(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        (rows, k), cache = candidates.shape, self.answer.cache
        every = torch.arange(rows, device=candidates.device).repeat_interleave(k)
        cache.reorder_cache(every)
        mask = torch.cat([self.mask, self.mask.new_ones(rows, 1)], 1)[every]
        self.answer = self.lm(candidates.reshape(-1, 1), mask, cache=cache, use_cache=True)
        return self.answer.hidden.view(rows, k, -1), self.answer.logits.view(rows, k, -1)


def narrowed(states: Tensor, choice: Tensor, k: int) -> Tensor:
    """Of ``[B, H, S + k, D]`` the first S tokens and the chosen one of the last k; changes `states`."""
    length = states.shape[2] - k + 1
    if len(choice) == 1:
        at = length - 1 + int(choice)
        states[:, :, length - 1] = states[:, :, at]
    else:
        rows = torch.arange(len(choice), device=choice.device)
        states[:, :, length - 1] = states[rows, :, length - 1 + choice]
    return states[:, :, :length]


WINDOWS = ("sliding_window", "window_size", "attention_window")
"""Settings of models whose layers see the last tokens only."""

_SHARES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def shares_cache(lm: CausalLM) -> bool:
    """Whether candidates that stand side by side behind one cache are read by `lm` as if each had a cache of its own.

    Found out once a model, on a few tokens: both ways must give the same states, also after one of them was kept.
    """
    if lm.model not in _SHARES:
        _SHARES[lm.model] = _alike(lm)
    return _SHARES[lm.model]


def _alike(lm: CausalLM) -> bool:
    device = lm.model.get_input_embeddings().weight.device
    ids = torch.arange(15, device=device).view(3, 5) % lm.vocabulary
    mask = torch.ones(2, 5, device=device).long()
    mask[1, :2] = 0
    choice = torch.tensor([2, 1], device=device)
    found = []
    training = lm.training
    settings = lm.model.config.get_text_config()
    if any(getattr(settings, name, None) for name in WINDOWS):  # on a longer text it would forget
        return False
    lm.eval()
    try:
        for shared in (False, True):
            reader = Reader(lm, ids[:2], mask, shared=shared)
            states, _ = reader.look_ahead(ids[1:, :3])
            reader.keep(choice)
            reader.read(ids[0, :2])
            found.append((states, reader.hidden))
    except Exception:  # whatever a model says about tokens that it is not made for
        if not found:
            raise
        return False
    finally:
        lm.train(training)
    scale = found[0][0].abs().max()
    loose = 1e-4 if scale.dtype == torch.float32 else 3e-2
    return all(bool((x - y).abs().max() <= loose * scale) for x, y in zip(*found, strict=True))
