"""Memory: where further negatives and targets come from. Modules with buffers, so that a checkpoint holds them."""

from counterpoint.memory.momentum import MomentumEncoder
from counterpoint.memory.queue import Queue

__all__ = ["MomentumEncoder", "Queue"]
