"""Text to token ids: the byte-level BPE of Qwen2, Qwen2.5 and Qwen3.

Unicode normalisation and the splitting into words are done by the `tokenizers` library. The merging is done here:
the library wants the whole vocabulary copied first, 0.6 s of CPU time for Qwen2's 151,643 tokens (0.8 s by its JSON),
where 0.2 s do for the two dicts that are needed. A test compares the two ways.

Special tokens such as <|im_start|> are recognised in the user's text too, as transformers (so diffusers) and
stable-diffusion.cpp do; encode(text, special=False) takes them as the characters they are made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from heapq import heappop, heappush
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from loader.checkpoint import Checkpoint
from loader.errors import LoadError
from loader.limits import Limits
from loader.strict_json import read_json

# Z-Image's prompt: Qwen3's chat template with one message, the answer begun, thinking allowed
TEMPLATE = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
QWEN2_PRE = ("qwen2", "deepseek-r1-qwen")  # names of this splitting in GGUF files

MAX_PROMPT = 1 << 20  # bytes
_LONG_WORD = 100  # from here on the square of the length counts
_FILE_LIMITS = Limits(json=64 << 20)
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types that are matched as a whole
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
# the 256 bytes as characters, in the order of their ids in Qwen2's vocabulary
BYTES = tuple(map(chr, _PRINTABLE)) + tuple(chr(256 + i) for i in range(256 - len(_PRINTABLE)))

Split = Callable[[str], Iterable[str]]


class Tokenizer:
    """Byte-level BPE with special tokens.

    vocab: token -> id, bytes written as GPT-2's printable characters. merges: "left right", most urgent first.
    special: token -> id, matched in the text before anything else. split: text -> words, in those characters.

    Raises ValueError when the parts do not fit together: a byte or the result of a merge has no id, two tokens have
    one, or an id is none.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[str], special: Mapping[str, int], *, split: Split | None = None
    ) -> None:
        if missing := [c for c in BYTES if c not in vocab]:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes: this is no byte-level BPE")
        every = {**vocab, **special}
        ids = set(every.values())
        if set(map(type, every.values())) != {int} or min(ids) < 0 or max(ids) >= 1 << 31:
            wrong_id = next(i for i in every.values() if type(i) is not int or not 0 <= i < 1 << 31)
            raise ValueError(f"{str(wrong_id)[:40]!r} is no token id (0 to 2^31 - 1)")
        if len(ids) != len(every):
            raise ValueError(f"{len(every)} tokens have {len(ids)} ids: some share one")
        made = _made_by(merges)
        if len(made) != len(merges) or not all(map(vocab.__contains__, made)):
            wrong = next(m for m in merges if m.count(" ") != 1 or "\n" in m or m.replace(" ", "") not in vocab)
            raise ValueError(f"the merge {wrong!r} does not make a token of the vocabulary")
        self.vocab = vocab
        self.special = special
        self._ranks = dict(zip(merges, count()))
        self._split = split or _qwen2_split()
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if special else None

    def with_split(self, split: Split) -> Tokenizer:
        """The same vocabulary with another way to divide a text into words."""
        other = copy(self)
        other._split = split
        return other

    @classmethod
    def qwen2(cls) -> Tokenizer:
        """The vocabulary that comes with this package; the one of Qwen2, Qwen2.5 and Qwen3."""
        path = Path(__file__).parent / "vocab" / "qwen2.merges"
        if not path.exists():
            raise LoadError("the Qwen2 vocabulary is missing", kind="MissingFile", path=path, hint="run build.py")
        merges = path.read_text(encoding="utf-8").split("\n")[:-1]
        vocab = dict(zip([*BYTES, *_made_by(merges)], count()))
        special = dict(zip(QWEN2_SPECIAL, count(len(vocab))))
        return cls(vocab, merges, special)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in the metadata of a GGUF file: tokenizer.ggml.{model,pre,tokens,merges,token_type}.

        Raises LoadError when one is missing or is not that of a Qwen2-like byte-level BPE.
        """

        def value(key: str) -> Any:
            if (name := f"tokenizer.ggml.{key}") not in metadata:
                raise LoadError(f"no tokenizer: the metadata has no {name}", field=name)
            return metadata[name]

        for key, known in (("model", ("gpt2",)), ("pre", QWEN2_PRE)):
            if value(key) not in known:
                raise LoadError(f"unknown tokenizer: {key} {value(key)!r}", field=f"tokenizer.ggml.{key}")
        if metadata.get("tokenizer.ggml.add_bos_token"):
            raise LoadError("this tokenizer begins texts with a token of its own", field="tokenizer.ggml.add_bos_token")
        tokens, types = list(value("tokens")), list(value("token_type"))
        if len(tokens) != len(types):
            raise LoadError(f"{len(tokens)} tokens, but {len(types)} token types", field="tokenizer.ggml.token_type")
        vocab = dict(zip(tokens, count()))
        if len(vocab) != len(tokens):
            raise LoadError(f"{len(tokens) - len(vocab)} tokens are there twice", field="tokenizer.ggml.tokens")
        special = {tokens[i]: i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
        try:
            return cls(vocab, list(value("merges")), special)
        except ValueError as error:
            raise LoadError(str(error), field="tokenizer.ggml.merges") from error

    @classmethod
    def for_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of a text encoder: from its metadata; else from files beside it, or in the folder "tokenizer"
        beside its own (diffusers' layout); else Qwen2's. LoadError when one is there but broken.
        """
        if "tokenizer.ggml.tokens" in checkpoint.metadata:
            return cls.from_gguf(checkpoint.metadata)
        path = Path(checkpoint.path)
        folder = path if path.is_dir() else path.parent
        for candidate in (folder, folder.parent / "tokenizer"):
            if (candidate / "tokenizer.json").exists() or (candidate / "merges.txt").exists():
                return cls.from_files(candidate)
        return cls.qwen2()

    @classmethod
    def from_files(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a folder: tokenizer.json, or else vocab.json and merges.txt.

        vocab.json and merges.txt are taken for Qwen2's kind; special tokens come from added_tokens.json or
        tokenizer_config.json beside them. Raises LoadError when there is none, or it is of another kind.
        """
        folder = Path(folder)
        try:
            if (path := folder / "tokenizer.json").exists():
                return cls._from_json(_read_json(path), path)
            return cls._from_vocab_and_merges(folder)
        except LoadError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LoadError(f"not a tokenizer: {error!r}", path=path, kind="BadHeader") from error

    @classmethod
    def _from_json(cls, data: dict[str, Any], path: Path) -> Tokenizer:
        model = data["model"]
        refused = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                               "ignore_merges") if model.get(k)]  # fmt: skip
        added = data.get("added_tokens") or []
        refused += [k for k in ("lstrip", "rstrip", "single_word") if any(token.get(k) for token in added)]
        if model.get("type", "BPE") != "BPE" or refused:
            raise LoadError(f"not a plain byte-level BPE: {model.get('type')} {', '.join(refused)}", path=path)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        # what comes before the model is left to the library, with an empty model in the place of the real one
        rest = {"version": "1.0", "normalizer": data.get("normalizer"), "pre_tokenizer": data["pre_tokenizer"],
                "truncation": None, "padding": None, "post_processor": None, "decoder": None, "added_tokens": [],
                "model": {"type": "BPE", "vocab": {}, "merges": []}}  # fmt: skip
        try:
            library = tokenizers.Tokenizer.from_str(json.dumps(rest))
        except Exception as error:  # the library raises Exception itself
            raise LoadError(f"not a tokenizer: {error}", path=path, kind="BadHeader") from error
        special = {token["content"]: int(token["id"]) for token in added}
        return cls(model["vocab"], merges, special, split=_splitter(library.normalizer, library.pre_tokenizer))

    @classmethod
    def _from_vocab_and_merges(cls, folder: Path) -> Tokenizer:
        vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
        for path in (vocab_path, merges_path):
            if not path.exists():
                message = f"no tokenizer here: neither tokenizer.json nor {path.name}"
                raise LoadError(message, kind="MissingFile", path=folder)
        lines = merges_path.read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        special: dict[str, int] = {}
        if (path := folder / "tokenizer_config.json").exists():
            special |= {t["content"]: int(i) for i, t in (_read_json(path).get("added_tokens_decoder") or {}).items()}
        if (path := folder / "added_tokens.json").exists():
            special |= {token: int(i) for token, i in _read_json(path).items()}
        return cls(_read_json(vocab_path), merges, special)

    # -- encoding ----------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text; nothing is put before or after it.

        special: whether special tokens in the text count as such. Raises ValueError for text that no tokenizer can
        mean: lone surrogates (broken UTF-16 or undecodable bytes) and NUL characters.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt is a str, not {type(text).__name__}")
        if bad := re.search("[\0\ud800-\udfff]", text):
            what = "a NUL character" if bad[0] == "\0" else f"half a character ({bad[0]!a})"
            raise ValueError(f"the prompt has {what} at position {bad.start()}")
        if (n := len(text.encode())) > MAX_PROMPT:
            raise ValueError(f"the prompt has {n} bytes, at most {MAX_PROMPT} can be used")
        ids: list[int] = []
        # with a group in the pattern, every second piece is a special token
        pieces = self._special.split(text) if special and self._special else [text]
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.special[piece])
            elif piece:
                for word in self._split(piece):
                    ids.extend(self._merge(word))
        return ids

    def encode_weighted(self, pieces: Iterable[tuple[str, float]]) -> tuple[list[int], list[float]]:
        """Ids of pieces of text encoded one by one, and for each id the weight of its piece."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            new = self.encode(text)
            ids += new
            weights += [weight] * len(new)
        return ids, weights

    def apply_template(self, prompt: str, template: tuple[str, str] = TEMPLATE) -> list[int]:
        """The ids of a prompt in a chat template, Z-Image's unless given, encoded as one text as transformers does.

        The template is part of the text: a prompt that begins with a line break merges with the one before it.
        ValueError when the tokenizer lacks a special token of the template.
        """
        prefix, suffix = template
        wanted = dict.fromkeys(re.findall(r"<\|\w+\|>", prefix + suffix))
        if missing := [token for token in wanted if token not in self.special]:
            raise ValueError(f"this tokenizer cannot write the model's prompt: it has no {' and no '.join(missing)}")
        return self.encode(prefix + prompt + suffix)

    def _merge(self, word: str) -> list[int]:
        """Byte pair encoding (Sennrich et al. 2016) of one word: the most urgent pair first, the leftmost of equals."""
        if len(word) > _LONG_WORD:
            return self._merge_long(word)
        parts = list(word)
        never = len(self._ranks)
        ranks = [self._ranks.get(f"{a} {b}", never) for a, b in pairwise(parts)]
        while ranks and (best := min(ranks)) < never:
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del ranks[i]
            if i > 0:
                ranks[i - 1] = self._ranks.get(f"{parts[i - 1]} {parts[i]}", never)
            if i < len(ranks):
                ranks[i] = self._ranks.get(f"{parts[i]} {parts[i + 1]}", never)
        return [self.vocab[part] for part in parts]

    def _merge_long(self, word: str) -> list[int]:
        """The same with a heap of pairs and a linked list of parts: n log n, for words of thousands of characters."""
        parts: list[str | None] = [*word]
        following, previous = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap: list[tuple[int, int, str, str]] = []

        def push(i: int, j: int) -> None:
            if i >= 0 and j < len(parts):
                left, right = parts[i], parts[j]
                if left is not None and right is not None and (rank := self._ranks.get(f"{left} {right}")) is not None:
                    heappush(heap, (rank, i, left, right))

        for i, j in pairwise(range(len(parts))):
            push(i, j)
        while heap:
            _, i, left, right = heappop(heap)
            j = following[i]
            if parts[i] != left or j >= len(parts) or parts[j] != right:
                continue  # one of the two has merged with another since
            parts[i], parts[j] = left + right, None
            following[i] = after = following[j]
            if after < len(parts):
                previous[after] = i
            push(previous[i], i)
            push(i, after)
        return [self.vocab[part] for part in parts if part is not None]


def _made_by(merges: Sequence[str]) -> list[str]:
    """The tokens that merges make; as one big string, since 151,387 small ones take five times as long."""
    if not merges:
        return []
    text = "\n".join(merges)
    return text.replace(" ", "").split("\n") if text.count(" ") == len(merges) else []


def _qwen2_split() -> Split:
    words = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _splitter(normalizers.NFC(), pre_tokenizers.Sequence([words, characters]))


def _splitter(normalizer: Any, pre_tokenizer: Any) -> Split:
    def split(text: str) -> list[str]:
        try:
            text = normalizer.normalize_str(text) if normalizer else text
            return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        except BaseException as error:
            # the library's panics derive from BaseException, and would pass every `except Exception` above us
            if type(error).__name__ == "PanicException":
                raise ValueError(f"the prompt cannot be split into words: {error}") from None
            raise

    return split


def _read_json(path: Path) -> dict[str, Any]:
    data = read_json(str(path), _FILE_LIMITS)
    if not isinstance(data, dict):
        raise LoadError("not a JSON object", path=path, kind="BadHeader")
    return data
