"""Serving: an index over embeddings, and search in it."""

from counterpoint.serve.index import Index

__all__ = ["Index"]
