"""Batches of packed documents for training and for held-out evaluation, with grain.

    pieces -> tokens -> shuffle, repeat, this process's share -> segments -> rows -> batches

A segment is BOS and then tokens of one piece, and always stands whole in one row, so that nothing leaks between rows
and every token of text is a target exactly once: the target at t+1 counts where segment_ids[t+1] == segment_ids[t] != 0.
A batch is `dict(tokens, segment_ids, bytes)`, all int32 [rows, context + 1]; segments of a row are numbered 1, 2, 3, ...
and padding, at the end of a row, is 0. `bytes` are those of the text that each token stands for: over an epoch they sum to
the bytes of the text, to the byte, whatever the tokenizer does to it. BOS has none, unless it stands alone for a piece of
which the tokenizer makes no token.

grain is imported where it is used, because that takes a second.
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmem.fields import Bounds, Count, Seed, checked
from jaxmem.models.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from jaxmem.training.formats import Formats
from jaxmem.training.heldout import hold_out
from jaxmem.training.pieces import Pieces, index_pieces
from jaxmem.training.sources import DataReport, SourceFile, find_files

if TYPE_CHECKING:
    import grain

Batch = dict[Literal["tokens", "segment_ids", "bytes"], Int[np.ndarray, "rows context+1"]]

BYTES_PER_TOKEN = 4
"""Of text in a vocabulary of words, roughly: decides how much text a piece holds."""
GROUP_BATCHES = 4
"""Batches packed at once: more rows to choose from waste less room, and take longer to restore."""
READS_AHEAD_PER_THREAD = 16
WITHOUT_TOKEN = 4096
"""Pieces in a row without a token (or as many as there are) that show that the tokenizer makes none."""


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
    """Which text, how it is split, and the shape of a batch.

    Raises:
      ValueError: a field out of its range.
    """

    train: tuple[str, ...]
    """Folders, files or globs (`**` crosses folders): by extension .jsonl, .array_record, all else one UTF-8 text a file."""
    heldout: tuple[str, ...] = ()
    """The same for evaluation; its files are left out of training. Empty: a fraction of the training data."""
    heldout_fraction: Annotated[float, Bounds("[0, 1)")] = 0.05
    """If `heldout` is empty, the share of bytes that is held out: of files, documents, or one (`heldout.py`); 0: none."""
    exclude: tuple[str, ...] = ()
    """Patterns as in .gitignore, matched against paths below the folders above."""
    jsonl_field: str = "text"
    """Where the text is in a JSON object, in .jsonl and .array_record."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a tokenizer.json."""
    context_tokens: Annotated[int, Bounds("[4, inf)")] = 1024
    """Targets in a row; a row has one token more."""
    batch_size: Count = 16
    """Rows of a batch, over all processes."""
    seed: Seed = 0
    """Of the shuffle."""
    read_threads: Annotated[int, Bounds("[0, 1024]")] = 0
    """Threads that read and tokenise ahead. 0 is the fastest on a local disk; storage with latency needs some."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("DataConfig: needs at least one folder, file or glob to train on, got train=(); name one")


class Text(NamedTuple):
    """All text of a run, with its reports."""

    train: Pieces
    heldout: Pieces | None
    """None: nothing is held out, and there is no evaluation."""


def read_text(config: DataConfig, tokenizer: Tokenizer | None = None) -> Text:
    """The text to train on and the text kept from it, every file read once.

    Raises:
      ValueError: a path that names nothing, or a file that is not text; no text in any file; too little to divide.
    """
    if config.heldout:
        return Text(training_pieces(config, tokenizer), heldout_pieces(config, tokenizer))
    everything = _indexed(config, tokenizer, "train")
    return Text(*hold_out(everything, config.heldout_fraction)) if config.heldout_fraction else Text(everything, None)


def training_pieces(config: DataConfig, tokenizer: Tokenizer | None = None) -> Pieces:
    """The text to train on, with its report. Raises: as `read_text`."""
    return _indexed(config, tokenizer, "train") if config.heldout else read_text(config, tokenizer).train


def heldout_pieces(config: DataConfig, tokenizer: Tokenizer | None = None) -> Pieces:
    """The text kept from training, with its report.

    Raises:
      ValueError: as `read_text`; nothing held out.
    """
    heldout = _indexed(config, tokenizer, "heldout") if config.heldout else read_text(config, tokenizer).heldout
    if heldout is None:
        raise ValueError(
            "heldout data: needs at least one document with text, got heldout=() and heldout_fraction=0; "
            "name heldout files that have text or raise heldout_fraction"
        )
    return heldout


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
    *,
    pieces: Pieces | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Batches without end: every epoch all pieces once, in a new global order that only the seed decides.

    The processes take turns in that order, so each piece goes to one of them, whatever the others do.

    Args:
      tokenizer: None loads the one that the config names.
      process_index, process_count: this process, and how many there are; each gets batch_size / process_count rows. Those
        that share the tokens of the same rows count as one (`jaxmem.training.placement.share_of_rows`).
      pieces: what to read, if already indexed.

    Returns:
      An iterator with get_state(), a dict that JSON can hold, and set_state(): after set_state the same batches follow
      as did after get_state, provided that `pieces.fingerprint` is the same.

    Raises:
      ValueError: as `training_pieces`; batch_size not divisible by process_count.
    """
    import grain

    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    rows = _rows_per_process(config, process_index, process_count)
    source = _Tokenised(pieces or training_pieces(config, tokenizer), tokenizer)
    texts = grain.MapDataset.source(source).shuffle(config.seed).repeat()
    packed = _pack(texts[process_index::process_count], tokenizer, config, GROUP_BATCHES * rows)
    return iter(packed.batch(rows, drop_remainder=True))


def heldout_batches(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
    *,
    max_bytes: int | None = None,
    pieces: Pieces | None = None,
) -> Iterable[Batch]:
    """All held-out text once, in order, in batches of one shape; the last is filled with rows of padding.

    Every process reads everything and gets its rows of every batch, so that all have equally many.

    Args:
      max_bytes: evaluate on at most so many bytes, spread over the files; None: on all.
      Others as in `train_batches`.

    Returns:
      An iterable that starts anew with every `iter`.

    Raises:
      ValueError: as `heldout_pieces`; batch_size not divisible by process_count.
    """
    import grain

    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    rows = _rows_per_process(config, process_index, process_count)
    source = _Tokenised((pieces or heldout_pieces(config, tokenizer)).limit(max_bytes), tokenizer)
    texts = grain.MapDataset.source(source)
    packed = _pack(texts, tokenizer, config, config.batch_size)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=config.batch_size)
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return packed.batch(config.batch_size, batch_fn=fill).map(lambda batch: {k: v[mine] for k, v in batch.items()})


def heldout_files(
    config: DataConfig, tokenizer: Tokenizer | None = None, *, max_bytes: int | None = None
) -> list[tuple[str, bytes]]:
    """Name and bytes of the held-out files, exactly as `heldout_batches` reads them: what a compressor is given."""
    return heldout_pieces(config, tokenizer).limit(max_bytes).by_file()


def _indexed(config: DataConfig, tokenizer: Tokenizer | None, split: Literal["train", "heldout"]) -> Pieces:
    """All text of the files to train on, those of `config.heldout` left out, or of these."""
    report = DataReport()
    heldout = find_files("heldout", config.heldout, config.exclude, report) if config.heldout else []
    if split == "heldout":
        files: list[SourceFile] = heldout
    else:
        paths = {os.path.realpath(file.path) for file in heldout}
        found = find_files("train", config.train, config.exclude, report)
        files = [file for file in found if os.path.realpath(file.path) not in paths]

    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    bytes_per_token = 1 if isinstance(tokenizer, ByteTokenizer) else BYTES_PER_TOKEN
    pieces = index_pieces(files, Formats(config.jsonl_field), config.context_tokens * bytes_per_token, report)
    if not pieces:
        remedy = "name heldout files that have text" if split == "heldout" else "put more text there or hold out less"
        if split == "train" and heldout and not files:
            remedy = "all of them are held out by name (heldout): name others there, or none to hold out a share"
        raise ValueError(f"{split} data: needs at least one document with text, got {report}; {remedy}")
    return pieces


def _rows_per_process(config: DataConfig, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"data: needs a process index in [0, {process_count}), got process_index={process_index}; "
            "pass jax.process_index() and jax.process_count()"
        )
    if config.batch_size % process_count:
        raise ValueError(
            f"data: needs batch_size divisible by the {process_count} processes, got batch_size={config.batch_size}; "
            "change batch_size"
        )
    return config.batch_size // process_count


class _Tokenised:
    """What grain reads from: of every piece [T, 2], its tokens and the bytes of text that each stands for.

    Raises, when read: ValueError if the tokenizer fails on a piece, or makes no token of thousands in a row.
    """

    def __init__(self, pieces: Pieces, tokenizer: Tokenizer) -> None:
        self._pieces, self._tokenizer = pieces, tokenizer
        self._without_token = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, piece: int) -> Int[np.ndarray, "T 2"]:
        text = self._pieces[piece]
        try:
            tokens = np.stack(self._tokenizer.encode_counted(text), axis=-1)
        except ValueError as error:
            raise ValueError(f"data: cannot use {self._pieces.name(piece)!r}: {error}") from error
        if len(tokens):
            self._without_token = 0
        elif text:
            self._count(piece, text)
            return np.array([[self._tokenizer.bos_id, len(text)]], np.int32)
        return tokens

    def _count(self, piece: int, text: bytes) -> None:
        with self._lock:
            self._without_token += 1
            if self._without_token >= min(len(self), WITHOUT_TOKEN):
                raise ValueError(
                    f"data: needs a tokenizer that makes tokens of this text, got none of {self._without_token:,} "
                    f"pieces in a row, the last {text[:40].decode(errors='replace')!r} of "
                    f"{self._pieces.name(piece)!r}; use another tokenizer"
                )


@dataclasses.dataclass(frozen=True)
class _Segments:
    """What grain's flat-map calls: a piece as segments of at most context + 1 tokens, each behind a BOS."""

    bos_id: int
    context_tokens: int

    def flat_map(self, piece: Int[np.ndarray, "T 2"]) -> list[dict[str, Int[np.ndarray, "S 2"]]]:
        if len(piece) == 1 and piece[0, 0] == self.bos_id:  # no token, only bytes
            return [{"tokens": piece}]
        bos, starts = np.array([[self.bos_id, 0]], np.int32), range(0, len(piece), self.context_tokens)
        return [{"tokens": np.concatenate([bos, piece[i : i + self.context_tokens]])} for i in starts]


def _pack(
    tokens: "grain.MapDataset[np.ndarray]", tokenizer: Tokenizer, config: DataConfig, n_rows: int
) -> "grain.IterDataset":
    """Rows of packed segments: `n_rows` are filled at a time, each segment goes into the first with room for it."""
    import grain
    from grain.experimental import FirstFitPackIterDataset, FlatMapIterDataset

    ahead = grain.ReadOptions(
        num_threads=config.read_threads, prefetch_buffer_size=config.read_threads * READS_AHEAD_PER_THREAD
    )
    segments = FlatMapIterDataset(tokens.to_iter_dataset(ahead), _Segments(tokenizer.bos_id, config.context_tokens))
    rows = FirstFitPackIterDataset(
        segments, length_struct={"tokens": config.context_tokens + 1}, num_packing_bins=n_rows, shuffle_bins=False
    )
    return rows.map(_as_row)


def _as_row(packed: dict[str, np.ndarray]) -> Batch:
    tokens = packed["tokens"]
    return {"tokens": tokens[..., 0], "segment_ids": packed["tokens_segment_ids"], "bytes": tokens[..., 1]}
