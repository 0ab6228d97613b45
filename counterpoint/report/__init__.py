"""One run, one self-contained HTML page: what was trained, how well, how it got there, what it sees as alike."""

from counterpoint.report.page import write

__all__ = ["write"]
