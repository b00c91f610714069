"""What a family of models says of itself: the networks' defaults, and what `Pipeline` asks it for during a run.

These are the methods to write for a new model. `Pipeline` is where they are called, in the order of a run.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from . import image
from .autoencoder_tiny import Kind
from .component import Component
from .guidance import Guidance
from .prediction import Phase
from .residency import Span
from .rng import RNG
from .sizes import check_size, latent_size
from .step_cache import Blocks

if TYPE_CHECKING:
    from PIL import Image

Float32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Path = str | os.PathLike[str]
Compat = Literal["diffusers", "sd.cpp"]


class Family(ABC):
    """Where a default is given, a model may leave it."""

    transformer: Component
    compat: Compat
    default_size: int

    default_steps: ClassVar[int]
    default_cfg_scale: ClassVar[float]
    edits: ClassVar[bool] = False  # takes reference pictures
    has_lightning: ClassVar[bool] = False  # there are Lightning models of it, of 4 or 8 steps
    default_shift: ClassVar[float] = 3.0
    default_strength: ClassVar[tuple[float, float]] = 0.6, 0.6  # of img2img, and with a mask, as in diffusers
    tiny: ClassVar[Kind]  # the kind of tiny autoencoder that there is for its latents
    refiner: ClassVar[str]  # what plans call the graph that is computed once for a prompt, `context_graph`

    # -- what it can be asked for --------------------------------------------------------------------------------------

    @classmethod
    def check_asked(
        cls, *, n_pictures: int = 0, layers: int | None = None, starts: bool = False, layered: bool = False,
        variant: str | None = None, compat: Compat = "diffusers",
    ) -> None:  # fmt: skip
        """ValueError for so many reference pictures, for layers, or for a picture to start from, `starts`, where the
        model takes none such. `layered`, `variant`: which model of the family it is.
        """
        if n_pictures:
            raise ValueError("this model edits no pictures: there is img2img, init_image (--init-img), for it")
        if layers is not None:
            raise ValueError("this model makes no layers")

    def _check_asked(self, n_pictures: int, layers: int | None, starts: bool = False) -> None:
        """As `check_asked`, of this model."""
        self.check_asked(n_pictures=n_pictures, layers=layers, starts=starts, compat=self.compat)

    def _read_reference(self, source: Path | Image.Image) -> Pixels:
        return image.read_image(source)

    def _size(self, width: int | None, height: int | None, pictures: Sequence[Pixels]) -> tuple[int, int]:
        """Width and height of what is drawn."""
        return self.default_size if width is None else width, self.default_size if height is None else height

    def _target(
        self, width: int | None, height: int | None, reference_images: Sequence[Path | Image.Image],
        layers: int | None = None, starts: bool = False,
    ) -> tuple[list[Pixels], int, int]:  # fmt: skip
        """The pictures that are edited, and width and height of what is drawn; ValueError for what cannot be."""
        self._check_asked(len(reference_images), layers, starts)
        pictures = [self._read_reference(source) for source in reference_images]
        width, height = self._size(width, height, pictures)
        check_size(width, height)
        return pictures, width, height

    def _latent_shape(self, width: int, height: int, layers: int | None) -> tuple[int, ...]:
        return self.transformer.module.config.in_channels, *latent_size(width, height)

    @abstractmethod
    def _guidance(
        self, cfg_scale: float | None, guidance_scale: float | None = None, true_cfg_scale: float | None = None,
        cfg_normalization: float | None = None, cfg_truncation: float | None = None,
    ) -> Guidance | None:  # fmt: skip
        """Guidance as `__call__` is asked for it, None when it is off; ValueError for what this model does not take."""

    @abstractmethod
    def _sigmas(
        self, n: int, explicit: Sequence[float] | None, name: str | None, shift: float | None, method: str,
        width: int, height: int,
    ) -> Float32:  # fmt: skip
        """The noise levels of a run."""

    # -- prompts and pictures ------------------------------------------------------------------------------------------

    def _note_prompt(self, prompt: str) -> None:
        """Told before a prompt is encoded."""
        return

    @abstractmethod
    def _features(self, prompt: str, pictures: Sequence[Pixels]) -> Float32:
        """What the text encoder makes of a prompt, and of pictures that belong to it: [n_tokens, dim]."""

    @abstractmethod
    def _refined(self, features: Float32) -> Float32:
        """What the transformer makes of them once, before the steps: [n_tokens, dim]."""

    def _drawn(self, mean: Float32, deviation: Float32, rng: RNG | None) -> Float32:
        """Latents as the transformer takes them, of what the autoencoder makes of a picture; with an rng a sample."""
        return mean if rng is None else mean + deviation * rng.randn(mean.shape)

    def _references(self, pictures: Sequence[Pixels], width: int, height: int) -> list[Float32]:
        """Latents of the pictures that are edited."""
        return []

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _foresee(self, times: Sequence[float]) -> None:
        """Told before the steps at which noise levels the transformer will be asked, in order."""
        return

    @abstractmethod
    def _velocities(
        self, x: Float32, sigma: float, contexts: Sequence[Float32], references: Sequence[Float32] = (),
        blocks: Blocks | None = None,
    ) -> list[Float32]:  # fmt: skip
        """noise - x0 as the network sees it with each context, of x's shape, computed at once where that is possible;
        `references` are latents [C, h, w]. `blocks`, with one context: computed in three parts, of which it says
        whether the one in the middle is needed.
        """

    @abstractmethod
    def _step_sizes(self, shape: Sequence[int], n_context: Any, references: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        """What the transformer's `step_graph` is built for, behind the backend: for latents of that shape, contexts of
        so many tokens each, and references of those shapes; and `part_graph`, where `n_context` is one number.
        """

    # -- plans ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _prompt_phases(
        self, texts: Sequence[str], pictures: Sequence[Pixels], spans: Sequence[Span]
    ) -> tuple[list[Phase], list[int]]:
        """What encodes prompts that speak of these pictures, and how many rows of features it makes of each."""

    def _reference_sizes(self, pictures: Sequence[Pixels], width: int, height: int) -> list[tuple[int, int]]:
        """Width and height of the pictures that are edited as the autoencoder reads them."""
        return []

    def _levels_phase(self, n_levels: int, spans: Sequence[Span]) -> tuple[Phase, bool] | None:
        """What is computed for the noise levels of several steps at once, and whether these are too many for once; its
        results stay, as `extra`.
        """
        return None
