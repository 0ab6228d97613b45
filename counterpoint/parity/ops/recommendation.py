"""Golden ops of the recommenders."""

from typing import Any

import torch

from counterpoint import contrast
from counterpoint.parity.ops import Inputs, Outputs, op


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
