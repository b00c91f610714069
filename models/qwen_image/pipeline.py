"""Qwen-Image from a prompt, and from pictures to edit or to take apart into layers, to a picture.

The call and the defaults are diffusers': 50 steps, a guidance (`true_cfg_scale`) of 4 whose result is scaled to the
length of the prediction with the prompt, noise levels that depend on the picture's size. The files of Edit and
Edit-2509 do not say which of the two they are: `variant` does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from loader.options import LoadOptions
from loader.params import load_params
from pyggml import Backend

from .. import image, prompt_weights, qwen25_vl, schedule
from ..component import Component, Load, opening
from ..decoders import check_decoders, open_decoders
from ..devices import Module, places
from ..family import Compat, Float32, Path, Pixels
from ..guidance import Guidance, QwenImageGuidance
from ..lora import ApplyMode
from ..pipeline import Pipeline
from ..prediction import Phase
from ..residency import Span
from ..rng import RNG
from ..sizes import PATCH, latent_size, n_patches, whole_patches
from ..step_cache import Blocks
from ..tokenizer import Tokenizer
from . import prompt as prompts
from . import references
from . import transformer as net
from .components import check_together, open_autoencoder, open_text_encoder, open_transformer, open_vision_tower
from .transformer import Modulation, QwenImageTransformer

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("pyggml.models")

Variant = Literal["edit", "2509", "2511"]
MAX_PICTURES = 16
MAX_LAYERS = 16
LAYERED_AREA = 640 * 640  # pixels of a picture that is taken apart


class QwenImagePipeline(Pipeline):
    """Text encoder, vision tower, transformer and autoencoder of Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered.

    Use `QwenImagePipeline.load`, or `models.load`.
    """

    default_steps = 50
    default_cfg_scale = 4.0
    edits = True
    has_lightning = True
    tiny = "TAEHV"
    refiner = "text's projection"
    default_layers: ClassVar[int] = 4

    def __init__(
        self, text_encoder: Component, transformer: Component, vae: Component | None, tokenizer: Tokenizer, *,
        tae: Component | None = None, tae_preview_only: bool = False, vision: Component | None = None,
        variant: Variant | None = None, grid_positions: bool = False, compat: Compat = "diffusers",
        default_size: int = 1024, lora_apply_mode: ApplyMode = "auto", memory_limit: int | None = None,
        opened: Sequence[Backend] = (),
    ) -> None:  # fmt: skip
        self.vision = vision
        self.variant: Variant = variant or ("2511" if transformer.module.config.zero_cond_t else "2509")
        self.grid_positions = grid_positions
        self._times: Sequence[float] = ()
        self._said_blind = False
        self._seen: dict[object, tuple[Float32, tuple[int, int]]] = {}
        self._modulations: dict[tuple[object, float], Modulation] = {}
        super().__init__(
            text_encoder, transformer, vae, tokenizer, tae=tae, tae_preview_only=tae_preview_only, compat=compat,
            default_size=default_size, lora_apply_mode=lora_apply_mode, memory_limit=memory_limit, opened=opened,
        )  # fmt: skip

    def components(self) -> tuple[Component, ...]:
        return (*super().components(), *([self.vision] if self.vision else []))

    @classmethod
    def load(
        cls, diffusion_model: Path, llm: Path, vae: Path | None = None, *, tae: Path | None = None,
        tae_preview_only: bool = False, llm_vision: Path | None = None,
        backend: Backend | str | Mapping[Module, Backend] | None = None, params_backend: str | None = None,
        n_threads: int | None = None, options: LoadOptions | None = None, compat: Compat = "diffusers",
        variant: Variant | None = None, grid_positions: bool = False, tokenizer: Tokenizer | None = None,
        encoder: bool = False, lora_apply_mode: ApplyMode = "auto", memory_limit: int | None = None,
        max_vram: int | None = None, load: Load = load_params,
    ) -> QwenImagePipeline:  # fmt: skip
        """Load from files (or diffusers folders). `encoder`: also what reads pictures, for img2img, editing and layers:
        the other half of the autoencoder and the vision tower, which is that of `llm_vision` or lies in `llm`.

        `variant`: which Edit model it is, as files do not say: "edit", the first, or "2509"; "2511" where the file is
        not marked. `grid_positions`: pictures' tokens are placed by row and column in the text encoder, as it was
        trained, instead of one after the other, as diffusers with transformers 5 and stable-diffusion.cpp do.

        The rest is as for every model, see models.z_image.ZImagePipeline.load.
        """
        if compat not in ("diffusers", "sd.cpp"):
            raise ValueError(f"compat is 'diffusers' or 'sd.cpp', not {compat!r}")
        if variant not in (None, "edit", "2509", "2511"):
            raise ValueError(f"variant is 'edit', '2509' or '2511', not {variant!r}")
        check_decoders(vae, tae, tae_preview_only, encoder)
        place = places(backend, params_backend, n_threads, max_vram)
        with opening(place) as parts:
            parts.append(open_text_encoder(llm, place["te"], options=options, load=load))
            zero = None if variant is None else variant == "2511"
            parts.append(open_transformer(
                diffusion_model, place["diffusion"], options=options, zero_cond_t=zero, compat=compat, load=load
            ))  # fmt: skip
            text_encoder, transformer = parts
            autoencoder, tiny = open_decoders(
                parts, vae, tae, place["vae"], cls.tiny, open_autoencoder, encoder=encoder, options=options, load=load
            )
            vision: Component | None = None
            if encoder and not transformer.module.config.layered:
                vision = open_vision_tower(
                    llm_vision, llm, place["te"], options=options, compat=compat, load=load
                )
                parts += [vision] if vision else []
            check_together(text_encoder, transformer, autoencoder, vision)
            if transformer.module.config.layered and tae is not None and not tae_preview_only:
                raise ValueError("a tiny autoencoder makes no layers, which are transparent: it is for previews only")
            tokenizer = tokenizer or Tokenizer.for_checkpoint(text_encoder.checkpoint)
            return cls(
                text_encoder, transformer, autoencoder, tokenizer, tae=tiny, tae_preview_only=tae_preview_only,
                vision=vision, variant=variant, grid_positions=grid_positions, compat=compat,
                lora_apply_mode=lora_apply_mode, memory_limit=memory_limit, opened=place["te"].opened,
            )  # fmt: skip

    @property
    def layered(self) -> bool:
        """Whether it takes pictures apart into layers."""
        return bool(self.transformer.module.config.layered)

    # -- prompts and pictures -----------------------------------------------------------------------------------------

    def _tokens(
        self, prompt: str, rows: Sequence[int] = (), *, edit: bool = False
    ) -> tuple[list[int], int, list[float]]:
        """Numbers of a prompt's tokens, how many are dropped after encoding, and with compat="sd.cpp" their weights.

        rows: of the vision tower, for each picture.
        """
        kind: Literal["text", "edit"] = "edit" if edit else "text"
        numbered = self.variant != "edit" or self.compat == "sd.cpp"
        if self.compat != "sd.cpp":
            return *prompts.prompt_ids(self.tokenizer, prompt, rows, kind=kind, numbered=numbered), []
        before, after, n_dropped = prompts.EDIT if edit else prompts.TEXT
        shown = "".join(prompts.picture_text(i, n, numbered=numbered) for i, n in enumerate(rows))
        pieces = [(before + shown, 1.0), *prompt_weights.parse(prompt), (after, 1.0)]
        ids, weights = self.tokenizer.encode_weighted(pieces)
        return ids, n_dropped, weights

    def _features(self, prompt: str, pictures: Sequence[Pixels]) -> Float32:
        seen = self._look_at(pictures) if pictures and not self.layered else []
        ids, n_dropped, weights = self._tokens(prompt, [len(x) for x, _ in seen], edit=self._is_edit(pictures))
        numbers = np.array(ids, np.int32)
        pad = self.tokenizer.special.get("<|image_pad|>", qwen25_vl.IMAGE_PAD)
        position = qwen25_vl.grid_positions(numbers, [grid for _, grid in seen], pad) if self.grid_positions else None
        encoder: qwen25_vl.Qwen25VL
        with self.text_encoder.in_use() as encoder:
            features = encoder.encode(
                self.text_encoder.backend, numbers, np.concatenate([x for x, _ in seen]) if seen else None,
                position=position, image_pad=pad, n_dropped=0 if weights else n_dropped,
                compute=partial(self._compute, "the text encoder"),
            )  # fmt: skip
        return prompt_weights.apply_weights(features, weights)[n_dropped:] if weights else features

    def _is_edit(self, pictures: Sequence[Pixels]) -> bool:
        """Whether the prompt is written as one that edits; stable-diffusion.cpp's is not where there is no tower."""
        return bool(pictures) and not self.layered and not (self.compat == "sd.cpp" and self.vision is None)

    def _look_at(self, pictures: Sequence[Pixels]) -> list[tuple[Float32, tuple[int, int]]]:
        """What the vision tower makes of pictures: rows, and their grid; nothing where there is no tower.

        The last pictures' are remembered: the negative prompt speaks of the same.
        """
        if self.vision is None:
            if not self._said_blind:
                log.warning(
                    "there is no vision tower: the text encoder does not see the pictures that are edited, the "
                    "transformer does. Give an mmproj file (--llm-vision), or a text encoder that has the tower."
                )
            self._said_blind = True
            return []
        keys = [image.fingerprint(picture) for picture in pictures]
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._seen}
        self._seen = {key: self._seen[key] for key in keys if key in self._seen}
        if missing:
            with self.vision.in_use() as tower:
                multiple = tower.config.multiple
                for key, picture in missing.items():
                    pixels = references.for_tower(picture, self._tower_area, multiple, compat=self.compat)
                    rows = tower.encode(self.vision.backend, pixels, partial(self._compute, "the vision tower"))
                    self._seen[key] = rows, (pixels.shape[1] // multiple, pixels.shape[2] // multiple)
        return [self._seen[key] for key in keys]

    @property
    def _tower_area(self) -> int:
        return references.AUTOENCODER_AREA if self.variant == "edit" else references.TOWER_AREA

    @classmethod
    def check_asked(
        cls, *, n_pictures: int = 0, layers: int | None = None, starts: bool = False, layered: bool = False,
        variant: str | None = None, compat: Compat = "diffusers",
    ) -> None:  # fmt: skip
        most = 1 if layered or (variant == "edit" and compat == "diffusers") else MAX_PICTURES
        if n_pictures > most:
            raise ValueError(f"{n_pictures} reference pictures; this model takes {most} at most")
        if layers is not None and not layered:
            raise ValueError("this model makes no layers")
        if layers is not None and not 1 <= layers <= MAX_LAYERS:
            raise ValueError(f"layers must be in 1..{MAX_LAYERS}, not {layers}")
        if layered and starts:
            raise ValueError("a model that makes layers starts from no picture: give it as a reference (-r)")
        if layered and not n_pictures:
            raise ValueError("a layered model takes a picture apart: give it as a reference image (-r)")

    def _check_asked(self, n_pictures: int, layers: int | None, starts: bool = False) -> None:
        self.check_asked(
            n_pictures=n_pictures, layers=layers, starts=starts, layered=self.layered, variant=self.variant,
            compat=self.compat,
        )  # fmt: skip

    def _note_prompt(self, prompt: str) -> None:
        if self.layered and not prompt.strip():
            log.warning(
                "the prompt is empty: say what is in the picture. diffusers lets the text encoder describe it then, "
                "which is not done here, and layers come out worse"
            )

    def _read_reference(self, source: Path | Image.Image) -> Pixels:
        return image.read_image(source, alpha=self.layered)

    def _size(self, width: int | None, height: int | None, pictures: Sequence[Pixels]) -> tuple[int, int]:
        if not pictures:
            return super()._size(width, height, pictures)
        # as large as the last picture, in proportion: what diffusers does
        area = LAYERED_AREA if self.layered else references.AUTOENCODER_AREA
        own = [side // 16 * 16 for side in references.size_of_area(*_sides(pictures[-1]), area)]
        return own[0] if width is None else width, own[1] if height is None else height

    def _references(self, pictures: Sequence[Pixels], width: int, height: int) -> list[Float32]:
        if self.layered:
            scaled = [image.resized(picture, width, height) for picture in pictures]
        else:
            area = self._reference_area(width, height)
            scaled = [references.for_autoencoder(picture, area, compat=self.compat) for picture in pictures]
        return [self.encode_image(picture) for picture in scaled]

    def _reference_area(self, width: int, height: int) -> int:
        """Pixels that the autoencoder sees of a reference, for a picture of that size."""
        area = references.AUTOENCODER_AREA
        return min(area, width * height) if self.compat == "sd.cpp" else area

    def _latent_shape(self, width: int, height: int, layers: int | None) -> tuple[int, ...]:
        shape = super()._latent_shape(width, height, None)
        if not self.layered:
            return shape
        return (self.default_layers if layers is None else layers) + 1, *shape  # the first is the whole picture again

    def _pictures(self, latents: Float32) -> Pixels | list[Pixels]:
        if latents.ndim == 3:
            return self.decode(latents)
        first = 0 if self.compat == "sd.cpp" else 1
        return [self._decoded(layer) for layer in latents[first:]]  # a layer may be empty

    def _drawn(self, mean: Float32, deviation: Float32, rng: RNG | None) -> Float32:
        return super()._drawn(mean, deviation, None if self.compat == "sd.cpp" else rng)  # which takes the mean

    # -- steps --------------------------------------------------------------------------------------------------------

    def _refined(self, features: Float32) -> Float32:
        module: QwenImageTransformer = self.transformer.module
        with module.context_graph(self.transformer.backend, len(features)) as graph:
            return np.asarray(self._compute("the text's projection", graph, features=features)["context"])

    def _foresee(self, times: Sequence[float]) -> None:
        self._times = times

    def _modulation(self, sigma: float) -> Modulation:
        """Made for the next levels of the run at once, as it takes a third of the weights."""
        state = self.loras.state("transformer")
        if (state, sigma) not in self._modulations:
            after = list(self._times[self._times.index(sigma) :]) if sigma in self._times else [sigma]
            levels = list(dict.fromkeys(after))[: net.TIMES_AT_ONCE - 1]
            module: QwenImageTransformer = self.transformer.module
            if module.config.zero_cond_t:
                levels.append(0.0)
            made = module.modulate(self.transformer.backend, levels, partial(self._compute, "the modulation"))
            self._modulations = {(state, level): m for level, m in zip(levels, made, strict=True)}
        return self._modulations[state, sigma]

    def _velocities(
        self, x: Float32, sigma: float, contexts: Sequence[Float32], references: Sequence[Float32] = (),
        blocks: Blocks | None = None,
    ) -> list[Float32]:  # fmt: skip
        module: QwenImageTransformer = self.transformer.module
        frames = [whole_patches(frame) for frame in (x if x.ndim == 4 else x[None])]
        others = [whole_patches(latents) for latents in references]
        grids = [(a.shape[1] // PATCH, a.shape[2] // PATCH) for a in (frames[0], *others)]
        modulation = self._modulation(sigma)
        positions = [
            net.joint_positions(
                len(context), grids[0], grids[1:], n_targets=len(frames), layered=self.layered, compat=self.compat
            ) for context in contexts
        ]  # fmt: skip
        inputs = {
            "patches": np.concatenate([net.patchify(a) for a in (*frames, *others)]),
            "context": np.concatenate(contexts),
            "position": np.concatenate(positions, axis=1),
            "modulation_image": modulation.image,
            "modulation_text": modulation.text,
        }
        if module.config.zero_cond_t and others:
            inputs["modulation_zero"] = self._modulation(0.0).image[: net.N_MOD * module.config.n_layers]
        out = self._step(x, sigma, contexts, references, blocks, inputs)
        h, w = x.shape[-2:]
        found = [net.unpatchify(part, *frames[0].shape[1:])[:, :h, :w]
                 for part in np.split(out.reshape(-1, out.shape[-1]), len(contexts) * len(frames))]  # fmt: skip
        stacked = np.stack(found).reshape(len(contexts), *x.shape)
        return list(stacked)

    def _step_sizes(self, shape: Sequence[int], n_context: Any, references: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        return n_patches(shape), n_context, sum(map(n_patches, references))

    def _sigmas(
        self, n: int, explicit: Sequence[float] | None, name: str | None, shift: float | None, method: str,
        width: int, height: int,
    ) -> Float32:  # fmt: skip
        n_of_picture = n_patches(latent_size(width, height))
        if explicit is not None:
            if self.compat == "sd.cpp":
                return schedule.explicit(explicit)
            if shift is not None:
                return schedule.shifted(explicit, shift)
            mu = schedule.qwen_layered_mu(n_of_picture) if self.layered else schedule.qwen_image_mu(n_of_picture)
            return schedule.shifted_by_size(explicit, mu, schedule.QWEN_TERMINAL)
        if name is None and self.layered and self.compat == "diffusers" and shift is None:
            return schedule.qwen_layered(n, n_of_picture)
        if name is None:
            of_model = "qwen_image" if shift is None else "diffusers"  # a shift that is given is a constant one
            name = schedule.sd_cpp_default(method) if self.compat == "sd.cpp" else of_model
        shift = self.default_shift if shift is None else shift
        return schedule.sigmas(name, n, shift=shift, n_positions=4 * n_of_picture)

    def _guidance(
        self, cfg_scale: float | None, guidance_scale: float | None = None, true_cfg_scale: float | None = None,
        cfg_normalization: float | None = None, cfg_truncation: float | None = None,
    ) -> Guidance | None:  # fmt: skip
        if guidance_scale is not None or cfg_truncation is not None or cfg_normalization is not None:
            raise ValueError("guidance_scale and its relatives are Z-Image's: Qwen-Image's is true_cfg_scale")
        if cfg_scale is not None and true_cfg_scale is not None:
            raise ValueError("cfg_scale and true_cfg_scale are both given: they mean the same, give one of them")
        scale = true_cfg_scale if cfg_scale is None else cfg_scale
        scale = self.default_cfg_scale if scale is None else scale
        if not math.isfinite(scale):
            raise ValueError(f"true_cfg_scale must be a finite number, not {scale}")
        if scale == 1 or (scale < 1 and self.compat != "sd.cpp"):
            return None
        return QwenImageGuidance(scale, rescale=self.compat == "diffusers" and not self.layered)

    # -- before anything is computed ----------------------------------------------------------------------------------

    def _prompt_phases(
        self, texts: Sequence[str], pictures: Sequence[Pixels], spans: Sequence[Span]
    ) -> tuple[list[Phase], list[int]]:
        found, n_rows, lengths = [], [], []
        if self.vision and not self.layered:
            tower = self.vision.module
            for sides in map(_sides, pictures):  # as `_look_at` scales them
                grid = references.tower_grid(*sides, self._tower_area, tower.config.multiple, compat=self.compat)
                n_rows.append(math.prod(grid))
                graph = tower.graph(self.vision.backend, tower.layout(*grid))
                found.append(Phase.of("vision tower", graph, spans))
        for text in texts:
            ids, n_dropped, weights = self._tokens(text, n_rows, edit=self._is_edit(pictures))
            dropped = 0 if weights else n_dropped
            graph = self.text_encoder.module.graph(self.text_encoder.backend, len(ids), sum(n_rows), dropped)
            found.append(Phase.of("text encoder", graph, spans, n_rows=len(set(ids))))
            lengths.append(len(ids) - n_dropped)
        return found, lengths

    def _reference_sizes(self, pictures: Sequence[Pixels], width: int, height: int) -> list[tuple[int, int]]:
        if self.layered:
            return [(width, height)] * len(pictures)
        area = self._reference_area(width, height)
        return [references.size_of_area(*sides, area, compat=self.compat) for sides in map(_sides, pictures)]

    def _levels_phase(self, n_levels: int, spans: Sequence[Span]) -> tuple[Phase, bool]:
        dit: QwenImageTransformer = self.transformer.module
        n_at_once = min(n_levels, net.TIMES_AT_ONCE - 1) + dit.config.zero_cond_t
        held = n_at_once * 4 * dit.config.dim * (2 * net.N_MOD * dit.config.n_layers + 2)
        graph = dit.modulation_graph(self.transformer.backend, n_at_once)
        return Phase.of("modulation", graph, spans, extra=held), n_levels >= net.TIMES_AT_ONCE


def _sides(picture: Pixels) -> tuple[int, int]:
    """Width and height."""
    return picture.shape[1], picture.shape[0]
