"""Qwen-Image's networks against the reference implementation's output on tiny random models (tests/golden)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from loader.checkpoint import Checkpoint, open_checkpoint
from loader.describe import describe
from loader.params import load_params
from models import autoencoder_qwen, qwen25_vision, qwen25_vl
from models.autoencoder_qwen import QwenAutoencoder, QwenAutoencoderConfig
from models.devices import places
from models.image import to_float
from models.nn import Linear, linear_gelu
from models.pipeline import Compat
from models.qwen25_vision import Layout, Qwen25Vision, VisionConfig
from models.qwen25_vl import Qwen25VL, Qwen25VLConfig
from models.qwen_image import references
from models.qwen_image import transformer as net
from models.qwen_image.components import open_vision_tower
from models.qwen_image.prompt import prompt_ids
from models.qwen_image.transformer import QwenImageConfig, QwenImageTransformer
from models.tokenizer import Tokenizer
from pyggml import Backend, Buffer, Context, Graph, Type, ops

GOLDEN = Path(__file__).parent / "golden"
PAD = 280  # <|image_pad|> of the tiny vocabulary
TOLERANCE = 1e-4  # relative to the largest value


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend.cpu(2)


def golden(name: str) -> Mapping[str, Any]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def weights_of(arrays: Mapping[str, Any], prefix: str = "weights/") -> dict[str, NDArray[np.float32]]:
    return {k.removeprefix(prefix): np.ascontiguousarray(v) for k, v in arrays.items() if k.startswith(prefix)}


def saved(tensors: Mapping[str, Any], folder: Path) -> Checkpoint:
    """Tensors as a file, through the loader like any other."""
    save_file(dict(tensors), folder / "model.safetensors")
    return open_checkpoint(folder / "model.safetensors")


def close_to(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e}"


# -- prompts ---------------------------------------------------------------------------------------------------------

TEXT_IDS = """151644 8948 198 74785 279 2168 553 44193 279 1894 11 6083 11 1379 11 10434 11 12194 11 1467 11 27979 11871
    315 279 6171 323 4004 25 151645 198 151644 872 198"""
EDIT_IDS = """
    151644 8948 198 74785 279 1376 4419 315 279 1946 2168 320 3423 11 6083 11 1379 11 10434 11 6171 11 4004 701
    1221 10339 1246 279 1196 594 1467 7600 1265 11596 476 5602 279 2168 13 19813 264 501 2168 429 20027 279 1196 594
    8502 1393 20337 28137 448 279 4024 1946 1380 8311 13 151645 198 151644 872 198"""
SUFFIX = [151645, 198, 151644, 77091, 198]
CAT = [64, 16690, 8251]  # a lovely cat


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.qwen2()


@pytest.mark.parametrize(("kind", "before", "n"), [("text", TEXT_IDS, 34), ("edit", EDIT_IDS, 64)])
def test_prompt(tokenizer: Tokenizer, kind: Literal["text", "edit"], before: str, n: int) -> None:
    dropped = [int(i) for i in before.split()]
    assert len(dropped) == n
    for prompt, ids in (("a lovely cat", CAT), (" ", [220]), ("", [])):
        assert prompt_ids(tokenizer, prompt, kind=kind) == (dropped + ids + SUFFIX, n)


def test_prompt_with_pictures(tokenizer: Tokenizer) -> None:
    pad = qwen25_vl.IMAGE_PAD
    ids, n = prompt_ids(tokenizer, "a lovely cat", [2, 1])
    pictures = [24669, 220, 16, 25, 220, 151652, pad, pad, 151653, 24669, 220, 17, 25, 220, 151652, pad, 151653]
    assert n == 64 and ids[64:] == [*pictures, *CAT, *SUFFIX]
    ids, n = prompt_ids(tokenizer, "a lovely cat", [3], numbered=False)
    assert n == 64 and ids[64:] == [151652, pad, pad, pad, 151653, *CAT, *SUFFIX]


def test_long_prompts_are_cut_unless_they_have_pictures(tokenizer: Tokenizer) -> None:
    long = "cat " * 1000
    ids, n = prompt_ids(tokenizer, long)
    assert (len(ids), n) == (34 + 512, 34) and ids[-1] == tokenizer.encode(" cat")[0]
    assert len(prompt_ids(tokenizer, long, max_tokens=1024)[0]) > 1000
    assert prompt_ids(tokenizer, long, [1])[0][-5:] == SUFFIX


# -- text encoder and vision tower -----------------------------------------------------------------------------------


def vl_checkpoint(folder: Path, names: str) -> Checkpoint:
    """The golden's language model and vision tower in one file, as it is called by newer and older transformers, and by
    llama.cpp (which makes two files; theirs has each frame's kernel, and q, k and v, apart).
    """
    arrays = golden("qwen25_vl")
    tensors = weights_of(arrays)
    (folder / "config.json").write_text(str(arrays["config"]), encoding="utf-8")
    if names == "newer":
        tensors = {f"model.{n}": t for n, t in tensors.items()} | {"lm_head.weight": np.zeros((2, 2), np.float32)}
    elif names == "older":
        tensors = {n.replace("language_model.", "model."): t for n, t in tensors.items()}
    else:
        checkpoint = saved({f"model.{n}": t for n, t in tensors.items()}, folder)
        language = checkpoint.renamed(qwen25_vl.RENAMES)
        tensors = {n: language.read(n) for n in language}
        tower = checkpoint.renamed(qwen25_vision.RENAMES)
        for name in tower:
            value = tower.read(name)
            if name == "v.patch_embd.weight":
                tensors[name], tensors[f"{name}.1"] = (value[:, :, i] for i in range(2))
            elif "attn_qkv" in name:
                tensors |= {name.replace("qkv", x): part for x, part in zip("qkv", np.split(value, 3), strict=True)}
            else:
                tensors[name] = value
    saved({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder)
    return open_checkpoint(folder)  # with its config.json


@pytest.mark.parametrize("names", ["newer", "older", "llama.cpp"])
def test_text_encoder(backend: Backend, tmp_path: Path, names: str) -> None:
    arrays = golden("qwen25_vl")
    checkpoint = vl_checkpoint(tmp_path, names).renamed(qwen25_vl.RENAMES)
    if names == "llama.cpp":
        checkpoint = checkpoint.renamed([(r"^(?:v|mm)\..*$", None)])
    config = Qwen25VLConfig.from_checkpoint(checkpoint)
    assert config == Qwen25VLConfig(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ff_dim=96, n_vocab=288, sections=(2, 3, 3)
    )
    module = Qwen25VL(config)
    with load_params(module.params(), checkpoint, backend=backend, component="qwen25_vl"):
        ids = arrays["text/ids"]
        close_to(module.encode(backend, ids), arrays["text/hidden"])
        close_to(module.encode(backend, ids, n_dropped=7), arrays["text/hidden"][7:])


@pytest.mark.parametrize("names", ["newer", "older", "llama.cpp"])
def test_vision_tower(backend: Backend, tmp_path: Path, names: str) -> None:
    arrays = golden("qwen25_vl")
    checkpoint = vl_checkpoint(tmp_path, names).renamed(qwen25_vision.RENAMES)
    config = VisionConfig.from_checkpoint(checkpoint)
    apart = names == "llama.cpp"
    assert config == VisionConfig(
        dim=48, n_layers=3, n_heads=2, ff_dim=40, out_dim=64, patch=14, window=112, full_blocks=(1,),
        fused_qkv=not apart, split_frames=apart,
    )  # fmt: skip
    module = Qwen25Vision(config)
    with load_params(module.params(), checkpoint, backend=backend, component="vision"):
        close_to(module.encode(backend, arrays["picture/pixels"]), arrays["picture/tower"])
        with pytest.raises(ValueError, match=r"sides of 28 n, not \(3, 28, 30\)"):
            module.encode(backend, np.zeros((3, 28, 30), np.float32))


def test_gelu_of_the_vision_tower(backend: Backend, tmp_path: Path) -> None:
    """By the error function or, for compat="sd.cpp", by its tanh formula: seen through layers that let it pass."""
    x = np.linspace(-3, 3, 192, dtype=np.float32)
    checkpoint = vl_checkpoint(tmp_path, "newer")
    tensors = {n: checkpoint.read(n) for n in checkpoint}
    name = next(n.removesuffix("0.bias") for n in tensors if n.endswith("merger.mlp.0.bias"))
    tensors |= {f"{name}0.weight": 0 * tensors[f"{name}0.weight"], f"{name}0.bias": x}
    tensors |= {f"{name}2.weight": np.eye(64, 192, k=64, dtype=np.float32), f"{name}2.bias": np.zeros(64, np.float32)}
    saved(tensors, tmp_path)
    x = x[64:128]
    tanh = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    erf = x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    expected: Mapping[Compat, NDArray[np.float32]] = {"diffusers": erf, "sd.cpp": tanh}
    for compat, gelu in expected.items():
        vision = open_vision_tower(tmp_path, tmp_path, places(backend, None, None)["te"], compat=compat)
        assert vision is not None
        with vision.in_use() as tower:
            rows = tower.encode(backend, np.zeros((3, 28, 56), np.float32))
        vision.close()
        close_to(rows, np.stack([gelu] * 2), 1e-5)


@pytest.mark.parametrize("positions", ["one after the other", "grid"])
def test_text_encoder_with_a_picture(
    backend: Backend, tmp_path: Path, positions: str
) -> None:
    arrays = golden("qwen25_vl")
    checkpoint = vl_checkpoint(tmp_path, "newer").renamed(qwen25_vl.RENAMES)
    module = Qwen25VL(Qwen25VLConfig.from_checkpoint(checkpoint))
    ids, tower = arrays["picture/ids"], arrays["picture/tower"]
    on_grid = positions == "grid"
    with load_params(module.params(), checkpoint, backend=backend, component="qwen25_vl"):
        where = qwen25_vl.grid_positions(ids, [(6, 5)], PAD) if on_grid else None
        hidden = module.encode(backend, ids, tower, position=where, image_pad=PAD)
        close_to(hidden, arrays["picture/hidden_grid" if on_grid else "picture/hidden"])
        with pytest.raises(ValueError, match=r"30 image tokens: images are \[30, 64\], not \(29, 64\)"):
            module.encode(backend, ids, tower[1:], image_pad=PAD)
        with pytest.raises(ValueError, match="token id 288"):
            module.encode(backend, np.int32([288]))


def test_grid_positions() -> None:
    x, pad = 0, qwen25_vl.IMAGE_PAD
    ids = np.int32([x, x, x, x] + [pad] * 6 + [x, x] + [pad] * 2 + [x])
    t, h, w = qwen25_vl.grid_positions(ids, [(2, 3), (2, 1)])
    assert t.tolist() == [0, 1, 2, 3] + [4] * 6 + [7, 8] + [9, 9] + [11]
    assert h.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9, 10, 11]
    assert w.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 9, 11]
    for grids in ([(2, 3)], [(2, 3), (2, 2)], [(2, 3), (2, 1), (1, 1)]):
        with pytest.raises(ValueError, match="image tokens"):
            qwen25_vl.grid_positions(ids, grids)


def test_size_for_the_vision_tower() -> None:
    assert qwen25_vision.size_for(384, 384) == (392, 392)
    assert qwen25_vision.size_for(20, 10) == (84, 56)  # too small: up to 56 * 56 pixels
    assert qwen25_vision.size_for(10, 3000) == (28, 980)  # nothing would be left of its width
    assert qwen25_vision.size_for(1000, 500, largest=28 * 28 * 100) == (392, 196)  # too large: down, rounding down


# -- autoencoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["diffusers", "original", "one frame"])
def test_autoencoder(backend: Backend, tmp_path: Path, names: str) -> None:
    """The names of diffusers; the original ones; and kernels of which only the last frame is in the file."""
    arrays = golden("autoencoder_qwen")
    checkpoint = saved(weights_of(arrays), tmp_path)
    assert describe(checkpoint).architecture == "Qwen-Image (Wan) autoencoder"
    checkpoint = checkpoint.renamed(autoencoder_qwen.RENAMES)
    if names != "diffusers":
        tensors = {n: checkpoint.read(n) for n in checkpoint}
        if names == "one frame":
            tensors = {n: np.ascontiguousarray(t[:, :, -1]) if t.ndim == 5 else t for n, t in tensors.items()}
        checkpoint = saved(tensors, tmp_path)
        assert describe(checkpoint).architecture == "Qwen-Image (Wan) autoencoder"
        assert list(checkpoint.renamed(autoencoder_qwen.RENAMES)) == list(checkpoint)
    config = QwenAutoencoderConfig.from_checkpoint(checkpoint)
    assert config == QwenAutoencoderConfig(
        channels=(8, 16, 32, 32), latent_channels=16, picture_channels=3, n_frames=1 if names == "one frame" else 3
    )
    module = QwenAutoencoder(config)
    with load_params(module.params(), checkpoint, backend=backend, component="vae") as weights:
        assert not weights.report.n_copied  # kernels of three frames too stay in the file
        mean, deviation = autoencoder_qwen.MEAN, autoencoder_qwen.DEVIATION
        close_to(module.decode(backend, (arrays["latents"] - mean) / deviation) * 2 - 1, arrays["decoded"])
        latents, _ = module.encode(backend, (arrays["pixels"] + 1) / 2)
        close_to(latents * deviation + mean, arrays["mean"])


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_an_autoencoder(backend: Backend, tmp_path: Path, half: str) -> None:
    checkpoint = saved(weights_of(golden("autoencoder_qwen")), tmp_path).renamed(autoencoder_qwen.RENAMES)
    config = QwenAutoencoderConfig.from_checkpoint(checkpoint)
    module = QwenAutoencoder(config, encoder=half == "encoder", decoder=half == "decoder")
    other: Literal["encoder", "decoder"] = "decoder" if half == "encoder" else "encoder"
    checkpoint = checkpoint.renamed(autoencoder_qwen.without(other))
    with load_params(module.params(), checkpoint, backend=backend, component="vae"):
        assert all(name.startswith((half, "conv")) for name in module.params())


# -- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", [0, 1])
def test_references_are_scaled_as_in_the_pipeline(i: int) -> None:
    arrays = golden("qwen_references")
    picture, (area, tower_area) = arrays[f"{i}/picture"], arrays["areas"].tolist()
    close_to(2 * to_float(references.for_autoencoder(picture, area)) - 1, arrays[f"{i}/autoencoder"], 1e-6)
    seen = references.for_tower(picture, tower_area)
    rows, columns = (side // 28 for side in seen.shape[1:])
    patches = Layout(rows, columns, np.arange(rows * columns), ()).patches(seen, 14)
    both = np.repeat(patches.reshape(-1, 3, 1, 14 * 14), 2, axis=2)  # the reference has two frames
    close_to(both.reshape(len(patches), -1), arrays[f"{i}/tower"], 1e-6)


def test_sizes_of_references() -> None:
    assert references.size_of_area(1920, 1080, 1024 * 1024) == (1376, 768)
    assert references.size_of_area(100, 100, 384 * 384) == (384, 384)
    with pytest.raises(ValueError, match="1 x 5000 is too thin"):
        references.size_of_area(1, 5000, 384 * 384)


def test_references_are_scaled_as_stable_diffusion_cpp_scales_them() -> None:
    """By nearest neighbours, to the area of what is drawn; the tower's to the middle of what covers its size."""
    area = references.TOWER_AREA  # which does not count here
    assert references.size_of_area(130, 70, 96 * 64, compat="sd.cpp") == (96, 64)
    assert references.size_of_area(97, 65, 64 * 64, compat="sd.cpp") == (64, 64)  # 78.18 and 52.39
    assert references.size_of_area(9, 4, 64 * 64, compat="sd.cpp") == (96, 32)  # 96 and 42.7
    assert references.size_of_area(80, 80, 80 * 80, compat="sd.cpp") == (96, 96)  # 2.5 goes up
    assert references.size_of_area(80, 80, 80 * 80) == (64, 64)
    assert references.tower_grid(130, 70, area, compat="sd.cpp") == (11, 19)  # too small: scaled up to 384 x 384 pixels
    assert references.tower_grid(640, 480, area, compat="sd.cpp") == (17, 23)  # too large: down to 560 x 560
    assert references.tower_grid(448, 434, area, compat="sd.cpp") == (16, 16)  # between: 15.5 goes up
    picture = np.arange(60 * 100 * 3).astype(np.uint8).reshape(60, 100, 3)
    seen = references.for_autoencoder(picture, 64 * 64, compat="sd.cpp")
    assert seen.shape == (64, 96, 3) and np.array_equal(seen[3, 50], picture[3 * 60 // 64, 50 * 100 // 96])
    high, wide = (28 * n for n in references.tower_grid(100, 60, area, compat="sd.cpp"))
    assert (high, wide) == (308, 504)
    tower = references.for_tower(picture, area, compat="sd.cpp")  # 513 x 308, of which 4 and 5 columns go
    whole = picture[np.arange(308) * 60 // 308][:, (np.arange(504) + 4) * 100 // 513]
    assert np.array_equal(tower, qwen25_vision.normalise(whole))


# -- transformer -----------------------------------------------------------------------------------------------------


def transformer(folder: Path, backend: Backend, case: str) -> tuple[QwenImageTransformer, Any]:
    """The model of a case as a file: zero_cond_t is a mark in it, the layered model has a tensor more."""
    arrays = golden("qwen_image_transformer")
    tensors = weights_of(arrays)
    if case == "layered":
        tensors |= weights_of(arrays, "layered/weights/")
    if case == "zero":
        tensors[net.ZERO_COND_T] = np.zeros(0, np.float32)
    checkpoint = saved(tensors, folder)
    config = QwenImageConfig.from_checkpoint(checkpoint)
    reference = json.loads(str(arrays["config"]))
    assert config == QwenImageConfig(
        dim=64, n_heads=reference["num_attention_heads"], head_dim=reference["attention_head_dim"],
        n_layers=reference["num_layers"], ff_dim=256, text_dim=reference["joint_attention_dim"], patch_dim=64,
        axes_dims=tuple(reference["axes_dims_rope"]), zero_cond_t=case == "zero", layered=case == "layered",
    )  # fmt: skip
    module = QwenImageTransformer(config)
    params = module.params()
    return module, load_params(params, checkpoint.renamed(net.RENAMES), backend=backend, component="qwen_image")


@pytest.mark.parametrize("case", ["t2i", "edit", "zero", "layered"])
def test_transformer(backend: Backend, tmp_path: Path, case: str) -> None:
    arrays = golden("qwen_image_transformer")
    module, weights = transformer(tmp_path, backend, case)
    targets, text, sigma = (arrays[f"{case}/{k}"] for k in ("targets", "text", "t"))
    references = [arrays[k] for k in sorted(arrays) if k.startswith(f"{case}/reference_")]
    h, w = targets.shape[-2:]
    grids = [(r.shape[1] // 2, r.shape[2] // 2) for r in references]
    with weights:
        with module.context_graph(backend, len(text)) as graph:
            context = graph.compute(features=text)["context"]
        zero, at_sigma = module.modulate(backend, [0.0, float(sigma.item())])
        patches = np.concatenate([net.patchify(x) for x in (*targets, *references)])
        n = len(targets) * h * w // 4
        inputs = dict(
            patches=patches, context=context, modulation_image=at_sigma.image, modulation_text=at_sigma.text,
            position=net.joint_positions(
                len(text), (h // 2, w // 2), grids, n_targets=len(targets), layered=module.config.layered
            ),
        )  # fmt: skip
        if case == "zero":
            inputs["modulation_zero"] = zero.image[:-2]
        with module.step_graph(backend, n, [len(text)], len(patches) - n) as graph:
            out = graph.compute(**inputs)["out"]
            again = graph.compute(patches=patches)["out"]  # inputs are kept from one computation to the next
        module.config = replace(module.config, compat="sd.cpp")
        with module.step_graph(backend, n, [len(text)], len(patches) - n) as graph:
            steps = net.position_steps(len(text), "sd.cpp")
            fractions = graph.compute(**{**inputs, "position": steps * inputs["position"]})["out"]
    assert np.array_equal(out, again)
    close_to(fractions, out, 1e-5)
    close_to(np.stack([net.unpatchify(p, h, w) for p in np.split(out, len(targets))]), arrays[f"{case}/out"])


def test_modulation_is_the_same_however_many_times_there_are(backend: Backend, tmp_path: Path) -> None:
    module, weights = transformer(tmp_path, backend, "t2i")
    sigmas = np.linspace(1, 0.1, net.TIMES_AT_ONCE + 3)
    with weights:
        together = module.modulate(backend, sigmas)
        for i in (0, net.TIMES_AT_ONCE - 1, net.TIMES_AT_ONCE, len(sigmas) - 1):
            (alone,) = module.modulate(backend, sigmas[i : i + 1])
            close_to(together[i].image, alone.image, 1e-6)
            close_to(together[i].text, alone.text, 1e-6)


@pytest.mark.parametrize("type", [Type.F16, Type.Q4_1, Type.Q5_1, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K],
                         ids=lambda t: t.name)  # fmt: skip
def test_headroom(backend: Backend, type: Type) -> None:
    """Activations beyond f16, which the real model has, go through a layer with headroom whatever its weights are."""
    n = 256
    layer = Linear(n, n, headroom=net.DOWN_HEADROOM)
    rng = np.random.default_rng(0)
    values = {"weight": rng.standard_normal((n, n)) / 16, "bias": rng.standard_normal(n)}
    context = Context(4)
    for name, kind in (("weight", type), ("bias", Type.F32)):
        getattr(layer, name).tensor = context.new_tensor(values[name].shape, kind)
    Buffer.allocate(context, backend.buffer_type)
    for name in values:
        getattr(layer, name).tensor.set(values[name].astype(np.float32))
    x = (1e5 * (1 + rng.random((5, n)))).astype(np.float32)
    with Graph(backend, 64) as graph:
        a = graph.input((n, 5), name="x")
        graph.output(layer(a), name="y")
        graph.output(ops.mul_mat(layer.weight.tensor, a), name="plain")
        out = graph.compute(x=x)
    exact = x @ layer.weight.tensor.numpy().T + values["bias"]
    assert np.abs(out["y"] - exact).max() <= 0.01 * np.abs(exact).max()
    if type in (Type.F16, Type.Q4_1, Type.Q5_1):
        assert not np.isfinite(out["plain"]).all()  # else nobody needs the headroom any more


def test_loras_take_part_in_every_layer(backend: Backend, tmp_path: Path) -> None:
    """A layer whose bias is added elsewhere, before GELU, must not lose what a LoRA adds."""
    module, weights = transformer(tmp_path, backend, "t2i")
    up = module.transformer_blocks[0].img_mlp.net[0].proj
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64)).astype(np.float32)

    def up_and_gelu() -> NDArray[np.float32]:
        with Graph(backend, 64) as graph:
            graph.output(linear_gelu(up, graph.input((64, 3), name="x")), name="y")
            return graph.compute(x=x)["y"]

    with weights:
        plain = up_and_gelu()
        up.deltas = (lambda y, _: ops.scale(y, 2.0),)  # before the bias, as in a linear layer alone
        doubled = up_and_gelu()
        w, b = up.weight.tensor.numpy(), up.bias.tensor.numpy()
        for y, v in ((plain, x @ w.T + b), (doubled, 2 * (x @ w.T) + b)):
            close_to(y, v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))))


def test_patches() -> None:
    x = np.arange(16 * 6 * 4, dtype=np.float32).reshape(16, 6, 4)
    patches = net.patchify(x)
    assert patches.shape == (6, 64)
    assert patches[1, 4 * 5 + 2] == x[5, 1, 2]  # second patch: row 0, columns 2..3; channel 5, second row, first column
    assert np.array_equal(net.unpatchify(patches, 6, 4), x)


def test_positions() -> None:
    """An odd grid is centred differently by the two; text begins behind the largest picture, or behind the target."""
    ours = net.joint_positions(2, (3, 4), [(10, 2)])
    assert ours[:, :2].tolist() == [[5, 6]] * 3
    assert ours[1, 2:14].tolist() == [-2] * 4 + [-1] * 4 + [0] * 4 and ours[2, 2:6].tolist() == [-2, -1, 0, 1]
    assert set(ours[0, 2:14]) == {0} and set(ours[0, 14:]) == {1} and ours[1, 14] == -5
    theirs = net.joint_positions(3, (3, 4), [(10, 2)], compat="sd.cpp") / net.position_steps(3, "sd.cpp")
    assert theirs[:, :3].tolist() == [[4, 5.5, 7]] * 3  # from the target's longer side, 3 / 2 apart
    assert theirs[1, 3:15].tolist() == [-1] * 4 + [0] * 4 + [1] * 4 and set(theirs[0, 15:]) == {1}
    assert net.joint_positions(1, (3, 4), compat="sd.cpp")[:, 0].tolist() == [4] * 3
    layered = net.joint_positions(1, (2, 2), [(2, 2)], n_targets=3, layered=True)
    assert layered[0].tolist() == [3] + [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 4
