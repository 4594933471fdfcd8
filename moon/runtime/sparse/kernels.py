"""Every kernel beside the convolution, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llvmlite import ir

from moon.runtime.sparse.kernels_linear import build_linear, build_sparse_linear
from moon.runtime.sparse.kernels_planes import (
    build_copy,
    build_frame,
    build_pool,
    build_reduce,
    build_spread,
    build_unframe,
)
from moon.runtime.sparse.kernels_points import POINTWISE_KINDS, build_pointwise

__all__ = ["PLANE_KERNELS", "SOURCES"]

# Kernel -> what writes it into a module.
PLANE_KERNELS: Mapping[str, Callable[[ir.Module, str], None]] = {
    "copy": build_copy,
    "frame_1": build_frame,
    "frame_2": build_frame,
    "frame_n": build_frame,
    "unframe": build_unframe,
    "unframe_add": build_unframe,
    "pool_max": build_pool,
    "pool_average": build_pool,
    "reduce_average": build_reduce,
    "reduce_max": build_reduce,
    "spread": build_spread,
    "linear": build_linear,
    "sparse_linear": build_sparse_linear,
    **{f"point_{kind}": build_pointwise for kind in POINTWISE_KINDS},
}
# Modules that decide what the code of a kernel is.
SOURCES = tuple(
    f"moon.runtime.sparse.{name}"
    for name in (
        "frames", "ir", "ir_math", "kernel", "kernels", "kernels_conv", "kernels_driver",
        "kernels_linear", "kernels_planes", "kernels_points",
    )
)  # fmt: skip
