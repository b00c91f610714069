"""ggml, safely, from Python: contexts, tensors, graphs, backends and buffers. No file formats, no models.

    from pyggml import Backend, Graph

    graph = Graph(Backend.cpu())
    x = graph.input((8,), name="x")
    graph.output(x * x + 1.0, name="y")
    y = graph.compute(x=range(8))["y"]
"""

from . import ops
from .backend import Backend, Buffer, BufferType, Device, SplitBackend, add_rpc_server, devices, physical_cores
from .context import Context
from .errors import Cancelled, ClosedError, GGMLError, NonFinite, OutOfMemory, ServerLost, ShapeError
from .graph import Graph, OpTime, summarise
from .lib import set_log_level
from .quantize import dequantize, quantize
from .tensor import Tensor
from .types import DeviceType, Op, Prec, ScaleMode, Type

__version__ = "0.1.0"

__all__ = [
    "Backend", "Buffer", "BufferType", "Cancelled", "ClosedError", "Context", "Device", "DeviceType", "GGMLError",
    "Graph", "NonFinite", "Op", "OpTime", "OutOfMemory", "Prec", "ScaleMode", "ServerLost", "ShapeError",
    "SplitBackend", "Tensor", "Type", "add_rpc_server", "dequantize", "devices", "ops", "physical_cores", "quantize",
    "set_log_level", "summarise",
]  # fmt: skip
