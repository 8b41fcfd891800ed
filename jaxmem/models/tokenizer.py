"""Tokenizers: bytes by default, or any `tokenizer.json` of the `tokenizers` library.

Text is bytes here. Whatever is not UTF-8 in it becomes U+FFFD before it is tokenised, so that every tokenizer sees the
same text and bits per byte compare between them.
"""

import codecs
import errno
import operator
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

BOS_NAMES = ("<s>", "<|endoftext|>", "<bos>", "[CLS]", "<|begin_of_text|>")
"""What published vocabularies call the token before a document, in the order in which they are looked for."""
REPLACEMENT = "\ufffd"
"""What stands for bytes that are no character, or not yet."""
BLANK = " \t\n" + REPLACEMENT


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline, the loss report and generation ask of a tokenizer."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    bos_id: int
    """The token that stands before every document; `encode` never writes it."""
    is_text: Bool[np.ndarray, "vocab"]
    """Which ids stand for text, neither special nor unused: those that generation may draw."""
    content: bytes
    """What it was made from: two of the same content make the same tokens."""

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """The tokens of a text (int32), without BOS; undecodable bytes count as U+FFFD."""
        ...

    def encode_counted(self, text: bytes | str) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
        """The tokens, and the bytes of this text that each stands for, which sum to those of the text if there is a token.

        A number of bytes belongs to a place in a text, not to an id: a tokenizer may add a space in front, drop or
        change letters, or write many words as one unknown token.
        """
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The text of some tokens; special tokens say nothing. It may end inside a character: see `stream`.

        Raises: ValueError for an id that is no token's.
        """
        ...

    def stream(self, ids: Iterable[SupportsIndex], after: Iterable[SupportsIndex] = ()) -> Iterator[str]:
        """The text of tokens as they arrive, in whole characters: what generation prints behind the text of `after`.

        decode(after) and all that is given out are decode(after + ids): the first token behind a prompt keeps its space.
        So it does where `after` is empty and `ids` do not begin with BOS: they are the middle of a text, then.
        """
        ...


def replace_undecodable(raw: bytes) -> bytes:
    r"""The same text as valid UTF-8: U+FFFD stands where bytes could not be decoded.

    >>> replace_undecodable(b"caf\xe9 \xc3\xa9").decode()
    'caf\ufffd é'
    """
    try:
        raw.decode()
    except UnicodeDecodeError:
        return raw.decode(errors="replace").encode()
    return raw


def _as_bytes(text: bytes | str) -> bytes:
    """Valid UTF-8 of either kind of text; a lone surrogate in a str is as undecodable as a stray byte."""
    if not isinstance(text, bytes | str):
        raise ValueError(f"tokenizer: needs text, str or bytes, got {text!r}; give some, or '' for none")
    if isinstance(text, bytes):
        return replace_undecodable(text)
    return re.sub("[\ud800-\udfff]", REPLACEMENT, text).encode()


def _known_ids(tokenizer: Tokenizer, ids: Iterable[SupportsIndex]) -> list[int]:
    """The ids as integers, if they are the tokenizer's."""
    ids = [operator.index(token) for token in ids]
    if unknown := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
        raise ValueError(
            f"tokenizer: needs token ids in 0..{tokenizer.vocab_size - 1}, got {unknown[0]}; "
            "decode with the tokenizer that made them"
        )
    return ids


class ByteTokenizer:
    """Tokens are the bytes of UTF-8 text; BOS is 0xFF, a byte that never occurs in UTF-8.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né").tolist(), tokenizer.decode([255, 110, 195, 169]).decode()
    ([110, 195, 169], 'né')
    """

    vocab_size = 256
    bos_id = 0xFF
    content = b"bytes"

    def __init__(self) -> None:
        self.is_text = np.arange(self.vocab_size) != self.bos_id

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """One token per byte."""
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

    def encode_counted(self, text: bytes | str) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
        """One byte per token."""
        ids = self.encode(text)
        return ids, np.ones_like(ids)

    def decode(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes themselves, BOS left out; not valid UTF-8 if the tokens are not."""
        return bytes(token for token in _known_ids(self, ids) if token != self.bos_id)

    def stream(self, ids: Iterable[SupportsIndex], after: Iterable[SupportsIndex] = ()) -> Iterator[str]:
        """Whole characters as soon as their last byte is there; U+FFFD for bytes that are no UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(self.decode(after))
        for token in ids:
            if text := decoder.decode(self.decode([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class FileTokenizer:
    """A `tokenizer.json` as the `tokenizers` library writes and reads it.

    Truncation and padding that the file may ask for are switched off, and the name of a special token inside a text is
    text.

    Args:
      path: a tokenizer.json, or the folder that holds one.

    Raises:
      ValueError: no such file; not a tokenizer.json; no token with one of the usual names for BOS (`BOS_NAMES`).
    """

    def __init__(self, path: str) -> None:
        import tokenizers

        file = tokenizer_file(path)
        self._path = path
        try:
            if file.exists() and not file.is_file():
                raise OSError(errno.EINVAL, "not a regular file")
            self.content = file.read_bytes()
        except OSError as error:
            raise ValueError(
                f"tokenizer: needs 'bytes' or a readable tokenizer.json, got tokenizer={path!r} ({error.strerror}); "
                "correct the path or use 'bytes'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        except ValueError as error:
            raise ValueError(
                f"tokenizer: needs a tokenizer.json of the tokenizers library, got tokenizer={path!r} ({error}); "
                "export one with Tokenizer.save or use 'bytes'"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        bos = next((name for name in BOS_NAMES if name in vocabulary), None)
        if bos is None:
            raise ValueError(
                f"tokenizer: needs a token for the beginning of a document, got tokenizer={path!r} without any of "
                f"{', '.join(BOS_NAMES)}; add one of them to its special tokens"
            )
        self.bos_id = vocabulary[bos]
        self.vocab_size = max(vocabulary.values()) + 1
        special = {i for i, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        self.is_text = np.zeros(self.vocab_size, bool)
        self.is_text[[i for name, i in vocabulary.items() if name and i not in special and i != self.bos_id]] = True

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """The tokens of the whole text, without the special tokens that a post-processor would add.

        Raises:
          ValueError: the tokenizer has no token for this text, nor one for what is unknown.
        """
        return np.array(self._encode(_as_bytes(text).decode()).ids, np.int32)

    def encode_counted(self, text: bytes | str) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
        """The bytes between the end of what the token before stands for and the token's own end.

        What no token stands for counts to the next one, or to the last; tokens that share characters share their bytes.
        """
        raw = _as_bytes(text)
        text = raw.decode()
        encoded = self._encode(text)
        ids = np.array(encoded.ids, np.int32)
        if not len(ids):
            return ids, ids
        ends = np.array(encoded.offsets, np.int64)[:, 1]  # in characters of the text as it was before any normaliser
        if len(text) < len(raw):
            ends = np.append(0, np.cumsum(_utf8_bytes(text)))[ends]
        ends = np.maximum.accumulate(ends)
        ends[ends == ends[-1]] = len(raw)
        last, first = np.searchsorted(ends, ends, side="right"), np.searchsorted(ends, ends)
        starts = np.where(first > 0, ends[first - 1], 0)
        index = np.arange(len(ends)) - first
        shares = [starts + (ends - starts) * i // (last - first) for i in (index, index + 1)]
        return ids, (shares[1] - shares[0]).astype(np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> bytes:
        """UTF-8 text; a character of which only some bytes are among the tokens comes out as U+FFFD."""
        ids = [token for token in _known_ids(self, ids) if token != self.bos_id]
        return self._tokenizer.decode(ids, skip_special_tokens=True).encode()

    def stream(self, ids: Iterable[SupportsIndex], after: Iterable[SupportsIndex] = ()) -> Iterator[str]:
        """Text as soon as its last character is whole; U+FFFD at the end for one that never is.

        Tokens that neither stand behind others nor begin with BOS are the middle of a text, whose first space stays.

        What a token says may depend on those before it: the first loses a space, bytes join to a character. So it is
        decoded together with the tokens from some place before it where a character ended; from there on, one new
        token costs as much as any other.
        """
        window = [int(token) for token in after]  # tokens that are decoded together
        shown, told = self._text(window), len(window)  # what has been given out of their text, and of how many
        for token in ids:
            if not window and token != self.bos_id:
                window = self._some_token()
                shown, told = self._text(window), len(window)
            window.append(int(token))
            text = self._text(window)
            if text.endswith(REPLACEMENT) or len(text) <= len(shown):
                continue
            same = next((i for i, pair in enumerate(zip(shown, text)) if pair[0] != pair[1]), len(shown))
            yield text[same:]
            if rest := self._text(window[told:]):  # whatever is taken from the beginning of a text, some of it stays
                window, text = window[told:], rest
            shown, told = text, len(window)
        if text := self._text(window)[len(shown) :]:
            yield text

    def _some_token(self) -> list[int]:
        """A token that says something by itself, or none."""
        return next(([i] for i in np.flatnonzero(self.is_text).tolist() if self._text([i]).strip(BLANK)), [])

    def _text(self, ids: list[int]) -> str:
        return self.decode(ids).decode()

    def _encode(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(
                f"tokenizer: needs a token for every word, got tokenizer={self._path!r}, which fails on "
                f"{text[:40]!r} ({error}); give its model an unk_token that is in its vocabulary"
            ) from error


def _utf8_bytes(text: str) -> Int[np.ndarray, "characters"]:
    """Bytes of every character of a text that has no lone surrogates."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)


def tokenizer_file(path: str) -> pathlib.Path:
    """The file that a path of it, or of its folder, names."""
    file = pathlib.Path(path).expanduser()
    return file / "tokenizer.json" if file.is_dir() else file


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a config names: "bytes", or the path of a tokenizer.json or of its folder.

    Raises:
      ValueError: as `FileTokenizer`.
    """
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)
