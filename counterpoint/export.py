"""Trained encoders leave the house: safetensors with everything needed to rebuild them, and timm's own format."""

import json
from pathlib import Path
from typing import Any

import torch

from counterpoint.atomic import writing
from counterpoint.errors import InputError
from counterpoint.train.run import Run

FORMATS = ("safetensors", "timm", "sentence-transformers")


def export(run: Run, to: str, out: str | Path | None = None) -> tuple[Path, float]:
    """Write the trained encoder of `run` and load it back.

    Args:
        run: a trained run.
        to: "safetensors": one file that `load_encoder` (or any safetensors reader) opens; "timm": a folder that
            ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens, for encoders that timm can rebuild unchanged;
            "sentence-transformers": a folder that ``SentenceTransformer(FOLDER)`` opens.
        out: where to; default beside the checkpoints.

    Returns:
        The path, and the largest difference between the original's and the reloaded encoder's output on random images.

    Raises:
        InputError: unknown format, or an encoder that timm cannot rebuild.
    """
    if to not in FORMATS:
        raise InputError(f'cannot export to "{to}"; there are {", ".join(FORMATS)}')
    method = run.model()
    encoder = method.encoder.eval()
    fits = {"images": ("safetensors", "timm"), "sentences": ("sentence-transformers",)}.get(method.family, ())
    if to not in fits:
        instead = f"export --to {' or '.join(fits)}" if fits else "embed writes their vectors"
        raise InputError(f"{method.family} cannot be exported --to {to}; {instead}")
    if method.family == "sentences":
        from counterpoint.export_text import save_sentence_transformer

        folder = Path(out) if out is not None else run.folder / "sentence-transformers"
        return folder, save_sentence_transformer(encoder, folder)
    path = Path(out) if out is not None else run.folder / ("encoder.safetensors" if to == "safetensors" else "timm")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.rand(4, encoder.channels, encoder.image_size, encoder.image_size)
    if to == "safetensors":
        _save(encoder, path)
        again: Any = load_encoder(path)
        with torch.no_grad():
            return path, float((encoder(images).pooled - again(images).pooled).abs().max())
    model = getattr(encoder, "model", None)
    if model is None:
        raise InputError(f"{encoder.name} is not a timm model; export --to safetensors")
    if encoder.small_stem:
        raise InputError(
            f"this {encoder.name} has the stem for small images, which timm.create_model cannot rebuild; "
            "export --to safetensors, or train with --image_size above 64"
        )
    import timm

    _save_timm(encoder, path)
    again = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        difference = float((model(images) - again(images)).abs().max())
    if not difference < 1e-3:
        raise InputError(f"timm rebuilds {encoder.name} differently (by {difference:.1e}); export --to safetensors")
    return path, difference


def load_encoder(path: str | Path) -> torch.nn.Module:
    """An encoder that `export` wrote as safetensors, ready to use: ``encoder(images).pooled``.

    Raises:
        InputError: no such file, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    from counterpoint import encoders

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["encoder"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        encoder = encoders.image(about["name"], image_size=about["image_size"], channels=about["channels"])
        encoder.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not an encoder that counterpoint exported: {reason}") from error
    return encoder.eval()


def _save(encoder: Any, path: Path) -> None:
    from safetensors.torch import save_file

    about = {name: getattr(encoder, name) for name in ("name", "image_size", "channels", "dim")}
    state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    with writing(path) as temporary:
        save_file(state, temporary, metadata={"encoder": json.dumps(about)})


def _save_timm(encoder: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    model = encoder.model
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    with writing(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    settings = {key: value for key, value in model.pretrained_cfg.items() if key in _TIMM_KEYS}
    size = {"img_size": encoder.image_size} if hasattr(getattr(model, "patch_embed", None), "img_size") else {}
    shape = [encoder.channels, encoder.image_size, encoder.image_size]
    config = {
        "architecture": encoder.name.split(".")[0],
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": {**settings, "input_size": shape, "num_classes": 0},
        "model_args": {"in_chans": encoder.channels, **size},
    }
    with writing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1))


_TIMM_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "first_conv", "classifier", "pool_size")
