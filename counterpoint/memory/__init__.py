"""Memory: where further negatives and targets come from. Modules with buffers, so that a checkpoint holds them."""

from counterpoint.memory.clusters import Clusterings, intersection, kmeans
from counterpoint.memory.mined import MinedNegatives, Mining
from counterpoint.memory.momentum import MomentumEncoder
from counterpoint.memory.prototypes import Prototypes
from counterpoint.memory.queue import Queue

__all__ = [
    "Clusterings",
    "MinedNegatives",
    "Mining",
    "MomentumEncoder",
    "Prototypes",
    "Queue",
    "intersection",
    "kmeans",
]
