"""Text encoders: any transformers model by name, folder or configuration, and how its tokens become one vector."""

import copy
import json
import logging
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.data.texts import pad_of
from counterpoint.encoders.image import Features
from counterpoint.errors import InputError, one_line

log = logging.getLogger("counterpoint")

Pooling = Literal["cls", "mean", "first-last", "cls-before-pooler"]
POOLINGS = ("cls", "mean", "first-last", "cls-before-pooler")

# what the configurations of different models call the same thing
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate"),
)
# models that count positions from the padding id + 1
SHIFTED_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "data2vec-text"}
# models to which vectors of words are as good as their ids
TAKES_WORDS = {"bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra"}
UNLIMITED = 10**6
UNIXCODER_MODE = "<encoder-only>"
UNNAMED = "a fresh model"
"""What a model from a configuration without a name is called."""


class TextEncoder(nn.Module):
    """A transformer from token ids to `Features`.

    Pooling: "cls" is the last layer's vector of the first token, as it is ("cls-before-pooler" is SimCSE's name for the
    same: a pretrained model's own pooler is never used); "mean" the mean of the last layer's tokens; "first-last" the
    mean over tokens of the average of the first and the last layer.

    Attributes:
        model: the transformers model.
        tokenizer: its tokeniser.
        dim: length of the pooled vector.
        pooling: as above.
        max_length: tokens that a sentence is cut to.
        positions: most tokens that the model can take.
        fresh: whether its weights are random ones.
        name: what it was built from.
        segments: whether tokens behind the first separator are marked as the second sentence of a pair; see `marks_pairs`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pooling: Pooling, max_length: int | None, name: str, fresh: bool = False
    ):
        super().__init__()
        self.fresh, self.segments = fresh, False
        self.model, self.tokenizer, self.name, self.pooling = model, tokenizer, name, pooling
        self.dim: int = model.config.hidden_size
        self.pad = pad_of(tokenizer)
        self.positions = positions_of(model.config)
        if max_length is None:
            max_length = min(self.positions, int(min(tokenizer.model_max_length, UNLIMITED)))
            max_length = 512 if max_length == UNLIMITED else max_length
        if not 3 <= max_length <= self.positions:
            raise InputError(f"max_length of {name} must lie between 3 and {self.positions}, not {max_length}")
        self.max_length = max_length

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, words: Tensor | None = None) -> Features:
        """[B, L] ids (and 1 where a token counts) -> pooled [B, D] and the last layer's tokens [B, L, D].

        `words` are the ids' vectors in the table of the model [B, L, D], where they have been looked up before.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        options: dict[str, Any] = {"output_hidden_states": self.pooling == "first-last", "return_dict": True}
        if self.segments:
            ends = (input_ids == self.tokenizer.sep_token_id).long()
            options["token_type_ids"] = (ends.cumsum(1) > ends).long()
        if words is None:
            out = self.called(input_ids, mask, **options)
        else:
            out = self.model(inputs_embeds=words, attention_mask=mask, **options)
        return Features(pool(out, mask, self.pooling), out.last_hidden_state)

    def called(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """What the model returns."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled vectors [B, D] of rows of mixed length, without most of the padding: see `by_length`."""
        words = (self.model.get_input_embeddings()(input_ids),) if self.looks_up_once else ()
        return by_length(lambda *rows: (self(*rows).pooled,), input_ids, attention_mask, *words)[0]

    @property
    def looks_up_once(self) -> bool:
        """Whether the vectors of all tokens can be looked up before rows go their ways in groups.

        Each look-up has a gradient as large as the table, to be filled and added up.
        """
        stock = type(self) is TextEncoder and self.model.config.model_type in TAKES_WORDS
        return stock and torch.is_grad_enabled() and self.model.get_input_embeddings().weight.requires_grad

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last layer's tokens [B, L, D] of rows of mixed length, zeros in the padding: see `by_length`."""

        def tokens(ids: Tensor, mask: Tensor) -> tuple[Tensor]:
            found = self(ids, mask).tokens * mask[..., None]
            return (nn.functional.pad(found, (0, 0, 0, input_ids.shape[1] - found.shape[1])),)

        return by_length(tokens, input_ids, attention_mask)[0]

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled vectors [B, D] of a batch of `counterpoint.data.texts.Sentences`."""
        return self(batch["input_ids"], batch["attention_mask"]).pooled

    def stock(self) -> "TextEncoder":
        """The same encoder as an ordinary transformers model, which is what other programs can load.

        Raises:
            InputError: there is no such model.
        """
        return self


def marks_pairs(encoder: TextEncoder) -> bool:
    """Whether the model of `encoder` was made to tell the sentences of a pair apart by segment, as BERT does.

    RoBERTa and DeBERTa go by the separator alone.
    """
    if getattr(encoder.model.config, "type_vocab_size", 0) < 2 or encoder.tokenizer.sep_token_id is None:
        return False
    return 1 in encoder.tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"]


def by_length(
    function: Callable[..., tuple[Tensor, ...]], input_ids: Tensor, attention_mask: Tensor, *more: Tensor
) -> tuple[Tensor, ...]:
    """What `function` makes of rows of mixed length, without most of the padding.

    Rows go through in four groups of like length, each cut to its own longest row; what a row becomes must not depend on
    its group. A GPU takes short rows all at once, because it waits for kernels rather than for padding.

    Args:
        function: takes ids and mask [b, L] and what else there is, returns tensors [b, ...].
        input_ids: [B, L].
        attention_mask: [B, L].
        more: further tensors [B, L, ...].
    """
    short = input_ids.shape[1] <= 64 and input_ids.device.type != "cpu"
    if len(input_ids) < 32 or short:
        return function(input_ids, attention_mask, *more)
    lengths = attention_mask.sum(1)
    order = lengths.argsort(stable=True)
    groups = [(at, int(lengths[at[-1]])) for at in order.chunk(4)]
    columns = (input_ids, attention_mask, *more)
    parts = [function(*(column[at, :longest] for column in columns)) for at, longest in groups]
    back = order.argsort()
    return tuple(torch.cat(results)[back] for results in zip(*parts, strict=True))


def pool(out: Any, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector [B, D] a row from what a transformers model returned."""
    if pooling in ("cls", "cls-before-pooler"):
        return out.last_hidden_state[:, 0]
    hidden = out.last_hidden_state
    if pooling == "first-last":
        hidden = (out.hidden_states[1] + hidden) / 2
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def text(
    name: str | dict[str, Any] = "bert-base-uncased",
    *,
    pooling: Pooling | None = None,
    layers: int | None = None,
    max_length: int | None = None,
    dropout: float | None = None,
    tokenizer: Any = None,
) -> TextEncoder:
    """Build a text encoder.

    Args:
        name: a model of the hub; a local folder, also one that sentence-transformers wrote; "package:NAME/FOLDER" for a
            folder inside an installed Python package; "transformer" or "transformer-W-L" (ours: L fresh layers of width
            W that read bytes, 128 and 2 by default); or the configuration of a fresh model as a dictionary for
            ``transformers.AutoConfig.for_model`` (``model_type`` "bert" unless it says another; its ``tokenizer`` entry
            names a folder or hub model, of whose tokens a ``vocabulary`` entry keeps the first so many; else it reads bytes).
        pooling: see `TextEncoder`. None takes what a sentence-transformers folder says, "mean" for a fresh model (whose
            first token says nothing for a long time: it hardly learns with "cls"), and else "cls".
        layers: keep only the first so many layers.
        max_length: tokens that a sentence is cut to; None takes what the folder says, and else the model's limit.
        dropout: of hidden states and attention; None keeps the configuration's.
        tokenizer: a ready one instead of the model's own.

    Raises:
        InputError: nothing of that name, an option the model cannot have, a tokeniser that cannot pad, or transformers
            is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise InputError("text encoders need transformers: pip install counterpoint[language]") from error
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f'no pooling named "{pooling}"; there are {", ".join(POOLINGS)}')
    if ours := re.fullmatch(r"transformer(?:-(\d+)-(\d+))?", name) if isinstance(name, str) else None:
        width, depth = int(ours[1] or 128), int(ours[2] or 2)
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
        name = {**sizes, "num_attention_heads": max(1, width // 32), "name": name}
    fresh, source = isinstance(name, dict), ""
    if isinstance(name, dict):
        config, tokenizer, title = _fresh(name, tokenizer)
    else:
        title, source = name, place_of(name)
        if pooling is None:
            pooling = folders_pooling(Path(source).expanduser())
        if max_length is None:
            max_length = _folders_length(Path(source).expanduser())
        config = loaded(source, lambda: transformers.AutoConfig.from_pretrained(source))
        tokenizer = tokenizer or loaded(source, lambda: transformers.AutoTokenizer.from_pretrained(source))
        _announce_mode(tokenizer)
    depth = getattr(config, "num_hidden_layers", 0)
    if layers is not None:
        if not 1 <= layers <= depth:
            raise InputError(f"{title} has {depth} layers, so layers must lie between 1 and {depth}, not {layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if dropout is not None:
        set_dropout(config, dropout, title)
    with quiet():
        if fresh:
            model = transformers.AutoModel.from_config(config)
        else:
            # the checkpoint's own precision may be half, which training from it does not survive
            options = {"config": config, "dtype": torch.float32}
            model = loaded(source, lambda: transformers.AutoModel.from_pretrained(source, **options))
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # without gradient it would only confuse optimisers and exports
    return TextEncoder(model.train(), tokenizer, pooling or ("mean" if fresh else "cls"), max_length, title, fresh)


def _announce_mode(tokenizer: Any) -> None:
    """Let a tokeniser of UniXcoder begin each text as it was trained: <s> <encoder-only> </s>.

    Source: Guo et al. 2022 (arXiv 2203.03850); its tokeniser leaves the mode to the caller.
    """
    if UNIXCODER_MODE not in tokenizer.get_vocab() or not tokenizer.is_fast:
        return
    from tokenizers import processors

    start, end = tokenizer.cls_token, tokenizer.sep_token
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (start, UNIXCODER_MODE, end)]
    form = f"{start} {UNIXCODER_MODE} {end} $A {end}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=marks)


def added_tokens(encoder: TextEncoder, names: Sequence[str], like: Sequence[Sequence[int]]) -> list[int]:
    """Ids of special tokens that the encoder's vocabulary gets; tokens that it has already keep their meaning.

    Args:
        encoder: is changed in place; its tokeniser is replaced by one that knows them, since others may hold it.
        names: such as "[code identifier]": no text should spell them.
        like: for each the ids whose mean embedding it begins with.
    """
    from transformers import AddedToken

    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
    known = encoder.tokenizer.get_vocab()
    encoder.tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = encoder.tokenizer.convert_tokens_to_ids([*names])
    with quiet():
        if len(encoder.tokenizer) > encoder.model.get_input_embeddings().num_embeddings:
            encoder.model.resize_token_embeddings(len(encoder.tokenizer), mean_resizing=False)
    with torch.no_grad():
        table = encoder.model.get_input_embeddings().weight
        for name, number, models in zip(names, ids, like, strict=True):
            if name not in known:
                table[number] = table[[*models]].mean(0)
    return ids


def tanh_head(dim: int) -> nn.Sequential:
    """Linear - tanh, [B, dim] -> [B, dim], initialised as BERT is: SimCSE's head.

    Source: Gao et al. 2021 (arXiv 2104.08821), section 6.3; initial weights as released.
    """
    linear = nn.Linear(dim, dim)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.Tanh())


def byte_tokenizer(max_length: int = 512) -> Any:
    """A tokeniser that needs no vocabulary: each byte of the UTF-8 text is a token, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special.values(), "[MASK]", *letters])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, mask_token="[MASK]", model_max_length=max_length, **special,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def first_tokens(tokenizer: Any, count: int) -> Any:
    """A WordPiece tokeniser that knows only the first `count` tokens of another and spells other words in pieces of these.

    BERT's tokens stand in the order of their frequency. A small model on a small machine spends most of its time on the rest.

    Raises:
        InputError: no WordPiece, more tokens than it has, or so few that its special tokens or its letters are not among them.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    if core["model"].get("type") != "WordPiece":
        raise InputError("vocabulary cuts the tokens of a WordPiece tokeniser, and this is none: leave it out")
    vocabulary = core["model"]["vocab"]
    # all lower-case letters inside a word, without which many a word would be unknown
    needed = [f"{core['model']['continuing_subword_prefix']}{letter}" for letter in string.ascii_lowercase]
    least = 1 + max([*tokenizer.all_special_ids, *(vocabulary[piece] for piece in needed if piece in vocabulary)])
    if not least <= count <= len(vocabulary):
        raise InputError(
            f"vocabulary must lie between {least:,} and the {len(vocabulary):,} tokens there are, not {count}"
        )
    core["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < count}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"], **tokenizer.special_tokens_map,
    )  # fmt: skip


def _fresh(settings: dict[str, Any], tokenizer: Any) -> tuple[Any, Any, str]:
    import transformers

    settings = dict(settings)
    kind, title = settings.pop("model_type", "bert"), settings.pop("name", UNNAMED)
    source, most = settings.pop("tokenizer", None), settings.pop("vocabulary", None)
    if tokenizer is None and source is not None:
        place = place_of(source)
        tokenizer = loaded(place, lambda: transformers.AutoTokenizer.from_pretrained(place))
        tokenizer = tokenizer if most is None else first_tokens(tokenizer, most)
    if tokenizer is None:
        tokenizer = byte_tokenizer(settings.get("max_position_embeddings", 512))
    settings = {"vocab_size": len(tokenizer), **settings}
    if settings["vocab_size"] < len(tokenizer):
        raise InputError(f"vocab_size is {settings['vocab_size']}, but the tokeniser has {len(tokenizer)} tokens")
    if tokenizer.pad_token_id is not None:
        settings.setdefault("pad_token_id", tokenizer.pad_token_id)
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
    except (ValueError, TypeError) as error:
        raise InputError(
            f'"{kind}" with {settings} is no configuration transformers knows: {one_line(error)}'
        ) from error
    heads = getattr(config, "num_attention_heads", 1)
    if config.hidden_size % heads:
        raise InputError(f"hidden_size {config.hidden_size} cannot be shared by {heads} attention heads evenly")
    return config, tokenizer, title


def place_of(name: str) -> str:
    """Where the folder lies that ``package:NAME/FOLDER`` means; any other name is itself."""
    if not name.startswith("package:"):
        if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
            raise InputError(f"there is no folder {name}")
        return name
    from importlib.util import find_spec

    package, _, inside = name.removeprefix("package:").partition("/")
    found = find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the Python package {package} is not installed: pip install {package.replace('_', '-')}")
    return str(Path(next(iter(found.submodule_search_locations))) / inside)


def folders_pooling(folder: Path) -> Pooling | None:
    """What a sentence-transformers folder asks for; None for any other."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    settings = json.loads(path.read_text())
    if settings.get("pooling_mode") == "mean" or settings.get("pooling_mode_mean_tokens"):
        return "mean"
    if settings.get("pooling_mode") == "cls" or settings.get("pooling_mode_cls_token"):
        return "cls"
    raise InputError(f"{path} asks for a pooling that we do not have; choose one of {', '.join(POOLINGS)}")


def _folders_length(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    return json.loads(path.read_text()).get("max_seq_length") if path.is_file() else None


def loaded(name: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = Path(name).expanduser()
        if where.is_dir():
            raise InputError(f"{name} holds no transformers model that can be read: {one_line(error)}") from error
        raise InputError(
            f"there is no folder {name}, and the hub's model of that name cannot be had here ({one_line(error)}); give a "
            "local folder, or transformer-128-2 for a fresh small model"
        ) from error


def positions_of(config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:
        return UNLIMITED
    if config.model_type == "mpnet":
        return most - 2  # it counts from 2, whatever the padding id says
    if config.model_type in SHIFTED_POSITIONS:
        return most - (config.pad_token_id or 0) - 1
    return most


def set_dropout(config: Any, dropout: float, title: str) -> None:
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must lie between 0 and 1, not {dropout}")
    known = [name for name in DROPOUTS if isinstance(getattr(config, name, None), float | int)]
    if not known:
        raise InputError(f"the configuration of {title} has no dropout that we know; leave dropout out")
    for name in known:
        setattr(config, name, dropout)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of weights that were left out (we cut layers and poolers on purpose)."""
    from transformers.utils import logging as reports

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()
