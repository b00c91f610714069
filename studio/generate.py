"""`pyggml generate`: from the options of the command line to files."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compare, loras, sampling
from .bars import Bars

if TYPE_CHECKING:
    from loader.lora import LoraReport
    from pyggml import Device

DEMO = Path(__file__).parent / "demo"
DEMO_FILES = ("z_image_demo.gguf", "qwen3_demo.gguf", "ae_demo.safetensors")
INIT_STRENGTH = 0.75  # sd-cli's


def generate(args: argparse.Namespace) -> int:
    """Draw what `args` asks for. What can be wrong with them is said before a model is loaded."""
    written_prompt = _prompt(args)
    prompt, tags = loras.take_tags(written_prompt)
    files = _models(args)
    _check(args)
    if args.command == "compare-backends":
        compare.check(args.compare_with, args.tolerance)
        if args.max_vram:
            raise ValueError("compare-backends wants the weights where they are computed with: leave --max-vram out")

    import models
    from models.decoders import check_decoders
    from models.preview import check_preview

    check_decoders(args.vae, args.tae, args.taesd_preview_only, bool(args.init_img or args.ref_image))
    check_preview("proj" if args.preview == "none" else args.preview, args.preview_interval, args.tae is not None)
    family = models.pipeline_for(files[0])
    wanted_loras = loras.find_all(tags, args.lora, args.lora_model_dir)
    _set_lightning(args, family, wanted_loras)
    of_family = _of_family(args, family)
    family.check_asked(
        n_pictures=len(args.ref_image), layers=args.layers, starts=args.init_img is not None,
        layered=models.is_layered(files[0]), variant=of_family.get("variant"), compat=args.compat,
    )  # fmt: skip
    options = _load_options(args)
    backend, params_backend = _devices(args)
    outputs = _outputs(args.output, args.batch_count)
    report = Path(args.report) if args.report else None
    previews = [Path(args.preview_path)] if args.preview != "none" else []
    if previews and (previews[0].suffix.lower() != ".png" or previews[0] in outputs):
        raise ValueError(f"--preview-path must end in .png and be another than --output's, not {args.preview_path!r}")
    for path in [*outputs, *previews, *([report] if report else [])] if args.command == "generate" else []:
        _check_writable(path)
    width, height = _side("width", args.width), _side("height", args.height)
    seed = secrets.randbelow(2**31) if args.seed < 0 else args.seed
    strength = INIT_STRENGTH if args.strength is None else args.strength
    tile = _tile(args)
    sigmas = _check_sampling(args, family, width, height, seed, strength)
    controls = sampling.controls(args, family)
    if "cache" in controls and (n_blocks := models.n_blocks(files[0])):
        controls["cache"].check(n_blocks)
    shift = args.flow_shift
    if sigmas and args.compat != "sd.cpp":  # diffusers would shift them and put the 0 at the end itself
        sigmas, shift = sigmas[:-1], 1.0

    from models.image import write_png, write_whole

    load: dict[str, Any] = {
        "backend": backend, "params_backend": params_backend, "n_threads": args.threads, "options": options,
        "compat": args.compat, "encoder": bool(args.init_img or args.ref_image),
        "lora_apply_mode": args.lora_apply_mode, "memory_limit": args.max_ram, "max_vram": args.max_vram,
        "tae": args.tae, "tae_preview_only": args.taesd_preview_only, **of_family,
    }  # fmt: skip
    shape: dict[str, Any] = {
        "negative_prompt": args.negative_prompt, "width": width, "height": height,
        "cfg_scale": args.cfg_scale, "method": args.sampling_method, "num_images_per_prompt": args.batch_count,
        "reference_images": args.ref_image, "layers": args.layers,
    }  # fmt: skip
    if args.dry_run:
        _show_plan(args, prompt, files, load, shape, controls, wanted_loras, tile)
        return 0

    start = time.perf_counter()
    # numpy and the native library are loaded by now; what follows is the models' own time.
    written: list[Path] = []
    with _Bars(args.batch_count) as bars:
        bars("load", 0, 1)
        pipe = models.load(*files, **load)
        bars("load", 1, 1)
        loaded = time.perf_counter() - start
        before = {"load": loaded}

        def save(i: int, used_seed: int, picture: Any) -> None:
            layers = picture if isinstance(picture, list) else [picture]
            for k, layer in enumerate(layers):
                text = ""
                if not args.disable_image_metadata:
                    text = parameters(args, pipe, written_prompt, used_seed, layer.shape)
                path = outputs[i] if len(layers) == 1 else outputs[i].with_stem(f"{outputs[i].stem}_layer{k}")
                write_png(path, layer, text)
                written.append(path)

        with pipe:
            pipe.find_bad_op = args.find_bad_op
            _set_up(pipe, args, tile)
            if wanted_loras:
                reports = pipe.set_loras(wanted_loras, progress=bars)
                before["lora"] = time.perf_counter() - start - loaded
                _warn_of_keys(reports, args)
            if args.command == "compare-backends":
                return compare.show(
                    pipe, args.compare_with, args.tolerance, prompt=prompt, seed=seed, init_image=args.init_img, **shape
                )
            predicted = _predict(pipe, args, prompt, shape, controls).to_dict() if report else None
            result = pipe(
                prompt, **{**shape, **controls}, num_inference_steps=args.steps, sigmas=sigmas,
                scheduler=args.scheduler, shift=shift, eta=args.eta, seed=seed, rng=args.rng, init_image=args.init_img,
                mask_image=args.mask, strength=strength, lightning=args.lightning, output_type="np", progress=bars,
                on_image=save,
            )  # fmt: skip
    if report:
        data = result.report.to_dict()
        data["seconds"] = {**before, **data["seconds"], "total": time.perf_counter() - start}
        data |= {"images": [str(path) for path in written], "seeds": result.seeds, "predicted": predicted}
        write_whole(report, (json.dumps(data, indent=1) + "\n").encode())
    for path in written:
        print(path)
    return 0


def _set_up(pipe: Any, args: argparse.Namespace, tile: tuple[int, int]) -> None:
    """What decides of the graphs that a pipeline builds."""
    pipe.smaller_vae_tile = tile
    pipe.vae_tile = tile if args.vae_tiling else None
    pipe.cfg_batch = {"on": True, "off": False}.get(args.cfg_batch, "auto")
    for component in pipe.components():
        component.backend.flash_attention = args.flash_attention


def _warn_of_keys(reports: Sequence[LoraReport], args: argparse.Namespace) -> None:
    for report in reports:
        if (report.unknown or report.warnings) and not args.verbose:  # else the log says it
            print("warning: " + "; ".join([report.sentence(), *report.warnings]), file=sys.stderr)


def _predict(
    pipe: Any, args: argparse.Namespace, prompt: str, shape: Mapping[str, Any], controls: Mapping[str, Any]
) -> Any:
    from .plan import predict_run

    preview = None if args.preview == "none" else args.preview
    steps = args.sigmas.count(",") if args.sigmas else args.steps
    return predict_run(
        pipe, prompt, **shape, encode_image=args.init_img is not None, preview=preview, cache=controls.get("cache"),
        num_inference_steps=steps,
    )  # fmt: skip


def _show_plan(
    args: argparse.Namespace, prompt: str, files: tuple[str, str, str | None], load: Mapping[str, Any],
    shape: Mapping[str, Any], controls: Mapping[str, Any], wanted_loras: Sequence[tuple[str, float]],
    tile: tuple[int, int],
) -> None:  # fmt: skip
    import models
    from models.prediction import stand_in

    from . import plan

    with models.load(*files, **load, load=stand_in) as pipe:
        _set_up(pipe, args, tile)
        if wanted_loras:
            _warn_of_keys(pipe.set_loras(wanted_loras), args)
        side = pipe.size(*(shape[name] for name in ("width", "height", "reference_images")))
        threads = pipe.transformer.backend.n_threads
        heading = f"{side[0]}x{side[1]}, {threads} thread{'s' * (threads != 1)}"
        plan.show(pipe, _predict(pipe, args, prompt, shape, controls), heading, getattr(args, "json", False))


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt_option is not None:
        raise ValueError("the prompt is given twice, as an argument and with -p")
    prompt = args.prompt if args.prompt_option is None else args.prompt_option
    if prompt is None:
        example = f"pyggml {args.command} 'a red circle on a blue background'"
        raise ValueError(f"what to draw? Give a prompt, such as: {example}")
    for name, text in (("prompt", prompt), ("negative prompt", args.negative_prompt)):
        # Bytes of the command line that are no UTF-8 arrive as halves of surrogate pairs.
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"the {name} is no valid UTF-8 text")
    if loras.TAG.search(args.negative_prompt):
        raise ValueError("a <lora:...> in the negative prompt has no effect: put it into the prompt")
    return str(prompt)


def _models(args: argparse.Namespace) -> tuple[str, str, str | None]:
    """The three files: all given, or all the demo's, which then stand in `args`. --tae may stand for --vae."""
    names = ("diffusion_model", "llm", "vae")
    missing = [f"--{name.replace('_', '-')}" for name in names if not getattr(args, name)]
    if len(missing) < len(names) and args.tae and "--vae" in missing:
        missing.remove("--vae")
    if len(missing) == len(names):
        args.diffusion_model, args.llm, args.vae = (str(DEMO / name) for name in DEMO_FILES)
    elif missing:
        raise ValueError(f"{' and '.join(missing)} missing: a model is three files (or none of them, for the demo)")
    return args.diffusion_model, args.llm, args.vae


def _set_lightning(args: argparse.Namespace, family: Any, wanted: Sequence[tuple[str, float]]) -> None:
    """The steps, the guidance and the schedule of Lightning models into `args` where they are not given, as the
    pipeline would choose them, when --lightning or the name of a LoRA says so.
    """
    if args.lightning and not family.has_lightning:
        raise ValueError("--lightning is for Qwen-Image")
    steps, why = args.lightning, ""
    if steps is None and family.has_lightning and args.compat != "sd.cpp":
        found = ((loras.lightning(path), path) for path, weight in wanted if weight > 0)
        steps, why = next(((n, path) for n, path in found if n), (0, ""))
    if not steps:
        return
    usual = {"cfg_scale": 1.0} | ({} if args.sigmas else {"steps": steps, "scheduler": "lightning"})
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if why:
        chosen = ", ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in usual)
        print(f"note: {os.path.basename(why)} is a Lightning LoRA: {chosen} (--lightning off: as without it)",
              file=sys.stderr)  # fmt: skip


def _of_family(args: argparse.Namespace, family: Any) -> dict[str, Any]:
    """What a family's `load` is given beside the options of all; ValueError for what is another family's."""
    cfg = family.default_cfg_scale if args.cfg_scale is None else args.cfg_scale
    if args.negative_prompt and cfg == 1:
        print("warning: --negative-prompt has no effect with --cfg-scale 1", file=sys.stderr)
    found = {
        "llm_vision": args.llm_vision, "variant": args.edit_model, "grid_positions": args.grid_positions or None,
    }  # fmt: skip
    for pair in args.model_args.split(",") if args.model_args else []:
        key, _, value = pair.partition("=")
        if key.strip() != "qwen_image_zero_cond_t" or value.strip() not in ("true", "false"):
            raise ValueError(f"--model-args {pair!r}: only qwen_image_zero_cond_t=true is known, or =false")
        if args.edit_model and (args.edit_model == "2511") != (value.strip() == "true"):
            raise ValueError(f"--model-args {pair} contradicts --edit-model {args.edit_model}")
        found["variant"] = "2511" if value.strip() == "true" else args.edit_model or "2509"
    found = {key: value for key, value in found.items() if value is not None}
    if found and not family.edits:
        raise ValueError("--llm-vision, --edit-model, --model-args and --grid-positions are for Qwen-Image")
    return found


def _check(args: argparse.Namespace) -> None:
    lowest = 0 if args.compat == "sd.cpp" else 1  # below 1 stable-diffusion.cpp mixes in the negative prompt
    if args.cfg_scale is not None and not lowest <= args.cfg_scale < 1000:
        raise ValueError(f"--cfg-scale must be in {lowest}..1000, where 1 is off, not {args.cfg_scale}")
    if args.mask is not None and args.init_img is None:
        raise ValueError("--mask needs --init-img, the picture of which a part is drawn anew")
    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise ValueError(f"--steps must be in 1..1000, not {args.steps}")
    if not 1 <= args.batch_count <= 1000:
        raise ValueError(f"--batch-count must be in 1..1000, not {args.batch_count}")
    if args.threads is not None and args.threads > 512:
        raise ValueError(f"--threads must be at most 512, not {args.threads}")
    if args.threads is not None and args.threads < 1:
        args.threads = None  # as sd-cli: physical cores
    if args.seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, not {args.seed}")
    if args.strength is not None and args.init_img is None:
        raise ValueError("--strength needs --init-img, the picture that it is about")
    if args.flow_shift is not None and not 0 < args.flow_shift < 1000:
        raise ValueError(f"--flow-shift must be above 0 and below 1000, not {args.flow_shift}")


def _load_options(args: argparse.Namespace) -> Any:
    from loader.options import LoadOptions, hints_from_environment, parse_hints

    flags = args.mmap_flags
    hints = hints_from_environment(os.environ) if flags is None else parse_hints(flags, "--mmap-flags")
    return LoadOptions(
        mode=args.mmap, mlock=args.mlock, hints=hints, repack=args.repack, reclaim=args.reclaim_mmap_source
    )


def _devices(args: argparse.Namespace) -> tuple[str, str]:
    """--backend with --clip-on-cpu and --vae-on-cpu, and --params-backend with --offload-to-cpu; checked."""
    from models.devices import MODULES, find_devices, parse

    servers = [device.name for device in add_servers(args)]
    named = parse(args.backend or "&".join(servers) or "auto", "--backend")
    if args.clip_on_cpu:
        named["te"] = "cpu"
    if args.vae_on_cpu:
        named["vae"] = "cpu"
    for name in named.values():
        find_devices(name, "--backend")
    rests = parse(args.params_backend or "auto", "--params-backend")
    if args.offload_to_cpu:
        if args.params_backend:
            raise ValueError("--offload-to-cpu is --params-backend cpu: give one of them")
        rests = dict.fromkeys(MODULES, "cpu")
    for name in set(rests.values()):
        if name.lower() != "disk":
            find_devices(name, "--params-backend")

    def text(chosen: Mapping[Any, str]) -> str:
        return ",".join(f"{module}={chosen.get(module, 'auto')}" for module in MODULES)

    return text(named), text(rests)


def add_servers(args: argparse.Namespace) -> list[Device]:
    """The devices of --rpc-servers, which `devices()` lists from now on."""
    from pyggml import add_rpc_server

    endpoints = [part.strip() for part in args.rpc_servers.split(",")] if args.rpc_servers else []
    if len(set(endpoints)) < len(endpoints):
        raise ValueError(f"--rpc-servers {args.rpc_servers}: a server is named twice")
    return [device for endpoint in endpoints for device in add_rpc_server(endpoint)]


def _check_writable(path: Path) -> None:
    """Try it with such a file as will be written: permissions say little of full or odd file systems."""
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".part", dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def _check_sampling(
    args: argparse.Namespace, family: Any, width: int | None, height: int | None, seed: int, strength: float
) -> list[float] | None:  # fmt: skip
    """What the pipeline would refuse, before models are loaded. Returns the noise levels of --sigmas, if given."""
    from models import image, sampler, schedule
    from models.rng import make_rng
    from models.sizes import check_size

    check_size(64 if width is None else width, 64 if height is None else height)
    sampler.find_sampler(args.sampling_method, args.eta)
    make_rng(args.rng or "cpu", seed + args.batch_count - 1)
    if args.sigmas:
        levels = schedule.explicit(_numbers("--sigmas", args.sigmas))
    else:
        levels = schedule.sigmas(args.scheduler or "diffusers", args.steps or family.default_steps)
    if args.init_img is not None:
        schedule.after_strength(levels, strength, compat="sd.cpp" if args.compat == "sd.cpp" else None)
    for path in filter(None, [args.init_img, args.mask, *args.ref_image]):
        image.read_image(path, 16, 16)
    return levels.tolist() if args.sigmas else None


def _side(name: str, pixels: int | None) -> int | None:
    """sd-cli's rule: up to the next multiple of 8."""
    if pixels is None or pixels % 8 == 0 or pixels <= 0:
        return pixels
    rounded = -(-pixels // 8) * 8
    print(f"warning: {name} {pixels} is no multiple of 8, {rounded} is used", file=sys.stderr)
    return rounded


def _tile(args: argparse.Namespace) -> tuple[int, int]:
    """(height, width) of the autoencoder's tiles in latent pixels."""
    from models import tiles

    if args.vae_tile_overlap is not None:
        if not 0 <= args.vae_tile_overlap <= 0.5:
            raise ValueError(f"--vae-tile-overlap must be in 0..0.5, not {args.vae_tile_overlap}")
        print("warning: --vae-tile-overlap has no effect: our tiles fit without overlapping", file=sys.stderr)
    if args.vae_tile_size is None:
        return tiles.DEFAULT
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", args.vae_tile_size, re.ASCII)
    sides = [int(side) for side in found.groups(found[1])] if found else []
    if not sides or min(sides) < tiles.LEAST:
        wanted = f"latent pixels such as 32x32, at least {tiles.LEAST}"
        raise ValueError(f"--vae-tile-size must be {wanted}, not {args.vae_tile_size!r}")
    return sides[1], sides[0]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} wants numbers with commas between them, not {text!r}") from None


def _outputs(pattern: str, n: int) -> list[Path]:
    """Where the pictures go: %d (or %03d) is the number; else several get _0, _1, ... before the suffix."""
    path = Path(pattern)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, not {path.name!r}")
    if number := re.search(r"%0?\d?d", path.name):
        return [path.with_name(path.name.replace(number[0], number[0] % i)) for i in range(n)]
    return [path] if n == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(n)]


def parameters(args: argparse.Namespace, pipe: Any, prompt: str, seed: int, shape: tuple[int, ...]) -> str:
    """The `parameters` text of AUTOMATIC1111's tools: prompt, negative prompt, settings."""
    from pyggml import __version__

    settings: dict[str, object] = {
        "Steps": args.sigmas.count(",") if args.sigmas else args.steps or pipe.default_steps,
        "CFG scale": pipe.default_cfg_scale if args.cfg_scale is None else args.cfg_scale, "Seed": seed,
        "Size": f"{shape[1]}x{shape[0]}", "Model": Path(args.diffusion_model).stem,
        "RNG": args.rng or ("cuda" if args.compat == "sd.cpp" else "cpu"),
        "Sampler": f"{args.sampling_method} {args.scheduler or ''}".strip(),
    }  # fmt: skip
    if args.lora:
        found = (loras.parse_option(text) for text in args.lora)
        settings["Lora"] = ", ".join(f"{Path(path).name}:{weight:g}" for path, weight in found)
    if args.guidance or args.extra_sample_args:
        settings["Guidance"] = " ".join(filter(None, [args.guidance, args.extra_sample_args]))
    if args.cache_mode:
        settings["Cache"] = " ".join(filter(None, [args.cache_mode, args.cache_option]))
    if args.flow_shift:
        settings["Shift"] = args.flow_shift
    if args.sigmas:
        settings["Custom Sigmas"] = f"[{args.sigmas}]"
    if args.init_img:
        settings["Denoising strength"] = INIT_STRENGTH if args.strength is None else args.strength
    decoder = args.vae if args.taesd_preview_only or not args.tae else args.tae
    settings |= {"TE": Path(args.llm).name, "Unet": Path(args.diffusion_model).name, "VAE": Path(decoder).name}
    settings["Version"] = f"pyggml {__version__}"
    lines = [prompt]
    if args.negative_prompt:
        lines.append(f"Negative prompt: {args.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value as those tools read it: in quotes where it holds what separates values."""
    value = value.encode(errors="replace").decode()  # of file names that are no UTF-8
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value


class _Bars(Bars):
    """With the number of the picture that is drawn."""

    def __init__(self, n_images: int) -> None:
        super().__init__(bar_format="{desc:14} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]")
        self.n_images = n_images
        self.image = 0

    def __call__(self, phase: str, done: int, total: int) -> None:
        several = phase == "step" and self.n_images > 1
        super().__call__(f"{phase} {self.image + 1}/{self.n_images}" if several else phase, done, total)
        self.image += phase == "decode" and 0 < done == total
