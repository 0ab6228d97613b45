"""One safetensors file that holds an encoder whole: weights, sizes, and its tokeniser or catalogue of items."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterpoint import encoders
from counterpoint.atomic import writing
from counterpoint.encoders.image_text import OpenClipTowers, TwoTowers, towers
from counterpoint.encoders.text import quiet
from counterpoint.errors import InputError
from counterpoint.export import open_clip_folder
from counterpoint.export.checks import histories, images, largest_difference, tokens
from counterpoint.export.folder import label, write_tensors

FILES = "files/"
"""Prefix of the tensors uint8 [bytes] that are files, such as the tokeniser's; all others are weights."""


class Kind(NamedTuple):
    """How one kind of encoder is put into a file and taken out again.

    Attributes:
        classes: encoders of this kind.
        about: what `build` must know, as plain data.
        build: the encoder, with any weights, from that and the file's tensors.
        answer: vectors of a few inputs that need no data.
        files: writes into a folder what `build` needs besides.
    """

    classes: tuple[type[nn.Module], ...]
    about: Callable[[Any], dict[str, Any]]
    build: Callable[[dict[str, Any], dict[str, Tensor]], nn.Module]
    answer: Callable[[Any], Tensor]
    files: Callable[[Any, Path], None] | None = None


def save(encoder: Any, path: str | Path, **about: str) -> float:
    """Write `encoder` as one file, and read it back.

    The header's ``encoder`` entry is JSON that says how to rebuild it. Any safetensors reader finds the weights under
    their names; a tokeniser's files are tensors of bytes named ``files/NAME``, the names of items are the tensor
    ``names`` (UTF-8, separated by a zero byte, in the order of their codes from 1).

    Args:
        encoder: of images (ours or timm's), sentences, histories, or images and texts.
        path: of the file.
        about: further words for the header.

    Returns:
        The largest difference between the answers of `encoder` and of the one read back.

    Raises:
        InputError: an encoder that is none of these, or that answers differently when read back.
    """
    kind = next((name for name, kind in KINDS.items() if type(encoder) in kind.classes), None)
    if kind is None:
        ours = ", ".join(cls.__name__ for kind in KINDS.values() for cls in kind.classes)
        raise InputError(f"a {type(encoder).__name__} cannot be rebuilt from a file; {ours} can")
    how = KINDS[kind]
    header = {**about, "kind": kind, **how.about(encoder)}
    state = encoder.state_dict()
    if how.files is not None:
        state |= _packed(how.files, encoder)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        write_tensors(state, temporary, {"encoder": json.dumps(header)})
        again = load_encoder(temporary)
        with torch.no_grad():
            return largest_difference(how.answer(encoder.eval()), how.answer(again), "the encoder read back")


def load_encoder(path: str | Path) -> nn.Module:
    """An encoder that `export` wrote as safetensors, in evaluation mode.

    Images: ``encoder(images).pooled``. Sentences: ``encoder(input_ids, attention_mask).pooled``, with the tokeniser
    in ``encoder.tokenizer``, and where there are domains ``encoder.marked(input_ids, domain)`` for the ids. Histories:
    ``encoder(item_seq, item_seq_len).pooled``, with the items' vectors in ``encoder.table`` and their names in
    ``encoder.catalogue``. Images and texts: ``encoder.image(images)`` and ``encoder.text(input_ids, attention_mask)``,
    with the tokeniser, and the temperature that the training ended with.

    Raises:
        InputError: no such file, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["encoder"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        encoder = KINDS[about.get("kind", "image")].build(about, state)
        encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith(FILES)})
    except ModuleNotFoundError as error:
        raise InputError(f"{path} needs {error.name}: pip install counterpoint[language]") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not an encoder that counterpoint exported: {reason}") from error
    return encoder.eval()


def _image_about(encoder: Any) -> dict[str, Any]:
    about = {name: getattr(encoder, name) for name in ("name", "image_size", "channels", "dim")}
    if isinstance(encoder, encoders.TimmEncoder):
        # a folder or hub may be out of reach where the file is read, and timm may one day give other statistics
        about["name"] = architecture(encoder)
        about |= {name: getattr(encoder, name).flatten().tolist() for name in ("mean", "std")}
    return about


def _image(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    encoder = encoders.image(about["name"], image_size=about["image_size"], channels=about["channels"])
    for name in ("mean", "std"):
        if name in about:
            setattr(encoder, name, torch.tensor(about[name]).reshape(-1, 1, 1))
    return encoder


def architecture(encoder: Any) -> str:
    """timm's name of a `TimmEncoder`'s architecture, also where it came from a folder or a hub."""
    on_a_hub = encoder.name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    return encoder.model.pretrained_cfg["architecture"] if on_a_hub else encoder.name


def _text_about(encoder: Any) -> dict[str, Any]:
    config = encoder.model.config.to_dict()
    for name in ("_name_or_path", "auto_map"):  # a place on this machine; code to be run
        config.pop(name, None)
    about = {"name": label(encoder), "pooling": encoder.pooling, "max_length": encoder.max_length, "dim": encoder.dim}
    return {**about, "config": config}


def _text(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    import transformers

    with _unpacked(state) as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with quiet():
        config = transformers.AutoConfig.for_model(**{k: v for k, v in about["config"].items() if k != "auto_map"})
        model = transformers.AutoModel.from_config(config)
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # as in every text encoder of ours
    return encoders.TextEncoder(model, tokenizer, about["pooling"], about["max_length"], about["name"])


def _experts_about(encoder: Any) -> dict[str, Any]:
    return {**_text_about(encoder), "conversion": encoder.conversion}


def _experts(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    encoder: Any = _text(about, state)
    return encoders.ExpertEncoder(encoder, **about["conversion"])


def _text_files(encoder: Any, folder: Path) -> None:
    encoder.tokenizer.save_pretrained(folder)


def _packed(write: Callable[[Any, Path], None], encoder: Any) -> dict[str, Tensor]:
    with TemporaryDirectory() as folder:
        write(encoder, Path(folder))
        files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        contents = {file.relative_to(folder).as_posix(): bytearray(file.read_bytes()) for file in files}
    return {FILES + name: torch.frombuffer(content, dtype=torch.uint8) for name, content in contents.items()}


@contextmanager
def _unpacked(state: dict[str, Tensor]) -> Iterator[Path]:
    with TemporaryDirectory() as place:
        folder = Path(place).resolve()
        for name, value in state.items():
            if name.startswith(FILES):
                file = (folder / name.removeprefix(FILES)).resolve()
                if not file.is_relative_to(folder):
                    raise ValueError(f"{name} leads out of the folder")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(value.numpy().tobytes())
        yield folder


def _sequence_about(encoder: Any) -> dict[str, Any]:
    block = encoder.blocks[0]
    return {
        "name": encoder.name,
        "items": encoder.items,
        "dim": encoder.dim,
        "layers": len(encoder.blocks),
        "heads": block.heads,
        "hidden": block.widen.out_features,
        "dropout": encoder.dropout.p,
        "attention_dropout": block.attention_dropout,
        "max_length": encoder.max_length,
    }


def _sequence(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    sizes = ("items", "dim", "layers", "heads", "hidden", "dropout", "attention_dropout", "max_length")
    return encoders.SASRecEncoder(**{name: about[name] for name in sizes})


def _towers_about(encoder: Any) -> dict[str, Any]:
    return {
        "name": label(encoder),
        "dim": encoder.dim,
        "max_length": encoder.max_length,
        "temperature": encoder.temperature,
        "images": _image_about(encoder.images),
        "texts": _text_about(encoder.texts),
    }


def _towers(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    images: Any = _image(about["images"], state)
    texts: Any = _text(about["texts"], state)
    encoder = TwoTowers(images, texts, about["dim"], about["max_length"])
    encoder.temperature = about["temperature"]
    return encoder


def _open_clip_about(encoder: Any) -> dict[str, Any]:
    names = ("dim", "image_size", "max_length", "temperature")
    return {"name": label(encoder), **{name: getattr(encoder, name) for name in names}}


def _open_clip(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    with _unpacked(state) as folder:
        encoder = towers(f"open_clip:local-dir:{folder}", max_length=about["max_length"])
    encoder.name, encoder.temperature = about["name"], about["temperature"]
    return encoder


def _answer_experts(encoder: Any) -> Tensor:
    """Vectors of a few sentences in every domain."""
    batch = tokens(encoder)
    if not encoder.domains:
        return encoder.embed(batch)
    rows = len(batch["input_ids"])
    return torch.cat([encoder.embed({**batch, "domain": torch.full((rows,), d)}) for d in range(len(encoder.domains))])


def _answer_towers(encoder: Any) -> Tensor:
    text = tokens(encoder)
    return torch.cat([encoder.image(images(encoder)), encoder.text(text["input_ids"], text["attention_mask"])])


KINDS = {
    "image": Kind(
        (encoders.ConvNet, encoders.TimmEncoder),
        _image_about,
        _image,
        lambda encoder: encoder(images(encoder)).pooled,
    ),
    "text": Kind(
        (encoders.TextEncoder,), _text_about, _text, lambda encoder: encoder.embed(tokens(encoder)), _text_files
    ),
    "experts": Kind((encoders.ExpertEncoder,), _experts_about, _experts, _answer_experts, _text_files),
    "sequence": Kind(
        (encoders.SASRecEncoder,), _sequence_about, _sequence, lambda encoder: encoder.embed(histories(encoder))
    ),
    "towers": Kind((TwoTowers,), _towers_about, _towers, _answer_towers, _text_files),
    "open_clip": Kind((OpenClipTowers,), _open_clip_about, _open_clip, _answer_towers, open_clip_folder.configure),
}
"""Kind of encoder, as the header names it -> how to handle it."""
