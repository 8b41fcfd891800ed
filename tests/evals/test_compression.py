"""Sizes against the command-line programs and against the standard presets."""

import gzip
import lzma
import shutil
import subprocess
import time

import numpy as np
import pytest

from jaxmem.evals.compression import PROGRAMS, compress_sizes

rng = np.random.default_rng(0)
WORDS = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(1, 9))) for _ in range(2000)]
TEXT = " ".join(WORDS[k % 2000] for k in rng.zipf(1.2, 200_000))[:1_000_000].encode()
NOISE = rng.bytes(20_000)
SAMPLES = {
    "empty": b"",
    "one byte": b"a",
    "piece": TEXT[:512],
    "odd piece": TEXT[7:1234],
    "a window's least": TEXT[:4096],
    "page": TEXT[:65_537],
    "noise": NOISE,
    "run": b"a" * 50_000,
}
RELATIVE_TO_COMMAND = {"gzip -9": 2e-3, "bzip2 -9": 0, "xz -9": 0}  # gzip's deflate is not quite zlib's


@pytest.mark.parametrize("data", SAMPLES.values(), ids=SAMPLES)
def test_a_window_as_long_as_the_data_is_preset_9(data):
    assert PROGRAMS["xz -9"](data).file_bytes == len(lzma.compress(data, preset=9))


@pytest.mark.parametrize("data", SAMPLES.values(), ids=SAMPLES)
def test_gzip_is_the_standard_library_at_level_9(data):
    assert PROGRAMS["gzip -9"](data).file_bytes == len(gzip.compress(data, 9))


@pytest.mark.parametrize("data", [SAMPLES["piece"], TEXT], ids=["piece", "1 MB"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_sizes_are_those_of_the_command(program, data):
    command, level = program.split()
    if shutil.which(command) is None:
        pytest.skip(f"no {command} here")
    written = subprocess.run([command, level], input=data, capture_output=True, check=True).stdout
    assert PROGRAMS[program](data).file_bytes == pytest.approx(len(written), rel=RELATIVE_TO_COMMAND[program], abs=0)


@pytest.mark.parametrize("program", PROGRAMS)
def test_headers_are_what_noise_does_not_explain(program):
    """Noise cannot be compressed: beyond its own bytes a payload has only block marks, a file its headers too."""
    size = PROGRAMS[program](NOISE)
    assert len(NOISE) <= size.payload_bytes < size.file_bytes
    assert PROGRAMS[program](b"").payload_bytes <= 2


def test_files_and_pieces_are_compressed_by_themselves():
    files = [("a", TEXT[:3000]), ("b", TEXT[5000:5700]), ("empty", b"")]
    pieces = [TEXT[:1024], TEXT[1024:2048], TEXT[2048:3000], TEXT[5000:5700]]
    results = compress_sizes(iter(files), piece_bytes=1024)
    assert [r.program for r in results] == list(PROGRAMS)
    for result in results:
        size = PROGRAMS[result.program]
        assert (result.n_bytes, result.piece_bytes) == (3700, 1024)
        assert result.bits_per_byte_whole == 8 * sum(size(data).file_bytes for _, data in files) / 3700
        assert result.bits_per_byte_pieces == 8 * sum(size(data).file_bytes for data in pieces) / 3700
        assert result.bits_per_byte_pieces_headerless == 8 * sum(size(data).payload_bytes for data in pieces) / 3700
        assert result.bits_per_byte_pieces_headerless < result.bits_per_byte_pieces


def test_a_megabyte_in_small_pieces_is_quick():
    start_s = time.process_time()
    compress_sizes([("a", TEXT)], piece_bytes=512)
    assert time.process_time() - start_s < 10


@pytest.mark.parametrize("piece_bytes", [0, -1])
def test_pieces_have_a_length(piece_bytes):
    with pytest.raises(ValueError, match=rf"compression: needs piece_bytes >= 1, got piece_bytes={piece_bytes}; pass"):
        compress_sizes([("a", b"a")], piece_bytes)


@pytest.mark.parametrize("files", [[], [("empty", b"")]], ids=["no files", "empty file"])
def test_nothing_has_no_bits_per_byte(files):
    with pytest.raises(
        ValueError, match="compression: needs at least one byte, got n_bytes=0; pass files that hold text"
    ):
        compress_sizes(files, 512)
