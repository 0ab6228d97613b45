"""An image encoder as a folder that the stock timm loads."""

import json
from pathlib import Path
from typing import Any

import torch

from counterpoint import encoders
from counterpoint.errors import InputError
from counterpoint.export.checks import images, largest_difference
from counterpoint.export.folder import description, replacing, write_tensors
from counterpoint.export.weights import architecture

SETTINGS = ("interpolation", "crop_pct", "first_conv", "classifier", "pool_size")


def save(encoder: Any, path: str | Path, **about: str) -> float:
    """Write the timm model of `encoder` as a folder, and let timm create it anew.

    The model takes images normalised by the mean and deviation in its config.json, as timm's own do.

    Args:
        encoder: a `TimmEncoder` with its stem unchanged.
        path: of the folder.
        about: further words for its counterpoint.json.

    Returns:
        The largest difference between pooled vectors of the two models.

    Raises:
        InputError: no timm model, or one that timm cannot rebuild; a path that is taken; vectors that differ.
    """
    import timm

    if not isinstance(encoder, encoders.TimmEncoder):
        raise InputError(
            f"{getattr(encoder, 'name', 'the encoder')} is not a timm model; export --to safetensors or onnx"
        )
    if encoder.small_stem:
        raise InputError(
            f"this {encoder.name} has the stem for small images, which timm.create_model cannot rebuild; "
            "export --to safetensors or onnx, or train with --image_size above 64"
        )
    model = encoder.model
    with replacing(path, description(encoder, **about)) as folder:
        write_tensors(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config(encoder), indent=1) + "\n")
        again = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        inputs = images(encoder)
        with torch.no_grad():
            return largest_difference(model.eval()(inputs), again(inputs), f"timm's {encoder.name}")


def _config(encoder: Any) -> dict[str, Any]:
    model = encoder.model
    settings = {name: value for name, value in model.pretrained_cfg.items() if name in SETTINGS}
    # a mean over channels stands for each of them, as the encoder applies it
    mean, std = (
        (values.flatten().tolist() * encoder.channels)[: encoder.channels] for values in (encoder.mean, encoder.std)
    )
    size = {"img_size": encoder.image_size} if hasattr(getattr(model, "patch_embed", None), "img_size") else {}
    shape = [encoder.channels, encoder.image_size, encoder.image_size]
    return {
        "architecture": architecture(encoder).split(".")[0],
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": {**settings, "mean": mean, "std": std, "input_size": shape, "num_classes": 0},
        "model_args": {"in_chans": encoder.channels, **size},
    }
