"""How the next token is chosen. A strategy is its settings and a generator of tokens; the loop around it is `decode`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from counterpoint.contrast.decoding import contrastive_logprob, contrastive_search_score, furthest_layer, nucleus
from counterpoint.contrast.operands import unit
from counterpoint.encoders.causal import CausalLM
from counterpoint.errors import InputError, nearest

Layers = tuple[int, ...] | str


class Seen(Protocol):
    """What a model predicts at some places of some texts: the next token of a `Reader`, or the tokens of given answers."""

    lm: Any

    @property
    def logits(self) -> Tensor: ...

    def exit(self, layer: int) -> Tensor: ...


class Looking(Seen, Protocol):
    """A `Reader`, as the strategies use it."""

    mask: Tensor

    @property
    def hidden(self) -> Tensor: ...

    def read(self, tokens: Tensor) -> None: ...

    def look_ahead(self, candidates: Tensor) -> tuple[Tensor, Tensor]: ...

    def keep(self, choice: Tensor) -> None: ...


class Readers(NamedTuple):
    """Who reads the texts: the model, its amateur, and the model behind an instruction to be truthful."""

    expert: Looking
    amateur: Looking | None = None
    truthful: Looking | None = None


class Strategy(Protocol):
    """Settings and how they choose.

    Attributes:
        needs_amateur: whether a second model reads along.
        takes_instruction: whether the model may read a second time, behind an instruction.
    """

    needs_amateur: ClassVar[bool]
    takes_instruction: ClassVar[bool]

    def tokens(self, readers: Readers, generator: torch.Generator) -> Iterator[Tensor]:
        """The next token ``[B]`` of every text, again and again; what is asked for next is behind what was given."""


class Scored:
    """Strategies that give every token a score and take the best: the same score also rates a given answer."""

    needs_amateur: ClassVar[bool] = False
    takes_instruction: ClassVar[bool] = False

    def scores(self, expert: Seen, amateur: Seen | None = None, truthful: Seen | None = None) -> Tensor:
        """``[..., V]``."""
        raise NotImplementedError

    def tokens(self, readers: Readers, generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            chosen = self.scores(*readers).argmax(-1)
            yield chosen
            for reader in readers:
                if reader is not None:
                    reader.read(chosen)


@dataclass(frozen=True)
class Greedy(Scored):
    """The most probable token."""

    def scores(self, expert: Seen, amateur: Seen | None = None, truthful: Seen | None = None) -> Tensor:
        return log_softmax(expert.logits.float(), -1)


@dataclass(frozen=True)
class Contrastive(Scored):
    r"""Contrastive decoding: what the expert thinks more probable than the amateur does, :math:`\log p_e - \log p_a`.

    With an amateur that was trained on false statements it is ICD.

    Source: Li et al. 2023 (arXiv 2210.15097); Zhang et al. 2023 (arXiv 2312.15710).

    Args:
        relative_top: tokens below this share of the expert's largest probability are left out; 0 leaves none out.
        relative_top_value: score of what is left out.
        post_softmax: normalise the difference.
    """

    relative_top: float = 0.1
    relative_top_value: float = -torch.inf
    post_softmax: bool = True
    needs_amateur: ClassVar[bool] = True

    def options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("relative_top", "relative_top_value", "post_softmax")}

    def scores(self, expert: Seen, amateur: Seen | None = None, truthful: Seen | None = None) -> Tensor:
        assert amateur is not None
        return contrastive_logprob(expert.logits, amateur.logits, **self.options())


@dataclass(frozen=True)
class DoLa(Contrastive):
    """Contrastive decoding whose amateur is an early layer of the expert itself: at each place the one that differs most.

    Source: Chuang et al. 2024 (arXiv 2309.03883).

    Args:
        layers: candidates: numbers (0 is the embeddings), or "high" or "low": those of the upper or lower half, every second
            one in models of more than eight layers.
        relative_top, relative_top_value, post_softmax: as in `Contrastive`.
    """

    layers: Layers = "high"
    needs_amateur: ClassVar[bool] = False

    def scores(self, expert: Seen, amateur: Seen | None = None, truthful: Seen | None = None) -> Tensor:
        _, early = furthest_layer(expert.logits, exits(expert, candidates(self.layers, expert.lm.depth)))
        return contrastive_logprob(expert.logits, early, **self.options())


@dataclass(frozen=True)
class LOL(Contrastive):
    r"""Contrast with an amateur at the last and at a lower layer, and with what the model says when asked for the truth.

    ``lower_weight=0, refocus_weight=0`` is `Contrastive`. The lower layer is the one at which the expert differs most from its
    last, for both models the same. The refocus needs an instruction.

    Source: Chen et al. 2024 (arXiv 2408.08769); formula and weights are assumed, see `counterpoint.contrast.decoding`.

    Args:
        layers: candidates for the lower layer, as in `DoLa`.
        lower_weight: of the contrast at the lower layer.
        refocus_weight: of the instruction's effect; 0 does not read it.
        relative_top, relative_top_value, post_softmax: as in `Contrastive`.
    """

    layers: Layers = "high"
    lower_weight: float = 0.5
    refocus_weight: float = 0.5
    takes_instruction: ClassVar[bool] = True

    def scores(self, expert: Seen, amateur: Seen | None = None, truthful: Seen | None = None) -> Tensor:
        assert amateur is not None
        early = None
        if self.lower_weight:
            known = candidates(self.layers, expert.lm.depth)
            if max(known) >= amateur.lm.depth:
                raise InputError(
                    f"the amateur has {amateur.lm.depth} layers, so no layer {max(known)} to contrast: give layers that both have"
                )
            chosen, low = furthest_layer(expert.logits, exits(expert, known))
            own = exits(amateur, known).gather(0, chosen[None, ..., None].expand(1, *low.shape))[0]
            early = low, own
        return contrastive_logprob(
            expert.logits,
            amateur.logits,
            early=early,
            truthful=None if truthful is None else truthful.logits,
            lower_weight=self.lower_weight,
            refocus_weight=self.refocus_weight,
            **self.options(),
        )


@dataclass(frozen=True)
class Nucleus:
    """A random token out of the most probable ones that make up `top_p` of the probability.

    Source: Holtzman et al. 2020 (arXiv 1904.09751).

    Args:
        top_p: share of the probability.
        top_k: at most so many tokens.
        temperature: that divides the logits.
    """

    top_p: float = 0.95
    top_k: int | None = None
    temperature: float = 1.0
    needs_amateur: ClassVar[bool] = False
    takes_instruction: ClassVar[bool] = False

    def tokens(self, readers: Readers, generator: torch.Generator) -> Iterator[Tensor]:
        reader = readers.expert
        while True:
            share = nucleus(reader.logits, top_p=self.top_p, top_k=self.top_k, temperature=self.temperature)
            chosen = torch.multinomial(share, 1, generator=generator)[:, 0]
            yield chosen
            reader.read(chosen)


@dataclass(frozen=True)
class TopK(Nucleus):
    """A random token out of the `top_k` most probable ones.

    Source: Fan et al. 2018 (arXiv 1805.04833).

    Args:
        top_k: so many tokens.
        top_p, temperature: as in `Nucleus`.
    """

    top_p: float = 1.0
    top_k: int | None = 50


@dataclass(frozen=True)
class ContrastiveSearch:
    """Of the `k` most probable tokens the one that is probable and whose state is unlike those of all tokens before it.

    Each step reads the candidates side by side, so that choosing costs no second pass; see `Reader.look_ahead`.

    Source: Su et al. 2022 (arXiv 2202.06417); Su and Xu 2023 (arXiv 2210.14140).

    Args:
        k: candidates; 1 is greedy.
        alpha: weight of the penalty, 0 (greedy) to 1.
    """

    k: int = 5
    alpha: float = 0.6
    needs_amateur: ClassVar[bool] = False
    takes_instruction: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.alpha <= 1:
            raise InputError(f"k is 1 or more and alpha lies between 0 and 1, not {self.k} and {self.alpha}")

    def tokens(self, readers: Readers, generator: torch.Generator) -> Iterator[Tensor]:
        reader = readers.expert
        logits, context = reader.logits, unit(reader.hidden)
        if self.k > logits.shape[-1]:
            raise InputError(f"k is {self.k:,}, but the vocabulary has {logits.shape[-1]:,} tokens")
        rows = torch.arange(len(logits), device=logits.device)
        length = context.shape[1]
        while True:
            if length == context.shape[1]:  # room for more, twice as much each time
                context = torch.cat([context, torch.zeros_like(context)], 1)
            probability = softmax(logits.float(), -1)
            best, options = probability.topk(self.k, -1)
            states, following = reader.look_ahead(options)
            states = unit(states)
            score = contrastive_search_score(
                context[:, :length], states, best, alpha=self.alpha, mask=reader.mask, normalize=False
            )
            choice = score.argmax(1)
            reader.keep(choice)
            context[:, length], logits, length = states[rows, choice], following[rows, choice], length + 1
            yield options[rows, choice]


STRATEGIES: dict[str, type] = {
    "greedy": Greedy,
    "contrastive-search": ContrastiveSearch,
    "nucleus": Nucleus,
    "top-k": TopK,
    "contrastive": Contrastive,
    "dola": DoLa,
    "lol": LOL,
}
"""By the names that people use."""


def strategy(name: str, **options: Any) -> Any:
    """The strategy called `name` with these settings.

    Raises:
        InputError: no such strategy, or a setting that it does not have.
    """
    if name not in STRATEGIES:
        raise InputError(f'no strategy named "{name}"; there are {", ".join(STRATEGIES)}{nearest(name, STRATEGIES)}')
    known = {field.name for field in fields(STRATEGIES[name])}
    for key in options:
        if key not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise InputError(f'{name} has no setting "{key}"{nearest(key, known)}; {has}')
    return STRATEGIES[name](**options)


def candidates(layers: Layers, depth: int) -> list[int]:
    """Numbers of the layers that a strategy chooses from, of a model of so many.

    Raises:
        InputError: a layer that the model does not have, or the last one, which differs from itself in nothing.
    """
    step = 2 if depth > 8 else 1
    if isinstance(layers, str):
        if layers not in ("high", "low"):
            raise InputError(f'layers are numbers, "high" or "low", not "{layers}"')
        middle = depth // 2 - depth // 2 % step
        return list(range(middle, depth, step) if layers == "high" else range(0, max(middle, 1), step))
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise InputError(f"layers must lie between 0 and {depth - 1}, below the last, not {list(layers)}")
    return list(layers)


def exits(seen: Seen, layers: list[int]) -> Tensor:
    """Logits ``[C, ..., V]`` after each of these layers."""
    return torch.stack([seen.exit(layer) for layer in layers])


def check_amateur(expert: CausalLM, amateur: CausalLM) -> None:
    """Refuse an amateur that reads other tokens than the expert.

    Raises:
        InputError: it does; the message says in what they differ.
    """
    ours, theirs = expert.tokenizer.get_vocab(), amateur.tokenizer.get_vocab()
    if ours != theirs:
        other = next((token for token, i in sorted(ours.items(), key=lambda x: x[1]) if theirs.get(token) != i), None)
        how = (
            f"{len(ours):,} tokens and {len(theirs):,}"
            if other is None or len(ours) != len(theirs)
            else f"{other!r} differs"
        )
        raise InputError(
            f"expert {expert.name} and amateur {amateur.name} have different tokenisers ({how}): contrast compares the "
            "probabilities of the same tokens, so the amateur must share the expert's"
        )
    if expert.vocabulary != amateur.vocabulary:
        raise InputError(
            f"expert {expert.name} scores {expert.vocabulary:,} tokens and amateur {amateur.name} {amateur.vocabulary:,}: "
            "contrast compares the probabilities of the same tokens"
        )
