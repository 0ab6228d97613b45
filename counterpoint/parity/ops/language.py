"""Golden ops of the language systems."""

from typing import Any

import torch

from counterpoint import contrast
from counterpoint.memory import Queue
from counterpoint.parity.ops import Inputs, Outputs, op
from counterpoint.views import text


@op("peft-augmentation.supcon")
def peft_augmentation_supcon(x: Inputs, p: dict[str, Any]) -> Outputs:
    # anchors without a positive give 0 and count in the mean; the scale is temperature / base temperature
    options = {"temperature": p["temperature"], "normalize": False, "reduction": "none"}
    rows = contrast.sup_con(x["z"], x["labels"], **options)
    return {"loss": rows.mean() * (p["temperature"] / p["base_temperature"])}


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
