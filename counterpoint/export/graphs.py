"""Encoders as ONNX graphs, which run without torch: in onnxruntime, in browsers, on phones."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterpoint.encoders.image import ImageEncoder
from counterpoint.encoders.image_text import OPEN_CLIP, OpenClipTowers, Towers, TwoTowers
from counterpoint.encoders.text import UNLIMITED, TextEncoder
from counterpoint.errors import InputError, one_line
from counterpoint.export.checks import gibberish, images, largest_difference, tokens
from counterpoint.export.folder import description, label, replacing

LARGE = 2**30
"""Bytes of weights from which they lie beside the graph: one file of ONNX cannot hold 2 GiB."""

LONGEST = 512
"""Tokens of the longest row that a graph is tried on."""

BATCH = torch.export.Dim("batch")


class ImageGraph(nn.Module):
    """``image`` [B, C, S, S] in 0 to 1 -> ``embedding`` [B, D].

    Args:
        owner: of the weights.
        embed: the function, made of the owner's weights.
    """

    def __init__(self, owner: nn.Module, embed: Callable[[Tensor], Tensor]):
        super().__init__()
        self.owner, self.embed = owner, embed

    def forward(self, image: Tensor) -> Tensor:
        return self.embed(image)


class TextGraph(nn.Module):
    """``input_ids`` and ``attention_mask`` int64 [B, L] -> ``embedding`` [B, D].

    Args:
        owner: of the weights.
        embed: the function, made of the owner's weights.
    """

    def __init__(self, owner: nn.Module, embed: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.owner, self.embed = owner, embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.embed(input_ids, attention_mask)


def save_image(encoder: Any, path: str | Path, **about: str) -> float:
    """Write an image encoder as a folder with encoder.onnx, and run it.

    Input ``image`` float32 [batch, C, S, S] in 0 to 1 (the normalisation is part of the graph), output ``embedding``
    float32 [batch, D].

    Args:
        encoder: of images.
        path: of the folder.
        about: further words for the graph's metadata and the folder's counterpoint.json.

    Returns:
        The largest difference between embeddings of onnxruntime and torch, for batches of 1, 2 and 5 random images.

    Raises:
        InputError: a package is missing, torch or onnxruntime cannot handle the model, the path is taken, or the
            embeddings differ. Nothing is kept then.
    """
    _require(path)
    _must_be(ImageEncoder, encoder)
    words = description(encoder, **about)
    with replacing(path, words) as folder:
        return write_image(encoder, lambda image: encoder(image).pooled, folder / "encoder.onnx", words)


def save_text(encoder: Any, path: str | Path, **about: str) -> float:
    """Write a text encoder as a folder with encoder.onnx and its tokeniser (folder tokenizer/), and run it.

    Inputs ``input_ids`` and ``attention_mask`` int64 [batch, length], output ``embedding`` float32 [batch, D]; the pooling
    is part of the graph.

    Args:
        encoder: of sentences.
        path: of the folder.
        about: further words for the graph's metadata and the folder's counterpoint.json.

    Returns:
        The largest difference between embeddings of onnxruntime and torch, for random batches of several sizes and
        lengths, with and without padding, and for sentences through the tokeniser read back.

    Raises:
        InputError: as `save_image`.
    """
    _require(path)
    _must_be(TextEncoder, encoder)
    words = description(encoder, **about)
    with replacing(path, words) as folder:
        again = write_tokenizer(encoder, folder / "tokenizer")
        return write_text(
            encoder, lambda ids, mask: encoder(ids, mask).pooled, folder / "encoder.onnx", words, tokenizer=again
        )


def save_towers(encoder: Any, path: str | Path, **about: str) -> float:
    """Write both towers of image-text encoders as a folder with image.onnx and text.onnx, and run them.

    Inputs and outputs are those of `save_image` and `save_text`; the projections are part of the graphs. The folder holds
    the tokeniser too, unless it is one of open_clip, which cannot be written: counterpoint.json then says how to get it.

    Args:
        encoder: the towers.
        path: of the folder.
        about: further words for the graphs' metadata and the folder's counterpoint.json.

    Returns:
        The largest difference between embeddings of onnxruntime and torch.

    Raises:
        InputError: as `save_image`.
    """
    _require(path)
    _must_be(Towers, encoder)
    words = {**description(encoder, **about), "temperature": f"{encoder.temperature:.6g}"}
    text, theirs = encoder.text, encoder.tokenizer
    if isinstance(encoder, OpenClipTowers):
        words["tokenizer"] = f"open_clip.get_tokenizer({label(encoder).removeprefix(OPEN_CLIP).split('/')[0]!r})"
    elif isinstance(encoder, TwoTowers):
        # its own way sorts the rows of a batch by length, which a graph cannot
        text = lambda ids, mask: encoder.text_projection(encoder.texts(ids, mask).pooled)  # noqa: E731
    with replacing(path, words) as folder:
        if "tokenizer" not in words:
            theirs = write_tokenizer(encoder, folder / "tokenizer")
        return max(
            write_image(encoder, encoder.image, folder / "image.onnx", words),
            write_text(encoder, text, folder / "text.onnx", words, tokenizer=theirs),
        )


def write_image(encoder: Any, embed: Callable[[Tensor], Tensor], path: Path, words: dict[str, str]) -> float:
    """Write the graph of `embed`, a function of images made of the weights of `encoder`; the largest difference."""
    batches = [{"image": images(encoder, count)} for count in (2, 1, 5)]
    return _write(ImageGraph(encoder, embed), {"image": {0: BATCH}}, batches, path, label(encoder), words)


def write_text(
    encoder: Any, embed: Callable[[Tensor, Tensor], Tensor], path: Path, words: dict[str, str], *, tokenizer: Any
) -> float:
    """Write the graph of `embed`, a function of ids and mask made of the weights of `encoder`; the largest difference.

    Args:
        encoder: of sentences.
        embed: to be written.
        path: of the file.
        words: for the metadata.
        tokenizer: as whoever opens the folder gets it; `SENTENCES` go through it into the graph, and through the
            encoder's own into `embed`.
    """
    limit = encoder.positions if encoder.positions < UNLIMITED else None
    shape = {0: BATCH, 1: torch.export.Dim("length", max=limit)}
    sentences = tokens(encoder)
    theirs = tokens(encoder, tokenizer=tokenizer)
    if any(not torch.equal(theirs[name], sentences[name]) for name in sentences):
        raise InputError(f"the tokeniser of {label(encoder)} cuts text differently once saved, so nothing was kept")
    return _write(
        TextGraph(encoder, embed),
        {"input_ids": shape, "attention_mask": shape},
        [*_token_batches(encoder), sentences],
        path,
        label(encoder),
        words,
    )


def write_tokenizer(encoder: Any, folder: Path) -> Any:
    """Save the tokeniser of `encoder`, limited to its length, and read it back."""
    import transformers

    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.max_length
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _require(path: str | Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"export --to onnx needs {error.name}: pip install counterpoint[onnx]") from error
    if Path(path).suffix == ".onnx":
        raise InputError(f"export --to onnx writes a folder with encoder.onnx in it; name a folder, not {path}")


def _must_be(kind: type[nn.Module], encoder: Any) -> None:
    if not isinstance(encoder, kind):
        raise InputError(f"a {type(encoder).__name__} is no {kind.__name__}, so nothing says what it takes")


def _token_batches(encoder: Any) -> list[dict[str, Tensor]]:
    """Padded rows, a single one as long as can be, some much shorter, and many of all lengths."""
    longest = min(encoder.max_length, LONGEST)
    lengths = ((3, 7), (longest,), (1, 1), (longest // 2, 1, longest // 3, 2, 0))
    return [
        {name: value[:, :longest] for name, value in tokens(encoder, gibberish(words)).items()} for words in lengths
    ]


def _write(
    graph: nn.Module,
    dynamic: dict[str, Any],
    batches: Sequence[dict[str, Tensor]],
    path: Path,
    name: str,
    words: dict[str, str],
) -> float:
    program = _traced(graph.eval(), dynamic, batches[0], name)
    _name_and_clean(program.model, [*dynamic], words)
    size = sum(weight.nbytes for weight in graph.state_dict().values())
    program.save(path, external_data=size > LARGE)
    session = _session(path, name)
    differences = []
    for batch in batches:
        with torch.no_grad():
            ours = graph(**batch)
        differences.append(largest_difference(ours, _run(session, batch, name), f"onnxruntime with {name}"))
    return max(differences)


def _traced(graph: nn.Module, dynamic: dict[str, Any], example: dict[str, Tensor], name: str) -> Any:
    try:
        # other kernels lay their output out in a way that the steps after them rely on, and that ONNX does not keep
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                graph, kwargs=example, dynamic_shapes=dynamic, input_names=[*dynamic], dynamo=True, verbose=False
            )
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # torch wraps what happened in advice on how to report it
            reason = reason.__cause__
        raise InputError(f"torch cannot write {name} as ONNX ({one_line(reason)}); export --to safetensors") from error


def _name_and_clean(model: Any, inputs: list[str], words: dict[str, str]) -> None:
    """Name the output, remove what torch noted about where on this machine each step was written, add `words`."""
    taken = {*inputs, "embedding"}
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value.name in taken:
                value.name = f"{value.name}_inside"
    model.graph.outputs[0].name = "embedding"
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(words)
    model.producer_name, model.producer_version = "counterpoint", words["counterpoint"]


def _session(path: Path, name: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"onnxruntime cannot open {name} ({one_line(error)}); export --to safetensors") from error


def _run(session: Any, batch: dict[str, Tensor], name: str) -> Tensor:
    try:
        (found,) = session.run(["embedding"], {key: value.numpy() for key, value in batch.items()})
    except Exception as error:
        raise InputError(f"onnxruntime cannot run {name} ({one_line(error)}); export --to safetensors") from error
    return torch.from_numpy(found)
