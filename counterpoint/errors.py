"""Errors a person can act on: the command line prints their one sentence instead of a traceback."""

from collections.abc import Iterable


class CounterpointError(Exception):
    """What went wrong and what to do about it, in one sentence."""


class InputError(CounterpointError, ValueError):
    """Something handed in (data, an option, a tensor, a file) cannot be used."""


class NotFinite(InputError):
    """A tensor holds NaN or infinite values."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``'; did you mean X?'`` for the known name closest to `name`, or an empty string when none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def one_line(error: object, most: int = 160) -> str:
    """What an error of somebody else says, on one line and cut to `most` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."
