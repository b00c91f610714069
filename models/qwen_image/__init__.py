"""Qwen-Image: the transformer, and how its prompts are written."""

from .transformer import QwenImageConfig, QwenImageTransformer

__all__ = ["QwenImageConfig", "QwenImageTransformer"]
