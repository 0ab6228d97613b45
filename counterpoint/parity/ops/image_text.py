"""Golden ops of the image-text systems."""

from typing import Any

import torch

from counterpoint import contrast
from counterpoint.parity.ops import Inputs, Outputs, op


@op("laclip.clip_loss")
def laclip_clip_loss(x: Inputs, p: dict[str, Any]) -> Outputs:
    from counterpoint.evaluate.image_text import zero_shot

    image, text = x["image_embed"], x["text_embed"]
    # each image's class is its own text
    accuracy = zero_shot(image, torch.arange(len(image)), text).value
    loss = contrast.clip_loss(image, text, temperature=1 / x["logit_scale"])
    return {"loss": loss, "clip_acc": torch.tensor(accuracy)}
