"""A text encoder as a folder that the stock sentence-transformers loads."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from counterpoint.encoders.experts import ExpertEncoder
from counterpoint.encoders.text import TextEncoder, quiet
from counterpoint.errors import InputError
from counterpoint.export.checks import SENTENCES, largest_difference, tokens
from counterpoint.export.folder import description, replacing

MODES = {"cls": "cls", "cls-before-pooler": "cls", "mean": "mean"}
KNOWN = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def save(encoder: TextEncoder, path: str | Path, **about: str) -> float:
    """Write `encoder` as a folder of stock modules (Transformer, Pooling) and load it back where that is possible.

    Args:
        encoder: with "cls" or "mean" pooling.
        path: of the folder.
        about: further words for its counterpoint.json.

    Returns:
        The largest difference between our embeddings and those of ``SentenceTransformer(path).encode``; NaN where
        sentence-transformers is not installed.

    Raises:
        InputError: a pooling that no stock module has, experts, a path that is taken, or vectors that differ.
    """
    if encoder.pooling not in MODES:
        raise InputError(
            f'sentence-transformers has no module for "{encoder.pooling}" pooling; export --to safetensors or onnx, or '
            "train with cls or mean"
        )
    if isinstance(encoder, ExpertEncoder) and (encoder.layers or encoder.domains):
        raise InputError(
            "sentence-transformers has no module for experts and domain tokens; export --to safetensors or onnx, or hand "
            "encoder.only(DOMAIN), the stock encoder of one domain, to counterpoint.export.sentence_folder.save"
        )
    with replacing(path, description(encoder, **about)) as folder:
        _write(encoder, folder)
        return _difference(encoder, folder)


def _write(encoder: TextEncoder, folder: Path) -> None:
    with quiet():
        encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    kind = "sentence_transformers.models"
    mode = MODES[encoder.pooling]
    pooling = {f"pooling_mode_{name}": name == {"cls": "cls_token", "mean": "mean_tokens"}[mode] for name in KNOWN}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        ],
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": encoder.dim, **pooling},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _difference(encoder: TextEncoder, folder: Path) -> float:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        return float("nan")
    device = next(encoder.parameters()).device
    with torch.no_grad():
        ours = encoder.eval().embed({name: value.to(device) for name, value in tokens(encoder).items()})
    with quiet():
        stock = SentenceTransformer(os.fspath(folder), device="cpu")
    theirs = stock.encode(list(SENTENCES), convert_to_tensor=True, show_progress_bar=False)
    return largest_difference(ours.float().cpu(), theirs.float().cpu(), "sentence-transformers")
