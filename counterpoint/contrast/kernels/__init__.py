"""Executors of the one quadratic reduction in the library. `blocked` runs on every device."""

from counterpoint.contrast.kernels.blocked import log_sum_exp, softplus_sum

__all__ = ["log_sum_exp", "softplus_sum"]
