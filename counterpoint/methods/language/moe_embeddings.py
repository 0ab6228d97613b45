"""MoE embeddings: one encoder for several domains, whose MLPs are copied into one expert for each."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.contrast.routing import load_balancing, specified_expert
from counterpoint.data import texts
from counterpoint.encoders.experts import ExpertEncoder, Router, Where
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE, columns
from counterpoint.train.method import Batch
from counterpoint.views.text import stack

log = logging.getLogger("counterpoint")

COLDEST = 0.01

Form = tuple[str, float, bool, bool]
FORMS: dict[str, Form] = {
    "clip": ("relabelled_clip", 0.7, False, True),
    "mnr_plus": ("relabelled_clip", 1.0, False, False),
    "mnr": ("info_nce", 0.05, True, False),
}
"""The paper's losses: objective, temperature, whether vectors are normalised, whether the temperature is learned."""


class MoEEmbeddings(SimCSE):
    r"""Pairs of texts from several domains; a text goes through the experts of its domain, everything else is shared.

    .. math::
        x \mapsto \mathrm{LN}\big(x + E_{r}(x)\big), \qquad E_r(x) = W^2_r\, \mathrm{gelu}(W^1_r x + b^1_r) + b^2_r,
        \qquad \mathcal{L} = \tfrac12 \big( \mathrm{CE}(A B^\top / \tau,\, y) + \mathrm{CE}(B A^\top / \tau,\, y') \big)

    One encoder for all texts is too coarse inside a niche, and one for each niche does not scale. Here the MLPs of a
    pretrained encoder are copied once for each domain r (all copies equal at the start) and the whole is tuned once on pairs
    of all domains; a text costs as much as before, since one expert runs. Its [CLS] is replaced by a token of the domain, a new
    word that starts as [CLS]. A and B are the vectors of a batch's pairs; targets y are nearly always the diagonal (see
    `counterpoint.contrast.relabelled_clip`).

    When to use it: when texts of several domains need one model, you know each text's domain, and one joint model is worse
    than several: above all where domains contradict each other in what belongs together. In the paper's tables it lies
    between the joint model and as many single ones, and a small encoder (MiniLM) gained nothing; one layer with
    experts has most of the gain. The data: pairs with a column ``domain``, or named sets with a plus between them
    (``--data arxiv-pairs+codenn-pairs``); ``--domains`` names them. `encode` takes ``domain="arxiv"``.

    Defaults: SciBERT, 512 tokens, experts in all layers, enforced routing, loss "clip" with a learned temperature that starts at
    0.7 (used as it is, not through exp), as released; there AdamW at 1e-5, batch 20, dropout 0.05. "mnr" is what the paper names:
    a softmax of cosines, scale 20, in one direction.

    Where codes differ: the release (9738dfe) puts a fresh LayerNorm before the experts in the place of BERT's after them, so
    that the converted network is another one before training: ``norm="pre"``; ours keeps BERT's. Routers there average
    padding too: ``real_tokens=False``. Switch routing does not multiply by the gate, so the gate learns from the router losses
    alone. The embedding there is BERT's pooler; here linear and tanh are a train-only head, as in SimCSE, and the embedding is
    the vector before. The mutual-information loss of a later release has no gradient, and is left out, as is its "MNR", which
    compares matched rows only. Here the learned temperature stays above 0.01.

    Source: Hallee et al. 2024, "Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings" (arXiv
    2401.15713); Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity at 9738dfe and 2a67569.

    Args:
        encoder: BERT, RoBERTa, MPNet, DistilBERT or ModernBERT, by name or folder; see `counterpoint.encoders.text`.
        domains: their names, as the data have them; none for texts of one kind.
        experts_in: "all" layers, the "middle" one, or "none": one joint model.
        experts: how many; None takes one for each domain.
        router: "enforced" by domain; learned: "switch" (one for a text), "sentence" or "token" (several).
        top_k: experts of a text or token under the last two.
        norm: "post" keeps BERT's blocks, "pre" is the released form.
        real_tokens: whether routers average over real tokens only.
        domain_tokens: whether the domain's own token stands in the place of [CLS].
        objective: "clip", "mnr_plus", "mnr", or any objective of pairs by name (then of cosines, temperature 0.05).
        temperature: of the softmax, at the start; None takes that of the objective.
        swap: whether a and b change sides at random: all of a "batch", each "row", or "none"; it matters for one direction.
        router_weight: of the cross entropy that tells a learned router the domain.
        balance_weight: of the term that keeps a learned router from sending everything to one expert.
        batches: "mixed", or of one "domain" each, which makes harder negatives.
        max_length: tokens that texts are cut to in training.
        **simcse: as in SimCSE.
    """

    parts_rest = True

    def __init__(
        self,
        encoder: str | dict[str, Any] = "allenai/scibert_scivocab_uncased",
        domains: tuple[str, ...] = (),
        experts_in: Where = "all",
        experts: int | None = None,
        router: Router = "enforced",
        top_k: int = 2,
        norm: Literal["post", "pre"] = "post",
        real_tokens: bool = True,
        domain_tokens: bool = True,
        objective: str = "clip",
        temperature: float | None = None,
        swap: Literal["batch", "row", "none"] = "batch",
        router_weight: float = 1.0,
        balance_weight: float = 0.0,
        batches: Literal["mixed", "domain"] = "mixed",
        max_length: int = 512,
        **simcse: Any,
    ):
        name, start, normalised, learned = FORMS.get(objective, (objective, 0.05, True, False))
        start = start if temperature is None else temperature
        if not start >= COLDEST:
            raise InputError(f"temperature must be {COLDEST} or more, not {start}")
        for option, chosen, known in (
            ("swap", swap, ("batch", "row", "none")),
            ("batches", batches, ("mixed", "domain")),
        ):
            if chosen not in known:
                raise InputError(f'{option} must be one of {", ".join(known)}, not "{chosen}"')
        if min(router_weight, balance_weight) < 0:
            raise InputError(f"weights of router losses are 0 or more, not {router_weight} and {balance_weight}")
        super().__init__(encoder=encoder, max_length=max_length, objective=name, temperature=start, **simcse)
        options: dict[str, Any] = {"experts": experts, "router": router, "top_k": top_k, "norm": norm}
        alone = experts is None and len(domains) < 2  # nothing to choose between
        where: Where = "none" if alone else experts_in
        self.encoder = ExpertEncoder(
            self.encoder, domains, where=where, tokens=domain_tokens, real=real_tokens, **options
        )
        self.wanted = experts_in != "none"
        self.domains, self.knows = tuple(domains), bool(domains) and (domain_tokens or bool(self.encoder.layers))
        if learned:
            self.temperature = torch.nn.Parameter(torch.tensor(float(start)))  # type: ignore[assignment]
        self.normalised, self.learned, self.swap, self.batches = normalised, learned, swap, batches
        self.weights = {"router": router_weight, "balance": balance_weight}
        told = router != "enforced" and router_weight > 0 and bool(self.encoder.layers)
        if told and experts is not None and experts < len(domains):
            raise InputError(
                f"the router cannot tell {len(domains)} domains apart with {experts} experts: set router_weight to 0"
            )

    # ---- data -------------------------------------------------------------------------------------------------------

    def used(self, rows: texts.Texts) -> texts.Texts:
        return super().used(rows.positives())

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> texts.Sentences:
        items = super().read(data, split, limit=limit, seed=seed, resident=resident)
        return items.in_domains(self.domains) if self.domains else items

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> texts.Sentences:
        items = self.read(data, limit=limit, seed=seed)
        if items.domain is None and len(self.domains) > 1:
            raise InputError(
                f"{items.name} does not say of which domain a row is: add a column domain with {', '.join(self.domains)}"
            )
        if self.wanted and not self.domains and not self.encoder.layers and len(items.domains) > 1:
            raise InputError(
                f"{items.name} has the domains {', '.join(items.domains)}: give --domains '[{', '.join(items.domains)}]' for an "
                "expert each, or --experts_in none for one joint model"
            )
        return items

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        super().grouping(epoch, items)
        return items.domain if self.batches == "domain" else None

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        domain = batch.get("domain")
        sentences = [(self.encoder.marked(ids, domain), mask) for ids, mask in columns(self.with_mined(batch))]
        pooled, routes = self.encoder.routed(*stack(sentences, self.encoder.pad))
        a, b, *negatives = self.head(pooled).tensor_split(len(sentences))
        terms = {"contrast": self.contrast(*self.swapped(a, b), negatives)}
        if routes is not None:
            if self.weights["router"] and domain is not None and self.domains:
                both = torch.stack(routes[:, : 2 * len(domain)].tensor_split(2, 1)).mean(0)
                terms["router"] = self.weights["router"] * specified_expert(both, domain)
            if self.weights["balance"]:
                terms["balance"] = self.weights["balance"] * load_balancing(routes)
        return terms

    def swapped(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.swap == "none":
            return a, b
        turn = torch.rand((len(a) if self.swap == "row" else 1, 1), device=a.device) < 0.5
        return torch.where(turn, b, a), torch.where(turn, a, b)

    def contrast(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Sequence[Tensor] = (),
        earlier: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        rows = torch.cat([key, *negatives])
        pairs = contrast.Pairs.under(self.objective, query, rows, negatives=earlier, normalize=self.normalised)
        pairs = self.mixing(pairs, self.current_epoch)
        self.watch(query, key, pairs)
        return self.heads(pairs, self.objective, temperature=self.temperature, **options)

    def after_step(self) -> None:
        super().after_step()
        if self.learned:
            with torch.no_grad():
                self.temperature.clamp_(min=COLDEST)  # type: ignore[attr-defined]

    # ---- embedding --------------------------------------------------------------------------------------------------

    def encode(
        self, data: Any, *, domain: str | None = None, split: str = "train", batch_size: int = 128
    ) -> np.ndarray:
        """Embeddings float32 [N, D] of texts (of a table's first column), one for each row of the data.

        Args:
            data: whatever `counterpoint.data.texts.load` takes.
            domain: of all texts; None takes what the data say, and else the first.
            split: which part of a known set.
            batch_size: texts per forward pass.

        Raises:
            InputError: a domain that the model does not know.
        """
        if domain is not None and domain not in self.domains:
            raise InputError(f"there is no domain {domain}; the model knows {', '.join(self.domains) or 'none'}")
        if not isinstance(data, texts.Sentences):
            rows = texts.load(data, split, whole=True)
            anchors = texts.Texts({"anchor": rows.columns["anchor"]}, domain=rows.domain, domains=rows.domains)
            data = texts.tokenise(anchors, self.encoder.tokenizer, self.encoder.max_length)
        if domain is not None:
            data = replace(data, domain=torch.zeros(len(data), dtype=torch.int64), domains=(domain,))
        if data.domain is None and self.knows and len(self.domains) > 1:
            log.warning("no domain is given: the texts are taken to be of %s", self.domains[0])
        if not self.domains:
            data = replace(data, domain=None)
        return super(SimCSE, self).encode(data, batch_size=batch_size)
