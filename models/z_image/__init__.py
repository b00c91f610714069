"""Z-Image: transformer and pipeline."""

from ..pipeline import Conditioning, Result
from .pipeline import ZImagePipeline
from .transformer import ZImageConfig, ZImageTransformer

__all__ = ["Conditioning", "Result", "ZImageConfig", "ZImagePipeline", "ZImageTransformer"]
