"""Weights larger than a device's memory: what stays, what comes just in time, and that results are the same.

The device is a second backend of the processor that is treated as if its memory were another.
"""

from __future__ import annotations

import logging
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from tiny_models import golden, write_tiny_models, write_tiny_qwen

import models
from loader import LoadError, Param, load_params, open_checkpoint
from loader.upload import Uploader
from models import streaming
from models.component import Component
from models.devices import Place, places
from models.pipeline import Pipeline
from models.qwen_image import pipeline as qwen
from models.qwen_image import references
from models.step_cache import DBCache
from models.streaming import Arrangement, Piece, Stream, Use, _Feeder, arrange, arrange_together
from models.z_image import ZImagePipeline
from pyggml import Backend, Cancelled, Device, Graph, OutOfMemory, SplitBackend, Tensor, ops
from pyggml.lib import ffi
from studio.cli import main

# Guidance: two graphs in turn, which find each weight at the same address.
SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2, "output_type": "np",
                         "negative_prompt": "a blue one", "guidance_scale": 1.5}  # fmt: skip
NOISE, SIGMAS = np.ones((16, 4, 4), np.float32), np.array([1, 0.5, 0], np.float32)

Files = dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def device() -> Iterator[Backend]:
    with Backend.cpu(2) as backend:
        yield backend


@pytest.fixture(autouse=True)
def memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Place, "offloads", True)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "pyggml uploads"]


def load(files: Files, device: Backend, max_vram: int | None = 1 << 30) -> ZImagePipeline:
    pipe = models.load(**files, backend=device, max_vram=max_vram, params_backend="cpu")
    pipe.cfg_batch = False  # two graphs, as SMALL says
    return pipe


def limit(component: Component, n_bytes: int) -> None:
    component.place = replace(component.place, max_vram=n_bytes)


def limit_each(pipe: Pipeline, vram: Any, share: Callable[[int], int]) -> None:
    """What each component that was used computes with, and a share of its weights."""
    for component in pipe.components():
        if seen := vram.get(component.weights.report.component):
            limit(component, seen.compute + share(seen.weights))


def at_upload(monkeypatch: pytest.MonkeyPatch, n: int, act: Callable[[], object]) -> list[str]:
    """Do something before the n-th matrix is uploaded. The names of those that were begun."""
    put, begun = Uploader.put, []

    def watched(self: Uploader, tensor: Tensor, *args: Any) -> None:
        if tensor.ne[1] > 1:
            begun.append(tensor.name)
            if len(begun) == n:
                act()
        put(self, tensor, *args)

    monkeypatch.setattr(Uploader, "put", watched)
    return begun


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def tight(files: Files, device: Backend) -> Iterator[tuple[ZImagePipeline, NDArray[np.uint8]]]:
    """A pipeline with room for a third of each component's weights, and what it draws of a red circle."""
    with load(files, device) as pipe:
        result = pipe("a red circle", **SMALL)
        limit_each(pipe, result.report.vram, lambda weights: weights // 3)
        yield pipe, result.images[0]


def test_a_third_of_the_weights_is_enough(
    files: Files, device: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    with models.load(**files, backend=device) as pipe:
        expected = pipe("a red circle", **SMALL).images[0]
    with load(files, device) as pipe:
        result = pipe("a red circle", **SMALL)
        np.testing.assert_array_equal(result.images[0], expected)
        roomy = result.report.vram
        assert set(roomy) == {"qwen3", "z_image", "vae"}
        for seen in roomy.values():
            assert not seen.per_pass and seen.stays == seen.weights and seen.uploaded_bytes <= seen.weights
            assert seen.weights < seen.peak <= seen.weights + seen.compute
        limit_each(pipe, roomy, lambda weights: weights // 3)
        with caplog.at_level(logging.INFO, "pyggml.models"):
            result = pipe("a red circle", **SMALL, num_images_per_prompt=2)
        np.testing.assert_array_equal(result.images[0], expected)
        for name, seen in result.report.vram.items():
            assert seen.peak <= seen.limit < roomy[name].peak, name
            assert seen.per_pass and seen.slots and seen.stays + seen.slots <= seen.limit - seen.compute, name
            assert seen.passes and seen.uploaded_bytes >= seen.per_pass and seen.upload_seconds > 0
            said = rf"{name}: 0.00 GB of weights, room for 0.00 GB on CPU: .*{name}: 0.00 GB to CPU in .* GB/s\), of wh"
            assert re.search(said, caplog.text, re.DOTALL), name
        assert result.report.to_dict()["vram"]["z_image"]["per_pass"]
        # and as it was before
        assert not any(component.weights.closed for component in pipe.components())
        assert all(p.tensor.has_data for c in pipe.components() for p in c.weights.params.values() if p.loaded)


def test_what_the_device_says_is_free_is_a_limit(
    files: Files, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(files, device, None) as pipe:
        prompt = pipe.encode("a red circle").features
        expected = pipe.denoise(NOISE, SIGMAS, prompt)
        assert pipe.transformer.vram is None  # there was plenty
        weights = sum(t.n_bytes for t in pipe.transformer.weights.context.tensors())
        monkeypatch.setattr(Device, "memory", (int(0.9 * weights), 4 * weights))
        np.testing.assert_array_equal(pipe.denoise(NOISE, SIGMAS, prompt), expected)
        seen = pipe.transformer.vram
        assert seen is not None and seen.per_pass and seen.peak <= seen.limit < 0.9 * weights
        pipe.transformer.vram = None
        monkeypatch.setattr(Device, "is_remote", True)  # whole, as it always was: not over the network in each pass
        np.testing.assert_array_equal(pipe.denoise(NOISE, SIGMAS, prompt), expected)
        assert pipe.transformer.vram is None


def test_too_small_a_limit_says_what_is_needed_and_that_is_enough(files: Files, device: Backend) -> None:
    with load(files, device, 1000) as pipe:
        with pytest.raises(OutOfMemory, match=r"qwen3 needs \d+ bytes of CPU at least, .* may take 1000") as caught:
            pipe("a red circle", **SMALL)
        least = int(str(caught.value).split()[2])
        limit(pipe.text_encoder, least - 1)
        with pytest.raises(OutOfMemory, match=f"qwen3 needs {least} bytes .* may take {least - 1}"):
            pipe.encode("a red circle")
        limit(pipe.text_encoder, least)
        features = pipe.encode("a red circle").features
        assert pipe.text_encoder.vram is not None and pipe.text_encoder.vram.peak <= least
        pipe._prompts.clear()
        limit(pipe.text_encoder, 1 << 30)
        np.testing.assert_array_equal(pipe.encode("a red circle").features, features)


def test_the_device_is_left_empty(tight: Any) -> None:
    """At the end of a visit, not when the last reference to it goes."""
    pipe, _ = tight
    prompt = pipe.encode("x").features
    with pipe.transformer.in_use():
        pipe.denoise(NOISE, SIGMAS, prompt)
        visit = pipe.transformer._visit
        held = [*visit._context.buffers, *visit._vectors.context.buffers]
        assert 0 < sum(buffer.n_bytes for buffer in held) <= visit.limit
        uploader = visit._uploader  # its staging buffers, its backend with a thread of its own
    assert len(held) > 2 and all(buffer.closed for buffer in held)
    assert uploader is not None and uploader._backend.closed
    with pytest.raises(ValueError, match="released"):
        _ = uploader._stages[0].view[0]


def test_the_order_of_uploads(tight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are there before their piece runs, a slot is written when its last piece has run, at the same time."""
    pipe, expected = tight
    passes: list[list[tuple[str, Piece]]] = []
    run, run_pieces, upload = Stream.run, Graph.run_pieces, Stream.upload
    pieces: tuple[Piece, ...] = ()

    def watched_run(self: Stream, graph: Graph) -> None:
        nonlocal pieces
        self.prepare(graph)
        known = self._graphs[graph].arrangement
        assert known is not None
        pieces = known.pieces
        passes.append([])
        run(self, graph)

    def watched_pieces(self: Graph, ends: Any, before: Any) -> None:
        def then(i: int) -> None:
            if i:
                time.sleep(0.002)  # a computation that takes a while
                passes[-1].append(("ran", pieces[i - 1]))
            before(i)
            passes[-1].append(("run", pieces[i]))

        run_pieces(self, ends, then)

    def watched_upload(self: Stream, piece: Piece, is_stopped: Any) -> bool:
        passes[-1].append(("upload", piece))
        result = upload(self, piece, is_stopped)
        passes[-1].append(("uploaded", piece))
        return result

    for owner, name, watched in (
        (Stream, "run", watched_run), (Graph, "run_pieces", watched_pieces), (Stream, "upload", watched_upload)
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, watched)
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], expected)
    overlaps = 0
    for events in passes:
        arrived: set[int] = set()
        slots: dict[int | None, Piece] = {}
        running: Piece | None = None
        for what, piece in events:
            if what == "upload" and piece.slot is not None:
                assert slots.get(piece.slot) is None, "the slot's last weights are still needed"
                slots[piece.slot] = piece
                overlaps += running is not None
            elif what == "uploaded":
                arrived.update(piece.weights)
            elif what == "run":
                assert arrived.issuperset(piece.weights), "not all of its weights have arrived"
                running = piece
            elif what == "ran":
                slots.pop(piece.slot, None)
                running = None
    assert len(passes) == 5 and overlaps > 10


def test_weights_of_a_piece_are_read_as_they_lie_in_the_file(tight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, expected = tight
    read: list[list[int]] = []
    upload, bytes_of = Stream.upload, streaming.bytes_of

    def watched(self: Stream, piece: Piece, is_stopped: Any) -> bool:
        read.append([])
        return upload(self, piece, is_stopped)

    monkeypatch.setattr(Stream, "upload", watched)
    monkeypatch.setattr(streaming, "bytes_of", lambda t: read[-1].append(streaming.address_of(t)) or bytes_of(t))
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], expected)
    assert max(map(len, read)) > 1
    assert all(addresses == sorted(addresses) for addresses in read)


@pytest.mark.parametrize("error", [OutOfMemory("the device took it away"), RuntimeError("a bug")])
def test_failures_of_uploads_reach_the_caller(
    tight: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, expected = tight
    prompt = pipe.encode("x")
    n_closed, close = [], Uploader.close
    with monkeypatch.context() as patch:
        patch.setattr(Uploader, "close", lambda self: (n_closed.append(self), close(self)))
        begun = at_upload(patch, 20, raising(error))
        with pytest.raises(type(error), match=str(error)):
            pipe.denoise(NOISE, SIGMAS, prompt)
    assert len(begun) == 20 and len(n_closed) == 2  # that of the vectors; the one that failed, with what it held
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], expected)


def test_an_upload_that_fails_for_want_of_memory_is_tried_again_in_tiles(
    tight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = tight
    latents = np.random.default_rng(0).standard_normal((16, 8, 8), np.float32)
    limit(pipe.vae, 1 << 30)
    expected = pipe.decode(latents)
    begun = at_upload(monkeypatch, 5, raising(OutOfMemory("the device took it away")))
    assert np.abs(pipe.decode(latents).astype(int) - expected).max() <= 1
    assert len(begun) > 20 and pipe._tiles == {"decode": (32, 32)}


def test_cancelling_between_pieces(tight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the backend itself cannot be stopped."""
    pipe, expected = tight
    run_pieces, ran = Graph.run_pieces, []

    def cancelled(self: Graph, ends: Any, before: Any) -> None:
        def then(i: int) -> None:
            before(i)
            ran.append(i)
            if i == 3:
                pipe.cancel()

        run_pieces(self, ends, then)

    monkeypatch.setattr(Graph, "run_pieces", cancelled)
    with pytest.raises(Cancelled):
        pipe("another circle", **SMALL)
    assert ran == [0, 1, 2, 3]
    monkeypatch.setattr(Graph, "run_pieces", run_pieces)
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], expected)


def test_cancelling_while_an_upload_is_waited_for(tight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, expected = tight
    prompt = pipe.encode("x")
    reached, released = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        assert released.wait(60)

    def cancel() -> None:
        assert reached.wait(60)
        pipe.cancel()

    def close(self: _Feeder) -> None:
        if reached.is_set():
            released.set()  # only now: nothing waits for that upload any more
        close_feeder(self)

    close_feeder = _Feeder.close
    monkeypatch.setattr(_Feeder, "close", close)
    thread = threading.Thread(target=cancel)
    thread.start()
    with monkeypatch.context() as patch, pytest.raises(Cancelled):
        begun = at_upload(patch, 20, block)
        pipe.denoise(NOISE, SIGMAS, prompt)
    thread.join()
    assert len(begun) == 20
    np.testing.assert_array_equal(pipe("a red circle", **SMALL).images[0], expected)


@pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot shrink there")
def test_a_file_that_shrinks_while_it_is_uploaded(
    device: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_tiny_models(tmp_path)
    with load(files, device) as pipe:
        limit_each(pipe, pipe("a red circle", **SMALL).report.vram, lambda weights: weights // 3)
        prompt = pipe.encode("x")
        at_upload(monkeypatch, 20, lambda: os.truncate(files["diffusion_model"], 5000))
        with pytest.raises(LoadError) as caught:
            pipe.denoise(NOISE, SIGMAS, prompt)
        assert caught.value.kind == "WeightsChanged"
        with pytest.raises(LoadError, match="changed"):
            pipe("a red circle", **SMALL)


def test_tiles_of_a_decoder_that_is_streamed(files: Files, device: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Want of memory is met with tiles, and said. Norms are read by the host between their graphs."""
    latents = np.random.default_rng(0).standard_normal((16, 16, 12), np.float32)
    with load(files, device) as pipe:
        whole = pipe.decode(latents)
        assert pipe.vae.vram is not None and not pipe._tiles
        limit(pipe.vae, pipe.vae.vram.peak // 3)
        pipe.vae.vram, pipe.smaller_vae_tile = None, (8, 8)
        with caplog.at_level(logging.WARNING, "pyggml.models"):
            tiled = pipe.decode(latents)
        seen = pipe.vae.vram
        assert seen is not None and seen.peak <= seen.limit and seen.passes > 20
        assert re.search(r"decode: vae needs \d+ bytes of CPU at least, .*: trying tiles of 8x8 latent", caplog.text)
        assert pipe._tiles["decode"][0] <= 8
        assert np.abs(tiled.astype(int) - whole).max() <= 1


def test_views_of_weights_follow_them(device: Backend, tmp_path: Path) -> None:
    """One graph under one limit after another, which put weights elsewhere. What it reads are halves of them."""
    rng = np.random.default_rng(2)
    side = 256  # weights of a size that is worth cutting a graph for
    values = {f"w{i}": rng.standard_normal((side, side), np.float32) / 16 for i in range(6)}
    save_file({name: np.ascontiguousarray(w) for name, w in values.items()}, path := tmp_path / "w.safetensors")
    x = rng.standard_normal((3, side), np.float32)
    with open_checkpoint(path) as checkpoint:
        params = {name: Param((side, side)) for name in values}
        weights = load_params(params, checkpoint, backend=device, component="t")
    stream = Stream(weights, device, 1 << 30)
    with weights, Graph(device) as graph:
        y = graph.input((side, 3), name="x")
        expected = x
        for name, w in values.items():
            half = ops.mul_mat(ops.narrow(graph.use(params[name].tensor), 1, side // 2, side // 2), y)
            y = ops.concat(half, half, dim=0)
            expected = np.tile(expected @ w[side // 2 :].T, 2)
        graph.output(y, name="y")
        compute = graph.measure()[0]
        for share in (6, 4, 3, 6, 4):
            stream.limit = compute + share * side * side * 4
            stream.prepare(graph)
            for node in graph.nodes:  # what lies where they were may still be the same
                for source in (node.ptr, *node.ptr.src):
                    if source != ffi.NULL and source.view_src != ffi.NULL:
                        there = ffi.cast("char *", source.view_src.data) + source.view_offs
                        assert ffi.cast("char *", source.data) == there and source.buffer == source.view_src.buffer
            graph.set(x=x)
            stream.run(graph)
            np.testing.assert_allclose(graph.outputs["y"].numpy(), expected, rtol=1e-4, atol=1e-5)
            assert bool(stream.report.per_pass) is (share < 6)
        stream.close()
        stream.close()


@pytest.mark.parametrize("seed", range(20))
def test_arrangements_keep_to_the_room_and_never_share_a_place_in_use(seed: int) -> None:
    """Random graphs: each weight is at its place when a node reads it, and all of it fits."""
    rng = random.Random(seed)
    sizes = [rng.choice([256, 4096, 40_960, 1 << 20]) for _ in range(rng.randrange(5, 60))]
    uses: list[Use] = [(3 * i, (i, *rng.sample(range(i), i > 0 and rng.random() < 0.1))) for i in range(len(sizes))]
    least = arrange(uses, sizes, 0).n_bytes
    assert least < sum(sizes)
    assert arrange(uses, sizes, least - 1).n_bytes == least == arrange(uses, sizes, least).n_bytes
    stays = []
    for room in sorted([least, *(rng.randrange(least, sum(sizes) + 2) for _ in range(20)), sum(sizes)]):
        found = arrange(uses, sizes, room)
        assert found.n_bytes <= room
        stays.append(found.stays)
        assert sum(sizes) - found.per_pass == found.stays
        play_through(uses, found, sizes)
    assert stays[-1] == sum(sizes) and stays[0] < stays[-1]


def play_through(uses: Sequence[Use], found: Arrangement, sizes: Sequence[int]) -> set[int]:
    """Each weight is at its place when a node reads it. Returns those that stay."""
    whole = found.whole or found
    slots: dict[int, tuple[int, ...]] = {}
    kept = {*whole.always, *(w for piece in whole.pieces if piece.slot is None for w in piece.weights)}
    assert sum(sizes[w] for w in kept) == found.stays
    at = -1
    for node, weights in uses:
        while at < 0 or 0 <= found.pieces[at].end <= node:
            at += 1
            piece = found.pieces[at]
            if piece.slot is not None:
                slots[piece.slot] = piece.weights
                assert sum(sizes[w] for w in piece.weights) <= found.slots[piece.slot]
        assert kept.union(*slots.values()) >= set(weights)
    assert at == len(found.pieces) - 1 and found.pieces[-1].end == -1
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_graphs_in_turn_have_one_arrangement(seed: int) -> None:
    """Three parts of a network, for two branches: the second's have more nodes. What stays does so for all."""
    rng = random.Random(seed)
    sizes = [rng.choice([256, 4096, 40_960]) for _ in range(rng.randrange(20, 60))]
    cuts = sorted(rng.sample(range(1, len(sizes)), 2))
    parts = [[(3 * i, (i, *rng.sample(range(i), i > 0 and rng.random() < 0.1))) for i in range(*ends)]
             for ends in zip((0, *cuts), (*cuts, len(sizes)), strict=True)]  # fmt: skip
    graphs: list[list[Use]] = [*parts, *([(2 * node, weights) for node, weights in part] for part in parts)]
    least = next(part.n_bytes for part in arrange_together(graphs, sizes, 0) if part is not None)
    for room in (least, max(least, sum(sizes) // 2), sum(sizes)):
        found = [part for part in arrange_together(graphs, sizes, room) if part is not None]
        assert len({part.placement for part in found}) == 1
        for uses, part in zip(graphs, found, strict=True):
            assert part.n_bytes <= room and part.whole is not None
            kept = play_through(uses, part, sizes)
            assert part.per_pass == sum(sizes[w] for w in {w for _, weights in uses for w in weights} - kept)
    backwards: list[Use] = [(node, weights) for (node, _), (_, weights) in zip(parts[0], parts[0][::-1], strict=True)]
    for uses, found_part in zip((parts[0], backwards), arrange_together([parts[0], backwards], sizes, 0), strict=True):
        if found_part is not None:
            play_through(uses, found_part, sizes)


def test_parts_of_a_network_that_run_in_turn(files: Files, device: Backend) -> None:
    """As with DBCache, whose three graphs share the room: what stays is not uploaded again for any of them."""
    settings = replace(BLOCKS, threshold=0.0)  # all are computed in each step
    run = {**SMALL, "guidance_scale": None, "cfg_scale": 2.0, "cache": settings}
    with load(files, device) as pipe:
        limit_each(pipe, pipe("a red circle", **run).report.vram, lambda weights: weights // 2)
        few, many = (pipe("a red circle", **{**run, "num_inference_steps": n}).report.vram["z_image"] for n in (3, 7))
    a_step = (many.uploaded_bytes - few.uploaded_bytes) / 4
    assert 0 < a_step <= 2 * (many.weights - many.stays)  # two branches
    assert a_step < many.weights and many.peak <= many.limit


BLOCKS = DBCache(front=1, warmup=1, threshold=10.0)


@pytest.mark.parametrize(("family", "more"), [
    ("qwen_image", {}), ("qwen_image", {"reference_images": 1}), ("qwen_image", {"cache": BLOCKS}),
    ("z_image", {"cache": BLOCKS}),
], ids=["qwen", "qwen-edit", "qwen-dbcache", "z-image-dbcache"])  # fmt: skip
def test_other_models_and_graphs_in_parts(
    family: str, more: dict[str, Any], files: Files, device: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes with room for half of the weights of each, guidance on."""
    recorded = golden("qwen_pipeline")
    for owner, name, area in zip(
        (references, references, qwen), ("AUTOENCODER_AREA", "TOWER_AREA", "LAYERED_AREA"),
        recorded["areas"].tolist(), strict=True,
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, area)
    if "reference_images" in more:
        more = {"reference_images": [Image.fromarray(recorded["edit_2509_two/picture_0"])]}
    given = write_tiny_qwen(tmp_path) if family == "qwen_image" else files
    run = {**SMALL, "guidance_scale": None, "cfg_scale": 2.0, "num_inference_steps": 3, **more}
    with monkeypatch.context() as patch:
        patch.setattr(Place, "offloads", False)
        with models.load(**given, backend=device, encoder=True) as pipe:
            expected = pipe("a red circle", **run)
    options: Any = {"max_vram": 1 << 30, "params_backend": "cpu"}
    with models.load(**given, backend=device, encoder=True, **options) as pipe:
        roomy = pipe("a red circle", **run)
    with models.load(**given, backend=device, encoder=True, **options) as pipe:
        limit_each(pipe, roomy.report.vram, lambda weights: weights // 2)
        tight = pipe("a red circle", **run)
    parts = {family, "vae", "qwen3" if family == "z_image" else "qwen25_vl"}
    if "reference_images" in more:
        parts.add("vision")
    assert set(tight.report.vram) == set(roomy.report.vram) == parts
    for result in (roomy, tight):
        np.testing.assert_array_equal(result.images[0], expected.images[0])
        assert result.report.cache == expected.report.cache
    assert bool(expected.report.cache.get("steps_skipped")) is ("cache" in more)
    for name, seen in tight.report.vram.items():
        assert seen.peak <= seen.limit < roomy.report.vram[name].peak, name
        assert seen.uploaded_bytes > seen.stays + seen.slots, name  # some came more than once, or in turns


@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_loras(mode: Any, files: Files, device: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    shapes = {"layers.0.attention.to_q": (64, 64), "layers.1.feed_forward.w2": (64, 170)}
    factors = {}
    for name, (n_out, n_in) in shapes.items():
        factors[f"{name}.lora_A.weight"] = rng.standard_normal((4, n_in), np.float32) / 5
        factors[f"{name}.lora_B.weight"] = rng.standard_normal((n_out, 4), np.float32) / 5
    save_file(factors, path := tmp_path / "lora.safetensors")
    pictures = {}
    for max_vram in (None, 1 << 30):
        options = dict(max_vram=max_vram, params_backend="cpu") if max_vram else {}
        with monkeypatch.context() as patch:
            patch.setattr(Place, "offloads", max_vram is not None)
            with models.load(**files, backend=device, lora_apply_mode=mode, **options) as pipe:
                plain = pipe("a red circle", **SMALL)
                if max_vram is not None:
                    limit_each(pipe, plain.report.vram, lambda weights: weights // 2)
                pipe.set_loras({path: 1.0})
                changed = pipe("a red circle", **SMALL)
                if max_vram is not None:
                    assert changed.report.vram["z_image"].per_pass
                pipe.unload_lora_weights()
                again = pipe("a red circle", **SMALL)
                pictures[max_vram] = [r.images[0] for r in (plain, changed, again)]
    np.testing.assert_array_equal(pictures[None], pictures[1 << 30])
    plain, changed, again = pictures[None]
    assert (plain == again).all() and (plain != changed).any()


@pytest.mark.parametrize("cfg_batch", [False, True])
@pytest.mark.parametrize("mode", ["at_runtime", "immediately"])
def test_loras_set_between_steps(
    mode: Any, cfg_batch: bool, files: Files, device: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged while weights visit the device stays when the visit ends, and goes when it is taken away."""
    rng = np.random.default_rng(1)
    factors = {"layers.0.attention.to_q.lora_A.weight": rng.standard_normal((4, 64), np.float32) / 5,
               "layers.0.attention.to_q.lora_B.weight": rng.standard_normal((64, 4), np.float32) / 5,
               "layers.1.attention_norm1.diff": rng.standard_normal(64, np.float32)}  # fmt: skip
    save_file(factors, path := tmp_path / "lora.safetensors")
    pictures = {}
    for weights_are in ("there", "visiting", "streamed"):
        options: dict[str, Any] = {} if weights_are == "there" else {"params_backend": "cpu"}
        if weights_are == "streamed":
            options["max_vram"] = 1 << 30
        with monkeypatch.context() as patch:
            patch.setattr(Place, "offloads", weights_are != "there")
            with models.load(**files, backend=device, lora_apply_mode=mode, **options) as pipe:
                pipe.cfg_batch = cfg_batch
                made = [pipe("a red circle", **SMALL)]
                if weights_are == "streamed":
                    limit_each(pipe, made[0].report.vram, lambda weights: weights // 2)
                for weights in ({path: 1.0}, {path: 0.5}, {}):
                    def change(pipe: ZImagePipeline, step: int, *_: Any, weights: Any = weights) -> dict[str, Any]:
                        if step == 0:
                            pipe.set_loras(weights)
                        return {}

                    during = pipe("a red circle", **SMALL, callback_on_step_end=change)
                    if weights_are == "streamed":
                        seen = during.report.vram["z_image"]
                        assert seen.per_pass and seen.peak <= seen.limit
                        # All of two steps; what the refiner made of the prompts is remembered.
                        assert seen.passes == (2 if cfg_batch else 4)
                    made += [during, pipe("a red circle", **SMALL)]
                pictures[weights_are] = [result.images[0] for result in made]
    for weights_are in ("visiting", "streamed"):
        for expected, found in zip(pictures["there"], pictures[weights_are], strict=True):
            np.testing.assert_array_equal(found, expected)
    plain, first, full, second, half, _, again = pictures["there"]
    assert (plain == again).all()
    different = (plain, first, full, second, half)
    assert all((a != b).any() for i, a in enumerate(different) for b in different[:i])


def test_max_vram_needs_a_device_and_weights_that_rest_on_the_host(
    device: Backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="max_vram must be a number of bytes above 0, not 0"):
        places(device, max_vram=0)
    with pytest.raises(ValueError, match="max_vram: te computes on several devices: let it compute on one"):
        places(SplitBackend([device, device]), max_vram=1 << 30)
    monkeypatch.setattr(Place, "offloads", property(lambda place: place.rest == "cpu" and not place.backend.is_cpu))
    output = ["-o", str(tmp_path / "x.png")]
    assert main(["generate", "x", "--backend", "cpu", "--max-vram", "1G", *output]) == 2
    assert capsys.readouterr().err.startswith("error: max_vram: no module computes on a device with memory of its own")
    for wrong in ("0", "-1G", "x", "4Q", ""):
        with pytest.raises(SystemExit) as caught:
            main(["generate", "x", f"--max-vram={wrong}", *output])
        assert caught.value.code == 2 and f"{wrong!r} is no size such as 6G or 800M" in capsys.readouterr().err
    monkeypatch.setattr(Backend, "is_cpu", False)
    with pytest.raises(ValueError, match="parameters of te have to rest on cpu, not on disk"):
        places(device, "te=disk,*=cpu", max_vram=1 << 30)
    assert {place.rest for place in places(device, max_vram=1 << 30).values()} == {"cpu"}
    monkeypatch.setattr(Device, "name", "GPU7")
    with pytest.raises(ValueError, match="parameters of vae have to rest on cpu, not on GPU7"):
        places(device, "vae=gpu7", max_vram=1 << 30)
    monkeypatch.setattr(Device, "is_remote", True)
    with pytest.raises(ValueError, match="te computes on GPU7, to which weights would go over the network"):
        places(device, max_vram=1 << 30)


def test_no_operation_is_looked_at_where_weights_come_piece_by_piece(tight: Any) -> None:
    """Where compare-backends would say nothing of the part, and succeed."""
    pipe, _ = tight
    pipe.look = lambda stage, graph: None
    with pytest.raises(ValueError, match="the caption's refiner: weights come piece by piece"):
        pipe.denoise(NOISE, SIGMAS, np.ones((3, pipe.transformer.module.config.text_dim), np.float32))


def test_weights_that_come_piece_by_piece_have_one_report(files: Files, device: Backend) -> None:
    with load(files, device) as pipe:
        first = pipe("a red circle", **SMALL).report.vram
        second = pipe("a red circle", **SMALL).report.vram
    assert "qwen3" in first and "qwen3" not in second  # the prompts were remembered
    assert first["z_image"].passes == second["z_image"].passes + 2  # and what the refiner made of them
