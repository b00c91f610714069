"""LoRAs on the command line: tags, options, files that are found and files that are not; with the demo model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from loader.checkpoint import open_checkpoint
from studio import cli
from studio.generate import DEMO, DEMO_FILES
from studio.loras import find_lora, parse_option, take_tags

SMALL = ["-W", "64", "-H", "64", "--steps", "2", "-t", "1"]
PROMPT = "a red circle on a blue background"


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def write_lora(path: Path, std: float = 0.3, extra: dict[str, Any] | None = None) -> Path:
    """A LoRA of the demo model's feed-forward parts."""
    rng = np.random.default_rng(0)
    tensors = dict(extra or {})
    with open_checkpoint(DEMO / DEMO_FILES[0]) as checkpoint:
        for name in ("layers.0.feed_forward.w1", "layers.0.feed_forward.w2"):
            n_in, n_out = checkpoint[f"{name}.weight"].ne
            tensors[f"diffusion_model.{name}.lora_A.weight"] = rng.standard_normal((4, n_in), np.float32) * std
            tensors[f"diffusion_model.{name}.lora_B.weight"] = rng.standard_normal((n_out, 4), np.float32) * std
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image), image.info.get("parameters", "")


def test_tags_options_and_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lora(tmp_path / "loras" / "styles" / "ink.safetensors")
    drawn = {}
    for name, prompt, options in (
        ("none", PROMPT, []),
        ("tag", f"{PROMPT}<lora:styles/ink:0.75>", []),
        ("two tags", f"{PROMPT}<lora:styles/ink:1.0><lora:styles/ink.safetensors:-0.25>", []),
        ("option", PROMPT, ["--lora", f"{tmp_path}/loras/styles/ink.safetensors:0.75"]),
        ("merged", PROMPT, ["--lora", f"{tmp_path}/loras/styles/ink.safetensors:0.75",
                            "--lora-apply-mode", "immediately"]),
    ):  # fmt: skip
        out, report = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        code, _, err = run("generate", prompt, "-o", str(out), "--report", str(report), "--lora-model-dir",
                           str(tmp_path / "loras"), *options, *SMALL, capsys=capsys)  # fmt: skip
        assert (code, err) == (0, "")
        drawn[name], text = pixels(out)
        assert text.split("\n")[0] == prompt and ("Lora: " in text) == bool(options)
        shown = json.loads(report.read_text())
        assert [x["weight"] for x in shown["loras"]] == ([] if name == "none" else [0.75])
        mode = "immediately" if name == "merged" else "at_runtime"
        for x in shown["loras"]:
            assert x["applied"] == {"transformer": {"keys": 4, "of": 4, "mode": mode}}
    for name in ("two tags", "option"):
        np.testing.assert_array_equal(drawn[name], drawn["tag"])
    assert (drawn["none"] != drawn["tag"]).mean() > 0.05
    assert np.abs(drawn["merged"].astype(int) - drawn["tag"]).mean() < 2  # the demo's weights are quantised


def test_unknown_keys_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lora(tmp_path / "a.safetensors", extra={f"x.{i}": np.zeros(1, np.float32) for i in range(5)})
    code, _, err = run("generate", PROMPT, "-o", str(tmp_path / "x.png"), "--lora", str(path), *SMALL, capsys=capsys)
    assert code == 0
    assert "warning: " in err and "4 of 4 keys applied to transformer; 5 are unknown: 'x.0', 'x.1', 'x.2' and 2" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", f"{PROMPT} <lora:none:1>"], r"<lora:none>: no such file in .*it has 1 LoRAs"),
        (["-p", f"{PROMPT} <lora:goood:1>"], "there is good"),
        (["-p", f"{PROMPT} <lora:../good:1>"], "there is no folder '..'"),
        (["-p", f"{PROMPT} <lora:/etc/passwd:1>"], "there is no folder ''"),
        (["-p", f"{PROMPT} <lora:good:much>"], "the weight 'much' is no number"),
        (["-p", f"{PROMPT} <lora:good:9>"], "number in -8..8"),
        (["-p", f"{PROMPT} <lora:good:1e400>"], "number in -8..8"),
        (["-p", f"{PROMPT} <lora:good:nan>"], "'nan' is no number"),
        (["-p", f"{PROMPT} <lora:good:0_5>"], "'0_5' is no number"),
        (["-p", f"{PROMPT} <lora:good:\u0663>"], "is no number"),
        (["-p", f"{PROMPT} <lora:good:0.5"], "'<lora:good:0.5' in the prompt is no tag"),
        (["-p", f"{PROMPT} <LORA:good:0.5>"], "'<LORA:good:0.5>' in the prompt is no tag"),
        (["-p", f"{PROMPT} <lora:<lora:good:1>:1>"], "'<lora::1>' in the prompt is no tag"),
        (["-p", f"{PROMPT} <lora:\x1b[2Jgood:1>"], r"<lora:\\x1b\[2Jgood>: no such file"),
        (["-p", f"{PROMPT} <lora:|high_noise|good:1>"], "high noise"),
        (["-p", f"{PROMPT} <lora:old:1>"], "pickle"),
        (["-p", PROMPT, "-n", "<lora:good:1>"], "negative prompt"),
        (["-p", PROMPT, "--lora", "nothing.safetensors:1"], "nothing.safetensors: No such file"),
        (["-p", PROMPT, "--lora", ":1"], "no file is named"),
        (["-p", PROMPT, "--lora", "x.safetensors:"], "is no number"),
        (["-p", PROMPT, "--lora-apply-mode", "later"], "invalid choice"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """One line, exit code 2, before a model is loaded."""
    monkeypatch.setattr("models.load", lambda *a, **k: pytest.fail("a model was loaded"))
    folder = tmp_path / "loras"
    write_lora(folder / "good.safetensors")
    if "old" in options[1]:
        (folder / "old.pt").write_bytes(b"\x80\x02}q\x00." + bytes(40))
    code, out, err = run("generate", *options, "--lora-model-dir", str(folder), "-o", str(tmp_path / "x.png"),
                         capsys=capsys)  # fmt: skip
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_a_lora_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sdxl.safetensors"
    save_file({"lora_unet_down_blocks_1_attentions_0_proj_in.alpha": np.ones(1, np.float32)}, path)
    code, _, err = run("generate", PROMPT, "--lora", str(path), "-o", str(tmp_path / "x.png"), *SMALL, capsys=capsys)
    assert code == 2 and "none of its 1 keys belongs to this model; it looks like one for Stable Diffusion" in err


def test_take_tags() -> None:
    assert take_tags("a <lora:x:0.5>cat <lora:dir/y.gguf:-1>") == ("a cat ", [("x", 0.5), ("dir/y.gguf", -1.0)])
    assert take_tags("<lora:x>") == ("", [("x", 1.0)])
    assert take_tags("a <b> <lora> <lyco:x:1> (a:1.2)") == ("a <b> <lora> <lyco:x:1> (a:1.2)", [])


def test_parse_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, expected in {
        "a.safetensors": ("a.safetensors", 1.0),
        "a.safetensors:0.5": ("a.safetensors", 0.5),
        "/x/a.safetensors:-1": ("/x/a.safetensors", -1.0),
        r"C:\x\a.safetensors": (r"C:\x\a.safetensors", 1.0),
        r"C:\x\a.safetensors:0.5": (r"C:\x\a.safetensors", 0.5),
        "C:/x/a.gguf": ("C:/x/a.gguf", 1.0),
        "C:a.safetensors": ("C:a.safetensors", 1.0),
        "x:1e-1": ("x", 0.1),
    }.items():
        assert parse_option(text) == expected
    (tmp_path / "odd:0.5").write_bytes(b"x")
    assert parse_option("odd:0.5") == ("odd:0.5", 1.0)
    assert parse_option("odd:0.5:2") == ("odd:0.5", 2.0)


def test_find_lora(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.gguf", "a.b.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert find_lora(str(tmp_path), "x") == str(tmp_path / "x.safetensors")
    assert find_lora(str(tmp_path), "x.gguf") == str(tmp_path / "x.gguf")
    assert find_lora(str(tmp_path), "a.b") == str(tmp_path / "a.b.safetensors")
    for name in ("notes", "notes.txt", "X", "", ".", "..", "x/", "a\0b", str(tmp_path / "x")):
        with pytest.raises(ValueError, match=r"no such file|no folder"):
            find_lora(str(tmp_path), name)
    with pytest.raises(ValueError, match="No such file"):
        find_lora(str(tmp_path / "none"), "x")
