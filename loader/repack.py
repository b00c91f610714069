"""Layouts of their own (CPU_REPACK, AMX): which weights may have one, and for which it pays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

from pyggml import BufferType, Context, Device, Type
from pyggml.lib import ffi, lib
from pyggml.types import DeviceType

from .options import Repack

# Buffer type -> types whose products were faster in it than by the kernel used otherwise, with 25 and with 288 tokens.
# Printed by benchmarks/bench_repack.py on a processor with AVX512-VNNI; elsewhere nothing was measured.
FASTER: Final[Mapping[str, frozenset[Type]]] = {"CPU_REPACK": frozenset({Type.Q4_0, Type.IQ4_NL, Type.MXFP4})}


def layout_for(device: Device, ne: tuple[int, ...], type: Type, repack: Repack) -> BufferType | None:
    """The extra buffer type for a weight that is only multiplied with; None: it stays as it is.

    "on" takes the first that has a kernel for it, "auto" only what was measured to be faster on such a processor.
    """
    if repack == "off" or len(ne) != 2 or device.type != DeviceType.CPU:
        return None
    for buffer_type in device.extra_buffer_types:
        if repack == "auto" and not (_is_measured() and type in FASTER.get(buffer_type.name, ())):
            continue
        if takes(device, buffer_type, ne, type):
            return buffer_type
    return None


@cache
def takes(device: Device, buffer_type: BufferType, ne: tuple[int, ...], type: Type) -> bool:
    """Whether the device multiplies a weight of this shape and type in this layout with f32."""
    buffer = lib.ggml_backend_buft_alloc_buffer(buffer_type.ptr, 0)
    try:
        with Context(4) as context:
            weight, x = context.new_tensor(ne, type), context.new_tensor((ne[0], 512))
            weight.ptr.buffer = buffer
            product = lib.py_ggml_mul_mat(context.ptr, weight.ptr, x.ptr)
            return product != ffi.NULL and bool(lib.ggml_backend_dev_supports_op(device.ptr, product))
    finally:
        lib.ggml_backend_buffer_free(buffer)


def _is_measured() -> bool:
    return bool(lib.ggml_cpu_has_avx512_vnni())
