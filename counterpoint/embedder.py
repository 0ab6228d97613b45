"""Training and embedding as a scikit-learn transformer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from counterpoint import methods, recipes
from counterpoint.errors import InputError
from counterpoint.train import Method, Run, fit
from counterpoint.train.run import next_folder


class Embedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A method as a step of a scikit-learn Pipeline: `fit` trains it, without labels, and `transform` embeds.

    X is what the method reads: images (an array, a list of paths or of PIL images, a folder), sentences (a list of strings,
    a Series), histories (lists of items). `transform` gives one row for each item of X, or says why it cannot.

    Arguments of the method and of `counterpoint.fit` are arguments here, named as on the command line, and parameters for
    `set_params` and GridSearchCV. Images that are smaller than a method's default size are trained at their own.

    * ``Embedder("simclr", encoder="resnet18", epochs=50)`` trains in `fit`;
    * ``Embedder(run="runs/simclr-1")`` is trained already: `fit` does nothing, and `transform` works without it;
    * ``Embedder("simcse", encoder="FOLDER", epochs=0)`` leaves the (pretrained) encoder as it comes.

    Args:
        method: name of a method or recipe (whose data set is not used).
        run: folder of a finished run, instead of training.
        folder: keep the runs of all trainings in this folder, as METHOD-1, METHOD-2 ...; None keeps none, since a search
            over parameters trains many times. The weights are in the fitted Embedder, and pickle and joblib keep them.
        random_state: seed of weights, order and views; None draws another one each time.
        options: of the method and of `fit`; ``progress`` is off unless it is among them.

    Attributes:
        method_: the trained method, in evaluation mode.
        run_: its run, or None where none is kept.
    """

    method_: Method
    run_: Run | None

    def __init__(
        self,
        method: str = "simclr",
        *,
        run: str | Path | None = None,
        folder: str | Path | None = None,
        random_state: int | np.random.RandomState | None = 0,
        **options: Any,
    ):
        self.method, self.run, self.folder, self.random_state = method, run, folder, random_state
        self.options = options

    def fit(self, X: Any, y: Any = None) -> Embedder:
        """Train on the items of `X`; `y` is not looked at.

        Raises:
            InputError: no such method or option, data that the method cannot read, or options beside a finished run.
        """
        if self.run is not None:
            if self.options:
                raise InputError(f"a finished run takes no options, but there is {', '.join(self.options)}")
            return self._open()
        if "seed" in self.options:
            raise InputError("the seed of an Embedder is its random_state")
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        recipe = recipes.experiment(self.method, **{"progress": False, **self.options, "seed": int(seed)})
        sizes = recipes.model_options(methods.get(recipe.method))
        if "image_size" in sizes and "image_size" not in recipe.model:
            recipe.model["image_size"] = recipes.size_for(X, sizes["image_size"])
        method, self.run_ = recipe.build(int(seed)), None
        if recipe.fit.get("epochs") == 0:
            method.read(X)  # what data alone teach: which items there are
        elif self.folder is not None:
            self.run_ = fit(method, X, run=next_folder(self.method, self.folder), **recipe.fit)
        else:
            with tempfile.TemporaryDirectory(prefix="counterpoint-") as place:
                fit(method, X, run=Path(place, "run"), **recipe.fit)
        self.method_ = method.eval()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embeddings float32 [N, D] of the items of `X`.

        Raises:
            NotFittedError: `fit` was not called, and there is no finished run.
            InputError: data that the method cannot read, or some items of it.
        """
        check_is_fitted(self)
        if not hasattr(self, "method_"):
            self._open()
        vectors = self.method_.encode(X)
        count = _count(X, self.method_.family)
        if count is not None and count != len(vectors):
            raise InputError(
                f"{count - len(vectors):,} of {count:,} items cannot be embedded: leave them out here and in the labels"
            )
        return vectors

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All parameters by name, options included."""
        return {**super().get_params(deep=deep), **self.options}

    def set_params(self, **params: Any) -> Embedder:
        """Change parameters and options; `fit` refuses an option that does not exist."""
        own = super().get_params(deep=False)
        for name, value in params.items():
            if name in own:
                setattr(self, name, value)
            else:
                self.options = {**self.options, name: value}
        return self

    def _open(self) -> Embedder:
        assert self.run is not None
        self.run_ = Run.open(self.run)
        self.method_ = self.run_.model()
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "method_") or self.run is not None

    @property
    def _n_features_out(self) -> int:
        return self.method_.encoder.dim


def _count(data: Any, family: str) -> int | None:
    """How many rows the embeddings of `data` must have; None where only the method knows."""
    table = hasattr(data, "columns") and family == "histories"  # its rows are events, not users
    columns = isinstance(data, Mapping) and family != "histories"
    return None if table or columns or isinstance(data, str | Path) or not hasattr(data, "__len__") else len(data)
