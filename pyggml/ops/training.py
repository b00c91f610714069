"""Losses, gradients and optimiser steps. See Graph.backward for whole graphs.

The *_back functions take the gradient of a forward operation's result and give that of its argument; backward graphs
are made of them.
"""

from __future__ import annotations

from ..lib import lib
from ..tensor import Tensor
from .node import binary, several, two


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-Σ labels·log(soft_max(logits)) / rows. f32, same shape, contiguous -> f32 [1]."""
    return binary("cross_entropy_loss", lib.py_ggml_cross_entropy_loss, logits, labels)


def cross_entropy_loss_back(grad: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the logits: (soft_max(logits) - labels)·grad / rows. grad: f32 [1]; the others as in the loss."""
    return several("cross_entropy_loss_back", lib.py_ggml_cross_entropy_loss_back, (grad, logits, labels))


def silu_back(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of silu's x. f32 or f16, same shape and type, contiguous rows."""
    return binary("silu_back", lib.py_ggml_silu_back, grad, x)


def rms_norm_back(grad: Tensor, x: Tensor, eps: float = 1e-6) -> Tensor:
    """The gradient of rms_norm's x. f32, same shape, contiguous rows."""
    return two("rms_norm_back", lib.py_ggml_rms_norm_back, grad, x, eps)


def repeat_back(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of repeat's x: repetitions added up into the shape of `like`. f32."""
    return binary("repeat_back", lib.py_ggml_repeat_back, grad, like)


def opt_step_adamw(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, params: Tensor) -> Tensor:
    """One step of AdamW (arXiv 1711.05101), in place: weight, m and v are overwritten; the result is a view of weight.

    weight: f32, marked with graph.param; grad, m, v: same shape; params: f32 [7]: learning rate, β₁, β₂, ε, weight
    decay, 1 / (1 - β₁ᵗ), 1 / (1 - β₂ᵗ).
    """
    return several("opt_step_adamw", lib.py_ggml_opt_step_adamw, (weight, grad, m, v, params))


def opt_step_sgd(weight: Tensor, grad: Tensor, params: Tensor) -> Tensor:
    """weight·(1 - rate·decay) - rate·grad, in place; the result is a view of weight.

    weight: f32, marked with graph.param; grad: same shape; params: f32 [2]: learning rate, weight decay.
    """
    return several("opt_step_sgd", lib.py_ggml_opt_step_sgd, (weight, grad, params))
