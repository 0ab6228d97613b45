"""Golden op name -> our public function. An op only rearranges arguments; it holds no mathematics of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.errors import InputError
from counterpoint.memory import Queue
from counterpoint.views import text

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """A function ``(inputs, params) -> outputs`` and the scalar that its gradients belong to.

    Attributes:
        function: takes ``in.*`` as tensors (strings as numpy arrays) and the parameters; returns ``out.*`` by name.
        gradient_of: names of outputs whose sum is differentiated, or a function of outputs and inputs. None: the
            output ``loss``, else ``probe``, else the sum of output times the input ``cotangent``.
    """

    function: Callable[[Inputs, dict[str, Any]], Outputs]
    gradient_of: tuple[str, ...] | Callable[[Outputs, Inputs], Tensor] | None = None

    def scalar(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """The scalar whose gradient a case records.

        Raises:
            InputError: the outputs do not say which it is.
        """
        if callable(self.gradient_of):
            return self.gradient_of(outputs, inputs)
        if self.gradient_of is not None:
            return torch.stack([outputs[name] for name in self.gradient_of]).sum()
        for name in ("loss", "probe"):
            if name in outputs:
                return outputs[name]
        if "cotangent" in inputs:
            shaped = [y for y in outputs.values() if y.requires_grad and y.shape == inputs["cotangent"].shape]
            if len(shaped) == 1:
                return (shaped[0] * inputs["cotangent"]).sum()
        raise InputError("the op does not say which of its outputs the gradients belong to")


OPS: dict[str, Op] = {}


def op(name: str, *, gradient_of: tuple[str, ...] | Callable[[Outputs, Inputs], Tensor] | None = None):
    """Register the function below as the golden op called `name`."""

    def register(function: Callable[[Inputs, dict[str, Any]], Outputs]):
        OPS[name] = Op(function, gradient_of)
        return function

    return register


@op("dcl.one_way")
def dcl_one_way(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.dcl(x["z1"], x["z2"], temperature=p["temperature"], one_way=True, normalize=False)}


@op("dcl.weighted_one_way")
def dcl_weighted_one_way(x: Inputs, p: dict[str, Any]) -> Outputs:
    options = {"temperature": p["temperature"], "sigma": p["sigma"], "detach_weight": False}
    return {"loss": contrast.dclw(x["z1"], x["z2"], one_way=True, normalize=False, **options)}


@op("dcl.symmetric")
def dcl_symmetric(x: Inputs, p: dict[str, Any]) -> Outputs:
    options = {"temperature": p["temperature"], "weighted": p["weighted"], "sigma": p["sigma"]}
    return {"loss": contrast.dcl(x["z1"], x["z2"], **options)}


@op("mmhcl.contrastive_loss")
def mmhcl_contrastive_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    # candidates are the other table, then the anchors' own table without the anchor itself
    n = len(x["z1"])
    rows = torch.arange(n)
    keys = torch.cat([x["z2"], x["z1"]])
    itself = contrast.Listed(n + rows)
    return {"loss": contrast.info_nce(x["z1"], keys, temperature=p["tau"], positives=rows, ignore=itself)}


@op("mclrec.info_nce")
def mclrec_info_nce(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.nt_xent(x["z1"], x["z2"], temperature=p["tau"], normalize=p["sim"] == "cos")}


@op("clhe.contrastive_loss")
def clhe_contrastive_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.info_nce(x["a"], x["b"], temperature=p["tau"])}


@op("projection_head.supcon")
def projection_head_supcon(x: Inputs, p: dict[str, Any]) -> Outputs:
    labels = x["labels"].repeat(p["n_views"])
    return {"loss": contrast.sup_con(x["z"], labels, temperature=p["temperature"])}


@op("peft-augmentation.supcon")
def peft_augmentation_supcon(x: Inputs, p: dict[str, Any]) -> Outputs:
    # anchors without a positive give 0 and count in the mean; the scale is temperature / base temperature
    options = {"temperature": p["temperature"], "normalize": False, "reduction": "none"}
    rows = contrast.sup_con(x["z"], x["labels"], **options)
    return {"loss": rows.mean() * (p["temperature"] / p["base_temperature"])}


@op("sepclr.uniform")
def sepclr_uniform(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.uniformity(x["x"], t=1 / (2 * p["tau"]), normalize=False)}


@op("esimcse.queue_infonce")
def esimcse_queue_infonce(x: Inputs, p: dict[str, Any]) -> Outputs:
    queue = x["queue"] if len(x["queue"]) else None
    return {"loss": contrast.info_nce(x["z1"], x["z2"], temperature=p["temperature"], negatives=queue)}


@op("esimcse.queue_update")
def esimcse_queue_update(x: Inputs, p: dict[str, Any]) -> Outputs:
    queue = Queue(x["keys"].shape[1], p["neg_size"], start="empty", whole_first=True).to(x["keys"])
    lengths = []
    for keys in x["keys"].split(x["batch_sizes"].tolist()):
        queue.enqueue(keys)
        lengths.append(len(queue))
    return {"queue": queue.oldest_first, "lengths": torch.tensor(lengths)}


@op("esimcse.repeat_tokens")
def esimcse_repeat_tokens(x: Inputs, p: dict[str, Any]) -> Outputs:
    ids = x["ids"][None]
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[0, x["dup_positions"].long()] = True
    options = {"rate": p["dup_rate"], "most": p["max_dup"]}
    repeated, mask = text.repeat_tokens(ids, torch.ones_like(ids), positions=positions, **options)
    bound = text.repeat_bound(torch.tensor([ids.shape[1]]), **options)
    return {"new_ids": repeated[mask.bool()], "num_dup_upper_exclusive": bound[0]}


@op("fac.proposal_contrast")
def fac_proposal_contrast(x: Inputs, p: dict[str, Any]) -> Outputs:
    # rows 2i and 2i + 1 are the two views of proposal i
    return {"loss": contrast.nt_xent(x["z"][0::2], x["z"][1::2], temperature=p["tau"])}


@op("fac.queue_nce")
def fac_queue_nce(x: Inputs, p: dict[str, Any]) -> Outputs:
    # the source keeps keys as columns; ours are rows
    bank, (start,) = x["queue"].T, x["ptr"]
    queue = Queue(bank.shape[1], len(bank)).to(bank.dtype)
    queue.load_state_dict({"bank": bank, "pointer": start, "filled": torch.tensor(len(bank))})
    loss = contrast.info_nce(x["q"], x["k"], temperature=p["tau"], negatives=queue.keys, in_batch=False)
    queue.enqueue(contrast.unit(x["k"]))
    return {"loss": loss, "new_queue": queue.keys.T, "new_ptr": queue.pointer[None]}


@op("mclrec.contrastive_regularizer")
def mclrec_contrastive_regularizer(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.margin import contrastive_regularizer

    return {"loss": contrastive_regularizer(x["z1"], x["z2"], temperature=p["tau"], normalize=False)}


@op("mclrec.meta_contrast")
def mclrec_meta_contrast(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.methods.recommendation.mclrec import meta_contrast

    weight = 0.1 if p["use_regularizer"] else 0.0
    terms = meta_contrast(x["h1"], x["h2"], x["z1"], x["z2"], regularizer=weight, temperature=p["tau_reg"])
    return {"loss": torch.stack(list(terms.values())).sum()}


@op("mclrec.augmenter")
def mclrec_augmenter(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.methods.recommendation.mclrec import Augmenter

    augment = Augmenter(p["layers"]).to(x["h"].dtype)
    count = len(p["layers"]) - 1
    given = [x[f"{kind}{layer}"] for layer in range(1, count + 1) for kind in ("W", "b")]
    weights = dict(zip(dict(augment.named_parameters()), given, strict=True))
    z = torch.func.functional_call(augment, weights, (x["h"],))
    return {"z": z, "probe": (z * x["w"]).sum()}


@op("laclip.clip_loss")
def laclip_clip_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.evaluate.image_text import zero_shot

    image, text = x["image_embed"], x["text_embed"]
    # each image's class is its own text
    accuracy = zero_shot(image, torch.arange(len(image)), text).value
    loss = contrast.clip_loss(image, text, temperature=1 / x["logit_scale"])
    return {"loss": loss, "clip_acc": torch.tensor(accuracy)}


@op("moe-embeddings.clip_loss")
def moe_embeddings_clip_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    a, b, temperature = x["a"], x["b"], x["temperature"]
    with torch.no_grad():  # targets are constants, and of equal ones the first counts: max says so, argmax does not
        alike = ((a @ a.T + b @ b.T) / 2 * temperature).softmax(1)
        there, back = alike.max(1).indices, alike.max(0).indices
    options = {"temperature": temperature, "normalize": False}
    one = contrast.info_nce(a, b, positives=there, **options)
    other = contrast.info_nce(b, a, positives=back, **options)
    return {"loss": (one + other) / 2}


@op("mochi.hardest")
def mochi_hardest(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.memory.mixing import hardest

    return {"index": hardest(x["q"], x["queue"], p["n_hard"])}


@op("mochi.mixed_logits")
def mochi_mixed_logits(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.memory.mixing import mix

    query, key, queue = contrast.unit(x["q"]), contrast.unit(x["k"]).detach(), x["queue"].detach()
    mixed = [mix(queue[x["pair_i"]], queue[x["pair_j"]], x["alpha"])]
    if "query_j" in x:
        mixed.append(mix(query[:, None], queue[x["query_j"]], x["beta"]))
    pairs = contrast.Pairs(query, key, negatives=queue, hard_negatives=torch.cat(mixed, dim=1), in_batch=False)
    positive, own = (query * key).sum(1, keepdim=True), torch.einsum("nd,nsd->ns", query, pairs.hard_negatives)
    logits = torch.cat([positive, query @ queue.T, own], dim=1) / p["temperature"]
    return {"logits": logits, "loss": pairs.loss(contrast.info_nce, temperature=p["temperature"])}
