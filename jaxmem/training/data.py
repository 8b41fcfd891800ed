"""Batches of packed documents for training and for held-out evaluation, with grain.

    pieces -> shuffle, repeat, this process's share -> tokens -> segments -> rows -> batches

A segment is BOS and then tokens of one piece, and always stands whole in one row, so that nothing leaks between rows
and every token of text is a target exactly once: the target at t+1 counts where segment_ids[t+1] == segment_ids[t] != 0.
A batch is `dict(tokens, segment_ids)`, both int32 [rows, context + 1]; segments of a row are numbered 1, 2, 3, ... and
padding, at the end of a row, is 0.

grain is imported where it is used, because that takes a second.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Int

from jaxmem.fields import Bounds, Count, Seed, checked
from jaxmem.models.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from jaxmem.training.formats import Formats
from jaxmem.training.pieces import Pieces, index_pieces
from jaxmem.training.sources import DataReport, find_files, heldout_names, is_heldout_record

if TYPE_CHECKING:
    import grain

Batch = dict[Literal["tokens", "segment_ids"], Int[np.ndarray, "rows context+1"]]

BYTES_PER_TOKEN = 4
"""Of text in a vocabulary of words, roughly: decides how much text a piece holds."""
GROUP_BATCHES = 4
"""Batches packed at once: more rows to choose from waste less room, and take longer to restore."""
READS_AHEAD_PER_THREAD = 16


@dataclasses.dataclass(frozen=True)
@checked
class DataConfig:
    """Which text, how it is split, and the shape of a batch.

    Raises:
      ValueError: a field out of its range.
    """

    train: tuple[str, ...]
    """Folders, files or globs (`**` crosses folders). By extension .jsonl, .array_record, all else one text a file."""
    heldout: tuple[str, ...] = ()
    """The same for evaluation; its files are left out of training. Empty: a fraction of the training data."""
    heldout_fraction: Annotated[float, Bounds("[0, 1)")] = 0.05
    """If `heldout` is empty: files (records, if there is only one file with records) whose name hashes below it."""
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


def training_pieces(config: DataConfig, tokenizer: Tokenizer | None = None) -> Pieces:
    """The text to train on, with its report.

    Raises:
      ValueError: a path that names nothing; no text in any file.
    """
    return _pieces(config, tokenizer, "train")


def heldout_pieces(config: DataConfig, tokenizer: Tokenizer | None = None) -> Pieces:
    """The text kept from training, with its report.

    Raises:
      ValueError: a path that names nothing; no text in any file; nothing held out.
    """
    return _pieces(config, tokenizer, "heldout")


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
    texts = grain.MapDataset.source(pieces or training_pieces(config, tokenizer)).shuffle(config.seed).repeat()
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
    texts = grain.MapDataset.source((pieces or heldout_pieces(config, tokenizer)).limit(max_bytes))
    packed = _pack(texts, tokenizer, config, config.batch_size)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=config.batch_size)
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return packed.batch(config.batch_size, batch_fn=fill).map(lambda batch: {k: v[mine] for k, v in batch.items()})


def heldout_files(
    config: DataConfig, tokenizer: Tokenizer | None = None, *, max_bytes: int | None = None
) -> list[tuple[str, bytes]]:
    """Name and bytes of the held-out files, exactly as `heldout_batches` reads them: what a compressor is given."""
    return heldout_pieces(config, tokenizer).limit(max_bytes).by_file()


def _pieces(config: DataConfig, tokenizer: Tokenizer | None, split: Literal["train", "heldout"]) -> Pieces:
    report, formats, keep = DataReport(), Formats(config.jsonl_field), None
    files = find_files("train", config.train, config.exclude, report)
    if config.heldout:
        heldout = find_files("heldout", config.heldout, config.exclude, report)
        paths = {os.path.realpath(file.path) for file in heldout}
        files = heldout if split == "heldout" else [f for f in files if os.path.realpath(f.path) not in paths]
    elif len(files) == 1 and formats.has_records(files[0].path):
        held = functools.partial(is_heldout_record, fraction=config.heldout_fraction)
        keep = held if split == "heldout" else lambda name, position: not held(name, position)
    else:
        names = heldout_names(files, config.heldout_fraction)
        files = [file for file in files if (file.name in names) == (split == "heldout")]

    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    bytes_per_token = 1 if isinstance(tokenizer, ByteTokenizer) else BYTES_PER_TOKEN
    pieces = index_pieces(files, formats, config.context_tokens * bytes_per_token, report, keep)
    if not pieces:
        remedies = {
            "train": "put more text there or hold out less",
            "heldout": "name heldout files that have text or raise heldout_fraction",
        }
        raise ValueError(f"{split} data: needs at least one document with text, got {report}; {remedies[split]}")
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


@dataclasses.dataclass(frozen=True)
class _Segments:
    """What grain's flat-map calls: the tokens of a piece as segments of at most context + 1 tokens, each behind a BOS."""

    bos_id: int
    context_tokens: int

    def flat_map(self, tokens: Int[np.ndarray, "T"]) -> list[dict[str, Int[np.ndarray, "S"]]]:
        starts = range(0, len(tokens), self.context_tokens)
        return [{"tokens": np.append(np.int32(self.bos_id), tokens[i : i + self.context_tokens])} for i in starts]


def _pack(
    texts: "grain.MapDataset[bytes]", tokenizer: Tokenizer, config: DataConfig, n_rows: int
) -> "grain.IterDataset":
    """Rows of packed segments: `n_rows` are filled at a time, each segment goes into the first with room for it."""
    import grain
    from grain.experimental import FirstFitPackIterDataset, FlatMapIterDataset

    ahead = grain.ReadOptions(
        num_threads=config.read_threads, prefetch_buffer_size=config.read_threads * READS_AHEAD_PER_THREAD
    )
    tokens = texts.map(tokenizer.encode).to_iter_dataset(ahead)
    segments = FlatMapIterDataset(tokens, _Segments(tokenizer.bos_id, config.context_tokens))
    rows = FirstFitPackIterDataset(
        segments, length_struct={"tokens": config.context_tokens + 1}, num_packing_bins=n_rows, shuffle_bins=False
    )
    return rows.map(lambda row: {"tokens": row["tokens"], "segment_ids": row["tokens_segment_ids"]})
