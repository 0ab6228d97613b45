"""Image methods, one file a paper."""
