"""Recommendation: what a user will choose next, learned from histories and bundles."""
