"""Golden op name -> our public function. An op only rearranges arguments; it holds no mathematics of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterpoint.errors import InputError

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """A function ``(inputs, params) -> outputs`` and the scalar that its gradients belong to.

    Attributes:
        function: takes ``in.*`` as tensors (strings as numpy arrays) and the parameters; returns ``out.*`` by name.
        gradient_of: names of outputs whose sum is differentiated, or a function of outputs and inputs. None: the
            output ``loss``, else ``probe``, else the sum of output times the input ``cotangent``.
    """

    function: Callable[[Inputs, dict[str, Any]], Outputs]
    gradient_of: tuple[str, ...] | Callable[[Outputs, Inputs], Tensor] | None = None

    def scalar(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """The scalar whose gradient a case records.

        Raises:
            InputError: the outputs do not say which it is.
        """
        if callable(self.gradient_of):
            return self.gradient_of(outputs, inputs)
        if self.gradient_of is not None:
            return torch.stack([outputs[name] for name in self.gradient_of]).sum()
        for name in ("loss", "probe"):
            if name in outputs:
                return outputs[name]
        if "cotangent" in inputs:
            shaped = [y for y in outputs.values() if y.requires_grad and y.shape == inputs["cotangent"].shape]
            if len(shaped) == 1:
                return (shaped[0] * inputs["cotangent"]).sum()
        raise InputError("the op does not say which of its outputs the gradients belong to")


OPS: dict[str, Op] = {}


def op(name: str, *, gradient_of: tuple[str, ...] | Callable[[Outputs, Inputs], Tensor] | None = None):
    """Register the function below as the golden op called `name`."""

    def register(function: Callable[[Inputs, dict[str, Any]], Outputs]):
        OPS[name] = Op(function, gradient_of)
        return function

    return register


# each registers its ops
from counterpoint.parity.ops import decoding, image_text, language, points, recommendation, vision  # noqa: E402, F401
