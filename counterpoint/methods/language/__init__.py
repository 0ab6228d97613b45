"""Sentence methods, one file a paper."""
