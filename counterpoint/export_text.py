"""A text encoder as a folder that the stock sentence-transformers loads."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from counterpoint.encoders.text import TextEncoder, quiet
from counterpoint.errors import InputError

MODES = {"cls": "cls", "cls-before-pooler": "cls", "mean": "mean"}
KNOWN = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
SENTENCES = ("A man is playing a guitar.", "Two dogs run across the snow", "", "rain " * 400)


def save_sentence_transformer(encoder: TextEncoder, path: str | Path) -> float:
    """Write `encoder` as a folder of stock modules (Transformer, Pooling) and load it back where that is possible.

    Args:
        encoder: with "cls" or "mean" pooling.
        path: a folder that does not exist yet, or one that this function wrote.

    Returns:
        The largest difference between our embeddings and those of ``SentenceTransformer(path).encode``; NaN where
        sentence-transformers is not installed.

    Raises:
        InputError: a pooling that no stock module has, a folder that holds something else, or vectors that differ.
    """
    if encoder.pooling not in MODES:
        raise InputError(f'sentence-transformers has no module for "{encoder.pooling}" pooling; train with cls or mean')
    path = Path(path)
    if path.exists() and not (path / "modules.json").is_file():
        raise InputError(f"{path} exists and is no exported encoder; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _write(encoder, temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _difference(encoder, path)


def _write(encoder: TextEncoder, folder: Path) -> None:
    folder.mkdir()
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


def _difference(encoder: TextEncoder, path: Path) -> float:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        return float("nan")
    from counterpoint.data.texts import Texts, tokenise

    training, device = encoder.training, next(encoder.parameters()).device
    batch = tokenise(
        Texts({"anchor": SENTENCES}, name="check of the export"), encoder.tokenizer, encoder.max_length
    ).take(torch.arange(len(SENTENCES)))
    with torch.no_grad():
        ours = encoder.eval().embed({name: value.to(device) for name, value in batch.items()}).float().cpu()
    encoder.train(training)
    with quiet():
        stock = SentenceTransformer(os.fspath(path), device="cpu")
    theirs = stock.encode(list(SENTENCES), convert_to_tensor=True, show_progress_bar=False).float().cpu()
    difference = float((ours - theirs).abs().max())
    if not difference < 1e-3:
        raise InputError(f"sentence-transformers embeds with {path} differently (by {difference:.1e})")
    return difference
