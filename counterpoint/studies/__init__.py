"""Studies: a paper's claim as paired runs, and fair comparisons of any methods."""

from counterpoint.studies.compare import Comparison, compare
from counterpoint.studies.reproduce import Study, entries, reproduce

__all__ = ["Comparison", "Study", "compare", "entries", "reproduce"]
