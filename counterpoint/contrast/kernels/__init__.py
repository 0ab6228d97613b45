"""The one quadratic reduction in the library, and its executors: `blocked` on every device, `triton` on NVIDIA GPUs."""

from counterpoint.contrast.kernels.reduction import automatic, executor, log_sum_exp, softmax_mean, softplus_sum

__all__ = ["automatic", "executor", "log_sum_exp", "softmax_mean", "softplus_sum"]
