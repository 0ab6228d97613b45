"""Data: one loader per family; resolve (own folder or array, embedded, cache, original source) -> typed items."""

from counterpoint.data.images import NAMES, ImageFiles, Images, check, load, resize, stratified

__all__ = ["NAMES", "ImageFiles", "Images", "check", "load", "resize", "stratified"]
