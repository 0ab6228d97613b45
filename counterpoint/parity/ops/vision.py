"""Golden ops of the vision systems."""

from typing import Any

import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.memory import Queue
from counterpoint.parity.ops import Inputs, Outputs, op


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


@op("projection_head.supcon")
def projection_head_supcon(x: Inputs, p: dict[str, Any]) -> Outputs:
    labels = x["labels"].repeat(p["n_views"])
    return {"loss": contrast.sup_con(x["z"], labels, temperature=p["temperature"])}


@op("sepclr.uniform")
def sepclr_uniform(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.uniformity(x["x"], t=1 / (2 * p["tau"]), normalize=False)}


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


@op("supremix.mixtures")
def supremix_mixtures(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.regression import mixtures

    found = mixtures(x["features"], x["labels"], x["lam_negative"], window=p["window"])
    names = ("negative_index", "negative_mixtures", "negative_labels")
    return dict(zip((*names, *(name.replace("negative", "positive") for name in names)), found, strict=True))


@op("supremix.loss")
def supremix_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.regression import weighted_sup_con

    given: dict[str, Any] = {key: x.get(key) for key in ("mixtures", "mixture_labels")}
    given["mask"] = x.get("mixture_mask")
    options: dict[str, Any] = {"temperature": p["temperature"], "weight": p["distance_weight"], "shift": "separate"}
    return {"loss": weighted_sup_con(x["features"], x["labels"], normalize=False, **given, **options)}


@op("cacr.attraction")
def cacr_attraction(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.attraction import attraction, attraction_weights

    options = {"tau": p["tau_pos"], "normalize": False}
    loss = attraction(x["z"], alpha=p["alpha"], uniform=p["uniform"], **options)
    return {"loss": loss, "weights_last_view": attraction_weights(x["z"], **options)[-1]}


@op("cacr.repulsion")
def cacr_repulsion(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.attraction import repulsion, repulsion_weights

    options = {"tau": p["tau_neg"], "normalize": False}
    loss = repulsion(x["z"], beta=p["beta"], uniform=p["uniform"], **options)
    return {"loss": loss, "weights_last_pair": repulsion_weights(x["z"][-2], x["z"][-1], **options)}


@op("cacr.momentum_rbf")
def cacr_momentum_rbf(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.attraction import momentum_rbf

    return {"loss": momentum_rbf(x["q"], x["k"], temperature=p["temperature"])}


@op("cacr.momentum_euclidean")
def cacr_momentum_euclidean(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.attraction import momentum_euclidean

    return {"loss": momentum_euclidean(x["q"], x["k"], temperature=p["temperature"], reduction="sum")}


def _hallucinated(x: Inputs, query: Tensor, other: Tensor, ratio: float) -> Tensor:
    from counterpoint.encoders import heads
    from counterpoint.memory.mixing import hallucinate

    (width, double), dim = x["w1"].shape, len(x["w3"])
    layers = heads.mlp(double, width, dim, layers=3).to(query.dtype)
    given = [x[f"{kind}{layer}"] for layer in (1, 2, 3) for kind in ("w", "b")]
    weights = dict(zip(dict(layers.named_parameters()), given, strict=True))
    return hallucinate(lambda z: torch.func.functional_call(layers, weights, (z,)), query, other, ratio)


@op("hallucinator.generate")
def hallucinator_generate(x: Inputs, p: dict[str, Any]) -> Outputs:
    pairs = contrast.Pairs(x["q"], x["k"], in_batch=False)
    return {"feat": pairs.with_queries(_hallucinated(x, pairs.query, pairs.matched, p["ratio"])).query}


@op("hallucinator.moco_loss")
def hallucinator_moco_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    pairs = contrast.Pairs(x["q"], contrast.unit(x["k"]).detach(), negatives=x["queue"].detach(), in_batch=False)
    pairs = pairs.with_queries(_hallucinated(x, pairs.query, pairs.matched, p["ratio"]))
    query = contrast.unit(pairs.query)
    logits = torch.cat([(query * pairs.key).sum(1, keepdim=True), query @ x["queue"].T], dim=1) / p["temperature"]
    return {"logits": logits, "loss": pairs.loss(contrast.info_nce, temperature=p["temperature"])}


@op("feature_transformation.logits")
def feature_transformation_logits(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.memory.mixing import transform

    pairs = contrast.Pairs(x["q"], x["k"].detach(), negatives=x["queue"].detach(), in_batch=False, normalize=False)
    shares = (x["lambda_neg"], x["perm"]) if p["target"] == "posneg" else ()
    pairs = transform(pairs, x["lambda_pos"], *shares, renormalize=p["renormalise_pos"])
    columns = [(pairs.query * pairs.key).sum(1, keepdim=True)]
    columns += [pairs.query @ rows.T for rows in (pairs.negatives,) if rows is not None]
    logits = torch.cat(columns, dim=1) / p["temperature"]
    return {"logits": logits, "loss": pairs.loss(contrast.info_nce, temperature=p["temperature"])}


@op("feature_transformation.score_stats")
def feature_transformation_score_stats(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"stats": contrast.score_stats(x["q"], x["k"], x["queue"], p["temperature"], normalize=False)}


@op("swav.sinkhorn")
def swav_sinkhorn(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"q": contrast.sinkhorn(x["scores"], p["epsilon"], p["n_iters"])}


@op("swav.loss")
def swav_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    z, prototypes, views = x["z"], x["prototypes"], p["crops_for_assign"]
    given = x.get("queue", [None] * len(views))
    options = {"epsilon": p["epsilon"], "iterations": p["n_iters"]}
    codes = [contrast.assign(z[a], prototypes, queue=old, **options) for a, old in zip(views, given, strict=True)]
    scores = z @ prototypes.T
    loss = contrast.swapped_prediction(scores, torch.stack(codes), assigned=views, temperature=p["temperature"])
    if "queue" not in x:
        return {"loss": loss}
    newest_first = []
    for a, old in zip(views, x["queue"], strict=True):  # the source has the newest in front, ours takes oldest first
        queue = Queue(old.shape[1], len(old), start="empty").to(old.dtype)
        queue.enqueue(old.flip(0))
        queue.enqueue(z[a].detach().flip(0))
        newest_first.append(queue.oldest_first.flip(0))
    return {"loss": loss, "queue_new": torch.stack(newest_first)}


@op("hydra.pair_gate")
def hydra_pair_gate(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.encoders.gates import PairGate

    classes, embedding = x["embedding"].shape
    dim, hidden = x["fc2_weight"].shape
    gate = PairGate(classes, dim, embedding, hidden, fuse=p["fuse"], eps=p["bn_eps"]).train(p["training"])
    layers = {"bn1": 1, "fc1": 2, "bn2": 4, "fc2": 5}
    weights = {
        f"layers.{place}.{kind}": x[f"{name}_{kind}"] for name, place in layers.items() for kind in ("weight", "bias")
    }
    weights["embedding.weight"] = x["embedding"]
    return {"gate": torch.func.functional_call(gate, weights, (x["y1"], x["y2"]))}


@op("hydra.arbitrary_pair_loss")
def hydra_arbitrary_pair_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.subspace import partner_loss

    options = {name: p[name] for name in ("temperature", "variant", "reduction")}
    return {"loss": partner_loss(x["queries"], x["keys"], x["gate"], x["labels"], x["pair_labels"], **options)}


@op("core-tuning.feature_mixup")
def core_tuning_feature_mixup(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.focal import mix_hard_pairs

    shares = {name: x[name] for name in ("permutation", "lam_negative", "lam_positive")}
    options = {"classes": p["num_classes"], "min_lam_negative": p["min_lam_negative"], "mining": "released"}
    features, targets = mix_hard_pairs(x["features"], x["labels"], **shares, **options)
    return {"features": features, "targets": targets}


@op("core-tuning.focal_supcon")
def core_tuning_focal_supcon(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.focal import focal_sup_con

    options = {"temperature": p["temperature"], "normalize": False}
    return {"loss": focal_sup_con(x["features"], x["targets"], **options)}


@op("mcl.cluster_batches")
def mcl_cluster_batches(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.train.batches import grouped_batches

    place = {"world_size": p["world_size"], "rank": p["rank"]}
    return {"batches": grouped_batches(x["pseudo_labels"], x["permutations"], p["batch_size"], **place)}


@op("mcl.integrated_pair_scores")
def mcl_integrated_pair_scores(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.encoders import integrated
    from counterpoint.evaluate.image_text import pair_scores

    stages = range(p["num_stages"])
    image, one, two = (integrated([x[f"{name}_{k}"] for k in stages]) for name in ("image", "text1", "text2"))
    scores = pair_scores(image[None], torch.stack([one[0], two[0]])[None], scale=p["logit_scale"])[0]
    alike = {"image_similarity": image[0] @ image[1], "text_similarity": one[0] @ two[0]}
    return {"image_features": image, "probs1": scores[:, :1], "probs2": scores[:, 1:], **alike}


@op("adainf.simclr_loss")
def adainf_simclr_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    return {"loss": contrast.sup_con(x["z"], x["indexes"], temperature=p["temperature"], mean="none")}


@op("adainf.inflate")
def adainf_inflate(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.data import Images
    from counterpoint.data.composites import inflate, replicated

    real, generated = (
        Images(x[f"{kind}_images"].permute(0, 3, 1, 2), x[f"{kind}_targets"]) for kind in ("real", "generated")
    )
    whole = replicated(inflate(real, generated, p["replication"]))
    assert whole.label is not None
    return {"images": whole.image.permute(0, 2, 3, 1), "targets": whole.label}


@op("projection_head.reweight")
def projection_head_reweight(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.encoders.heads import reweight

    return {"y": reweight(x["x"], p["kappa"])}


@op("projection_head.symmetric_relu")
def projection_head_symmetric_relu(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.encoders.heads import symmetric_relu

    return {"y": symmetric_relu(x["x"], x["b"] if "b" in x else p["b"])}


@op("projection_head.spectral_contrastive")
def projection_head_spectral_contrastive(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.spectral import spectral_contrastive

    return {"loss": spectral_contrastive(x["z1"], x["z2"], mu=p["mu"])}


@op("pixpro.ppm")
def pixpro_ppm(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.encoders.propagation import Propagation

    propagate = Propagation(x["feat"].shape[1], p["gamma"], p["clamp"], p["transform_layers"]).to(x["feat"].dtype)
    weights = {}
    if p["transform_layers"]:
        weights = {"transform.weight": x["weight"][:, :, None, None], "transform.bias": x["bias"]}
    return {"feat": torch.func.functional_call(propagate, weights, (x["feat"],))}


@op("pixpro.consistency_loss")
def pixpro_consistency_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.contrast.pixel import pixel_consistency

    maps, boxes = (x["q"], x["k"]), (x["coord_q"], x["coord_k"])
    return {"loss": pixel_consistency(*maps, *boxes, near=p["pos_ratio"], normalize=False)}
