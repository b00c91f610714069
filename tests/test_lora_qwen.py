"""LoRAs on Qwen-Image: names, arithmetic against numpy, caches, merging into files, Lightning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_models import as_options, write_tiny_qwen

import models
from loader.errors import LoadError
from models import schedule
from models.lora import lightning_steps
from models.qwen_image import QwenImagePipeline
from pyggml import Backend
from studio import cli

Arrays = dict[str, NDArray[Any]]

PROMPT = "a red circle"
SMALL: dict[str, Any] = {"width": 32, "height": 48, "num_inference_steps": 2, "output_type": "latent"}
RANK = 4
BLOCK = "transformer_blocks.0"  # what the last one makes of the text is not used
# every kind of linear layer: the transformer's and the text encoder's, by their names in files
MATRICES = [
    "img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "proj_out",
    *(f"{BLOCK}.{name}" for name in (
        "img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2",
        "txt_mlp.net.0.proj", "txt_mlp.net.2")),
]  # fmt: skip
TEXT = [f"layers.0.self_attn.{x}_proj" for x in "qkvo"] + [f"layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")]
IN_FILE = "model.language_model."  # before the text encoder's names
LIGHTNING = "Qwen-Image-Lightning-4steps-V1.0-bf16.safetensors"


@pytest.fixture(scope="module")
def pipes(qwen_files: dict[str, Path], backend: Backend) -> Iterator[dict[str, QwenImagePipeline]]:
    """By how LoRAs are applied."""
    modes = ("at_runtime", "immediately")
    opened: dict[str, Any] = {mode: models.load(**qwen_files, backend=backend, lora_apply_mode=mode) for mode in modes}
    yield opened
    for pipe in opened.values():
        pipe.close()


@pytest.fixture
def pipe(pipes: dict[str, QwenImagePipeline]) -> Iterator[QwenImagePipeline]:
    yield pipes["at_runtime"]
    pipes["at_runtime"].unload_lora_weights()


def file_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


@cache
def weights(part: str) -> Mapping[str, NDArray[np.float32]]:
    """The tensors of a file of the tiny models."""
    with TemporaryDirectory() as folder:
        return load_file(file_of(write_tiny_qwen(Path(folder))[part]))


def write_models(folder: Path, changed: Mapping[str, NDArray[Any]]) -> dict[str, Path]:
    """The tiny models; changed: "part/tensor" -> what that holds instead."""
    paths = write_tiny_qwen(folder)
    for part in ("diffusion_model", "llm"):
        found = {k.removeprefix(f"{part}/"): v for k, v in changed.items() if k.startswith(f"{part}/")}
        assert found.keys() <= weights(part).keys()
        save_file({k: np.ascontiguousarray(v) for k, v in {**weights(part), **found}.items()}, file_of(paths[part]))
    return paths


def latents(pipe: Any) -> NDArray[Any]:
    result: NDArray[Any] = pipe(PROMPT, **SMALL).images[0]
    return result


def error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def matrix(name: str) -> NDArray[np.float32]:
    part, before = ("llm", IN_FILE) if name in TEXT else ("diffusion_model", "")
    return weights(part)[f"{before}{name}.weight"]


def pair(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(down, up), the same for a name each time."""
    rng = np.random.default_rng(sum(map(ord, name)))
    n_out, n_in = matrix(name).shape
    down, up = rng.standard_normal((RANK, n_in), np.float32), rng.standard_normal((n_out, RANK), np.float32)
    return down / 8, up / 8


def deltas(names: list[str], scale: float) -> Arrays:
    """ "part/tensor" -> its values with the LoRA in it, by numpy."""
    changed = {}
    for name in names:
        down, up = pair(name)
        key = f"llm/{IN_FILE}{name}.weight" if name in TEXT else f"diffusion_model/{name}.weight"
        changed[key] = (matrix(name) + scale * up.astype(np.float64) @ down).astype(np.float32)
    return changed


def expected(folder: Path, changed: Mapping[str, NDArray[Any]], backend: Backend) -> NDArray[Any]:
    with models.load(**write_models(folder, changed), backend=backend) as pipe:
        return latents(pipe)


def write(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata)
    return path


def simple(path: Path, *names: str, metadata: dict[str, str] | None = None, sign: float = 1) -> Path:
    tensors: Arrays = {}
    for name in names:
        down, up = pair(name)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": sign * up}
    return write(path, tensors, metadata)


# -- names and arithmetic --------------------------------------------------------------------------------------------


def dots(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def own(name: str) -> str:
    """llama.cpp's name of a module of the text encoder."""
    for a, b in (("layers.", "blk."), ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("mlp.", "ffn_"),
                 ("_proj", "")):  # fmt: skip
        name = name.replace(a, b)
    return name


# transformer's names, text encoder's names, endings of down and up, alpha
SCHEMES: dict[str, tuple[Callable[[str], str], Callable[[str], str], str, str, float | None]] = {
    "diffusers": (
        dots("transformer."), dots("text_encoder.model.language_model."), ".lora_A.weight", ".lora_B.weight", None,
    ),
    "diffusers, old": (dots("transformer."), dots("text_encoder.model."), ".lora.down.weight", ".lora.up.weight", 2),
    "lightx2v": (dots(""), dots("te."), ".lora_down.weight", ".lora_up.weight", 2),
    "peft": (
        dots("base_model.model."), dots("base_model.model.model.language_model."), ".lora_A.default.weight",
        ".lora_B.default.weight", None,
    ),
    "trainers of one model": (dots(""), dots("language_model."), ".lora_A.default.weight", ".lora_B.default.weight", 2),
    "comfy": (
        dots("diffusion_model."), dots("text_encoders.qwen25_7b.transformer.model."), ".lora_A.weight",
        ".lora_B.weight", 2,
    ),
    "single file": (
        dots("model.diffusion_model."), lambda name: f"text_encoders.llm.{own(name)}", ".lora_down", ".lora_up", None,
    ),
    "kohya": (flat("lora_unet_"), flat("lora_te_"), ".lora_down.weight", ".lora_up.weight", 2),
    "kohya, with the model's own name": (
        flat("lora_transformer_"), flat("lora_te1_model_"), ".lora_down.weight", ".lora_up.weight", 2,
    ),
    "lycoris": (flat("lycoris_"), flat("lora_te_model_language_model_"), ".lora_down.weight", ".lora_up.weight", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def by_numpy(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> dict[bool, NDArray[Any]]:
    """Whether there is an alpha -> latents with the weights merged by numpy, LoRA weight 0.5."""
    return {
        has_alpha: expected(tmp_path_factory.mktemp("merged"), deltas([*MATRICES, *TEXT], scale), backend)
        for has_alpha, scale in ((False, 0.5), (True, 0.5 * 2 / RANK))
    }


@pytest.mark.parametrize("name", SCHEMES)
def test_every_naming_scheme_equals_numpy(
    pipes: dict[str, QwenImagePipeline], by_numpy: dict[bool, NDArray[Any]], tmp_path: Path, name: str
) -> None:
    of_transformer, of_text, down_ending, up_ending, alpha = SCHEMES[name]
    tensors: Arrays = {}
    for module in (*MATRICES, *TEXT):
        renamed = (of_text if module in TEXT else of_transformer)(module)
        tensors[renamed + down_ending], tensors[renamed + up_ending] = pair(module)
        if alpha:
            tensors[renamed + ".alpha"] = np.array(alpha, np.float32)
    path = write(tmp_path / "x.safetensors", tensors)
    n = 3 if alpha else 2
    for mode, pipe in pipes.items():
        before = latents(pipe)
        [report] = pipe.set_loras({path: 0.5})
        assert report.applied == {
            "transformer": (n * len(MATRICES),) * 2, "text_encoder": (n * len(TEXT),) * 2
        } and not report.unknown, mode  # fmt: skip
        assert error(latents(pipe), by_numpy[alpha is not None]) < 1e-5, mode
        assert error(before, by_numpy[alpha is not None]) > 0.01
        pipe.unload_lora_weights()
        np.testing.assert_array_equal(latents(pipe), before)


@pytest.mark.parametrize("name", [*MATRICES, *TEXT])
def test_each_layer_alone(pipes: dict[str, QwenImagePipeline], tmp_path: Path, backend: Backend, name: str) -> None:
    """Each takes part in the picture, so that one which is forgotten is noticed."""
    path = simple(tmp_path / "x.safetensors", name)
    wanted = expected(tmp_path, deltas([name], 1), backend)
    for mode, pipe in pipes.items():
        before = latents(pipe)
        pipe.set_loras({path: 1})
        assert error(latents(pipe), wanted) < 1e-5, mode
        assert error(before, wanted) > 1e-4
        pipe.unload_lora_weights()


def test_vectors_and_other_forms(pipes: dict[str, QwenImagePipeline], tmp_path: Path, backend: Backend) -> None:
    """Norms and biases, which are merged in both modes; a LoKr of img_mod and a LoHa."""
    rng = np.random.default_rng(5)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32) / 4

    norm, bias, text_norm, query = normal(32), normal(384), normal(64), normal(64)
    k1, k2, a1, b1, a2, b2 = normal(48, 8), normal(8, 8), normal(64, 2), normal(2, 64), normal(64, 3), normal(3, 64)
    path = write(tmp_path / "x.safetensors", {
        f"diffusion_model.{BLOCK}.attn.norm_added_q.diff": norm, f"transformer.{BLOCK}.img_mod.1.diff_b": bias,
        "text_encoder.model.language_model.norm.diff": text_norm, "te.layers.0.self_attn.q_proj.diff_b": query,
        f"lycoris_{BLOCK.replace('.', '_')}_img_mod_1.lokr_w1": k1,
        f"lycoris_{BLOCK.replace('.', '_')}_img_mod_1.lokr_w2": k2,
        **{f"{BLOCK}.attn.to_k.hada_{k}": v for k, v in (("w1_a", a1), ("w1_b", b1), ("w2_a", a2), ("w2_b", b2))},
    })  # fmt: skip
    changes = {
        f"diffusion_model/{BLOCK}.attn.norm_added_q.weight": norm,
        f"diffusion_model/{BLOCK}.img_mod.1.bias": bias,
        f"llm/{IN_FILE}norm.weight": text_norm, f"llm/{IN_FILE}layers.0.self_attn.q_proj.bias": query,
        f"diffusion_model/{BLOCK}.img_mod.1.weight": np.kron(k1, k2),
        f"diffusion_model/{BLOCK}.attn.to_k.weight": (a1 @ b1) * (a2 @ b2),
    }  # fmt: skip
    wanted = expected(tmp_path, {k: weights(k.split("/")[0])[k.split("/")[1]] + v for k, v in changes.items()}, backend)
    for pipe in pipes.values():
        pipe.set_loras({path: 1})
        assert error(latents(pipe), wanted) < 1e-5
        pipe.unload_lora_weights()


def test_edit_and_zero_cond_t(qwen_files: dict[str, Path], backend: Backend, tmp_path: Path) -> None:
    """References pass through the same layers; those at time 0 are modulated with the LoRA too."""
    reference = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    path = simple(tmp_path / "x.safetensors", *MATRICES)
    merged = write_models(tmp_path, deltas(MATRICES, 1))

    def edited(pipe: QwenImagePipeline) -> NDArray[Any]:
        noise = np.random.default_rng(1).standard_normal((16, 4, 6)).astype(np.float32)
        references = [pipe.encode_image(reference)]
        return pipe.denoise(noise, schedule.sigmas("lightning", 2), pipe.encode(PROMPT), references=references)

    for variant in ("2509", "2511"):
        with models.load(**merged, backend=backend, encoder=True, variant=variant) as pipe:
            wanted = edited(pipe)
        for mode in ("at_runtime", "immediately"):
            with models.load(
                **qwen_files, backend=backend, encoder=True, variant=variant, lora_apply_mode=mode
            ) as pipe:
                before = edited(pipe)
                pipe.set_loras({path: 1})
                assert error(edited(pipe), wanted) < 1e-5 and error(before, wanted) > 0.01
                pipe.set_loras({})
                np.testing.assert_array_equal(edited(pipe), before)


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_modulations_that_are_kept_know_the_loras(
    pipes: dict[str, QwenImagePipeline], tmp_path: Path, backend: Backend, mode: str
) -> None:
    """Of img_mod, txt_mod, norm_out and the time's embedding, which the steps do not compute: another weight, another
    LoRA, another file under the same name, none at all.
    """
    pipe = pipes[mode]
    names = [f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1", "norm_out.linear"]
    names += ["time_text_embed.timestep_embedder.linear_2"]
    a, b = simple(tmp_path / "a.safetensors", *names), simple(tmp_path / "b.safetensors", *names, sign=-1)
    base = latents(pipe)
    wanted = {weight: expected(tmp_path / str(weight), deltas(names, weight), backend) for weight in (1, 0.5, -1)}
    pipe.set_loras({a: 1})
    assert error(latents(pipe), wanted[1]) < 1e-5
    kept = dict(pipe._modulations)
    latents(pipe)
    assert pipe._modulations == kept  # made once
    pipe.set_loras({a: 0.5})
    assert error(latents(pipe), wanted[0.5]) < 1e-5
    pipe.set_loras({b: 1})
    assert error(latents(pipe), wanted[-1]) < 1e-5
    pipe.set_loras({})
    pipe.load_lora_weights(a, "x")
    assert error(latents(pipe), wanted[1]) < 1e-5
    pipe.unload_lora_weights()
    pipe.load_lora_weights(b, "x")
    assert error(latents(pipe), wanted[-1]) < 1e-5
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(latents(pipe), base)


def test_prompts_know_the_file_behind_a_name(pipe: QwenImagePipeline, tmp_path: Path) -> None:
    a, b = simple(tmp_path / "a.safetensors", *TEXT), simple(tmp_path / "b.safetensors", *TEXT, sign=-1)
    pipe.load_lora_weights(a, "x")
    first = pipe.encode(PROMPT)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(b, "x")
    assert error(pipe.encode(PROMPT).features, first.features) > 1e-3
    pipe.unload_lora_weights()
    pipe.load_lora_weights(a, "y")
    assert pipe.encode(PROMPT) is first  # the same file again


# -- refusals, files -------------------------------------------------------------------------------------------------


def test_a_lora_of_z_image(pipe: QwenImagePipeline, tmp_path: Path) -> None:
    down = np.ones((4, 64), np.float32)
    path = write(tmp_path / "x.safetensors", {"diffusion_model.layers.0.attention.qkv.lora_A.weight": down})
    with pytest.raises(LoadError, match=r"none of its 1 keys.*looks like one for Z-Image"):
        pipe.set_loras({path: 1})


def test_keys_of_the_vision_tower_are_counted_apart(pipe: QwenImagePipeline, tmp_path: Path) -> None:
    down, up = pair(TEXT[0])
    names = (f"text_encoder.model.language_model.{TEXT[0]}", "text_encoder.model.visual.blocks.0.attn.proj")
    path = write(tmp_path / "x.safetensors", {
        f"{n}.lora_{k}.weight": x for n in names for k, x in (("A", down), ("B", up))
    })  # fmt: skip
    [report] = pipe.set_loras({path: 1})
    assert report.applied == {"text_encoder": (2, 4)} and report.ignored == 2 and not report.unknown


def merge(source: Path, lora: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["convert", str(source), "--lora", f"{lora}:0.5", "-o", str(out)]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_merged_by_convert(
    qwen_files: dict[str, Path], backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    by_numpy: dict[bool, NDArray[Any]], ending: str,
) -> None:  # fmt: skip
    lora = simple(tmp_path / "x.safetensors", *MATRICES, *TEXT)
    out = {**qwen_files, "diffusion_model": tmp_path / "dit" / f"model.{ending}", "llm": tmp_path / "llm"}
    out["diffusion_model"].parent.mkdir()
    out["llm"].mkdir()
    said = merge(qwen_files["diffusion_model"], lora, out["diffusion_model"], capsys)
    assert f"{2 * len(MATRICES)} of {2 * len(MATRICES)} keys applied to transformer" in said
    said = merge(qwen_files["llm"], lora, out["llm"] / f"model.{ending}", capsys)
    assert f"{2 * len(TEXT)} of {2 * len(TEXT)} keys applied to text_encoder" in said
    for name in ("config.json", "tokenizer.json"):
        (out["llm"] / name).write_bytes((qwen_files["llm"] / name).read_bytes())
    if ending == "safetensors":
        with models.load(**out, backend=backend) as pipe:
            assert error(latents(pipe), by_numpy[False]) < 1e-5
        written = load_file(out["llm"] / "model.safetensors")
    else:
        written = {t.name: t.data for t in gguf.GGUFReader(out["llm"] / "model.gguf").tensors}
        for name in TEXT:
            key = f"{IN_FILE}{name}.weight"
            np.testing.assert_allclose(written[key], deltas([name], 0.5)[f"llm/{key}"], rtol=1e-5, atol=1e-6)
    visual = [name for name in weights("llm") if ".visual." in name]
    assert len(visual) > 20  # the tower of the same file is as it was
    for name in visual:
        np.testing.assert_array_equal(written[name].reshape(-1), weights("llm")[name].reshape(-1))


def test_what_loras_are_merged_into(
    qwen_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = simple(tmp_path / "x.safetensors", MATRICES[0])
    assert cli.main(["convert", str(qwen_files["vae"]), "--lora", str(lora), "-o", str(tmp_path / "y.gguf")]) == 2
    assert "transformers and text encoders of Z-Image and Qwen-Image" in capsys.readouterr().err


# -- Lightning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "metadata", "steps"), [
    (LIGHTNING, {}, 4), ("qwen-image-lightning-8steps-v1.1.safetensors", {}, 8),
    ("Qwen-Image-Edit-2511-Lightning-4steps-V1.0-fp32.safetensors", {}, 4), ("lightning_8step.gguf", {}, 8),
    ("Qwen-Image-Lightning.safetensors", {}, 8), ("lightning-44steps.safetensors", {}, 44),
    ("x.safetensors", {"modelspec.title": "Qwen-Image-Lightning 4 steps"}, 4),
    ("Qwen-Lightning-8steps.safetensors", {"ss_output_name": "my-lightning-4step"}, 4),
    ("x.safetensors", {"ss_sd_model_name": "Qwen-Image-Lightning-4steps"}, None),  # what it was trained on
    ("ink-4steps.safetensors", {"modelspec.title": 4}, None), ("thunder.safetensors", {}, None),
])  # fmt: skip
def test_what_is_a_lightning_lora(name: str, metadata: dict[str, Any], steps: int | None) -> None:
    assert lightning_steps(f"/lightning/{name}", metadata) == steps


def test_lightnings_schedule() -> None:
    """diffusers' scheduler with base_shift = max_shift = ln 3 and no terminal, in float32."""
    for n in (4, 8):
        u = np.linspace(1, 1 / n, n).astype(np.float32)
        shifted = (math.exp(math.log(3)) / (math.exp(math.log(3)) + (1 / u - 1))).astype(np.float32)
        np.testing.assert_array_equal(schedule.sigmas("lightning", n), np.append(shifted, np.float32(0)))
    np.testing.assert_allclose(schedule.sigmas("lightning", 4), [1, 0.9, 0.75, 0.5, 0], atol=2e-7)
    np.testing.assert_allclose(schedule.sigmas("lightning", 8), schedule.sigmas("simple", 8), atol=2e-7)


def levels(pipe: QwenImagePipeline, **asked: Any) -> tuple[list[float], Any]:
    """Noise levels of a run, from the times that its steps are told; and its report."""
    times: list[float] = []

    def step(_: Any, i: int, time: float, tensors: dict[str, Any]) -> dict[str, Any]:
        times.append(time / 1000)
        return {}

    result = pipe(PROMPT, width=32, height=32, output_type="latent", callback_on_step_end=step, **asked)
    return times, result.report


def test_a_lightning_lora_decides(pipe: QwenImagePipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = simple(tmp_path / LIGHTNING, f"{BLOCK}.attn.to_q")
    prompts: list[str] = []
    encode = pipe._features
    monkeypatch.setattr(pipe, "_features", lambda prompt, pictures: prompts.append(prompt) or encode(prompt, pictures))
    pipe._prompts.clear()
    pipe.set_loras({path: 1})
    with caplog.at_level("INFO", "pyggml"):
        times, report = levels(pipe)
    np.testing.assert_allclose(times, [1, 0.9, 0.75, 0.5], atol=1e-6)
    assert prompts == [PROMPT]  # no guidance
    assert report.lightning == f"Lightning, by {LIGHTNING}: 4 steps, guidance off, schedule lightning"
    assert report.lightning in caplog.text and json.loads(json.dumps(report.to_dict()))["lightning"]
    # what is given counts
    times, report = levels(pipe, num_inference_steps=2, cfg_scale=2.0)
    np.testing.assert_allclose(times, [1, 0.75], atol=1e-6)
    assert prompts == [PROMPT, ""] and "2 steps, guidance on" in report.lightning
    own = schedule.sigmas("qwen_image", 4, n_positions=16)[:4]
    assert levels(pipe, scheduler="qwen_image")[0] == pytest.approx(own)
    assert levels(pipe, shift=1.0)[0] == pytest.approx([1, 0.75, 0.5, 0.25])
    times, report = levels(pipe, sigmas=[1, 0.5], true_cfg_scale=1)
    assert times == pytest.approx([1, 0.75]) and report.lightning.endswith("2 steps, guidance off, sigmas as given")
    # by the argument: not at all, or though no LoRA says it
    times, report = levels(pipe, lightning=0, num_inference_steps=4)
    assert times == pytest.approx(own) and report.lightning is None
    pipe.set_loras({path: -1})
    assert levels(pipe, num_inference_steps=2)[1].lightning is None
    pipe.set_loras({})
    assert levels(pipe, num_inference_steps=2)[1].lightning is None
    times, report = levels(pipe, lightning=8)
    assert len(times) == 8 and times == pytest.approx(schedule.sigmas("lightning", 8)[:8])
    assert report.lightning == "Lightning, as asked: 8 steps, guidance off, schedule lightning"
    with pytest.raises(ValueError, match=r"in 1\.\.100, or 0 for off, not 101"):
        levels(pipe, lightning=101)


def test_the_name_of_a_link_counts(pipe: QwenImagePipeline, tmp_path: Path) -> None:
    """The cache of a hub keeps files under their hashes."""
    path = simple(tmp_path / "2ac1f0", f"{BLOCK}.attn.to_q")
    link = tmp_path / LIGHTNING
    link.symlink_to(path)
    pipe.set_loras({link: 1})
    assert len(levels(pipe)[0]) == 4


def test_lightning_of_others(qwen_files: dict[str, Path], backend: Backend, tmp_path: Path) -> None:
    """A LoRA of the text encoder is none; stable-diffusion.cpp does not look at names."""
    with models.load(**qwen_files, backend=backend) as pipe:
        pipe.set_loras({simple(tmp_path / LIGHTNING, *TEXT): 1})
        assert levels(pipe, num_inference_steps=1)[1].lightning is None
    with models.load(**qwen_files, backend=backend, compat="sd.cpp") as pipe:
        pipe.set_loras({simple(tmp_path / LIGHTNING, *MATRICES): 1})
        assert levels(pipe, num_inference_steps=1)[1].lightning is None
        assert len(levels(pipe, lightning=4)[0]) == 4


def test_lightning_on_the_command_line(
    qwen_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = simple(tmp_path / LIGHTNING, f"{BLOCK}.attn.to_q")
    model = as_options(qwen_files)

    def draw(*options: str) -> tuple[dict[str, Any], str]:
        report = tmp_path / "report.json"
        code = cli.main(["generate", PROMPT, "-o", str(tmp_path / "x.png"), "--report", str(report), "-t", "1",
                         "-W", "32", "-H", "32", *model, *options])  # fmt: skip
        err = capsys.readouterr().err
        assert code == 0, err
        return json.loads(report.read_text()), err

    data, err = draw("--lora", str(lora))
    assert err == (f"note: {LIGHTNING} is a Lightning LoRA: --cfg-scale 1.0, --steps 4, --scheduler lightning "
                   "(--lightning off: as without it)\n")  # fmt: skip
    assert len(data["step_seconds"]) == 4 and data["lightning"].startswith(f"Lightning, by {LIGHTNING}")
    assert len([p for p in data["predicted"]["phases"] if p["name"] == "text encoder"]) == 1
    data, err = draw("--lora", str(lora), "--lightning", "off", "--steps", "2", "--cfg-scale", "1")
    assert err == "" and len(data["step_seconds"]) == 2 and data["lightning"] is None
    data, err = draw("--lightning", "8")
    assert err == "" and len(data["step_seconds"]) == 8 and "as asked" in data["lightning"]
    data, err = draw("--lora", str(lora), "--sigmas", "1,0.5,0")
    assert len(data["step_seconds"]) == 2 and data["lightning"].endswith("sigmas as given")
    for options, message in (
        (["--lightning", "x"], "'x' is not auto, off or a number"), (["--lightning", "0"], "in 1..100"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", PROMPT, *options])
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert cli.main(["generate", PROMPT, "--lightning", "4"]) == 2  # the demo model is a Z-Image
    assert "--lightning is for Qwen-Image" in capsys.readouterr().err
