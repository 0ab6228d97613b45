"""CoCoSoDa: queries and code in one space, with queues, a momentum encoder, and soft changes of tokens by their syntax."""

from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.contrast.multimodal import Queues, multimodal_contrast, multimodal_pairs
from counterpoint.data import code, texts
from counterpoint.encoders.masked import mask_of
from counterpoint.encoders.text import Pooling, added_tokens
from counterpoint.errors import InputError
from counterpoint.memory import MomentumEncoder, Queue
from counterpoint.methods.language.simcse import SimCSE, columns
from counterpoint.train.method import Batch
from counterpoint.views.text import soft_replace, stack

Rows = tuple[Tensor, Tensor]


class CoCoSoDa(SimCSE):
    r"""A query finds its code and code its query, also among thousands of earlier ones, and each finds its own changed copy.

    .. math::
        \mathcal{L} = \frac1{6B} \sum_i \Big[ \underbrace{\ell(c_i, q, Q_q) + \ell(c_i, q', Q_{q'}) + \ell(q_i, c, Q_c)
        + \ell(q_i, c', Q_{c'})}_{\text{between}} + \underbrace{\ell(c_i, c', Q_{c'}) + \ell(q_i, q', Q_{q'})}_{\text{within}}
        \Big], \qquad
        \ell(x_i, P, Q) = -\log \frac{e^{x_i \cdot P_i / \tau}}
        {\sum_j e^{x_i \cdot P_j / \tau} + \sum_m e^{x_i \cdot Q_m / \tau}}

    One encoder makes the unit vectors c and q of code and query; a slowly moving copy of it makes c' and q', of augmented inputs.
    Each kind of vector has a queue Q of the last K, which are further negatives. The augmentation is soft: a tenth of the
    tokens is masked, or replaced by the name of its syntactic type (`counterpoint.data.code.KINDS`); steps take turns between
    masking code and query, replacing tokens of code by their types, replacing those of one type drawn for the step, and masking
    those of one type.

    When to use it: to search code with words, above all as a further pretraining of a code model on pairs without labels.
    The data: a table with columns ``query`` (or ``docstring``) and ``code``, or named pairs (``--data cosqa-pairs``). An index
    of a run holds the code, and what one searches for is a question::

        counterpoint train cocosoda-fresh --data pairs.csv --run runs/code
        counterpoint evaluate runs/code --data held_out.csv
        counterpoint index runs/code --data functions.csv
        counterpoint search runs/code/index "read a csv file line by line"

    The paper then fine-tunes on each language with the plain loss: ``counterpoint train simcse-unixcoder --encoder FOLDER``, of
    a run exported for sentence-transformers.

    Defaults: UniXcoder, mean of the tokens, 256 tokens of code and 128 of a query, K = 1,024, momentum 0.999, a tenth of the
    tokens, AdamW at 2e-5, batch 128, 100,000 steps. The released temperature is 0.07 and its logits are multiplied by another 20:
    0.0035, which fits a model that is nearly right already. From scratch, or with a small encoder, take ``logit_scale: 1``.

    Where codes differ: the released script does not use the terms within a modality (``intra: false``), and its data
    lack types, so that three of four steps augment nothing: ``augment="released"``. Its operators for one type look for tokens
    that are type names already; ours look for tokens of that type, as meant. Types there come from a parser of each language,
    about 50 of them; here seven come from Python's tokeniser, and from a lexer for any language. Type tokens are seen by the
    momentum copy alone and so never learn; there they start at random, here as the mean of the words of their names. Code is
    read as it is, there with one space between its tokens. There a language is drawn for each step by the 0.7th power of its
    size; here batches are mixed, or (``batches="domain"``) of one language each, as many as it has pairs for.

    Source: Shi et al. 2023, "CoCoSoDa: Effective Contrastive Learning for Code Search" (ICSE; arXiv 2204.03293);
    DeepSoftwareAnalytics/CoCoSoDa at 2f2bf8e.

    Args:
        encoder: as in SimCSE. UniXcoder's texts begin with <encoder-only>.
        pooling: as in SimCSE.
        layers: keep only the encoder's first so many layers.
        max_length: tokens that code is cut to in training.
        query_length: tokens that a query is cut to in training.
        dropout: of the encoder, and of its copy; None keeps its own.
        head: SimCSE's train-only head; the paper has none.
        temperature: of the softmax.
        logit_scale: that the logits are multiplied by besides.
        queue: K, keys kept of each of the four kinds; 0 for none.
        momentum: of the copy.
        augment: "types" takes turns as above, "mask" masks code and query in every step, "released" in every fourth and does
            nothing else, "none" leaves the copy's inputs as they are.
        rate: share of the tokens that is chosen for a change.
        intra: whether the terms within a modality count.
        batches: "mixed", or of one "domain" (the data's column ``domain``, such as the language) each.
    """

    searched = "positive"
    types: Tensor
    special: Tensor

    def __init__(
        self,
        encoder: str | dict[str, Any] = "microsoft/unixcoder-base",
        pooling: Pooling | None = "mean",
        layers: int | None = None,
        max_length: int = 256,
        query_length: int = 128,
        dropout: float | None = None,
        head: bool = False,
        temperature: float = 0.07,
        logit_scale: float = 20.0,
        queue: int = 1024,
        momentum: float = 0.999,
        augment: Literal["types", "mask", "released", "none"] = "types",
        rate: float = 0.1,
        intra: bool = True,
        batches: Literal["mixed", "domain"] = "mixed",
    ):
        if not (temperature > 0 and logit_scale > 0 and queue >= 0 and 0 <= rate <= 1):
            raise InputError(
                "temperature and logit_scale are positive, queue is 0 or more and rate lies between 0 and 1, got "
                f"{temperature}, {logit_scale}, {queue} and {rate}"
            )
        for name, value, known in (
            ("augment", augment, ("types", "mask", "released", "none")),
            ("batches", batches, ("mixed", "domain")),
        ):
            if value not in known:
                raise InputError(f'{name} must be one of {", ".join(known)}, not "{value}"')
        super().__init__(
            encoder, pooling, layers, max_length, dropout=dropout, head=head, temperature=temperature / logit_scale
        )
        if not 3 <= query_length <= self.encoder.positions:
            raise InputError(f"query_length must lie between 3 and {self.encoder.positions}, not {query_length}")
        self.encoder.max_length = max(self.encoder.max_length, query_length)
        self.query_length, self.augment, self.rate, self.intra, self.batches = (
            query_length, augment, rate, intra, batches,
        )  # fmt: skip
        tokenizer = self.encoder.tokenizer
        self.vocabulary = len(tokenizer)
        fixed = {*tokenizer.all_special_ids, *tokenizer("")["input_ids"]}
        self.register_buffer("special", torch.tensor(sorted(fixed)), persistent=False)
        self.mask_token = None if augment == "none" else mask_of(self.encoder)
        if augment == "types":
            names = [f"[code {kind}]" for kind in code.KINDS]
            like = [tokenizer(f"code {kind}", add_special_tokens=False)["input_ids"] for kind in code.KINDS]
            self.register_buffer("types", torch.tensor(added_tokens(self.encoder, names, like)), persistent=False)
        self.key_encoder, self.key_head = MomentumEncoder(self.encoder, momentum), MomentumEncoder(self.head, momentum)
        self.kept = queue
        self.queues = torch.nn.ModuleList(Queue(self.heads.width, queue) for _ in Queues._fields if queue)

    # ---- data -------------------------------------------------------------------------------------------------------

    def used(self, rows: texts.Texts) -> texts.Texts:
        if "positive" not in rows.columns or rows.score is not None:
            raise InputError(
                f"{rows.name} holds no pairs of query and code: give a table with the columns query and code, or named pairs "
                "such as cosqa-pairs"
            )
        rows = rows.positives()
        pair = {part: rows.columns[part] for part in ("anchor", "positive")}
        return texts.Texts(pair, name=rows.name, domain=rows.domain, domains=rows.domains)

    def tokenised(self, rows: texts.Texts) -> texts.Sentences:
        lengths = {"anchor": self.query_length, "positive": self.max_length}
        kinds = {"positive": code.kinds} if self.augment == "types" else None
        return texts.tokenise(rows, self.encoder.tokenizer, lengths, kinds=kinds)

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> texts.Sentences:
        items = self.read(data, limit=limit, seed=seed)
        if self.kept and self.kept >= len(items):
            raise InputError(
                f"{items.name} holds {len(items):,} pairs and the queue {self.kept:,}, so that a pair's own earlier vectors "
                f"would be its negatives: give --queue {len(items) // 4} or less"
            )
        return items

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        return items.domain if self.batches == "domain" else None

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        query, source = self.project(*columns(batch))
        key_query, key_source = self.keys(*self.augmented(batch, self.global_step))
        vectors = source, query, key_source, key_query
        queues: Any = self.queues
        earlier = Queues(*(queue.keys for queue in queues))
        self.watch(query, source, multimodal_pairs(*vectors, earlier)[2])
        loss = multimodal_contrast(*vectors, earlier, temperature=self.temperature, intra=self.intra)
        for queue, rows in zip(queues, vectors, strict=False):
            queue.enqueue(contrast.unit(rows.detach()))
        return loss

    @torch.no_grad()
    def keys(self, *sentences: Rows) -> tuple[Tensor, ...]:
        """[B, D] for each (ids, mask) [B, L], as the momentum copy sees them, its dropout on."""
        copy: Any = self.key_encoder.module
        z = self.key_head(copy.pooled(*stack(list(sentences), self.encoder.pad)))
        return z.tensor_split(len(sentences))

    def augmented(self, batch: Batch, step: int) -> tuple[Rows, Rows]:
        """(ids, mask) of queries and of code, changed as it is this step's turn."""
        (query, query_mask), (source, source_mask) = columns(batch)
        turn = {"types": step % 4, "mask": 0, "released": 0 if step % 4 == 0 else None, "none": None}[self.augment]
        if turn == 0:
            query, source = self.masked(query, query_mask), self.masked(source, source_mask)
        elif turn is not None:
            kinds = batch["positive_kinds"]
            allowed = kinds >= 0
            if turn > 1:  # only tokens of one type
                allowed = kinds == torch.randint(len(self.types), (1,), device=kinds.device)
            into = self.mask_token if turn == 3 else self.types[kinds.clamp(min=0)]
            assert into is not None
            source = soft_replace(source, allowed, into, rate=self.rate)
        return (query, query_mask), (source, source_mask)

    def masked(self, ids: Tensor, mask: Tensor) -> Tensor:
        allowed = mask.bool() & ~torch.isin(ids, self.special)
        assert self.mask_token is not None
        others = torch.randint(self.vocabulary, ids.shape, device=ids.device)
        return soft_replace(ids, allowed, self.mask_token, rate=self.rate, random_ids=others)

    def after_step(self) -> None:
        self.key_encoder.update(self.encoder)
        self.key_head.update(self.head)
