"""Z-Image: transformer and pipeline."""

from .pipeline import Conditioning, Result, ZImagePipeline
from .transformer import ZImageConfig, ZImageTransformer

__all__ = ["Conditioning", "Result", "ZImageConfig", "ZImagePipeline", "ZImageTransformer"]
