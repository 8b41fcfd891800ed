"""Tokenizers: bytes by default, or any `tokenizer.json` of the `tokenizers` library.

Text is bytes here. Whatever is not UTF-8 in it becomes U+FFFD before it is tokenised, so that every tokenizer sees the
same text and bits per byte compare between them.
"""

import codecs
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

BOS_NAMES = ("<s>", "<|endoftext|>", "<bos>", "[CLS]", "<|begin_of_text|>")
"""What published vocabularies call the token before a document, in the order in which they are looked for."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline, the loss report and generation ask of a tokenizer."""

    vocab_size: int
    """Ids are in [0, vocab_size)."""
    bos_id: int
    """The token that stands before every document; `encode` never writes it."""
    token_bytes: Int[np.ndarray, "vocab"]
    """Bytes of text that each token stands for, 0 for special tokens: nats per token -> bits per byte."""

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """The tokens of a text (int32), without BOS; undecodable bytes count as U+FFFD."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The text of some tokens; special tokens say nothing. It may end inside a character: see `stream`."""
        ...

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text of tokens as they arrive, in whole characters: what generation prints."""
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
    return replace_undecodable(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


class ByteTokenizer:
    """Tokens are the bytes of UTF-8 text; BOS is 0xFF, a byte that never occurs in UTF-8.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né").tolist(), tokenizer.decode([255, 110, 195, 169]).decode()
    ([110, 195, 169], 'né')
    """

    vocab_size = 256
    bos_id = 0xFF

    def __init__(self) -> None:
        self.token_bytes = np.ones(self.vocab_size, np.int32)
        self.token_bytes[self.bos_id] = 0

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """One token per byte."""
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes themselves, BOS left out; not valid UTF-8 if the tokens are not."""
        return bytes(int(token) for token in ids if token != self.bos_id)

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """Whole characters as soon as their last byte is there; U+FFFD for bytes that are no UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if text := decoder.decode(self.decode([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class FileTokenizer:
    """A `tokenizer.json` as the `tokenizers` library writes and reads it.

    Truncation and padding that the file may ask for are switched off, and the name of a special token inside a text is
    text. `token_bytes` is exact for byte-level vocabularies; elsewhere it counts a leading "▁" as one space and
    does not know what a normaliser has changed.

    Args:
      path: a tokenizer.json, or the folder that holds one.

    Raises:
      ValueError: no such file; not a tokenizer.json; no token with one of the usual names for BOS (`BOS_NAMES`).
    """

    def __init__(self, path: str) -> None:
        import tokenizers

        file = pathlib.Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(
                f"tokenizer: needs 'bytes' or a readable tokenizer.json, got tokenizer={path!r} ({error.strerror}); "
                "correct the path or use 'bytes'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
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
        self.token_bytes = self._count_bytes(vocabulary, json.loads(content))
        self.token_bytes[self.bos_id] = 0

    def encode(self, text: bytes | str) -> Int[np.ndarray, "T"]:
        """The tokens of the whole text, without the special tokens that a post-processor would add."""
        ids = self._tokenizer.encode(_as_bytes(text).decode(), add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> bytes:
        """UTF-8 text; a character of which only some bytes are among the tokens comes out as U+FFFD."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True).encode()

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """Text as soon as it can no longer change; what is left of a character that never ended is dropped."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        for token in ids:
            if text := decoder.step(self._tokenizer, int(token)):
                yield text

    def _count_bytes(self, vocabulary: dict[str, int], config: dict) -> Int[np.ndarray, "vocab"]:
        """Bytes per token: in byte-level vocabularies one letter is one byte, elsewhere letters are text."""
        byte_level = "ByteLevel" in json.dumps([config.get("pre_tokenizer"), config.get("decoder")])
        counts = np.zeros(self.vocab_size, np.int32)
        for token, index in vocabulary.items():
            if byte_level:
                counts[index] = len(token)
            elif token.startswith("<0x") and token.endswith(">"):
                counts[index] = 1
            else:
                counts[index] = len(token.replace("▁", " ").removeprefix("##").encode())
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[index] = 0 if added.special else len(added.content.encode())
        return counts


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a config names: "bytes", or the path of a tokenizer.json or of its folder.

    Raises:
      ValueError: as `FileTokenizer`.
    """
    return ByteTokenizer() if spec == "bytes" else FileTokenizer(spec)
