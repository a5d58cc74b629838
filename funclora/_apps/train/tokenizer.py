"""From text to token ids: transformers' tokenizer of a folder, or bytes for the demo's base."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from funclora._apps.train import utf8
from funclora._apps.train.settings import Settings
from funclora._files.atomic import read_json
from funclora.errors import ConfigError, FormatError, UnsupportedError
from funclora.io.hf.checkpoint import CONFIG_FILE
from funclora.io.hf.library import OPTIONS, check_config, reading, transformers
from funclora.io.peft.files import CONFIG_FILE as ADAPTER_CONFIG

_PROBE = f"{string.printable} é Жα漢字 \N{ELECTRIC LIGHT BULB}\N{ARABIC LIGATURE BISMILLAH AR-RAHMAN AR-RAHEEM}"


class ByteTokenizer:
    """The demo's tokens: the bytes of a text in UTF-8. There are no others, so there is no end token.

    Examples:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer("é!")["input_ids"], tokenizer.decode([195, 169, 33])
        ([195, 169, 33], 'é!')
    """

    eos_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int = 0  # padding is never read
    chat_template: str | None = None

    def __len__(self) -> int:
        return 256

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`{"input_ids": bytes}`; there are no special tokens to add."""
        return {"input_ids": list(text.encode("utf-8", "surrogateescape"))}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", "replace")


def load_tokenizer(settings: Settings) -> Any:
    """The tokenizer of the model's folder, with a padding token; `ByteTokenizer` for the demo's base.

    A tokenizer without a padding token uses its end token or its unknown token for padding, which has neither attention
    nor loss.

    Args:
        settings: `model` and `chat_template` are used.

    Raises:
        FormatError: there is no such folder, or no tokenizer in it that transformers can load.
        ConfigError: it has no token for padding, or the chat template is no template.
        UnsupportedError: transformers is not installed.

    Examples:
        >>> type(load_tokenizer(Settings())).__name__
        'ByteTokenizer'
    """
    if settings.model is None:
        return ByteTokenizer()
    folder = settings.model
    load_config(folder)  # which transformers looks at too
    remedy = " Put the tokenizer's files next to the model's, with tokenizer.save_pretrained(folder)."
    with reading(folder, f"model: transformers finds no tokenizer in {folder}", remedy):
        tokenizer = transformers().AutoTokenizer.from_pretrained(str(folder), **OPTIONS)
        tokenizer.decode(tokenizer(_PROBE)["input_ids"])  # what is wrong with one often shows at a text
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise ConfigError(
                f"model: the tokenizer in {folder} has no padding token, and neither an end token nor an unknown token "
                "to use instead. Set one: tokenizer.pad_token = ... and tokenizer.save_pretrained(folder)."
            )
        tokenizer.pad_token = token
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template)
    # Examples begin at the left, like the positions of a model.
    tokenizer.padding_side = "right"
    return tokenizer


def _template(file: Path) -> str:
    """The chat template in a file."""
    if not file.is_file():
        raise ConfigError(f"chat_template: {file} is no file. Give the file of a Jinja template.")
    text = utf8.text(file)
    if "messages" not in text:
        raise ConfigError(
            f"chat_template: {file} does not speak of messages, so it is no chat template. Give a Jinja template, such "
            "as the chat_template.jinja of an instruct model."
        )
    return text


def ends_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer itself adds its end token to every text, as T5's does.

    Examples:
        >>> ends_texts(ByteTokenizer())
        False
    """
    return tokenizer.eos_token_id is not None and tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]


def begun(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids of a text to be continued: without the end token that a tokenizer may add.

    Args:
        tokenizer: as from `load_tokenizer`.
        text: the beginning.
        **options: of the tokenizer.

    Examples:
        >>> begun(ByteTokenizer(), "ab")
        [97, 98]
    """
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids[:-1] if ends_texts(tokenizer) else ids


def load_config(folder: Path) -> Any:
    """transformers' configuration of a folder.

    Raises:
        FormatError: it cannot be read.
        UnsupportedError: it needs code that is not in transformers.
    """
    file = model_folder(folder) / CONFIG_FILE
    check_config(folder, read_json(file))
    with reading(folder, f"model: {file} cannot be read"):
        return transformers().AutoConfig.from_pretrained(str(folder), **OPTIONS)


def model_folder(folder: Path) -> Path:
    """The folder, if it looks like the folder of a transformers model.

    Raises:
        FormatError: it does not.
        UnsupportedError: it also contains an adapter.
    """
    if not folder.is_dir():
        raise FormatError(f"model: {folder} is not a directory. Give the folder of a transformers model.")
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"model: {folder} contains no config.json. Give the folder of a transformers model, as save_pretrained "
            "writes it."
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise UnsupportedError(
            f"model: {folder} also contains an adapter ({ADAPTER_CONFIG}), so transformers would load its base. "
            "Move the adapter to its own folder."
        )
    return folder
