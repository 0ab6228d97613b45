"""A run folder: what was asked for, on what machine, what happened, what came out."""

import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from counterpoint.atomic import writing
from counterpoint.errors import InputError
from counterpoint.train.checkpoint import load_state
from counterpoint.train.method import Method, construct, plain


@dataclass
class Run:
    """A training that happened (or is happening) in `folder`."""

    folder: Path
    method: Method | None = None
    interrupted: bool = False

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """An existing run.

        Raises:
            InputError: the folder is no run.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise InputError(f"{folder} is no run folder: it holds no config.yaml")
        return cls(folder)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration: method, its arguments, data, fit arguments.

        Raises:
            InputError: the file is damaged.
        """
        path = self.folder / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        for name, kind in (("method", str), ("model", dict), ("data", str | None), ("fit", dict)):
            if not isinstance(config, dict) or not isinstance(config.get(name, NotImplemented), kind):
                raise InputError(f"{path} is damaged: it does not hold {name}")
        return config

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights with the best validation score; exists when the training looked (``fit(validate=...)``)."""
        return self.folder / "checkpoints" / "best.safetensors"

    def model(self, *, best: bool = False) -> Method:
        """The trained method, in evaluation mode, with its last weights, or those with the best validation score."""
        method, path = self.untrained(), self.best if best else self.checkpoint
        state = load_state(path)
        try:
            method.load_state_dict(state["state_dict"])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} does not belong to {self.folder}/config.yaml: {reason}") from error
        return method.eval()

    def untrained(self) -> Method:
        """The same method with weights drawn from the run's seed: where a training from the command line started.

        A training that went on from an earlier run (`start`) began with that run's encoder; here it is a random one.
        """
        from counterpoint import methods

        config = self.config
        torch.manual_seed(config["fit"]["seed"])
        # an earlier run that this one started from is no part of it, and may be gone
        arguments = {name: value for name, value in config["model"].items() if name != "start"}
        return construct(methods.get(config["method"]), arguments).eval()

    def encode(self, data: Any, **options: Any) -> Any:
        """Embeddings of `data` under the trained method; see `Method.encode`."""
        return self.model().encode(data, **options)

    def write(self, name: str, content: Any) -> Path:
        """Write JSON, YAML or text into the folder, whole or not at all."""
        path = self.folder / name
        text = content if isinstance(content, str) else None
        if text is None and path.suffix == ".yaml":
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        with writing(path) as temporary:
            temporary.write_text(text if text is not None else json.dumps(content, indent=1) + "\n")
        return path


def describe(method: Method, data: Any, fit: dict[str, Any], command: str | None) -> dict[str, Any]:
    """The resolved configuration of a run as plain data."""
    from counterpoint import methods

    return {
        "method": methods.name_of(type(method)),
        "model": {name: plain(value) for name, value in method.arguments.items()},
        "data": data,
        "fit": fit,
        "labels_used_in_training": method.uses_labels,
    } | ({"command": command} if command else {})


def environment() -> dict[str, Any]:
    """Machine and versions, for the record."""
    from importlib.metadata import version

    import counterpoint

    cuda = torch.cuda.is_available()
    return {
        "counterpoint": counterpoint.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "timm", "numpy")},
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "processor": platform.machine(),
        "system": platform.system(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def next_folder(name: str, root: str | Path = "runs") -> Path:
    """``runs/NAME-1``, or the next number that is free; nothing is created."""
    return next(folder for number in count(1) if not (folder := Path(root) / f"{name}-{number}").exists())


def make_folder(folder: Path) -> None:
    """Create a run folder and make sure that it can be written.

    Raises:
        InputError: it exists, or it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(
            f"the run folder {folder} exists; choose another with --run, or go on with --resume {folder}"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot create the run folder {folder}: {error.strerror}; choose another with --run"
        ) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"the run folder {folder} is not writable; choose another with --run")
