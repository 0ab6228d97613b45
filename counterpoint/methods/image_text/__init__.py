"""Image-text methods, one file a paper."""
