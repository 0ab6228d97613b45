"""The SASRec encoder: a small causal Transformer over the items that a user chose."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.encoders.image import Features
from counterpoint.errors import InputError

MASKED = -10000.0
"""Added to the score of a key that does not count. Finite, so that a row without any key averages instead of failing."""


class SASRecEncoder(nn.Module):
    """From histories ``item_seq`` [B, L], ``item_seq_len`` [B] to `Features`: pooled is the state after the last item.

    Item plus position embedding, layer norm, dropout; then Transformer blocks with the norm after each residual sum (as in
    BERT), exact GELU, and keys that are neither later nor padding (0). On a CPU only items, no padding, pass through
    the dense layers; the result is the same.

    All weights start as N(0, 0.02^2) and all biases as 0, the embedding of the padding included: row 0 is a class of the
    softmax over items that is never right, and what a masked last place reads. One more spare row at the end of the table
    (a mask token) is kept as released and used by nothing here.

    Source: Kang and McAuley 2018 (arXiv 1808.09781); with the choices of QinHsiu/MCLRec at bc8d622 (RecBole's SASRec).

    Args:
        items: number of items, codes 1 ... items; 0 leaves the table to the first `name_items`.
        dim: length of the vectors.
        layers: Transformer blocks.
        heads: attention heads.
        hidden: width of the feed-forward layer.
        dropout: of embeddings and block outputs.
        attention_dropout: of attention weights.
        max_length: longest history.

    Attributes:
        item: the embedding of items [items + 2, dim].
        dim: length of the pooled vector.

    Raises:
        InputError: sizes that make no sense.
    """

    names: Tensor

    def __init__(
        self,
        items: int,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        hidden: int = 256,
        dropout: float = 0.5,
        attention_dropout: float = 0.5,
        max_length: int = 50,
    ):
        super().__init__()
        if items < 0 or min(dim, layers, heads, hidden, max_length) < 1 or dim % heads:
            raise InputError(
                f"a sequence encoder needs positive sizes and a dim that heads divides, not items={items}, dim={dim}, "
                f"layers={layers}, heads={heads}, hidden={hidden}, max_length={max_length}"
            )
        self.name, self.dim, self.max_length = "sasrec", dim, max_length
        # the table draws from its own seed, so that it is the same now or once the number of items is known
        self.table_seed = int(torch.randint(2**62, ()))
        self.position = nn.Embedding(max_length, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, dropout, attention_dropout) for _ in range(layers))
        self.apply(_initialise)
        self.item: nn.Embedding | None = None
        self.register_buffer("names", torch.empty(0, dtype=torch.uint8))
        if items:
            self._make_table(items)

    @property
    def items(self) -> int:
        """Number of items, 0 while it is not known."""
        return 0 if self.item is None else self.item.num_embeddings - 2

    @property
    def table(self) -> Tensor:
        """The vectors of padding (row 0) and items: [items + 1, dim].

        Raises:
            InputError: there is no table yet.
        """
        if self.item is None:
            raise InputError("how many items there are is not known yet: read data first, or pass item_count=")
        return self.item.weight[:-1]

    @property
    def catalogue(self) -> tuple[str, ...]:
        """Names of the items, in the order of their codes from 1; () while they are not known."""
        return tuple(bytes(self.names.tolist()).decode().split("\0")) if len(self.names) else ()

    def name_items(self, catalogue: Sequence[str]) -> None:
        """Remember which item has which code (the checkpoint then holds it), and make the table if there is none.

        Raises:
            InputError: another number of items than the table has.
        """
        if self.item is None:
            self._make_table(len(catalogue))
        if len(catalogue) != self.items:
            raise InputError(f"the encoder was built for {self.items:,} items, but the data has {len(catalogue):,}")
        names = bytearray("\0".join(name.replace("\0", "") for name in catalogue), "utf-8")
        self.names = torch.frombuffer(names, dtype=torch.uint8).clone().to(self.names.device)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled vectors [B, D]."""
        return self(batch["item_seq"], batch["item_seq_len"]).pooled

    def forward(
        self, item_seq: Tensor, length: Tensor, *, tokens: bool = False, packed: bool | None = None
    ) -> Features:
        """States of histories.

        Args:
            item_seq: int64 [B, L], right-padded with 0.
            length: int64 [B], at least 1.
            tokens: return the state after every item too (``tokens`` [B, L, D]); without, the last block computes only
                what the pooled vector needs.
            packed: leave padding out of the dense layers, and cut it where no history of the batch reaches. None: on a
                CPU; elsewhere looking at the lengths would wait for the device. The result is the same.

        Raises:
            InputError: longer histories than the positions reach, or an empty one.
        """
        if self.item is None:
            raise InputError("how many items there are is not known yet: read data first, or pass item_count=")
        width = item_seq.shape[1]
        if packed is None:
            packed = item_seq.device.type == "cpu"
        if packed:
            if int(length.min()) < 1:
                raise InputError("a history without any item has no state: leave it out")
            item_seq = item_seq[:, : int(length.max())]
        batch, longest = item_seq.shape
        if longest > self.max_length:
            raise InputError(f"a history has {longest} items, but the encoder's positions end at {self.max_length}")
        place = torch.arange(longest, device=item_seq.device)
        inside = place < length[:, None]
        layout = Layout(batch, longest, inside.flatten().nonzero().flatten() if packed else None)
        last = length.cumsum(0) - 1 if packed else torch.arange(batch, device=length.device) * longest + length - 1
        seen = (place[:, None] >= place) & (item_seq != 0)[:, None]
        mask = torch.where(seen, 0.0, MASKED)[:, None]
        x = layout.pack(self.item(item_seq) + self.position.weight[:longest])
        x = self.dropout(self.norm(x))
        for number, block in enumerate(self.blocks):
            only = last if number + 1 == len(self.blocks) and not tokens else None
            x = block(x, mask, layout, length, only)
        if not tokens:
            return Features(x)
        states = layout.spread(x).masked_fill(~inside[:, :, None], 0)
        return Features(x[last], F.pad(states, (0, 0, 0, width - longest)))

    def _make_table(self, items: int) -> None:
        if items < 1:
            raise InputError("there are no items to embed")
        table = nn.Embedding(items + 2, self.dim, padding_idx=0)
        generator = torch.Generator().manual_seed(self.table_seed)
        nn.init.normal_(table.weight, std=0.02, generator=generator)
        self.item = table.to(self.position.weight.device)

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if prefix + "names" in state:
            self.names = torch.empty_like(state[prefix + "names"], device=self.names.device)
        if self.item is None and prefix + "item.weight" in state:
            self._make_table(len(state[prefix + "item.weight"]) - 2)
        super()._load_from_state_dict(state, prefix, *rest)


class Layout:
    """Where the items of a batch lie: packed [T, D] for dense layers, spread [B, L, D] for attention.

    Args:
        batch, longest: B and L.
        inside: places of the items in the flattened batch; None keeps the padding (T = B * L).
    """

    def __init__(self, batch: int, longest: int, inside: Tensor | None):
        self.batch, self.longest, self.inside = batch, longest, inside

    def pack(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.inside is None else x[self.inside]

    def spread(self, x: Tensor) -> Tensor:
        if self.inside is not None:
            x = x.new_zeros(self.batch * self.longest, x.shape[1]).index_copy(0, self.inside, x)
        return x.view(self.batch, self.longest, -1)


class Block(nn.Module):
    """Attention and feed-forward layer, each with dropout, residual sum and then layer norm."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.widen, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, layout: Layout, length: Tensor, only: Tensor | None) -> Tensor:
        """States [T, D] of packed items; with `only` [B], the places of the last items, just theirs [B, D]."""
        key, value = layout.spread(self.key_value(x)).chunk(2, dim=2)
        if only is None:
            query = layout.spread(self.query(x))
        else:
            x = x[only]
            query = self.query(x)[:, None]
            mask = mask.gather(2, (length - 1)[:, None, None, None].expand(-1, 1, 1, mask.shape[3]))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        rate = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), dropout_p=rate)
        context = context.transpose(1, 2).flatten(2)
        context = layout.pack(context) if only is None else context[:, 0]
        x = self.attention_norm(x + self.dropout(self.out(context)))
        return self.norm(x + self.dropout(self.narrow(F.gelu(self.widen(x)))))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
