"""Golden ops of the point cloud systems."""

from typing import Any

import torch

from counterpoint import contrast
from counterpoint.memory import Queue
from counterpoint.parity.ops import Inputs, Outputs, op


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
