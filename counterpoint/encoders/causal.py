"""Causal language models: any of transformers by name, folder or configuration, with their states, early exits and cache."""

import inspect
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterpoint.encoders.text import loaded, place_of, positions_of, quiet, set_dropout
from counterpoint.errors import InputError, one_line

END, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 258
"""Tokens of a tokeniser that knows bytes and these two alone."""

CACHES = ("cache", "past_key_values", "cache_params")
"""What different versions and models of transformers call their cache."""


class Answer(NamedTuple):
    """What a model makes of tokens.

    Attributes:
        logits: ``[B, T, V]`` of the token that follows each (of the last T where only those were asked for).
        hidden: ``[B, L, E]``, the last layer's states behind its final normalisation: what the head reads.
        layers: states ``[B, L, E]`` of the embeddings and of every layer; the last is `hidden`.
        cache: of transformers, if it was asked for.
    """

    logits: Tensor
    hidden: Tensor
    layers: tuple[Tensor, ...]
    cache: Any = None


class CausalLM(nn.Module):
    """A transformers model that predicts the next token.

    Attributes:
        model: the transformers model.
        tokenizer: its tokeniser. One that learns ("bpe-N") knows bytes until `learn` has seen text; it is part of the state.
        dim: width of the states.
        depth: number of layers.
        positions: most tokens that the model can take.
        vocabulary: number of tokens that it has scores for.
        end: id of the token that ends a text; None if there is none.
        name: what it was built from.
        fresh: whether its weights are random ones.
        learns: tokens that its tokeniser is to learn; 0 for none.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, fresh: bool = False, learns: int = 0):
        super().__init__()
        self.model, self.tokenizer, self.name, self.fresh, self.learns = model, tokenizer, name, fresh, learns
        text = model.config.get_text_config()
        self.dim: int = text.hidden_size
        self.depth: int = text.num_hidden_layers
        self.positions = positions_of(text)
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        if len(tokenizer) > self.vocabulary:
            raise InputError(f"{name} scores {self.vocabulary:,} tokens, but its tokeniser has {len(tokenizer):,}")
        self.takes = set(inspect.signature(model.forward).parameters)
        self.cache_name = next((key for key in CACHES if key in self.takes), None)

    @property
    def end(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def filler(self) -> int:
        """Id that fills rows up; whatever it is, it is masked."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    @property
    def start(self) -> int | None:
        """Id that a text without a prompt starts from: that of the beginning, or that which ends the text before it."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> Answer:
        """Read tokens ``[B, L]``.

        Args:
            input_ids: the tokens.
            attention_mask: ``[B, S + L]`` with the S tokens of the cache, 0 for padding; or additive ``[B, 1, L, S + L]``.
            position_ids: ``[B, L]``; by default counted by the mask, so that padding on the left moves nothing.
            cache: of an earlier answer; it is changed.
            use_cache: return a cache.
            last_only: logits of the last token only.
        """
        options: dict[str, Any] = {"use_cache": use_cache}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
            if position_ids is None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if "position_ids" in self.takes and position_ids is not None:
            options["position_ids"] = position_ids
        if cache is not None:
            options[str(self.cache_name)] = cache
            recurrent = getattr(cache, "is_linear", None)
            if recurrent and all(recurrent):  # its states hold the past: a mask is one of the new tokens
                options["attention_mask"] = options["attention_mask"][:, -input_ids.shape[1] :]
        if last_only and "logits_to_keep" in self.takes:
            options["logits_to_keep"] = 1
        out = self.model(input_ids=input_ids, output_hidden_states=True, return_dict=True, **options)
        kept = next((found for key in CACHES if (found := out.get(key)) is not None), None) if use_cache else None
        logits = out.logits[:, -1:] if last_only else out.logits
        return Answer(logits, out.hidden_states[-1], out.hidden_states, kept)

    def exit(self, layers: tuple[Tensor, ...], layer: int, at: Any = slice(None)) -> Tensor:
        """Logits ``[B, L, V]`` if the model ended after `layer`: its final normalisation and its head on that layer's states.

        The last layer's states have been normalised already, and are not again.

        Args:
            layers: of an `Answer`.
            layer: 0 for the embeddings, up to `depth`.
            at: which tokens.

        Raises:
            InputError: no such layer, or a model whose scores are not its head on normalised states.
        """
        if not 0 <= layer <= self.depth:
            raise InputError(f"{self.name} has layers 0 (its embeddings) to {self.depth}, and no layer {layer}")
        states = layers[layer][:, at]
        if layer < self.depth and self.final_norm is not None:
            states = self.final_norm(states)
        return self.model.get_output_embeddings()(states)

    @cached_property
    def final_norm(self) -> nn.Module | None:
        """The normalisation between the last layer and the head, found by what it returns; None where there is none.

        Raises:
            InputError: the scores are not the head's on normalised states, so that no other layer can take its place.
        """
        found: dict[str, Tensor] = {}

        def remember(name: str) -> Any:
            def hook(module: nn.Module, given: Any, returned: Any) -> None:
                if isinstance(returned, Tensor):
                    found[name] = returned

            return hook

        # what lies inside a layer has its number in its name
        outside = [(n, m) for n, m in self.model.named_modules() if n and not any(p.isdigit() for p in n.split("."))]
        norms = [(n, m) for n, m in outside if "norm" in type(m).__name__.lower()]
        hooks = [module.register_forward_hook(remember(name)) for name, module in norms]
        training = self.model.training
        device = self.model.get_input_embeddings().weight.device
        try:
            with torch.no_grad():
                answer = self.eval()(torch.arange(3, device=device)[None] % self.vocabulary)
                again = self.model.get_output_embeddings()(answer.hidden)
        except RuntimeError:
            again = answer.logits + 1
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        if again.shape != answer.logits.shape or not torch.allclose(again, answer.logits, rtol=1e-5, atol=1e-7):
            raise InputError(
                f"{self.name} makes its scores by more than a head on its last states, so it cannot be left early; take another "
                "model, or a strategy without lower layers"
            )
        for name, module in norms:
            if name in found and found[name].shape == answer.hidden.shape and torch.equal(found[name], answer.hidden):
                return module
        return None

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean of the last layer's states ``[B, E]`` over the tokens of each text."""
        mask = batch["attention_mask"]
        hidden = self(batch["input_ids"], mask).hidden
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    @property
    def learned(self) -> bool:
        """Whether there is nothing (more) to learn for the tokeniser."""
        return not self.learns or len(self.tokenizer) > BYTES

    def learn(self, texts: Iterable[str]) -> None:
        """Let the tokeniser learn its tokens from `texts`, the same ones from the same texts."""
        if self.learns:
            self.tokenizer = pair_encoding(texts, self.learns)

    def get_extra_state(self) -> Tensor:
        """What the tokeniser has learned, so that a checkpoint is whole without the texts."""
        words = self.tokenizer.backend_tokenizer.to_str() if self.learns else ""
        return torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8) if words else torch.zeros(0).byte()

    def set_extra_state(self, state: Tensor) -> None:
        if self.learns and len(state):
            from tokenizers import Tokenizer

            self.tokenizer = _wrapped(Tokenizer.from_str(bytes(state.cpu().tolist()).decode()))


def causal(
    name: str | dict[str, Any] = "gpt2",
    *,
    tokenizer: str | None = None,
    positions: int = 256,
    dropout: float | None = None,
) -> CausalLM:
    """Build a causal language model.

    Args:
        name: a model of the hub; a local folder; "package:NAME/FOLDER"; "decoder" or "decoder-W-L" (ours: a GPT-2 of L fresh
            layers of width W, 128 and 4 by default); or the configuration of a fresh model as a dictionary for
            ``transformers.AutoConfig.for_model`` (``model_type`` "gpt2" unless it says another).
        tokenizer: of a fresh model: "bpe-N", N tokens of byte pairs that are learned from the training text; "bytes"; or a hub
            model or folder whose tokeniser is taken. None is "bpe-4096". Any other model has its own.
        positions: most tokens that a fresh model can take.
        dropout: None keeps the configuration's (0 for "decoder").

    Raises:
        InputError: nothing of that name, or an option that the model cannot have.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise InputError("language models need transformers: pip install counterpoint[language]") from error
    ours = re.fullmatch(r"decoder(?:-(\d+)-(\d+))?", name) if isinstance(name, str) else None
    if ours:
        width, depth = int(ours[1] or 128), int(ours[2] or 4)
        sizes = {"n_embd": width, "n_layer": depth, "n_head": max(1, width // 32)}
        name = {**sizes, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "name": str(name)}
    if isinstance(name, dict):
        return _fresh(name, tokenizer, positions, dropout)
    if tokenizer is not None:
        raise InputError(f"{name} has a tokeniser of its own: leave tokenizer out")
    source = place_of(name)
    config = loaded(source, lambda: transformers.AutoConfig.from_pretrained(source))
    if dropout is not None:
        set_dropout(config, dropout, name)
    with quiet():
        options = {"config": config, "dtype": torch.float32}  # half precision would not survive training
        model = loaded(source, lambda: transformers.AutoModelForCausalLM.from_pretrained(source, **options))
        own = loaded(source, lambda: transformers.AutoTokenizer.from_pretrained(source))
    return CausalLM(model.train(), own, name)


def _fresh(settings: dict[str, Any], tokenizer: str | None, positions: int, dropout: float | None) -> CausalLM:
    import transformers

    settings = dict(settings)
    kind, title = settings.pop("model_type", "gpt2"), settings.pop("name", "a fresh model")
    source, learns = tokenizer or "bpe-4096", 0
    if found := re.fullmatch(r"bpe-(\d+)", source):
        learns = int(found[1])
        if learns < 300:
            raise InputError(f"bpe-{learns} has too few tokens: 256 bytes, two special ones, and some pairs")
    if learns or source == "bytes":
        made = pair_encoding((), BYTES)
    else:
        place = place_of(source)
        made = loaded(place, lambda: transformers.AutoTokenizer.from_pretrained(place))
    settings = {"vocab_size": learns or len(made), "max_position_embeddings": positions, **settings}
    if kind == "gpt2":
        settings["n_positions"] = settings.pop("max_position_embeddings")
    for key, token in (
        ("eos_token_id", made.eos_token_id),
        ("bos_token_id", made.bos_token_id),
        ("pad_token_id", made.pad_token_id),
    ):
        settings.setdefault(key, token)
    try:
        config = transformers.AutoConfig.for_model(kind, **settings)
        if dropout is not None:
            set_dropout(config, dropout, title)
        with quiet():
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError) as error:
        raise InputError(f'"{kind}" with {settings} is no language model of transformers: {one_line(error)}') from error
    return CausalLM(model.train(), made, title, fresh=True, learns=learns)


def pair_encoding(texts: Iterable[str], size: int) -> Any:
    """A byte-level tokeniser of at most `size` tokens: bytes, and the pairs that are most frequent in `texts`.

    Source: Sennrich et al. 2016 (arXiv 1508.07909); on bytes: Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", section 2.2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END, PAD], show_progress=False, min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return _wrapped(core)


def _wrapped(core: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, bos_token=END, pad_token=PAD, model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
