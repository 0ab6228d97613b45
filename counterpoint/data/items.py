"""What training asks of data, whatever its family."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Items(Protocol):
    """Resident items: rows that can be gathered into a batch."""

    name: str

    @property
    def lengths(self) -> Tensor | None:
        """int64 ``[N]`` where rows differ in length: embedding then runs in order of length, without padding waste."""

    @property
    def nbytes(self) -> int:
        """Size of the tensors, in bytes."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index` (int64 ``[B]``) as a batch on the items' device; always holds ``"index"``."""

    def to(self, device: torch.device) -> Any:
        """The same items on another device."""

    def subset(self, index: Any) -> Any:
        """The items at `index`."""
