"""Trains the demo checkpoint: Z-Image, Qwen3 and the Flux autoencoder, all narrow, on drawn pictures.

Needs torch, diffusers, transformers, tokenizers, gguf and safetensors; one CPU core and about two hours are enough.

    python tools/train_demo.py prepare --work DIR     tokenizer and latent basis (seconds)
    python tools/train_demo.py model --work DIR       text encoder and transformer, jointly (about an hour)
    python tools/train_demo.py ae --work DIR          autoencoder (about 40 minutes; may run beside `model`)
    python tools/train_demo.py export --work DIR      writes studio/demo/*, after comparing with diffusers/transformers
    python tools/train_demo.py evaluate --work DIR    draws held-out prompts from the written files and checks them

Every stage is seeded and saves its state; started again it goes on from there, so it can be stopped at any time. How
the committed files came about, which was in more pieces than that, is in studio/demo/README.md.

What is not as usual, and why:

* The latent code is given, not learned: the 16 leading principal components of 8x8 pixel patches of drawn pictures,
  each scaled to the square root of its deviation, all together to variance one. The encoder learns to compute it, the
  decoder to invert it (with some noise on it, so that it repairs what the transformer gets slightly wrong). So the
  transformer does not wait for the autoencoder, and needs no encoder for its training data: a matrix product does it.
* The modules are those of diffusers and transformers; only the order of calls is written out here for whole batches
  (`Denoiser`, `encode_text`). `export` compares that with the originals' own forward pass.
* Captions are padded to exactly 32 tokens, 64x64 pictures to 32 image tokens, so every batch has one shape.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import demo_pictures as world
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "studio" / "demo"

DIM, HEADS, LAYERS, REFINERS = 192, 6, 3, 1
TEXT_DIM, TEXT_FFN, TEXT_HEADS, TEXT_KV, TEXT_HEAD_DIM, TEXT_LAYERS = 128, 384, 4, 2, 32, 4  # the last layer is unused
CHANNELS = (32, 32, 64, 64)
WINDOWED, WHOLE = 800, 2400  # steps of the autoencoder on windows, and until when encoder and decoder learn
VOCAB = 512
CAPTION = 32  # tokens, template included
SHIFT, SCALE = 0.1159, 0.3611  # z_model = (z_vae - SHIFT) * SCALE
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SPLIT = (  # Qwen2's pre-tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# --- tokenizer and latent basis --------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """The 256 symbols of byte-level BPE in Qwen2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def build_tokenizer(vocab: list[str], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL])
    return tokenizer


def train_tokenizer() -> dict[str, Any]:
    """Vocabulary (bytes, merges, control tokens, in this order) and merges, learned from prompts."""
    from tokenizers import trainers

    rng = random.Random(0)
    texts = [world.write_prompt(world.draw_scene(rng), rng) for _ in range(20000)]
    texts += ["user\n", "assistant\n"] * 5000
    tokenizer = build_tokenizer(byte_symbols(), [])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=byte_symbols(), min_frequency=10, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = byte_symbols() + [a + b for a, b in merges]
    return {"vocab": vocab + list(CONTROL), "merges": merges}


def to_tensor(pictures: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Code:
    """The given latent code: [N, 3, H, W] pixels <-> [N, 16, H/8, W/8] latents of about unit variance."""

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        self.mean, self.basis, self.scale = mean, basis, scale  # [192], [192, 16], [16]

    @classmethod
    def fit(cls, pixels: Tensor) -> Code:
        patches = F.unfold(pixels, 8, stride=8).transpose(1, 2).reshape(-1, 192)
        mean = patches.mean(0)
        variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variance, basis = variance.flip(0)[:16], basis.flip(1)[:, :16]
        basis = basis * torch.sign(basis.sum(0) + 1e-9)
        deviation = variance**0.25
        deviation /= (deviation**2).mean().sqrt()
        return cls(mean, basis, deviation / variance.sqrt())

    def encode(self, pixels: Tensor) -> Tensor:
        n, _, h, w = pixels.shape
        patches = F.unfold(pixels, 8, stride=8).transpose(1, 2) - self.mean
        return ((patches @ self.basis) * self.scale).transpose(1, 2).reshape(n, 16, h // 8, w // 8)

    def decode(self, latents: Tensor) -> Tensor:
        """The best linear inverse; a preview while there is no decoder yet."""
        _, _, h, w = latents.shape
        patches = (latents.flatten(2).transpose(1, 2) / self.scale) @ self.basis.T + self.mean
        return F.fold(patches.transpose(1, 2), (h * 8, w * 8), 8, stride=8).clamp(-1, 1)


def prepare(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    words = train_tokenizer()
    (work / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    tokenizer = load_tokenizer(work)
    rng = random.Random(1)
    lengths = [
        len(tokenizer.encode(TEMPLATE.format(world.write_prompt(world.draw_scene(rng), rng))).ids) for _ in range(5000)
    ]
    pixels = to_tensor(np.stack([world.draw_picture(world.draw_split(rng, False), rng) for _ in range(4000)]))
    code = Code.fit(pixels)
    torch.save({"mean": code.mean, "basis": code.basis, "scale": code.scale}, work / "code.pt")
    latents = code.encode(pixels)
    log(f"{len(words['vocab'])} tokens, captions of {min(lengths)} to {max(lengths)} tokens")
    log(f"latents: mean {latents.mean():.4f}, deviation {latents.std():.4f}")
    error = (code.decode(latents) - pixels).square().mean().item()
    log(f"linear inverse: {10 * math.log10(4 / error):.2f} dB")


def load_tokenizer(work: Path) -> Any:
    words = json.loads((work / "tokenizer.json").read_text(encoding="utf-8"))
    n = len(CONTROL)
    return build_tokenizer(words["vocab"][:-n], [tuple(m) for m in words["merges"]])


def load_code(work: Path) -> Code:
    return Code(**torch.load(work / "code.pt"))


# --- models ----------------------------------------------------------------------------------------------------------


def make_transformer() -> Any:
    from diffusers import ZImageTransformer2DModel

    d = DIM // HEADS
    return ZImageTransformer2DModel(
        in_channels=16, dim=DIM, n_layers=LAYERS, n_refiner_layers=REFINERS, n_heads=HEADS, n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM, axes_dims=[d // 4, d * 3 // 8, d * 3 // 8], axes_lens=[1536, 512, 512],
    )  # fmt: skip


def make_text_encoder(vocab: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocab, hidden_size=TEXT_DIM, intermediate_size=TEXT_FFN, num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS, num_key_value_heads=TEXT_KV, head_dim=TEXT_HEAD_DIM, rms_norm_eps=1e-6,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attention_bias=False, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3Model(config)


def make_autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=CHANNELS, layers_per_block=2,
        latent_channels=16, norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=SCALE, shift_factor=SHIFT,
    )  # fmt: skip


def init_weights(transformer: Any, text: Any) -> None:
    """Starts near the identity: quiet branches, open gates, no output."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("adaLN_modulation.0.weight") or ".2-1.linear" in name:
            nn.init.zeros_(parameter)
        elif name.endswith("adaLN_modulation.0.bias"):
            nn.init.zeros_(parameter)
            parameter.data.view(4, DIM)[[1, 3]] = 1.0
        elif "all_final_layer.2-1.adaLN" in name:
            nn.init.zeros_(parameter)
        elif "pad_token" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "norm2.weight" in name:
            nn.init.constant_(parameter, 0.4)
    nn.init.normal_(text.embed_tokens.weight, std=1.0)


def rope_tables(h: int, w: int, head_dim: int, theta: float = 256.0) -> tuple[Tensor, Tensor]:
    """cos and sin [caption + image tokens, head_dim / 2] for a caption of CAPTION tokens and h x w patches."""
    grid = [(CAPTION + 1, r, c) for r in range(h) for c in range(w)]
    pads = [(0, 0, 0)] * (-len(grid) % 32)
    positions = torch.tensor([*((1 + i, 0, 0) for i in range(CAPTION)), *grid, *pads], dtype=torch.float64)
    angles = []
    for axis, d in enumerate((head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)):
        angles.append(positions[:, axis, None] * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d))
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


class Denoiser(nn.Module):
    """The forward pass of a ZImageTransformer2DModel over whole batches of one shape. Returns v = noise - x0."""

    def __init__(self, model: Any, h: int = 4, w: int = 4) -> None:
        super().__init__()
        self.model, self.h, self.w = model, h, w
        cos, sin = rope_tables(h, w, DIM // HEADS)
        self.register_buffer("cos", cos[:, None, :], persistent=False)
        self.register_buffer("sin", sin[:, None, :], persistent=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def block(self, b: Any, x: Tensor, rows: slice, temb: Tensor | None) -> Tensor:
        cos, sin = self.cos[rows], self.sin[rows]
        n, s, _ = x.shape

        def norm(m: Any, y: Tensor) -> Tensor:
            return F.rms_norm(y, (DIM,), m.weight, 1e-5)

        if temb is not None:
            scale_a, gate_a, scale_f, gate_f = b.adaLN_modulation(temb).unsqueeze(1).chunk(4, dim=2)
            scale_a, scale_f, gate_a, gate_f = 1 + scale_a, 1 + scale_f, gate_a.tanh(), gate_f.tanh()
        at, ff = b.attention, b.feed_forward
        y = norm(b.attention_norm1, x)
        y = y if temb is None else y * scale_a
        qkv = y @ torch.cat([at.to_q.weight, at.to_k.weight, at.to_v.weight]).T
        q, k, v = qkv.view(n, s, 3, HEADS, -1).unbind(2)
        q = self.rotate(F.rms_norm(q, q.shape[-1:], at.norm_q.weight, 1e-5), cos, sin)
        k = self.rotate(F.rms_norm(k, k.shape[-1:], at.norm_k.weight, 1e-5), cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = norm(b.attention_norm2, at.to_out[0](y.transpose(1, 2).flatten(2)))
        x = x + (y if temb is None else gate_a * y)
        y = norm(b.ffn_norm1, x)
        y = y if temb is None else y * scale_f
        y = norm(b.ffn_norm2, ff.w2(F.silu(ff.w1(y)) * ff.w3(y)))
        return x + (y if temb is None else gate_f * y)

    def forward(self, latents: Tensor, sigma: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        """latents [N, 16, 2h, 2w], sigma [N], caption [N, 32, TEXT_DIM], mask [N, 32] (1 = a token, 0 = padding)."""
        m, n, h, w = self.model, len(latents), self.h, self.w
        wave = m.t_embedder.timestep_embedding((1 - sigma) * 1000, 256)
        temb = m.t_embedder.mlp(wave)
        x = latents.view(n, 16, h, 2, w, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, 64)
        x = m.all_x_embedder["2-1"](x)
        x = torch.cat([x, m.x_pad_token.expand(n, -h * w % 32, DIM)], dim=1)
        c = m.cap_embedder[1](F.rms_norm(caption, (TEXT_DIM,), m.cap_embedder[0].weight, 1e-5))
        c = torch.where(mask[:, :, None], c, m.cap_pad_token[None])
        for b in m.context_refiner:
            c = self.block(b, c, slice(0, CAPTION), None)
        for b in m.noise_refiner:
            x = self.block(b, x, slice(CAPTION, None), temb)
        x = torch.cat([c, x], dim=1)
        for b in m.layers:
            x = self.block(b, x, slice(0, None), temb)
        f = m.all_final_layer["2-1"]
        x = x[:, CAPTION : CAPTION + h * w]
        x = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + f.adaLN_modulation(temb)[:, None])
        x = f.linear(x).view(n, h, w, 2, 2, 16).permute(0, 5, 1, 3, 2, 4)
        return -x.reshape(n, 16, 2 * h, 2 * w)


def encode_text(text: Any, ids: Tensor) -> Tensor:
    """hidden_states[-2] of a Qwen3Model for right-padded ids [N, L]; causal, so padding changes no real row."""
    h = text.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rope = text.rotary_emb(h, positions)
    for layer in text.layers[:-1]:
        h = layer(h, attention_mask=None, position_ids=positions, position_embeddings=rope)
        h = h[0] if isinstance(h, tuple) else h
    return h


class Prompts:
    """Prompts to padded token ids [N, 32] and masks, remembered."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = load_tokenizer(work)
        self.pad = self.tokenizer.token_to_id(CONTROL[0])

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(prompts), CAPTION), self.pad)
        mask = torch.zeros(len(prompts), CAPTION, dtype=torch.bool)
        for i, encoding in enumerate(self.tokenizer.encode_batch([TEMPLATE.format(p) for p in prompts])):
            n = len(encoding.ids)
            if n > CAPTION:
                raise ValueError(f"{n} tokens are more than {CAPTION}: {prompts[i]!r}")
            ids[i, :n] = torch.tensor(encoding.ids)
            mask[i, :n] = True
        return ids, mask


# --- text encoder and transformer ------------------------------------------------------------------------------------


class Muon:
    """Momentum whose step for a matrix is made orthogonal (K. Jordan's Muon), four Polar Express iterations.

    A convolution's kernel counts as a matrix [out, in * 9]. Matrices of one shape go through the iteration as one
    batch. The coefficients are those of Amsel et al., 2025.
    """

    ROUNDS = (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    )

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in matrices:
            rows, columns = p.flatten(1).shape
            shapes.setdefault((min(rows, columns), max(rows, columns)), []).append(p)
        self.groups = [(ps, torch.zeros(len(ps), *shape)) for shape, ps in shapes.items()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for ps, velocity in self.groups:
            flat = [p.grad.flatten(1) for p in ps]  # type: ignore[union-attr]
            g = torch.stack([f if f.shape[0] <= f.shape[1] else f.T for f in flat])
            velocity.lerp_(g, 1 - self.momentum)
            x = g.lerp(velocity, self.momentum)
            x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-9)
            for a, b, c in self.ROUNDS:
                s = x @ x.mT
                x = a * x + (b * s + c * (s @ s)) @ x
            for p, f, u in zip(ps, flat, x, strict=True):
                rows, columns = f.shape
                u = u if rows <= columns else u.T
                p.add_(u.reshape(p.shape), alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def state(self) -> list[Tensor]:
        return [v for _, v in self.groups]

    def load(self, state: list[Tensor]) -> None:
        for (_, v), saved in zip(self.groups, state, strict=True):
            v.copy_(saved)


class Drawings:
    """Endless training data: prompts, latents. One in twenty prompts is empty, for guidance."""

    def __init__(self, code: Code, prompts: Prompts, seed: int) -> None:
        self.rng, self.code, self.prompts = random.Random(seed), code, prompts

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        scenes = [world.draw_split(self.rng, held_out=False) for _ in range(n)]
        texts = [world.write_prompt(s, self.rng) if self.rng.random() > 0.04 else "" for s in scenes]
        pixels = to_tensor(np.stack([world.draw_picture(s, self.rng) for s in scenes]))
        return *self.prompts(texts), self.code.encode(pixels)


def sigmas(steps: int = 8, shift: float = 3.0) -> list[float]:
    """The Turbo schedule: 'simple' with a static shift, 0 appended."""
    u = [1 - i / steps for i in range(steps)]
    return [shift * x / (1 + (shift - 1) * x) for x in u] + [0.0]


@torch.no_grad()
def sample(denoiser: Denoiser, text: Any, prompts: Prompts, texts: list[str], x: Tensor) -> Tensor:
    """Latents [N, 16, 8, 8] after eight Euler steps from the noise `x`."""
    ids, mask = prompts(texts)
    caption = encode_text(text, ids)
    table = sigmas()
    for s, t in pairwise(table):
        x = x + (t - s) * denoiser(x, torch.full((len(x),), s), caption, mask)
    return x


def to_pictures(pixels: Tensor) -> np.ndarray:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def score(texts: list[str], pictures: np.ndarray) -> dict[str, float]:
    return world.summarise([world.check(t, p) for t, p in zip(texts, pictures, strict=True)])


def train_model(work: Path, steps: int, batch: int, decay: float, limit: int, compile_it: bool) -> None:
    torch.manual_seed(0)
    prompts, code = Prompts(work), load_code(work)
    vocab = prompts.pad + len(CONTROL)
    transformer, text = make_transformer(), make_text_encoder(vocab)
    init_weights(transformer, text)
    average, average_text = make_transformer(), make_text_encoder(vocab)
    average.load_state_dict(transformer.state_dict())
    average_text.load_state_dict(text.state_dict())
    denoiser, preview = Denoiser(transformer), Denoiser(average)
    unused = {id(p) for p in [*text.layers[-1].parameters(), *text.norm.parameters()]}
    named = [*transformer.named_parameters(), *text.named_parameters()]
    named = [(n, p) for n, p in named if id(p) not in unused]
    matrices = [p for n, p in named if p.ndim == 2 and ("layers." in n or "refiner" in n) and "adaLN" not in n]
    chosen = {id(p) for p in matrices}
    adam = torch.optim.Adam([p for _, p in named if id(p) not in chosen], lr=1.0, betas=(0.9, 0.98), fused=True)
    muon = Muon(matrices)
    log(f"{sum(p.numel() for _, p in named) / 1e6:.2f} M parameters, {len(matrices)} matrices")
    live = [p for _, p in named]
    shadow = dict([*average.named_parameters(), *((f"text.{n}", p) for n, p in average_text.named_parameters())])
    names = [*(n for n, _ in transformer.named_parameters())]
    names += [f"text.{n}" for n, p in text.named_parameters() if id(p) not in unused]
    shadows = [shadow[n].data for n in names]
    data = Drawings(code, prompts, seed=10)
    generator = torch.Generator().manual_seed(11)
    done = 0
    state_file = work / "model.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=False)
        transformer.load_state_dict(state["transformer"])
        text.load_state_dict(state["text"])
        average.load_state_dict(state["average"])
        average_text.load_state_dict(state["average_text"])
        adam.load_state_dict(state["adam"])
        muon.load(state["muon"])
        data.rng.setstate(state["rng"])
        generator.set_state(state["generator"])
        done = state["step"]
        log(f"going on at step {done}")

    def loss_of(ids: Tensor, mask: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        v = denoiser((1 - s) * latents + s * noise, sigma, encode_text(text, ids), mask)
        return (v - (noise - latents)).square().mean()

    run = torch.compile(loss_of, dynamic=False) if compile_it else loss_of
    texts = world.heldout_prompts(96, seed=5)
    start, mean, seen = time.time(), 0.0, 0

    def save() -> None:
        torch.save(
            {
                "transformer": transformer.state_dict(), "text": text.state_dict(), "average": average.state_dict(),
                "average_text": average_text.state_dict(), "adam": adam.state_dict(), "muon": muon.state(),
                "rng": data.rng.getstate(), "generator": generator.get_state(), "step": done,
            },
            state_file.with_suffix(".tmp"),
        )  # fmt: skip
        state_file.with_suffix(".tmp").rename(state_file)

    def evaluate() -> None:
        noise = torch.randn(len(texts), 16, 8, 8, generator=torch.Generator().manual_seed(3))
        latents = sample(preview, average_text, prompts, texts, noise)
        shares = score(texts, to_pictures(code.decode(latents)))
        log("check " + " ".join(f"{k} {v:.2f}" for k, v in shares.items()))

    while done < steps and done < limit:
        ids, mask, latents = data.batch(batch)
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch  # stratified
        sigma = 3 * u / (1 + 2 * u)
        noise = torch.randn(latents.shape, generator=generator)
        loss = run(ids, mask, latents, noise, sigma)
        loss.backward()
        left = (steps - done) / (decay * steps)
        rate = min(1.0, (done + 1) / 50, left)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * rate
        adam.step()
        muon.step(0.02 * rate)
        adam.zero_grad()
        for p in matrices:
            p.grad = None
        done += 1
        torch._foreach_lerp_(shadows, [p.data for p in live], max(0.005, 1 / (1 + done / 8)))
        mean += loss.item()
        seen += 1
        if done % 50 == 0 or done == 10:
            log(f"step {done} loss {mean / seen:.4f} {(time.time() - start) / seen:.2f} s/step rate {rate:.2f}")
            start, mean, seen = time.time(), 0.0, 0
            save()
        if done % 200 == 0:
            evaluate()
            start = time.time()
    save()
    evaluate()


# --- autoencoder -----------------------------------------------------------------------------------------------------


def train_ae(work: Path, steps: int, decay: float, limit: int) -> None:
    """Decoder: latents with noise -> pixels (L1). Encoder: pixels -> latents (squares). Apart from each other.

    The first WINDOWED steps see 32x32 windows of the pictures, which cost a quarter; the rest whole pictures. (Only
    windows will not do: group norm makes the colours depend on how much of the picture an object covers.) From step
    WHOLE on only the decoder learns, with less noise, more small objects and eight times the weight on and around them.
    """
    torch.manual_seed(1)
    code = load_code(work)
    model = make_autoencoder()
    with torch.no_grad():  # the posterior is narrow and the same everywhere
        model.encoder.conv_out.weight[16:] = 0
        model.encoder.conv_out.bias[16:] = 2 * math.log(0.05 / SCALE)
        model.encoder.conv_out.bias[:16] = SHIFT
    average = make_autoencoder()
    average.load_state_dict(model.state_dict())
    model.to(memory_format=torch.channels_last)

    def kernels(part: Any) -> list[Tensor]:
        return [p for n, p in part.named_parameters() if p.ndim > 1 and "conv_in" not in n and "conv_out" not in n]

    chosen = {id(p) for part in (model.encoder, model.decoder) for p in kernels(part)}
    adam = torch.optim.Adam([p for p in model.parameters() if id(p) not in chosen], lr=1.0, betas=(0.9, 0.98))
    muon, muon_e = Muon(kernels(model.decoder)), Muon(kernels(model.encoder))
    live, shadows = [p.data for p in model.parameters()], [p.data for p in average.parameters()]
    rng, generator, done = random.Random(20), torch.Generator().manual_seed(21), 0
    state_file = work / "ae.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=False)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        adam.load_state_dict(state["adam"])
        muon.load(state["muon"])
        muon_e.load(state["muon_e"])
        rng.setstate(state["rng"])
        generator.set_state(state["generator"])
        done = state["step"]
        log(f"ae going on at step {done}")

    def decoder_loss(latents: Tensor, pixels: Tensor, weighted: bool) -> Tensor:
        error = (model.decoder(latents / SCALE + SHIFT) - pixels).abs()
        if not weighted:
            return error.mean()
        differs = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02
        weight = 1 + 7 * F.max_pool2d(differs.float(), 5, stride=1, padding=2)
        return (error * weight).mean() / weight.mean()

    def draw(sharpen: bool) -> np.ndarray:
        while True:
            scene = world.draw_split(rng, held_out=False)
            if not sharpen or any(t.size == "small" for t in scene.things) or rng.random() < 0.4:
                return world.draw_picture(scene, rng)

    def encoder_loss(pixels: Tensor, latents: Tensor) -> Tensor:
        mean = model.encoder(pixels)[:, :16]
        return ((mean - SHIFT) * SCALE - latents).square().mean()

    check = random.Random(22)
    scenes = [world.draw_split(check, held_out=True) for _ in range(40)]
    texts = [world.write_prompt(s, check) for s in scenes]
    pictures = np.stack([world.draw_picture(s, check) for s in scenes])

    def save() -> None:
        state = {
            "model": model.state_dict(), "average": average.state_dict(), "adam": adam.state_dict(),
            "muon": muon.state(), "muon_e": muon_e.state(), "rng": rng.getstate(),
            "generator": generator.get_state(), "step": done,
        }  # fmt: skip
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").rename(state_file)

    @torch.no_grad()
    def evaluate() -> None:
        pixels = to_tensor(pictures)
        latents = code.encode(pixels)
        noisy = latents + 0.15 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        y = average.decoder(noisy / SCALE + SHIFT)
        found = (average.encoder(pixels)[:, :16] - SHIFT) * SCALE
        decibel = 10 * math.log10(4 / (y - pixels).square().mean().item())
        shares = score(texts, to_pictures(y))
        log(
            f"ae check {decibel:.2f} dB, encoder error {(found - latents).square().mean():.4f}, "
            + " ".join(f"{k} {v:.2f}" for k, v in shares.items())
        )

    start, mean, mean_e, seen = time.time(), 0.0, 0.0, 0
    while done < steps and done < limit:
        whole, sharpen = done >= WINDOWED, done >= WHOLE
        n = 8 if whole else 16
        pixels = to_tensor(np.stack([draw(sharpen) for _ in range(n)]))
        latents = code.encode(pixels)
        if not whole:
            corners = [(rng.randrange(5), rng.randrange(5)) for _ in range(n)]
            latents = torch.stack([z[:, r : r + 4, c : c + 4] for z, (r, c) in zip(latents, corners, strict=True)])
            pixels = torch.stack(
                [p[:, 8 * r : 8 * r + 32, 8 * c : 8 * c + 32] for p, (r, c) in zip(pixels, corners, strict=True)]
            )
        level = (0.15 if sharpen else 0.25) * torch.rand(n, 1, 1, 1, generator=generator)
        noisy = latents + level * torch.randn(latents.shape, generator=generator)
        loss = decoder_loss(noisy.contiguous(memory_format=torch.channels_last), pixels, sharpen)
        loss.backward()
        error = 0.0
        if not sharpen:
            few = n // 4
            loss_e = encoder_loss(pixels[:few].contiguous(memory_format=torch.channels_last), latents[:few])
            loss_e.backward()
            model.encoder.conv_out.weight.grad[16:] = 0
            model.encoder.conv_out.bias.grad[16:] = 0
            error = loss_e.item()
        left = (steps - done) / (decay * steps)
        rate = min(1.0, (done + 1) / 50, left)
        for group in adam.param_groups:
            group["lr"] = 2e-3 * rate
        adam.step()
        muon.step(0.01 * rate)
        if not sharpen:
            muon_e.step(0.01 * rate)
        for p in model.parameters():
            p.grad = None
        done += 1
        torch._foreach_lerp_(shadows, live, max(0.01, 1 / (1 + done / 8)))
        mean, mean_e, seen = mean + loss.item(), mean_e + error, seen + 1
        if done % 50 == 0 or done == 10:
            seconds = (time.time() - start) / seen
            log(f"ae step {done} L1 {mean / seen:.4f} encoder {mean_e / seen:.4f} {seconds:.2f} s/step rate {rate:.2f}")
            start, mean, mean_e, seen = time.time(), 0.0, 0.0, 0
            save()
        if done % 250 == 0:
            evaluate()
            start = time.time()
    save()
    evaluate()


# --- export and evaluation -------------------------------------------------------------------------------------------

BLOCK_NAMES = (  # diffusers -> single file; q, k and v are stacked besides
    ("all_x_embedder.2-1.", "x_embedder."),
    ("all_final_layer.2-1.", "final_layer."),
    ("attention.to_out.0.", "attention.out."),
    ("attention.norm_q.", "attention.q_norm."),
    ("attention.norm_k.", "attention.k_norm."),
)
TEXT_NAMES = (  # transformers -> llama.cpp
    ("embed_tokens.", "token_embd."),
    ("layers.", "blk."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.q_norm.", "attn_q_norm."),
    ("self_attn.k_norm.", "attn_k_norm."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("input_layernorm.", "attn_norm."),
)
AE_NAMES = (  # diffusers -> original; the decoder counts its levels the other way round
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
    ("mid_block.attentions.0.to_q.", "mid.attn_1.q."),
    ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
    ("mid_block.attentions.0.to_v.", "mid.attn_1.v."),
    ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
    ("conv_shortcut.", "nin_shortcut."),
    ("conv_norm_out.", "norm_out."),
    *((f"decoder.up_blocks.{i}.", f"decoder.up.{3 - i}.") for i in range(4)),
    ("encoder.down_blocks.", "encoder.down."),
    ("resnets.", "block."),
    ("upsamplers.0.", "upsample."),
    ("downsamplers.0.", "downsample."),
)
NOTE = "pyggml demo: a tiny checkpoint of its own, trained by tools/train_demo.py"


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = name.replace(old, new)
    return name


def original_ae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's state under the original names; the attention's matrices as 1x1 kernels."""
    found = {}
    for name, value in state.items():
        name = renamed(name, AE_NAMES)
        found[name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    return found


def compare(what: str, ours: Tensor, theirs: Tensor) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    log(f"{what}: relative error {error:.1e}")
    if not error <= 1e-4:
        raise SystemExit(f"error: {what} differs from the original")


@torch.no_grad()
def verify(transformer: Any, text: Any, prompts: Prompts) -> None:
    """Our batched forward passes against those of transformers and diffusers."""
    texts = ["", "a red circle on a blue background", *world.heldout_prompts(6, seed=7)]
    ids, mask = prompts(texts)
    ours = encode_text(text, ids)
    captions = []
    for row, keep, h in zip(ids, mask, ours, strict=True):
        theirs = text(input_ids=row[keep][None], output_hidden_states=True).hidden_states[-2][0]
        compare("text encoder", h[keep], theirs)
        captions.append(theirs)
    for h, w in ((4, 4), (3, 5)):
        x = torch.randn(len(texts), 16, 2 * h, 2 * w, generator=torch.Generator().manual_seed(1))
        sigma = torch.linspace(1, 0.05, len(texts))
        v = Denoiser(transformer, h, w)(x, sigma, ours, mask)
        for i in range(len(texts)):
            theirs = transformer([x[i, :, None]], 1 - sigma[i : i + 1], [captions[i]], return_dict=False)[0][0]
            compare(f"transformer {h}x{w}", v[i], -theirs[:, 0])


def export(work: Path, out: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    prompts = Prompts(work)
    words = json.loads((work / "tokenizer.json").read_text(encoding="utf-8"))
    state = torch.load(work / "model.pt", weights_only=False)
    transformer, text = make_transformer(), make_text_encoder(len(words["vocab"]))
    transformer.load_state_dict(state["average"])
    text.load_state_dict(state["average_text"])
    verify(transformer, text, prompts)
    out.mkdir(parents=True, exist_ok=True)

    def add(writer: Any, name: str, value: Tensor) -> None:
        small = value.ndim == 1 or value.shape[0] == 1 or name in ("x_embedder.weight", "final_layer.linear.weight")
        writer.add_tensor(name, np.ascontiguousarray(value.numpy().astype(np.float32 if small else np.float16)))

    writer = gguf.GGUFWriter(out / "z_image_demo.gguf", "lumina2")
    writer.add_name("Z-Image demo")
    writer.add_description(NOTE)
    writer.add_license("mit")
    writer.add_uint32("z_image.default_size", world.SIZE)
    tensors = transformer.state_dict()
    for name, value in tensors.items():
        if name.endswith("to_q.weight"):
            stem = name[: -len("to_q.weight")]
            add(writer, stem + "qkv.weight", torch.cat([tensors[f"{stem}to_{x}.weight"] for x in "qkv"]))
        elif not name.endswith(("to_k.weight", "to_v.weight")):
            add(writer, renamed(name, BLOCK_NAMES), value)
    finish(writer)

    writer = gguf.GGUFWriter(out / "qwen3_demo.gguf", "qwen3")
    writer.add_name("Qwen3 demo text encoder")
    writer.add_description(NOTE)
    writer.add_license("mit")
    writer.add_block_count(TEXT_LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(TEXT_DIM)
    writer.add_feed_forward_length(TEXT_FFN)
    writer.add_head_count(TEXT_HEADS)
    writer.add_head_count_kv(TEXT_KV)
    writer.add_key_length(TEXT_HEAD_DIM)
    writer.add_value_length(TEXT_HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words["vocab"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words["vocab"])
    writer.add_token_types([3 if t in CONTROL else 1 for t in words["vocab"]])
    writer.add_token_merges([" ".join(m) for m in words["merges"]])
    writer.add_eos_token_id(words["vocab"].index("<|im_end|>"))
    writer.add_pad_token_id(words["vocab"].index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    for name, value in text.state_dict().items():
        name = "output_norm.weight" if name == "norm.weight" else renamed(name, TEXT_NAMES)
        add(writer, name, value)
    finish(writer)

    model = make_autoencoder()
    model.load_state_dict(torch.load(work / "ae.pt", weights_only=False)["average"])
    kernels = {n: v.half().contiguous() for n, v in original_ae(model.state_dict()).items()}
    save_file(kernels, out / "ae_demo.safetensors", metadata={"format": "pt", "note": NOTE})
    for path in sorted(out.iterdir()):
        if path.suffix in (".gguf", ".safetensors"):
            log(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_back(out: Path) -> tuple[Any, Any, Any, Any]:
    """Tokenizer, text encoder, transformer and autoencoder from the written files alone."""
    import gguf
    from safetensors.torch import load_file

    def tensors(reader: Any) -> dict[str, Tensor]:
        return {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}

    reader = gguf.GGUFReader(out / "qwen3_demo.gguf")
    vocab = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = build_tokenizer(vocab[: -len(CONTROL)], merges)
    text = make_text_encoder(len(vocab))
    back = tuple((new, old) for old, new in TEXT_NAMES)
    found = {renamed(n, back): v for n, v in tensors(reader).items() if n != "output_norm.weight"}
    text.load_state_dict({**found, "norm.weight": tensors(reader)["output_norm.weight"]})
    transformer = make_transformer()
    found = {}
    back = tuple((new, old) for old, new in BLOCK_NAMES)
    for name, value in tensors(gguf.GGUFReader(out / "z_image_demo.gguf")).items():
        if name.endswith("qkv.weight"):
            for x, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("qkv.", f"to_{x}.")] = part
        else:
            found[renamed(name, back)] = value
    transformer.load_state_dict(found)
    ae = make_autoencoder()
    file = load_file(out / "ae_demo.safetensors")
    ae.load_state_dict({n: file[renamed(n, AE_NAMES)].float().reshape(v.shape) for n, v in ae.state_dict().items()})
    return tokenizer, text, transformer, ae


@torch.no_grad()
def evaluate_files(work: Path, out: Path, n: int, seed: int) -> dict[str, Any]:
    """Held-out prompts through the written files with the pipeline's defaults. Picture i starts from seed `seed + i`.

    The noise of picture i is torch.randn([1, 16, 8, 8]) of a CPU generator with that seed.
    """
    from PIL import Image

    tokenizer, text, transformer, ae = read_back(out)
    prompts = Prompts.__new__(Prompts)
    prompts.tokenizer, prompts.pad = tokenizer, tokenizer.token_to_id(CONTROL[0])
    texts = world.heldout_prompts(n, seed)
    denoiser = Denoiser(transformer)
    pictures = []
    for first in range(0, n, 50):
        part = texts[first : first + 50]
        noise = [
            torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed + first + i))
            for i in range(len(part))
        ]
        latents = sample(denoiser, text, prompts, part, torch.cat(noise))
        pictures.append(to_pictures(ae.decoder(latents / SCALE + SHIFT)))
    found = np.concatenate(pictures)
    folder = work / "evaluation"
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(found):
        Image.fromarray(picture).save(folder / f"{i:04d}.png")
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return {
        "runtime": "torch, weights read back from studio/demo",
        "sampler": "euler, 8 steps, simple, shift 3, cfg 1",
        "prompts": f"demo_pictures.heldout_prompts({n}, {seed})",
        "pictures": n,
        **{k: round(v, 4) for k, v in score(texts, found).items()},
    }


# --- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="train the demo checkpoint")
    parser.add_argument("stage", choices=["prepare", "model", "ae", "export", "evaluate"])
    parser.add_argument("--work", type=Path, required=True, help="folder for state between stages")
    parser.add_argument("--steps", type=int, help="default: 2600 for model, 4000 for ae")
    parser.add_argument("--batch", type=int, default=48, help="model: pictures a step")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--limit", type=int, default=10**9, help="stop after this step")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the three files")
    parser.add_argument(
        "--report", type=Path, default=ROOT / "tools" / "demo_check_torch.json", help="evaluate: result file"
    )
    parser.add_argument("-n", type=int, default=200, help="evaluate: number of held-out prompts")
    parser.add_argument("--seed", type=int, default=1, help="evaluate: seed of prompts and noise")
    parser.add_argument(
        "--compile", action="store_true", help="model: torch.compile the loss (a third faster; needs a C++ compiler)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "prepare":
        prepare(args.work)
    elif args.stage == "model":
        train_model(args.work, args.steps or 2600, args.batch, args.decay, args.limit, args.compile)
    elif args.stage == "ae":
        train_ae(args.work, args.steps or 4000, args.decay, args.limit)
    elif args.stage == "export":
        export(args.work, args.out)
    else:
        result = evaluate_files(args.work, args.out, args.n, args.seed)
        args.report.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        log(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
