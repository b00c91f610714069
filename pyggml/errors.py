"""The exceptions of pyggml. Each is also the builtin that a caller would expect.

    GGMLError(RuntimeError)         whatever ggml or this package refuses
      ShapeError(ValueError)        an operation's arguments do not fit: shapes, types, layout
      OutOfMemory(MemoryError)      an allocation failed; names bytes asked and bytes free
      DeviceLost                    a device stopped working; nothing can be computed on it any more
      ClosedError(ValueError)       a handle was used after close()
      Cancelled                     a computation was stopped by cancel() or Ctrl-C
      ServerLost(ConnectionError)   an RPC server cannot be reached, or went away
      NonFinite(ArithmeticError)    a result holds NaN or infinity, or a picture is constant
"""

from __future__ import annotations


class GGMLError(RuntimeError):
    """ggml, or the layer above it, refused; the message says what and why."""


class ShapeError(GGMLError, ValueError):
    """The arguments of an operation do not fit each other; the message names their shapes and types."""


class OutOfMemory(GGMLError, MemoryError):
    """An allocation failed; the message names what for, bytes asked and bytes free."""


class DeviceLost(GGMLError):
    """A device stopped working (a reset, a driver's fault): its backends and buffers are of no use any more."""


class ClosedError(GGMLError, ValueError):
    """A handle was used after it was closed."""


class Cancelled(GGMLError):
    """A computation was stopped before its end because somebody asked for it."""


class ServerLost(GGMLError, ConnectionError):
    """An RPC server cannot be reached, or went away with what it had; the message names it."""


class NonFinite(GGMLError, ArithmeticError):
    """A result is unusable: NaN, infinity, or a picture of one colour."""
