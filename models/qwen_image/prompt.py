"""How Qwen-Image's prompts are written: a chat template whose first tokens the transformer never sees.

The text encoder reads an instruction, the pictures and the prompt; the hidden states of the instruction are dropped,
those of what ends the message are kept. Facts: diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..tokenizer import Tokenizer

MAX_TOKENS = 512  # kept of a prompt without pictures, unless asked otherwise; those with pictures are never cut
_END = "<|im_end|>\n<|im_start|>assistant\n"


class Template(NamedTuple):
    """What stands before and after the prompt, and how many tokens of it are dropped."""

    before: str
    after: str
    n_dropped: int


TEXT = Template(
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    _END,
    34,
)
EDIT = Template(
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n",
    _END,
    64,
)


def picture_text(i: int, n_rows: int, *, numbered: bool = True) -> str:
    """How picture i, from 0, of `n_rows` rows of the vision tower stands before the prompt. The first Edit model's
    pipeline does not number them.
    """
    name = f"Picture {i + 1}: " if numbered else ""
    return f"{name}<|vision_start|>{'<|image_pad|>' * n_rows}<|vision_end|>"


def prompt_ids(
    tokenizer: Tokenizer, prompt: str, pictures: Sequence[int] = (), *, kind: Literal["text", "edit"] | None = None,
    numbered: bool = True, max_tokens: int = MAX_TOKENS,
) -> tuple[list[int], int]:  # fmt: skip
    """The ids of a prompt, and how many of them are dropped after encoding.

    pictures: how many rows of the vision tower each has. kind: which template; "edit" where there are pictures, unless
    given: an edit without a vision tower is one too. A prompt of kind "text" is cut to `max_tokens` after what is
    dropped, as in the reference.
    """
    kind = kind or ("edit" if pictures else "text")
    template = EDIT if kind == "edit" else TEXT
    shown = "".join(picture_text(i, n, numbered=numbered) for i, n in enumerate(pictures))
    ids = tokenizer.apply_template(shown + prompt, (template.before, template.after))
    return (ids if kind == "edit" else ids[: template.n_dropped + max_tokens]), template.n_dropped
