"""Vega v1: an encoder learns to find replaced tokens, and then also to tell whole sentences apart."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.operands import reduce
from counterpoint.contrast.replaced import replaced_token_loss
from counterpoint.data import texts
from counterpoint.encoders.masked import Disentangled, ReplacedTokenHead, mask_of, masked_language_model, shared_tables
from counterpoint.encoders.text import Pooling
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train.method import Batch
from counterpoint.train.optimise import decay_groups
from counterpoint.train.start import earlier_method
from counterpoint.views.text import mask_tokens

KEPT = ("encoder", "pooling", "layers", "generator", "generator_layers", "sharing")
"""Arguments that a second phase takes from the first."""


class Vega(SimCSE):
    r"""A small generator proposes tokens, the encoder finds them out; in the second phase sentences are contrasted as well.

    .. math::
        L = \underbrace{-\frac{1}{|M|} \sum_{t \in M} \log p_G(x_t)}_{\text{generator}}
        + \lambda\, \frac{1}{|T|} \sum_{t \in T} \mathrm{BCE}\big(D(\tilde x)_t, [\tilde x_t \ne x_t]\big)
        + \beta\, L_{\text{SimCSE}}

    15 % of the tokens T of a sentence are hidden (M). The generator G, a masked language model of half the depth, guesses them,
    and what it samples takes their places in :math:`\tilde x`. The encoder says of every token whether it is the
    original, looking at the token's vector plus that of the first token, which thus has to know the sentence. No
    gradient goes from the encoder to the generator; the encoder's token embeddings are the generator's, as constants, plus
    differences of its own. Phase 1 is ``beta: 0``; phase 2 adds SimCSE's loss of two dropout passes of the whole sentences, so
    that the space of the first token serves sentence tasks. ::

        counterpoint train vega --data corpus.txt --beta 0 --run runs/phase1
        counterpoint train vega --data corpus.txt --start runs/phase1

    When to use it: to train an encoder of text from scratch (or to go on with one on text of a domain) that will be fine-tuned,
    and be used as a sentence encoder too. The paper's tricks of fine-tuning (smoothness under perturbed embeddings,
    pseudo-labels, softened labels) need labels and are no part of it; the first is `counterpoint.encoders.perturbed.Sift`.
    With a good pretrained encoder and no tokens to learn about, SimCSE does the same for a third of the cost.

    Defaults: lambda 10 and 15 % as released for replaced token detection (ELECTRA: 50), beta 1 (assumed), temperature 0.05,
    [CLS] pooling, sentences of 64 tokens. The paper's encoder has disentangled attention (``microsoft/deberta-v3-*``, or a fresh
    configuration of ``model_type: deberta-v2``) and 1.3 billion weights; DeBERTa's scripts: Adam at 1e-4, batch 256.

    Where codes differ: there is none of Vega, and its report could not be read: that the second phase keeps the first's losses
    and contrasts uncorrupted sentences is assumed. DeBERTa's trains generator and encoder by two optimisers in turn; here
    one takes both steps at once, which for rates that adapt to each weight is the same but for the age of the shared
    embeddings. There one token out of each window of 6 is hidden; here any. Shared embeddings do not decay.

    Source: Zhong et al. 2023, "Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on
    GLUE" (arXiv 2302.09268); microsoft/DeBERTa at 4d7fe0b; He et al. 2023 (arXiv 2111.09543); Clark et al. 2020 (arXiv
    2003.10555).

    Args:
        encoder: as in SimCSE; None takes that of `start`, or microsoft/deberta-v3-base.
        pooling: as in SimCSE; None takes that of `start`, or "cls".
        layers: keep only the encoder's first so many layers.
        generator: the generator's encoder, named as `encoder` is; None takes the same model.
        generator_layers: keep only its first so many layers; None is half those of the encoder where it is the same model.
        mask_rate: share of tokens that are hidden.
        detection: lambda, weight of finding replaced tokens.
        beta: weight of the contrast of sentences; 0 is the first phase.
        sharing: of embeddings: "gdes" as above, "es" one table for both (pulled in two directions), "none".
        start: run folder of a first phase, whose weights the training starts from.
        max_length: tokens that sentences are cut to in training.
        head: as in SimCSE, in the second phase.
        **simcse: as in SimCSE.
    """

    reads_pairs = False
    special: Tensor

    def __init__(
        self,
        encoder: str | dict[str, Any] | None = None,
        pooling: Pooling | None = None,
        layers: int | None = None,
        generator: str | dict[str, Any] | None = None,
        generator_layers: int | None = None,
        mask_rate: float = 0.15,
        detection: float = 10.0,
        beta: float = 1.0,
        sharing: Literal["gdes", "es", "none"] = "gdes",
        start: str | None = None,
        max_length: int = 64,
        head: bool = True,
        **simcse: Any,
    ):
        if sharing not in ("gdes", "es", "none"):
            raise InputError(f'sharing must be one of gdes, es, none, not "{sharing}"')
        if not (0 < mask_rate < 1 and detection >= 0 and beta >= 0):
            raise InputError(
                f"mask_rate lies between 0 and 1, detection and beta are not negative, got {mask_rate}, {detection} and {beta}"
            )
        given = dict(zip(KEPT, (encoder, pooling, layers, generator, generator_layers, sharing), strict=True))
        earlier = None if start is None else earlier_method(start, Vega)
        if earlier is not None:
            given = taken_over(given, earlier.arguments, str(start))
        given["encoder"] = given["encoder"] or "microsoft/deberta-v3-base"
        given["pooling"] = given["pooling"] or "cls"
        choice: Any = given
        super().__init__(
            choice["encoder"], choice["pooling"], choice["layers"], max_length, head=head and beta > 0, **simcse
        )
        self.arguments |= given  # the run must say which models these are, also when the earlier one is gone
        small = choice["generator_layers"]
        if small is None and generator_of(given) == given["encoder"]:
            small = -(-self.encoder.model.config.num_hidden_layers // 2)
        self.generator = masked_language_model(generator_of(given), layers=small, dropout=simcse.get("dropout"))
        if self.generator.encoder.tokenizer.get_vocab() != self.encoder.tokenizer.get_vocab():
            raise InputError(
                "generator and encoder read different tokens: take a generator with the encoder's tokeniser"
            )
        if max_length > self.generator.encoder.positions:
            raise InputError(
                f"the generator takes {self.generator.encoder.positions} tokens, max_length is {max_length}"
            )
        self.mask_token = mask_of(self.encoder)
        self.register_buffer("special", torch.tensor(self.encoder.tokenizer.all_special_ids), persistent=False)
        pairs = [] if sharing == "none" else shared_tables(self.generator.encoder, self.encoder)
        self.shared = Disentangled(pairs, copy=self.encoder.fresh) if sharing == "gdes" else None
        for leader, follower in pairs if sharing == "es" else ():
            follower.weight = leader.weight
        self.detector = ReplacedTokenHead(self.encoder.dim)
        self.mask_rate, self.detection, self.beta = mask_rate, detection, beta
        if earlier is not None:
            go_on(self, earlier)

    def used(self, rows: texts.Texts) -> texts.Texts:
        return rows.single() if len(rows.columns) > 1 else rows

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        sentences = batch["input_ids"], batch["attention_mask"]
        corrupted, guessing = self.corrupted(*sentences)
        terms = {"generator": guessing, "detection": self.detection * self.found_out(corrupted, *sentences)}
        if self.beta:
            query, key = self.project(sentences, sentences)
            terms["contrast"] = self.beta * self.contrast(query, key)
        return terms

    def corrupted(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The sentences with some tokens replaced by what the generator samples, and the loss that it learns from."""
        hidden = mask_tokens(ids, mask, self.special, rate=self.mask_rate)
        # a GPU must not wait to know how many there are: as many places as there can be, the last ones empty (-1)
        most = max(1, round(self.mask_rate * ids.shape[1])) * len(ids)
        count = int(hidden.sum()) if ids.device.type == "cpu" else most
        at = torch.nonzero_static(hidden.flatten(), size=count, fill_value=-1)[:, 0]
        scores = self.generator(ids.masked_fill(hidden, self.mask_token), mask, at)
        guesses = functional.log_softmax(scores.float(), dim=1)
        rows = functional.nll_loss(guesses, ids.flatten()[at], reduction="none")
        loss = reduce(rows * (at >= 0), "mean", at >= 0)
        sampled = drawn(guesses.detach())
        # empty places write into one token more than there are
        flat = functional.pad(ids.flatten(), (0, 1))
        return flat.scatter(0, at.where(at >= 0, ids.numel()), sampled)[:-1].view_as(ids), loss

    def found_out(self, corrupted: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss of telling replaced tokens from original ones."""
        scores = self.detector(self.encoder.hidden(corrupted, mask))
        return replaced_token_loss(scores, corrupted, ids, mask)

    def after_step(self) -> None:
        if self.shared is not None:
            self.shared.follow()

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = decay_groups(self, self.optimisation.weight_decay)
        shared = {id(table.weight) for _, table in (self.shared.pairs if self.shared else ())}
        groups[1]["params"] += [p for p in groups[0]["params"] if id(p) in shared]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in shared]
        return groups


def drawn(log_probabilities: Tensor) -> Tensor:
    """int64 [M]: a token of each row [M, V], by one random number each: one for every token would cost more than the softmax."""
    upto = log_probabilities.exp().cumsum(1)
    place = torch.rand(len(upto), 1, device=upto.device) * upto[:, -1:]
    return torch.searchsorted(upto, place, right=True)[:, 0].clamp(max=upto.shape[1] - 1)


def generator_of(given: dict[str, Any]) -> Any:
    """What the generator is built from: its own name, or else the encoder's."""
    return given["encoder"] if given["generator"] is None else given["generator"]


def taken_over(given: dict[str, Any], earlier: dict[str, Any], start: str) -> dict[str, Any]:
    """The arguments of the earlier run, which must not contradict those that are given.

    Raises:
        InputError: they do.
    """
    for name, value in given.items():
        if value is not None and value != earlier[name]:
            raise InputError(f"{name} is {value}, but {start} was trained with {earlier[name]}: leave {name} out")
    return {name: earlier[name] for name in given}


def go_on(method: Vega, earlier: Vega) -> None:
    """Copy the weights of an earlier phase; the head of the contrast is new where that phase had none.

    Raises:
        InputError: they do not fit.
    """
    try:
        different = method.load_state_dict(earlier.state_dict(), strict=False)
    except RuntimeError as error:
        raise InputError(f"the run to start from does not fit: {' '.join(str(error).split())}") from error
    if other := [
        name for name in [*different.missing_keys, *different.unexpected_keys] if not name.startswith("head.")
    ]:
        raise InputError(f"the run to start from does not fit: only one of the two has {other[0]}")
