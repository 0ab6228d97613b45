"""Golden ops of the language systems."""

from typing import Any

import torch
from torch.nn.functional import gelu, linear

from counterpoint import contrast, encoders
from counterpoint.contrast import operands, whitening
from counterpoint.contrast.adversarial import ascended, symmetric_cross_entropy
from counterpoint.contrast.multimodal import Queues, multimodal_contrast, multimodal_pairs
from counterpoint.contrast.replaced import replaced, replaced_token_loss
from counterpoint.contrast.routing import load_balancing, specified_expert
from counterpoint.encoders.experts import Expert, routed, sentence_logits
from counterpoint.encoders.perturbed import normalised
from counterpoint.encoders.tuned import PrefixEncoder
from counterpoint.memory import Queue
from counterpoint.parity.ops import Inputs, Outputs, op
from counterpoint.views import text


@op("peft-augmentation.supcon")
def peft_augmentation_supcon(x: Inputs, p: dict[str, Any]) -> Outputs:
    # anchors without a positive give 0 and count in the mean; the scale is temperature / base temperature
    options = {"temperature": p["temperature"], "normalize": False, "reduction": "none"}
    rows = contrast.sup_con(x["z"], x["labels"], **options)
    return {"loss": rows.mean() * (p["temperature"] / p["base_temperature"])}


@op("peft-augmentation.prefix_kv")
def peft_augmentation_prefix_kv(x: Inputs, p: dict[str, Any]) -> Outputs:
    places, heads = len(x["weight"]), p["num_heads"]
    sizes = {"hidden_size": heads * p["head_dim"], "num_attention_heads": heads, "num_hidden_layers": p["num_layers"]}
    small = {"intermediate_size": 8, "max_position_embeddings": places + 8}
    encoder = PrefixEncoder(encoders.text({**sizes, **small}), length=places, dropout=0.0)
    with torch.no_grad():
        encoder.table.copy_(x["weight"])
    keys, values = encoder.keys_values(p["batch_size"])
    return {"keys": keys, "values": values}


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


@op("cocosoda.multimodal_loss")
def cocosoda_multimodal_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    vectors = x["code_q"], x["nl_q"], x["code_k"], x["nl_k"]
    names = ("code_queue", "nl_queue", "masked_code_queue", "masked_nl_queue")
    options: dict[str, Any] = {"intra": p["intra_modal"], "scale": p["pos_scale"]}
    before = Queues(*(x[name] for name in names))
    contrasts = multimodal_pairs(*vectors, before, **options)
    logits = [
        operands.logit_matrix(pairs.query, torch.cat([pairs.key, pairs.negatives]), p["temperature"])
        for pairs in contrasts
        if pairs.negatives is not None
    ]
    temperature = p["temperature"] / p["logit_scale"]
    found = {
        "logits": torch.cat(logits),
        "labels": torch.arange(len(vectors[0])).repeat(len(contrasts)),
        "loss": multimodal_contrast(*vectors, before, temperature=temperature, **options),
    }
    for name, keys in zip(names, vectors, strict=True):
        queue = Queue(keys.shape[1], p["queue_size"]).to(keys)
        queue.bank, queue.pointer = x[name].clone(), torch.tensor(p["ptr"])
        queue.enqueue(contrast.unit(keys.detach()))
        found[f"new_{name}"], found["new_ptr"] = queue.keys, queue.pointer[None]
    return found


@op("cocosoda.soft_augment")
def cocosoda_soft_augment(x: Inputs, p: dict[str, Any]) -> Outputs:
    ids, mode = x["ids"], p["mode"]
    special = torch.tensor([*p["special_ids"], p["pad_id"]])
    allowed = ~torch.isin(ids, special) if mode in ("mask", "type") else ids == p["token_id"]
    into = {"mask": p["mask_id"], "type": x["type_ids"], "special_type": p["token_id"], "special_mask": p["mask_id"]}
    random_ids = x["random_ids"] if mode == "mask" else None
    draws = x["u_select"], x["u_replace"], x["u_random"]
    found = text.soft_replace(ids, allowed, into[mode], rate=p["probability"], random_ids=random_ids, draws=draws)
    return {"ids": found}


@op("moe-embeddings.clip_loss")
def moe_embeddings_clip_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.relabelled_clip(x["a"], x["b"], temperature=x["temperature"], normalize=False)}


@op("moe-embeddings.mnr_plus_loss", gradient_of=("mnr_plus",))
def moe_embeddings_mnr_plus_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    a, b, normalize = x["a"], x["b"], p["normalize"]
    plus = contrast.relabelled_clip(a, b, temperature=1.0, normalize=normalize)
    return {"mnr_plus": plus, "mnr": contrast.mnr(a, b, scale=1.0, normalize=normalize)}


@op("moe-embeddings.sentence_moe", gradient_of=lambda y, x: (y["enforced"] * x["w"]).sum())
def moe_embeddings_sentence_moe(x: Inputs, p: dict[str, Any]) -> Outputs:
    def mlp(e: int) -> Expert:
        return lambda h: linear(gelu(linear(h, x["w_up"][e], x["b_up"][e])), x["w_down"][e], x["b_down"][e])

    experts = [mlp(e) for e in range(p["num_experts"])]
    logits = sentence_logits(linear(x["x"], x["gate"]))
    return {
        "enforced": routed(x["x"], x["assignment"].long(), experts),
        "router_logits": logits,
        "switch": routed(x["x"], logits.argmax(1), experts),
    }


@op("moe-embeddings.router_losses", gradient_of=("specified_expert", "load_balancing"))
def moe_embeddings_router_losses(x: Inputs, p: dict[str, Any]) -> Outputs:
    logits = x["router_logits"]
    return {
        "specified_expert": specified_expert(logits, x["labels"].long()),
        "load_balancing": load_balancing(logits),
    }


@op("whitenedcse.shuffled_group_whitening", gradient_of=("scalar",))
def whitenedcse_shuffled_group_whitening(x: Inputs, p: dict[str, Any]) -> Outputs:
    permutations = torch.stack([x[f"perm{view}"] for view in range(1, p["num_views"] + 1)])
    y = whitening.shuffled_group_whitening(x["x"], permutations, groups=p["num_groups"])
    return {"y": y, "scalar": (y * x["w"]).sum()}


@op("whitenedcse.multi_positive_loss")
def whitenedcse_multi_positive_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    anchor, *others = x["h"].unbind(1)
    terms = [contrast.info_nce(anchor, view, temperature=p["temperature"]) for view in others]
    logits = operands.logit_matrix(contrast.unit(anchor), contrast.unit(others[0]), p["temperature"])
    return {"loss": torch.stack(terms).sum(), "logits12": logits}


@op("vega.symmetric_cross_entropy", gradient_of=("mean",))
def vega_symmetric_cross_entropy(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {
        "per_example": symmetric_cross_entropy(x["logits"], x["target"], reduction="none"),
        "mean": symmetric_cross_entropy(x["logits"], x["target"]),
    }


@op("vega.sift_update")
def vega_sift_update(x: Inputs, p: dict[str, Any]) -> Outputs:
    base = normalised(x["embedding"], eps=p["layer_norm_eps"])
    delta = ascended(x["delta"], x["grad_delta"], rate=p["learning_rate"])
    return {"normalized": base, "new_delta": delta, "perturbed": base + delta}


@op("vega.rtd_loss")
def vega_rtd_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    ids, labels, mask = x["input_ids"], x["lm_labels"], x["input_mask"]
    original = labels.where(labels > 0, ids)
    loss = replaced_token_loss(x["logits"], ids, original, mask)
    return {"targets": replaced(ids, original)[mask > 0].float(), "loss": p["rtd_lambda"] * loss}
