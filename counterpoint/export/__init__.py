"""Trained encoders leave the house: each family of methods in the formats that can hold it, checked before it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from counterpoint.encoders import TextEncoder
from counterpoint.errors import InputError, nearest
from counterpoint.export import graphs, language_folder, open_clip_folder, sentence_folder, timm_folder, weights
from counterpoint.export.weights import load_encoder
from counterpoint.train.run import Run

__all__ = ["FAMILIES", "FORMATS", "Format", "export", "load_encoder"]


class Format(NamedTuple):
    """How one family is written in one format.

    Attributes:
        save: takes the encoder, the path and what is known about the run (words by name); writes, loads back, compares,
            and returns the largest difference. It leaves nothing behind when it raises.
        place: name inside the run folder unless another path is given.
    """

    save: Callable[..., float]
    place: str


SAFETENSORS = Format(weights.save, "encoder.safetensors")

FAMILIES: dict[str, dict[str, Format]] = {
    "images": {
        "safetensors": SAFETENSORS,
        "onnx": Format(graphs.save_image, "onnx"),
        "timm": Format(timm_folder.save, "timm"),
    },
    "sentences": {
        "safetensors": SAFETENSORS,
        "onnx": Format(graphs.save_text, "onnx"),
        "sentence-transformers": Format(sentence_folder.save, "sentence-transformers"),
    },
    "histories": {"safetensors": SAFETENSORS},
    "language": {"transformers": Format(language_folder.save, "transformers")},
    "pairs": {
        "safetensors": SAFETENSORS,
        "onnx": Format(graphs.save_towers, "onnx"),
        "open_clip": Format(open_clip_folder.save, "open_clip"),
    },
}
"""What can be written: family of the method -> format -> how."""

FORMATS = tuple(dict.fromkeys(name for formats in FAMILIES.values() for name in formats))


def export(run: Run, to: str, out: str | Path | None = None) -> tuple[Path, float]:
    """Write the trained encoder of `run`, load it back, and keep it only if it answers the same.

    Args:
        run: a trained run.
        to: "safetensors": one file with everything that `load_encoder` needs; "onnx": a folder with encoder.onnx (image.onnx and
            text.onnx of image-text towers) and the tokeniser, for onnxruntime and other engines; "timm": a folder that
            ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens; "sentence-transformers": a folder that
            ``SentenceTransformer(FOLDER)`` opens; "open_clip": a folder that ``open_clip.create_model("local-dir:FOLDER")``
            opens.
        out: file or folder to write; default inside the run folder. An earlier export there is replaced, once the new one
            is whole and checked.

    Returns:
        The path, and the largest absolute difference between what the trained encoder and the one loaded back answer; NaN
        where it could not be loaded back because sentence-transformers is not installed.

    Raises:
        InputError: unknown format, one that cannot hold this encoder, a package that is missing, a path that is taken, or
            other answers than the trained encoder's. Nothing is kept then.
    """
    if to not in FORMATS:
        raise InputError(f'cannot export to "{to}"; there are {", ".join(FORMATS)}{nearest(to, FORMATS)}')
    method: Any = run.model()
    fits = FAMILIES.get(method.family, {})
    if to not in fits:
        instead = f"export --to {' or '.join(fits)}" if fits else "embed writes their vectors"
        raise InputError(f"{method.family} cannot be exported --to {to}; {instead}")
    path = Path(out) if out is not None else run.folder / fits[to].place
    encoder = method.encoder.eval()
    if isinstance(encoder, TextEncoder):
        encoder = encoder.stock().eval()
    if method.family == "pairs":  # where training started is of no use to whoever turns similarities into shares
        encoder.temperature = float(method.temperature.detach())
    return path, fits[to].save(encoder, path, method=run.config["method"])
