"""Where a training may start from: the encoder of an earlier run, or an exported one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from counterpoint.encoders import ImageEncoder, TextEncoder
from counterpoint.encoders.causal import CausalLM, causal
from counterpoint.encoders.text import UNNAMED
from counterpoint.errors import InputError
from counterpoint.train.run import Run

READS: dict[type[nn.Module], str] = {ImageEncoder: "images", TextEncoder: "sentences"}
"""What each kind of encoder reads, for messages."""


def earlier_encoder(start: str | Path, kind: type[nn.Module] = ImageEncoder, **wanted: str | int | None) -> Any:
    """The encoder that an earlier training ended with, on the CPU.

    Args:
        start: a run folder, a file that ``counterpoint export --to safetensors`` wrote, or a folder that holds it.
        kind: `ImageEncoder` or `TextEncoder`.
        **wanted: what someone asked for besides (`encoder` by name, `image_size`, `channels`); None asks for nothing.

    Raises:
        InputError: there is neither, the run has no checkpoint yet, what it trained is no encoder of images, or another
            one than was asked for.
    """
    path = Path(start).expanduser()
    exported = path / "encoder.safetensors" if path.is_dir() else path
    # building the earlier method draws weights from its own seed: that must not move the generator of this one
    with torch.random.fork_rng(devices=[]):
        if (path / "config.yaml").is_file():
            encoder: Any = Run.open(path).model().encoder
        elif exported.is_file():
            from counterpoint.export.weights import load_encoder

            encoder = load_encoder(exported)
        elif path.exists():
            raise InputError(f"start is {start}, which is neither a run folder nor an exported encoder")
        else:
            raise InputError(f"start is {start}, but there is no such run or file")
    if not isinstance(encoder, kind):
        raise InputError(f"start is {start}, which holds a {type(encoder).__name__} and no encoder of {READS[kind]}")
    for name, value in wanted.items():
        found = getattr(encoder, "name" if name == "encoder" else name)
        if value is not None and value != found:
            raise InputError(
                f"{name} is {value}, but {start} was trained with {found}; leave --{name} out or give {found}"
            )
    return encoder


def earlier_method(start: str | Path, kind: type[Any]) -> Any:
    """The method of an earlier run, with what its training ended with, on the CPU.

    Args:
        start: a run folder.
        kind: class that the method must be of.

    Raises:
        InputError: no run, one without a checkpoint, or one of another method.
    """
    with torch.random.fork_rng(devices=[]):  # as in `earlier_encoder`
        method = Run.open(Path(start).expanduser()).model()
    if not isinstance(method, kind):
        raise InputError(f"start is {start}, a run of {type(method).__name__} and none of {kind.__name__}")
    return method


def language_model(place: str | Path, device: torch.device | str = "cpu") -> tuple[CausalLM, CausalLM | None]:
    """The language model of a run, with its amateur where the run trained one, or any of transformers; to generate with.

    Args:
        place: run folder, or whatever `counterpoint.encoders.causal.causal` takes.
        device: where to.

    Raises:
        InputError: neither, or a run of something else.
    """
    path = Path(place).expanduser()
    if not (path / "config.yaml").is_file():
        return causal(str(place)).to(device).eval(), None
    with torch.random.fork_rng(devices=[]):  # as in `earlier_encoder`
        method = Run.open(path).model().to(device)
    if method.family != "language":
        raise InputError(f"{place} is a run of {type(method).__name__}, which is no language model")
    for model in (found := getattr(method, "models", (method.encoder, None))):
        if model is not None:
            model.name = str(place)
    return found


def earlier_text(start: str | Path, **wanted: Any) -> tuple[TextEncoder, dict[str, Any]]:
    """The text encoder of an earlier run or export as an ordinary model, and the arguments that build one of its kind.

    Args:
        start: as in `earlier_encoder`; an adapted encoder (LoRA) counts with what it learned.
        **wanted: what someone asked for besides: `encoder`, `pooling`, `layers`; None asks for nothing.

    Returns:
        The encoder, on the CPU, and `encoder`, `pooling` and `layers` by name.

    Raises:
        InputError: as `earlier_encoder`; an encoder that is no ordinary model, one that was asked for differently, or an
            exported one whose kind only its run knows.
    """
    is_run = (Path(start).expanduser() / "config.yaml").is_file()
    earlier = earlier_encoder(start, TextEncoder).stock()
    if type(earlier) is not TextEncoder:
        raise InputError(f"start is {start}, whose {type(earlier).__name__} is no plain encoder to go on with")
    named = Run.open(Path(start).expanduser()).config["model"].get("encoder") if is_run else None
    given = wanted.get("encoder") or named or earlier.name
    if given == UNNAMED:
        raise InputError(f"start is {start}, which does not say how to build its encoder: name the run that trained it")
    found = {"encoder": named or given, "pooling": earlier.pooling, "layers": earlier.model.config.num_hidden_layers}
    for name, value in wanted.items():
        if value is not None and value != found[name]:
            raise InputError(f"{name} is {value}, but {start} was trained with {found[name]}: leave {name} out")
    return earlier, found


def take_over(encoder: nn.Module, earlier: nn.Module) -> None:
    """Copy the weights of `earlier` into `encoder`.

    Raises:
        InputError: they are not of one shape, or the two normalise images differently.
    """
    try:
        encoder.load_state_dict(earlier.state_dict())
    except RuntimeError as error:
        raise InputError(f"the encoder to start from does not fit: {' '.join(str(error).split())}") from error
    for name in ("mean", "std"):  # no part of a checkpoint, so the run could not know others when it is opened
        if hasattr(encoder, name) and not torch.equal(getattr(encoder, name), getattr(earlier, name)):
            raise InputError(f"the encoder to start from has another {name} of images than timm gives {encoder.name}")
