"""Evaluation: named protocols that say how good vectors are. Arrays in, a small result out; none trains an encoder."""

from counterpoint.evaluate.protocols import (
    Result,
    bootstrap,
    geometry,
    knn,
    linear_probe,
    one_shot,
    own_classifier,
    raw_pixels,
    ridge_probe,
    scatter,
)

__all__ = [
    "Result",
    "bootstrap",
    "geometry",
    "knn",
    "linear_probe",
    "one_shot",
    "own_classifier",
    "raw_pixels",
    "ridge_probe",
    "scatter",
]
