"""Which text is kept from training: whole files if that comes out right, else whole documents, else stretches of text.

"Right" means that what is held out has the bytes that were asked for, within a factor of `TOLERANCE`. Files, and likewise
documents, are taken in the order of a hash of their names (for a document: its file's name and its place there) as long
as they bring the bytes closer to what was asked for. So the choice depends on names and sizes, not on where the data lie,
and most of it stays when files are added. Where there is but one document, or a few of unequal size, the text of all
files in order is divided into up to `STRETCHES` parts of equal bytes, and the end of each is held out, cut to the byte.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxmem.training.pieces import FILE, POSITION, TEXT_BYTES, Pieces

TOLERANCE = 1.5
STRETCHES = 10
"""Fewer where they would be shorter than a piece."""


def hold_out(pieces: Pieces, fraction: float) -> tuple[Pieces, Pieces]:
    """The text to train on and the text held out, whose report says by what it was chosen.

    Args:
      pieces: all text.
      fraction: of its bytes, in (0, 1).

    Raises:
      ValueError: text of a single character.
    """
    wanted = fraction * int(pieces.index[:, TEXT_BYTES].sum())
    n_before = 0
    for what, columns in (("file", [FILE]), ("document", [FILE, POSITION])):
        first, unit = _units(pieces.index[:, columns])
        if len(first) == n_before:
            continue  # every file is one document
        n_before = len(first)
        sizes = np.bincount(unit, weights=pieces.index[:, TEXT_BYTES], minlength=len(first)).astype(np.int64)
        chosen = _choose([_name(pieces, row, what) for row in first.tolist()], sizes, wanted)
        held = sizes[chosen].sum()
        if not chosen.all() and wanted / TOLERANCE <= held <= wanted * TOLERANCE:
            return _divide(pieces, chosen[unit], f"by {what}, {chosen.sum():,} of {len(chosen):,}")
    pieces, mask, n_stretches = _stretches(pieces, wanted)
    return _divide(pieces, mask, f"as {n_stretches} {'stretches' if n_stretches > 1 else 'stretch'} of text")


def _divide(pieces: Pieces, chosen: Bool[np.ndarray, "pieces"], how: str) -> tuple[Pieces, Pieces]:
    train, heldout = pieces.divide(chosen)
    share = heldout.report.bytes / (heldout.report.bytes + train.report.bytes)
    heldout.report.split = f"held out {how}, {100 * share:.3g} % of the bytes"
    return train, heldout


def _units(keys: Int[np.ndarray, "pieces columns"]) -> tuple[Int[np.ndarray, "units"], Int[np.ndarray, "pieces"]]:
    """The first piece of every unit, and the unit of every piece; pieces of one stand together."""
    new = np.any(np.diff(keys, axis=0, prepend=-1) != 0, axis=1)
    return np.flatnonzero(new), np.cumsum(new) - 1


def _name(pieces: Pieces, piece: int, what: str) -> str:
    name = pieces.name(piece)
    return name if what == "file" else f"{name}#{pieces.index[piece, POSITION]}"


def _choose(names: Sequence[str], sizes: Int[np.ndarray, "units"], wanted: float) -> Bool[np.ndarray, "units"]:
    chosen, held = np.zeros(len(names), bool), 0.0
    hashes = [hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names]
    for unit in sorted(range(len(names)), key=hashes.__getitem__):
        if held + sizes[unit] / 2 <= wanted:
            chosen[unit], held = True, held + sizes[unit]
    return chosen


def _stretches(pieces: Pieces, wanted: float) -> tuple[Pieces, Bool[np.ndarray, "pieces"], int]:
    """The pieces, some of them cut where a stretch begins or ends; which are held out; and the number of stretches."""
    total, largest = pieces.index[:, TEXT_BYTES].sum(), pieces.index[:, TEXT_BYTES].max()
    n_stretches = int(np.clip(wanted / largest, 1, STRETCHES))
    ends = total * np.arange(1, n_stretches + 1) / n_stretches
    edges = np.sort(np.concatenate([ends - wanted / n_stretches, ends[:-1]]))
    for edge in edges:
        pieces = _cut_at(pieces, edge)
    if len(pieces) == 1:
        raise ValueError(
            f"data: needs more than a character of text to hold some of it out, got {pieces.report}; put more text there, "
            "or set heldout_fraction=0 to train without evaluation"
        )
    starts = np.append(0, np.cumsum(pieces.index[:, TEXT_BYTES]))
    nearest = lambda edge: int(np.abs(starts - edge).argmin())
    mask = np.zeros(len(pieces), bool)
    for end in ends:
        last = max(nearest(end), 2)
        first = min(max(nearest(end - wanted / n_stretches), 1), last - 1)
        mask[first:last] = True
    return pieces, mask, n_stretches


def _cut_at(pieces: Pieces, edge: float) -> Pieces:
    """The same text, with a boundary between two pieces near a byte."""
    starts = np.append(0, np.cumsum(pieces.index[:, TEXT_BYTES]))
    piece = int(np.clip(np.searchsorted(starts, edge, side="right") - 1, 0, len(pieces) - 1))
    n_bytes = int(np.clip(round(edge - starts[piece]), 0, pieces.index[piece, TEXT_BYTES]))
    inside = 0 < n_bytes < pieces.index[piece, TEXT_BYTES]
    return pieces.cut_in_two(piece, n_bytes) if inside or len(pieces) == 1 else pieces
