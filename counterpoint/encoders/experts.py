"""One transformer as a mixture of experts: copies of its MLPs, each for one kind of text, and domain tokens.

A text says its domain by its first token: a vocabulary entry of the domain's own stands in the place of [CLS]. Whatever
takes ids and mask (losses, pooling by length, exports) thereby takes domains too.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from counterpoint.encoders.text import TextEncoder, added_tokens, by_length, pool, quiet
from counterpoint.errors import InputError

Router = Literal["enforced", "switch", "sentence", "token"]
Where = Literal["all", "middle", "none"]
ROUTERS = ("enforced", "switch", "sentence", "token")

Expert = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------------------------- routing


def routed(x: Tensor, assignment: Tensor, experts: Sequence[Expert]) -> Tensor:
    """Each row through the one expert that it is assigned to, unweighted; the others are not computed.

    The rows of an expert go through it together. A GPU is waited for once, to learn how many each gets.

    Args:
        x: [R, ...]: sentences [B, L, H], or tokens [T, H].
        assignment: int64 [R], number of the expert.
        experts: functions that keep the shape.
    """
    if torch.compiler.is_exporting():  # a graph has no parts of unknown length: all experts, and a choice among them
        own = [(assignment == e).reshape(-1, *[1] * (x.ndim - 1)) for e in range(len(experts))]
        return torch.stack([expert(x) * mine for expert, mine in zip(experts, own, strict=True)]).sum(0)
    counts = assignment.bincount(minlength=len(experts)).tolist()
    if max(counts, default=0) == len(x):
        return experts[counts.index(len(x))](x)
    order = assignment.argsort(stable=True)
    parts = x[order].split(counts)
    return torch.cat([expert(rows) for expert, rows in zip(experts, parts, strict=True) if len(rows)])[order.argsort()]


def blended(x: Tensor, assignment: Tensor, weight: Tensor, experts: Sequence[Expert]) -> Tensor:
    """Each row through k experts, and the weighted sum of what they say.

    Args:
        x: [R, ...].
        assignment: int64 [R, k].
        weight: [R, k].
        experts: functions that keep the shape.
    """
    rows, k = assignment.shape
    said = routed(x.repeat_interleave(k, 0), assignment.flatten(), experts).unflatten(0, (rows, k))
    return (said * weight.reshape(rows, k, *[1] * (x.ndim - 1)).to(said.dtype)).sum(1)


def sentence_logits(token_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Router logits of sentences [B, E], the mean of those of their tokens.

    Args:
        token_logits: [B, L, E].
        mask: [B, L], the tokens that count; None takes the plain mean over all positions, so that padding moves it.
    """
    if mask is None:
        return token_logits.mean(1)
    weight = mask.unsqueeze(-1).to(token_logits.dtype)
    return (token_logits * weight).sum(1) / weight.sum(1).clamp(min=1)


class Traffic:
    """What the routers of one forward pass share: each row's domain, which tokens are real, and what they decided."""

    def __init__(self) -> None:
        self.domain: Tensor | None = None
        self.mask: Tensor | None = None
        self.logits: list[Tensor] = []


class Experts(nn.Module):
    """N experts of one layer and their router, in the place of an MLP: x [B, L, H] -> [B, L, H].

    Routers: "enforced" (the expert of the sentence's domain, no gate), "switch" (the one expert with the highest sentence
    logit, not weighted, so that the gate learns from router losses alone), "sentence" (top k of the sentence logits, weighted
    with their softmax values, which do not sum to 1), "token" (top k for each token, weights brought to sum 1, as in Mixtral).

    Args:
        mlp: what is copied; every expert starts as this very function.
        count: N.
        dim: H.
        router: as above.
        top_k: k.
        real: whether sentence logits leave padding out; False is the released plain mean.
        traffic: of the encoder that this layer belongs to.
    """

    def __init__(
        self, mlp: nn.Module, count: int, dim: int, router: Router, top_k: int, real: bool, traffic: Traffic
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(count))
        self.router, self.top_k, self.real, self.traffic = router, top_k, real, traffic
        self.gate = None if router == "enforced" else nn.Linear(dim, count, bias=False)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        experts: Any = self.experts
        if self.gate is None:
            assert self.traffic.domain is not None
            return routed(x, self.traffic.domain, experts)
        token = self.gate(x).float()
        logits = sentence_logits(token, self.traffic.mask if self.real else None)
        self.traffic.logits.append(logits)
        if self.router == "switch":
            return routed(x, logits.argmax(1), experts)
        if self.router == "sentence":
            weight, chosen = logits.softmax(1).topk(self.top_k, dim=1)
            return blended(x, chosen, weight, experts)
        weight, chosen = token.softmax(-1).flatten(0, 1).topk(self.top_k, dim=1)
        return blended(x.flatten(0, 1), chosen, weight / weight.sum(1, keepdim=True), experts).view_as(x)


class ExpertOutput(nn.Module):
    """The second half of a BERT block with experts: norm(experts(x) + x), or the released x + experts(norm(x)).

    Args:
        experts: the layer.
        norm: BERT's own LayerNorm (post), or a fresh one (pre).
        pre: which of the two.
    """

    def __init__(self, experts: Experts, norm: nn.Module, pre: bool) -> None:
        super().__init__()
        self.experts, self.norm, self.pre = experts, norm, pre

    def forward(self, hidden: Tensor, attention: Tensor) -> Tensor:
        if self.pre:
            return attention + self.experts(self.norm(attention))
        return self.norm(self.experts(attention) + attention)


# ------------------------------------------------------------------------------------------------------------- encoder


class RoutedFeatures(NamedTuple):
    """What an `ExpertEncoder` returns.

    Attributes:
        pooled: [B, D].
        tokens: [B, L, D].
        map: None.
        routes: [B, layers, E], sentence logits of the learned routers; None where routing is enforced.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    map: Tensor | None = None
    routes: Tensor | None = None


class ExpertEncoder(TextEncoder):
    """A text encoder whose MLPs have become experts, and whose first token says the domain.

    A row whose first token is no domain token is of the first domain.

    Args:
        encoder: is taken over: its model is changed in place. Its tokeniser must begin every text with [CLS].
        domains: names; none for an encoder that knows no domains.
        where: layers that get experts: "all", the "middle" one (layers // 2), or "none".
        experts: N; None takes one for each domain.
        router: see `Experts`; "enforced" needs one expert for each domain.
        top_k: experts of a sentence or token under the routers of that name.
        norm: "post" keeps BERT's block, so that the converted encoder is the original one before training; "pre" is the
            released form with a fresh LayerNorm.
        tokens: whether a domain's token has an embedding of its own, seeded with that of [CLS]; otherwise it only routes.
        real: see `Experts`.

    Attributes:
        conversion: these options by name.

    Raises:
        InputError: options that contradict each other, a model whose MLPs we do not know, or a tokeniser without [CLS].

    Source: Hallee et al. 2024 (arXiv 2401.15713); Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity at 9738dfe and 2a67569.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        domains: Sequence[str] = (),
        *,
        where: Where = "all",
        experts: int | None = None,
        router: Router = "enforced",
        top_k: int = 2,
        norm: Literal["post", "pre"] = "post",
        tokens: bool = True,
        real: bool = True,
    ) -> None:
        super().__init__(
            encoder.model, encoder.tokenizer, encoder.pooling, encoder.max_length, encoder.name, encoder.fresh
        )
        self.domains = tuple(domains)
        self.conversion: dict[str, Any] = {
            "domains": [*domains], "where": where, "experts": experts, "router": router, "top_k": top_k, "norm": norm,
            "tokens": tokens, "real": real,
        }  # fmt: skip
        count = len(self.domains) if experts is None else experts
        _check(self.conversion, count)
        self.tokens, self.traffic = tokens, Traffic()
        self.layers: list[int] = []
        if self.domains:
            self._add_domains()
        if where != "none":
            blocks = _blocks(self.model)
            self.layers = [len(blocks) // 2] if where == "middle" else [*range(len(blocks))]
            for layer in self.layers:
                self._convert(
                    blocks[layer], lambda mlp: Experts(mlp, count, self.dim, router, top_k, real, self.traffic)
                )

    def _add_domains(self) -> None:
        start = self.tokenizer.cls_token_id
        if start is None or (self.tokenizer("a")["input_ids"] or [None])[0] != start:
            raise InputError(
                f"domain tokens stand in the place of [CLS], with which {self.name} does not begin its texts"
            )
        names = [f"[domain {name}]" for name in self.domains]
        ids = torch.tensor(added_tokens(self, names, [[start]] * len(names)))
        self.register_buffer("domain_ids", ids, persistent=False)

    def _convert(self, block: nn.Module, experts: Callable[[nn.Module], Experts]) -> None:
        pre, form, held = self.conversion["norm"] == "pre", _form(block), cast(Any, block)
        if form == "bert":
            inner = held.output
            mlp = nn.Sequential(held.intermediate, inner.dense, inner.dropout)
            norm = nn.LayerNorm(self.dim, eps=inner.LayerNorm.eps) if pre else inner.LayerNorm
            held.intermediate, held.output = nn.Identity(), ExpertOutput(experts(mlp), norm, pre)
            held.chunk_size_feed_forward = 0  # a sentence is routed whole
        elif pre:
            raise InputError(f'norm="pre" is for blocks like BERT\'s, unlike those of {self.name}: leave norm out')
        else:
            setattr(block, form, experts(getattr(block, form)))

    def marked(self, input_ids: Tensor, domain: Tensor | None) -> Tensor:
        """Ids [B, L] whose first token is that of the row's domain int64 [B]; as they are without domains."""
        if domain is None or not self.domains:
            return input_ids
        return torch.cat([self.domain_ids[domain][:, None], input_ids[:, 1:]], 1)  # type: ignore[index]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RoutedFeatures:  # type: ignore[override]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        traffic = self.traffic
        if self.domains:
            ids: Any = self.domain_ids
            traffic.domain = ((input_ids[:, :1] == ids) * torch.arange(len(ids), device=ids.device)).sum(1)
            first = (
                ids[traffic.domain] if self.tokens else torch.full_like(input_ids[:, 0], self.tokenizer.cls_token_id)
            )
            input_ids = torch.cat([first[:, None], input_ids[:, 1:]], 1)
        traffic.mask, traffic.logits = mask, []
        layers = self.pooling == "first-last"
        out = self.model(input_ids=input_ids, attention_mask=mask, output_hidden_states=layers, return_dict=True)
        routes = torch.stack(traffic.logits, 1) if traffic.logits else None
        traffic.domain, traffic.mask, traffic.logits = None, None, []
        return RoutedFeatures(pool(out, mask, self.pooling), out.last_hidden_state, None, routes)

    def routed(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled vectors [B, D] of rows of mixed length, and the routers' logits [layers, B, E]; None under enforced routing."""

        def both(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            found = self(ids, mask)
            return (found.pooled,) if found.routes is None else (found.pooled, found.routes)

        pooled, *routes = by_length(both, input_ids, attention_mask)
        return pooled, routes[0].transpose(0, 1) if routes else None

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled vectors [B, D] of a batch, each in its ``domain`` if the batch says it."""
        return self(self.marked(batch["input_ids"], batch.get("domain")), batch["attention_mask"]).pooled

    def only(self, domain: str) -> TextEncoder:
        """The stock encoder that texts of one domain pass through: its experts alone, and its token as [CLS].

        Raises:
            InputError: no such domain, learned routing, or the pre-norm form: those are no stock model.
        """
        import transformers

        if domain not in self.domains:
            raise InputError(f"there is no domain {domain}, only {', '.join(self.domains) or 'none'}")
        if self.layers and (self.conversion["router"] != "enforced" or self.conversion["norm"] == "pre"):
            raise InputError("one domain stands alone only under enforced routing with norm post")
        number = self.domains.index(domain)
        with quiet():
            model = transformers.AutoModel.from_config(copy.deepcopy(self.model.config))
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        state = dict(self.model.state_dict())
        for layer in self.layers:
            block = _blocks(model)[layer]
            name = next(name for name, module in model.named_modules() if module is block)
            _stock(state, name, number, _form(block))
        model.load_state_dict(state)
        if self.tokens:
            with torch.no_grad():
                table = model.get_input_embeddings().weight
                table[self.tokenizer.cls_token_id] = table[int(self.domain_ids[number])]  # type: ignore[index]
        return TextEncoder(
            model.train(self.training), self.tokenizer, self.pooling, self.max_length, self.name, self.fresh
        )


def _check(options: dict[str, Any], count: int) -> None:
    where, router, domains = options["where"], options["router"], options["domains"]
    for name, value, known in (
        ("where", where, ("all", "middle", "none")),
        ("router", router, ROUTERS),
        ("norm", options["norm"], ("post", "pre")),
    ):
        if value not in known:
            raise InputError(f'{name} must be one of {", ".join(known)}, not "{value}"')
    if len(set(domains)) < len(domains) or not all(name.strip() for name in domains):
        raise InputError(f"domains need a name each, not {', '.join(domains)}")
    if where == "none":
        return
    if count < 1:
        raise InputError("experts are one for each domain: name the domains, or say how many experts there are")
    if router == "enforced" and count != len(domains):
        raise InputError(f"enforced routing needs one expert for each of the {len(domains)} domains, not {count}")
    if router in ("sentence", "token") and not 1 <= options["top_k"] <= count:
        raise InputError(f"top_k must lie between 1 and the {count} experts, not {options['top_k']}")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, whose MLPs we know how to take out."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_form(block) for block in module):
            return [*module]
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise InputError(
        f"experts are copies of a block's MLP, and where that lies in {kind} is not known; take a BERT, RoBERTa, MPNet, "
        "DistilBERT or ModernBERT"
    )


def _form(block: nn.Module) -> str:
    """How a block holds its MLP: "bert", or the name of the module that is nothing else; "" if we do not know it."""
    inner = getattr(block, "output", None)
    if isinstance(inner, ExpertOutput) or all(hasattr(inner, name) for name in ("dense", "dropout", "LayerNorm")):
        return "bert" if hasattr(block, "intermediate") else ""
    if hasattr(block, "ffn") and hasattr(block, "output_layer_norm"):
        return "ffn"
    return "mlp" if hasattr(block, "mlp") and hasattr(block, "mlp_norm") else ""


def _stock(state: dict[str, Tensor], block: str, number: int, form: str) -> None:
    """Rename one expert's weights to those of the stock block, and drop the others."""
    if form != "bert":
        place = f"{block}.{form}.experts."
        for name in [name for name in state if name.startswith(place)]:
            value, (which, _, rest) = state.pop(name), name.removeprefix(place).partition(".")
            if int(which) == number:
                state[f"{block}.{form}.{rest}"] = value
        return
    place = f"{block}.output."
    for name in [name for name in state if name.startswith(place)]:
        value, rest = state.pop(name), name.removeprefix(place)
        if rest.startswith("norm."):
            state[f"{place}LayerNorm.{rest.removeprefix('norm.')}"] = value
            continue
        which, step, inner = rest.removeprefix("experts.experts.").split(".", 2)
        if int(which) == number:  # step 0 is the intermediate module, step 1 the output's dense layer
            state[f"{block}.intermediate.{inner}" if step == "0" else f"{place}dense.{inner}"] = value
