"""Golden ops of contrast at decoding time."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from counterpoint import contrast
from counterpoint.contrast.decoding import contrastive_logprob, contrastive_search_score, furthest_layer, plausible
from counterpoint.decoding import ContrastiveSearch, Readers
from counterpoint.evaluate.language import diversity
from counterpoint.parity.ops import Inputs, Outputs, op


@op("contrastive-search.rank")
def contrastive_search_rank(x: Inputs, p: dict[str, Any]) -> Outputs:
    score = contrastive_search_score(x["context_hidden"], x["candidate_hidden"], x["candidate_probs"], alpha=p["alpha"])
    return {"selected": score.argmax(1)}


@op("contrastive-search.simctg_loss", gradient_of=("mle_loss", "cl_loss"))
def contrastive_search_simctg_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    mle = cross_entropy(x["logits"].flatten(0, 1), x["labels"].flatten(), ignore_index=-100)
    return {
        "mle_loss": mle,
        "cl_loss": contrast.token_margin(x["hidden"], x["input_ids"] != p["pad_id"], margin=p["margin"]),
    }


@op("contrastive-search.isotropy")
def contrastive_search_isotropy(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"isotropy": contrast.isotropy(x["hidden"], x["lengths"])}


class TableReader:
    """A model whose state of a token is a row of a table, whatever stands before it."""

    def __init__(self, table: Tensor, head: Tensor, prompt: Tensor):
        self.table, self.head, self.mask = table, head, torch.ones_like(prompt)[None]
        self.hidden = table[prompt][None]

    @property
    def logits(self) -> Tensor:
        return self.hidden[:, -1] @ self.head

    def exit(self, layer: int) -> Tensor:
        raise NotImplementedError

    lm = None

    def read(self, tokens: Tensor) -> None:
        self.hidden = self.table[tokens][:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)

    def look_ahead(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        self.candidates = candidates
        states = self.table[candidates]
        return states, states @ self.head

    def keep(self, choice: Tensor) -> None:
        self.read(self.candidates.gather(1, choice[:, None])[:, 0])


@op("contrastive-search.generate")
def contrastive_search_generate(x: Inputs, p: dict[str, Any]) -> Outputs:
    readers = Readers(TableReader(x["token_hidden"], x["lm_head"], x["prompt"]))
    search = ContrastiveSearch(k=p["k"], alpha=p["alpha"])
    new = [token[0] for token in islice(search.tokens(readers, torch.Generator()), p["steps"])]
    return {"ids": torch.cat([x["prompt"], torch.stack(new)])}


@op("contrastive-search.diversity")
def contrastive_search_diversity(x: Inputs, p: dict[str, Any]) -> Outputs:
    value, repeated = diversity([[word for word in row if word >= 0] for row in x["tokens"].tolist()])
    return {key: torch.tensor(number, dtype=torch.float64) for key, number in {**repeated, "diversity": value}.items()}


def scored(expert: Tensor, amateur: Tensor, tokens: Tensor, p: dict[str, Any]) -> Tensor:
    options = {key: p[key] for key in ("relative_top", "relative_top_value", "post_softmax")}
    score = contrastive_logprob(expert, amateur, **options)
    return score.double().gather(1, tokens[:, None]).sum()


@op("lol.contrastive_logprob")
def lol_contrastive_logprob(x: Inputs, p: dict[str, Any]) -> Outputs:
    expert = x["expert_logits"]
    kept = plausible(expert.log_softmax(-1), p["relative_top"])
    return {"score": scored(expert, x["amateur_logits"], x["tokens"], p), "masked": ~kept}


@op("lol.dola_score")
def lol_dola_score(x: Inputs, p: dict[str, Any]) -> Outputs:
    chosen, early = furthest_layer(x["mature_logits"], x["early_logits"])
    return {"score": scored(x["mature_logits"], early, x["tokens"], p), "selected_layer": chosen}
