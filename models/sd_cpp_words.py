"""How stable-diffusion.cpp 0.4.7 divides a prompt into words before they are merged, for `--compat sd.cpp`.

It is meant to be Qwen2's rule, and is for words, numbers and punctuation with single spaces between them. It differs:

- characters are not normalised to NFC
- of several spaces before a word none goes to the word
- 's, 't, 'm, 're, 've and 'll are made small
- of white space after a line break the first character comes twice
- digits are 0 to 9 alone; other numbers count as punctuation
"""

from __future__ import annotations

from collections.abc import Callable

from .tokenizer import BYTES

_PRINTABLE = [b for b in range(256) if chr(b) in BYTES]
_OTHER = [b for b in range(256) if chr(b) not in BYTES]
_CHARACTER = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHER)}
_DIGITS = frozenset("0123456789")
_ASCII_SPACE = frozenset("\t\n\v\f\r ")
_SPACE = _ASCII_SPACE | {chr(c) for c in (0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)}
_ENDINGS = ("s", "t", "m", "re", "ve", "ll")


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    words: list[str] = []
    i, n = 0, len(text)
    while i < n:
        start, c, following = i, text[i], text[i + 1 : i + 2]
        ending = _ending(text[i + 1 : i + 3]) if c == "'" else ""
        if ending:
            i += 1 + len(ending)
            words.append("'" + ending)
            continue
        if c in _DIGITS:
            i += 1
        elif c.isalpha() or (c not in "\r\n" and following.isalpha()):
            i = _skip(text, i + 1, str.isalpha)
        elif _is_mark(c) or (c == " " and following and _is_mark(following)):
            i = _skip(text, i + 1, _is_mark)
            i = _skip(text, i, "\r\n".__contains__)
        elif c in _SPACE:
            i = _skip(text, i, _is_blank)
            lines = _skip(text, i, "\r\n".__contains__)
            if lines > i:
                i = lines
                # the one after the line breaks is part of this word and begins the next
                words.append(text[start : i + 1] if text[i : i + 1] and text[i] in _SPACE else text[start:i])
                continue
        words.append(text[start:i])
    return words


def split(text: str) -> list[str]:
    """`split_words` in the characters that stand for bytes: what models.tokenizer.Tokenizer takes as `split`."""
    return ["".join(_CHARACTER[b] for b in word.encode()) for word in split_words(text)]


def _ending(text: str) -> str:
    small = text.lower() if text.isascii() else text[:1].lower() if text[:1].isascii() else ""
    return next((e for e in _ENDINGS if small.startswith(e)), "")


def _is_mark(c: str) -> bool:
    return not (c.isalpha() or c in _DIGITS or c in _ASCII_SPACE)


def _is_blank(c: str) -> bool:
    return c in _SPACE and c not in "\r\n"


def _skip(text: str, i: int, belongs: Callable[[str], bool]) -> int:
    while i < len(text) and belongs(text[i]):
        i += 1
    return i
