"""Qwen-Image: transformer and pipeline."""

from ..pipeline import Conditioning, Result
from .pipeline import QwenImagePipeline
from .transformer import QwenImageConfig, QwenImageTransformer

__all__ = ["Conditioning", "QwenImageConfig", "QwenImagePipeline", "QwenImageTransformer", "Result"]
