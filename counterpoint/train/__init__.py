"""Loops: the base Method, optimisers, checkpoints, `fit` and exact `resume`."""

from counterpoint.train.loop import fit, resume
from counterpoint.train.method import Method
from counterpoint.train.run import Run

__all__ = ["Method", "Run", "fit", "resume"]
