"""A model of open_clip as a folder that the stock open_clip loads."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from counterpoint.encoders.image_text import OPEN_CLIP, OpenClipTowers, name_and_weights, silent
from counterpoint.errors import InputError
from counterpoint.export.checks import SENTENCES, images, largest_difference
from counterpoint.export.folder import description, label, replacing, write_tensors


def save(encoder: Any, path: str | Path, **about: str) -> float:
    """Write the model of `encoder` as a folder, and let ``open_clip.create_model("local-dir:FOLDER")`` open it.

    Its logit scale is the one that the training ended with. Texts are cut to the model's context, also where training cut
    them shorter.

    Args:
        encoder: towers that came from open_clip.
        path: of the folder.
        about: further words for its counterpoint.json.

    Returns:
        The largest difference between vectors of images and texts of the two models.

    Raises:
        InputError: other towers, a path that is taken, a folder that open_clip cannot open, or answers that differ.
    """
    if not isinstance(encoder, OpenClipTowers):
        raise InputError(f"{label(encoder)} is no model of open_clip; export --to safetensors or onnx")
    import open_clip

    model = encoder.model
    state = model.state_dict()
    state["logit_scale"] = torch.full_like(state["logit_scale"], -math.log(encoder.temperature))
    with replacing(path, description(encoder, **about)) as folder:
        write_tensors(state, folder / "open_clip_model.safetensors", {"format": "pt"})
        configure(encoder, folder)
        with silent():
            try:
                again = open_clip.create_model(f"local-dir:{folder}").eval()
                tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            except Exception as error:  # files, hubs and configurations each fail in their own way
                reason = " ".join(str(error).split())
                raise InputError(
                    f"open_clip cannot open {label(encoder)} once saved ({reason}); export --to safetensors"
                ) from error
        ids = tokenizer(list(SENTENCES))
        if not torch.equal(ids, encoder.tokenizer.tokenizer(list(SENTENCES))):
            raise InputError(f"open_clip cuts text differently once {label(encoder)} is saved; export --to safetensors")
        image = images(encoder)
        with torch.no_grad():
            ours = [encoder.image(image), encoder.text(ids, torch.ones_like(ids))]
            theirs = [again.encode_image((image - encoder.mean) / encoder.std), again.encode_text(ids)]
        return largest_difference(torch.cat(ours), torch.cat(theirs), "open_clip")


def configure(encoder: OpenClipTowers, folder: Path) -> None:
    """Write open_clip_config.json, and the tokeniser's files where it has some: all of open_clip's format but the weights."""
    import open_clip

    visual, tokenizer = encoder.model.visual, encoder.tokenizer.tokenizer
    name, _ = name_and_weights(encoder.name.removeprefix(OPEN_CLIP), open_clip)
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["image_size"] = encoder.image_size
    more = getattr(visual, "preprocess_cfg", {})
    preprocess = {"mean": visual.image_mean, "std": visual.image_std}
    preprocess |= {key: more[key] for key in ("interpolation", "resize_mode") if key in more}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n"
    )
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
