"""Tables on disk: any rows are read, written and grown alone; damage, other shapes and full disks are one sentence each."""

import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import threading
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.checkpoints.reading import CheckpointError
from jaxmem.checkpoints.table_files import SUFFIX_BYTES, NamedFiles
from jaxmem.checkpoints.table_rows import CHUNK_BYTES, RowArray, initial_rows
from jaxmem.checkpoints.table_store import TableStore
from jaxmem.checkpoints.table_versions import Versions

N_ROWS = 1000
FULL_DISKS = int(os.environ.get("JAXMEM_FULL_DISKS", "3"))
ARRAYS = {
    "values": RowArray(24, stddev=0.5, seed=3),
    "inputs": RowArray(5, "bfloat16", stddev=2.0),
    "mu": RowArray(24),
    "codes": RowArray(7, "int8", fill=-1),
}


def new(tmp_path, n_rows: int = N_ROWS, arrays=ARRAYS) -> TableStore:
    return TableStore.create(tmp_path / "table", n_rows, arrays)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def disk_bytes(store: TableStore) -> int:
    return sum(path.stat().st_size for path in store.directory.rglob("*") if path.is_file())


def largest_file_in(store: TableStore) -> pathlib.Path:
    return max((store.directory / "d").iterdir(), key=lambda path: path.stat().st_size)


# Reading and writing


def test_rows_that_were_never_written_are_drawn_and_cost_nothing(tmp_path):
    store = new(tmp_path, 10**9)
    assert disk_bytes(store) < 4000
    rows = [7, 10**9 - 1, 7, 3]
    values = store.read("values", rows)
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(values, TableStore(store.directory).read("values", rows))
    np.testing.assert_array_equal(values, initial_rows(ARRAYS["values"], np.array(rows)))
    assert not store.read("mu", rows).any() and np.all(store.read("codes", rows) == -1)
    assert disk_bytes(store) < 4000


def test_drawn_rows_are_normal_and_belong_to_seed_and_row():
    drawn = initial_rows(ARRAYS["values"], np.arange(4000))
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 0.5) < 0.01
    assert abs(np.mean((drawn / 0.5) ** 4) - 3) < 0.1
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    shuffled = np.random.default_rng(0).permutation(4000)[:500]
    np.testing.assert_array_equal(initial_rows(ARRAYS["values"], shuffled), drawn[shuffled])
    other = initial_rows(RowArray(24, stddev=0.5, seed=4), np.arange(4000))
    assert np.mean(other == drawn) < 0.01
    np.testing.assert_array_equal(
        initial_rows(RowArray(24, "bfloat16", 0, 0.5, 3), np.arange(9)), drawn[:9].astype("bfloat16")
    )


def test_any_rows_are_written_and_read_and_their_neighbours_stay(tmp_path):
    store, chance = new(tmp_path), np.random.default_rng(0)
    expected = {name: store.read(name, slice(None)) for name in ARRAYS}
    for _ in range(6):
        rows = chance.permutation(N_ROWS)[: chance.integers(1, 60)]
        written = {
            "values": chance.normal(size=(len(rows), 24)).astype(np.float32),
            "inputs": jnp.asarray(chance.normal(size=(len(rows), 5)), jnp.bfloat16),
            "codes": chance.integers(-128, 128, (len(rows), 7), np.int8),
        }
        store.write(rows, written)
        for name, array in written.items():
            expected[name][rows] = array
        store = TableStore(store.directory)
        for name in ARRAYS:
            np.testing.assert_array_equal(store.read(name, rows), expected[name][rows])
    for name in ARRAYS:
        np.testing.assert_array_equal(store.read(name, slice(None)), expected[name])
        np.testing.assert_array_equal(store.read(name, slice(300, 700), slice(2, 5)), expected[name][300:700, 2:5])
    store.write(slice(10, 20), {"mu": np.ones((10, 24), np.float32)})
    assert store.read("mu", slice(8, 22)).sum(1).tolist() == [0.0] * 2 + [24.0] * 10 + [0.0] * 2
    assert store.read("mu", []).shape == (0, 24)


def test_a_write_costs_its_chunks_and_a_read_its_chunks(tmp_path):
    store = new(tmp_path, 10**7, {"values": RowArray(1024)})
    chance = np.random.default_rng(0)
    for n in (50, 200):
        before = disk_bytes(store)
        store.write(chance.permutation(10**7)[:n], {"values": numbers(n, n, 1024)})
        assert n * CHUNK_BYTES < disk_bytes(store) - before < n * CHUNK_BYTES * 1.1 + 2000
    assert store.info().n_chunks == 250


def test_growing_writes_no_rows(tmp_path):
    store = new(tmp_path)
    store.write([0, 999], {"values": numbers(0, 2, 24)})
    before = disk_bytes(store)
    store.write([1], {"mu": numbers(0, 1, 24)}, step=1)
    before = disk_bytes(store)
    store.grow(10**8)
    assert store.rows_at(1) == N_ROWS and store.read("mu", slice(None), step=1).shape == (N_ROWS, 24)
    with pytest.raises(ValueError, match="needs rows in 0..999, got 5000..5000"):
        store.read("mu", [5000], step=1)
    assert disk_bytes(store) - before < 4000
    store = TableStore(store.directory)
    assert (store.n_rows, store.info().n_rows) == (10**8, 10**8)
    np.testing.assert_array_equal(store.read("values", [999, 0]), numbers(0, 2, 24)[::-1])
    np.testing.assert_array_equal(store.read("values", [1000]), initial_rows(ARRAYS["values"], np.array([1000])))
    store.write([10**8 - 1], {"mu": numbers(1, 1, 24)})
    np.testing.assert_array_equal(store.read("mu", [10**8 - 1]), numbers(1, 1, 24))


def test_what_is_there_is_told_without_reading_it(tmp_path):
    store = new(tmp_path)
    rows_in_a_chunk = CHUNK_BYTES // (24 * 4)
    store.write([0, 1, rows_in_a_chunk], {"values": numbers(0, 3, 24)}, step=5)
    info = TableStore(store.directory).info()
    assert (info.n_rows, info.arrays, info.n_chunks, info.steps) == (N_ROWS, ARRAYS, 2, [5])
    assert 2 * CHUNK_BYTES < info.live_bytes <= info.disk_bytes < 2 * CHUNK_BYTES + 6000


# Steps


def test_steps_are_read_kept_and_rewound(tmp_path):
    store = new(tmp_path, arrays={"values": RowArray(8)})
    for step in range(1, 6):
        store.write([step, 9], {"values": np.full((2, 8), step, np.float32)}, step=step)
    store.write([9], {"values": np.full((1, 8), 99, np.float32)})
    store = TableStore(store.directory)
    first = lambda rows, step=None: store.read("values", rows, step=step)[:, 0].tolist()
    assert [first([9], step) for step in range(1, 6)] == [[1], [2], [3], [4], [5]] and first([9]) == [99]
    assert first([1, 2, 3, 4, 5], 3) == [1, 2, 3, 0, 0]
    store.keep([2, 4])
    assert store.steps() == [2, 4] and first([9, 5]) == [99, 5]
    store.rewind(4)
    assert store.steps() == [2, 4] and first([9, 4, 5]) == [4, 4, 0]
    store.write([5], {"values": np.full((1, 8), 55, np.float32)}, step=5)
    assert (
        TableStore(store.directory).steps() == [2, 4, 5] and first([9, 5], 5) == [4, 55] and first([9, 5], 2) == [2, 0]
    )


@pytest.mark.parametrize("cold", [0, 10])
def test_dropped_steps_free_their_space(cold, tmp_path):
    """Rows that are not written again keep no file alive that is mostly dead."""
    store, width, n = new(tmp_path, 4000, {"values": RowArray(1024)}), 1024, 100
    expected = np.zeros((4000, width), np.float32)
    chance = np.random.default_rng(1)
    for step in range(30):
        rows = chance.permutation(400)[:n]
        rows[:cold] = 400 + cold * step + np.arange(cold)
        expected[rows] = numbers(step + 1, n, width)
        store.write(rows, {"values": expected[rows]}, step)
        store.keep(store.steps()[-2:])
        info = store.info()
        assert info.disk_bytes == disk_bytes(store) - (store.directory / "manifest.ocdbt").stat().st_size
        assert info.disk_bytes < 4 * info.live_bytes + n * 4300 + 2**16, "twice what each step that is kept refers to"
        assert info.steps == list(range(max(0, step - 1), step + 1))
    np.testing.assert_array_equal(store.read("values", slice(None)), expected)
    np.testing.assert_array_equal(store.read("values", slice(None), step=29), expected)
    store.compact()
    assert store.steps() == [28, 29]
    np.testing.assert_array_equal(TableStore(store.directory).read("values", slice(None), step=29), expected)


# Mistakes


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.write([1], {"values": numbers(0, 1, 32)}), r"needs values as stored, float32\[rows, 24\], got "),
        (lambda s: s.write([1], {"mu": np.ones((1, 24), np.float64)}), r"got mu=float64\[1, 24\]; change it, or make"),
        (lambda s: s.write([1], {"mu": np.ones((2, 24), np.float32)}), "needs 1 rows of mu, got 2; pass as many"),
        (
            lambda s: s.write([1, 1], {"mu": np.ones((2, 24), np.float32)}),
            "needs each row once, got some twice; add up",
        ),
        (lambda s: s.write([1000], {"mu": np.ones((1, 24), np.float32)}), "needs rows in 0..999, got 1000..1000; grow"),
        (lambda s: s.write([1], {"nu": np.ones((1, 24), np.float32)}), "arrays values, inputs, mu, codes, got 'nu'"),
        (
            lambda s: s.write([2], {"mu": np.ones((1, 24), np.float32)}, step=4),
            "needs a step after 4, the last saved, got",
        ),
        (
            lambda s: s.write([2], {"values": np.full((1, 24), 0x7FA5A5A5, np.uint32).view(np.float32)}),
            "without the NaN of",
        ),
        (lambda s: s.read("values", [-1, 3]), r"needs rows in 0..999, got -1..3; grow the table, or change them"),
        (
            lambda s: s.read("values", np.arange(N_ROWS) < 3),
            r"needs the numbers of rows as integers, got bool\[1000\]; use np",
        ),
        (
            lambda s: s.read("values", [1.0, 2.5]),
            r"needs the numbers of rows as integers, got float64\[2\]; convert them",
        ),
        (lambda s: s.read("values", [[1, 2]]), r"needs the numbers of rows in one dimension, got \[1, 2\]; flatten"),
        (
            lambda s: s.write(np.array([True]), {"mu": np.ones((1, 24), np.float32)}),
            r"needs the numbers of rows as integers, got bool\[1\]; use np.flatnonzero\(mask\)",
        ),
        (
            lambda s: s.write([2], {"mu": np.ones((1, 24), np.float32)}, step=5.0),
            "needs a step that is an integer, got step=5.0; convert it",
        ),
        (lambda s: s.read("values", [3], step=7), r"needs one of the steps \[4\], got step=7; choose another"),
        (lambda s: s.rewind(3), r"needs one of the steps \[4\], got step=3"),
        (lambda s: s.grow(999), "needs at least its 1000 rows, got n_rows=999; rows are never dropped"),
        (
            lambda s: s.expect({"values": np.zeros((9, 24), np.float32)}, 9),
            "as many rows as stored, 1000, got n_rows=9",
        ),
        (
            lambda s: TableStore.create(s.directory, 5, ARRAYS),
            "needs a new or empty directory, got one in use; name another",
        ),
        (
            lambda s: TableStore.create(s.directory / "d2", 0, ARRAYS),
            "needs rows, and arrays with names like Python's",
        ),
        (
            lambda s: TableStore(s.directory / "d"),
            "needs a directory made by TableStore.create or `jaxmem table create`, got one without manifest",
        ),
        (
            lambda s: RowArray(4, "float64"),
            "needs dtype to be one of float32, .*, uint32, got dtype='float64'",
        ),
        (
            lambda s: RowArray(4, "int8", stddev=1.0),
            "float32, float16, bfloat16 in rows that begin as drawn numbers, got dtype='int8'; change it",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(call, message, tmp_path):
    store = new(tmp_path)
    store.write([4], {"mu": numbers(0, 1, 24)}, step=4)
    before = disk_bytes(store)
    with pytest.raises(ValueError, match=message) as error:
        call(store)
    assert "\n" not in str(error.value)
    assert (disk_bytes(store), store.steps()) == (before, [4])


def test_a_directory_of_others_is_told(tmp_path):
    import tensorstore as ts

    ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()["a"] = b"b"
    with pytest.raises(ValueError, match="needs a directory made by TableStore.create or .*, got other data"):
        TableStore(tmp_path)


# Damage


def flip(path: pathlib.Path, place: int):
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def test_a_damaged_chunk_is_told_with_its_rows_and_others_are_read(tmp_path):
    store = new(tmp_path, arrays={"values": RowArray(64)})  # 16 rows of 256 bytes in a chunk
    store.write(slice(0, 64), {"values": numbers(0, 64, 64)}, step=1)
    file = largest_file_in(store)
    place = file.read_bytes().index(numbers(0, 64, 64)[35].tobytes())
    store.write(slice(64, 80), {"values": numbers(1, 16, 64)})
    flip(file, place)
    store = TableStore(store.directory)
    with pytest.raises(CheckpointError) as error:
        store.read("values", slice(None))
    assert str(error.value).startswith(
        f"table {store.directory} is damaged: needs values of rows 32..47 as written, got Digest"
    )
    assert str(error.value).endswith("; rewind to an earlier step, or copy the directory back from elsewhere")
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="rows 32..47 as written"):
        store.write([33], {"values": numbers(2, 1, 64)})
    np.testing.assert_array_equal(store.read("values", slice(0, 32)), numbers(0, 64, 64)[:32])
    np.testing.assert_array_equal(store.read("values", slice(64, 80)), numbers(1, 16, 64))


def swap(one: pathlib.Path, other: pathlib.Path):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def without_name(path: pathlib.Path):
    """As jaxmem 0.1 wrote it, and as a kill behind the commit leaves it."""
    os.truncate(path, path.stat().st_size - SUFFIX_BYTES)


def test_data_files_that_have_changed_places_are_told(tmp_path):
    """All commits write the same rows, so that chunks and index of each fit in the place of another's."""
    whole = new(tmp_path, arrays={"values": RowArray(64)})
    other = TableStore.create(tmp_path / "other", N_ROWS, {"values": RowArray(64)})
    for step in range(3):
        whole.write(slice(0, 32), {"values": numbers(step, 32, 64)}, step)
        other.write(slice(0, 32), {"values": numbers(7 + step, 32, 64)}, step)
    files = sorted(os.listdir(whole.directory / "d"))
    assert len(files) >= 4
    pairs = [(a, whole.directory / "d" / b) for a, b in itertools.combinations(files, 2)]
    pairs += [(files[-1], path) for path in (other.directory / "d").iterdir()]
    for n, (name, source) in enumerate(pairs):
        copy = shutil.copytree(whole.directory, tmp_path / f"copy{n}")
        if source.parent.parent == whole.directory:
            swap(copy / "d" / name, copy / "d" / source.name)
        else:
            shutil.copy(source, copy / "d" / name)
        with pytest.raises(CheckpointError, match=rf"is damaged: needs d/\w+ as written, got the contents of {source.name}|"
                           rf"got the contents of {name}; rename the files back"):  # fmt: skip
            TableStore(copy).read("values", slice(0, 32))
    for path in (whole.directory / "d").iterdir():
        without_name(path)
    old = TableStore(whole.directory)
    np.testing.assert_array_equal(old.read("values", slice(0, 32), step=1), numbers(1, 32, 64))
    old.write(slice(0, 32), {"values": numbers(3, 32, 64)}, 3)  # which names the files before it too
    swap(*(whole.directory / "d" / name for name in files[:2]))
    with pytest.raises(CheckpointError, match="got the contents of"):
        TableStore(whole.directory)


def test_damage_anywhere_is_told_and_never_read_as_rows(tmp_path):
    whole = new(tmp_path, arrays={"values": RowArray(16, stddev=1.0)})
    small = next((whole.directory / "d").iterdir()).name
    for step in range(3):
        whole.write(slice(100 * step, 100 * step + 150), {"values": numbers(step, 150, 16)}, step)
    expected = whole.read("values", slice(None))
    chance, told, copy = np.random.default_rng(0), 0, tmp_path / "copy"
    for file in ("manifest.ocdbt", *(f"d/{name}" for name in os.listdir(whole.directory / "d"))):
        size = (whole.directory / file).stat().st_size
        for damage in ("delete", "truncate", *chance.integers(0, size, 150 if file.endswith(small) else 30).tolist()):
            shutil.rmtree(copy, ignore_errors=True)
            path = shutil.copytree(whole.directory, copy) / file
            if damage == "delete":
                path.unlink()
            elif damage == "truncate":
                os.truncate(path, size // 2)
            else:
                flip(path, damage)
            try:
                np.testing.assert_array_equal(TableStore(copy).read("values", slice(None)), expected)
            except (CheckpointError, ValueError) as error:
                assert str(error).startswith(f"table {copy}") and "\n" not in str(error), error
                assert "tensorstore_spec" not in str(error)
                told += 1
    assert told > 100


@contextlib.contextmanager
def largest_file(n_bytes: int):
    """Writes beyond this size fail as they do on a full disk; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_the_state_before_stays(tmp_path):
    with largest_file(100), pytest.raises(CheckpointError, match="make room there, and save again"):
        new(tmp_path)
    store = new(tmp_path)
    store.write(slice(None), {"values": numbers(0, N_ROWS, 24)}, step=1)
    before = sorted(path for path in store.directory.rglob("*"))
    for room in (10_000, 100):  # not enough for the rows; not enough for the manifest
        with largest_file(room), pytest.raises(CheckpointError) as error:
            store.write(slice(None), {"values": numbers(1, N_ROWS, 24)}, step=2)
        message = str(error.value)
        assert message.startswith(f"table {store.directory}: needs to be written, got ") and "\n" not in message
        assert "too large" in message
        assert message.endswith("; what was committed before is intact; make room there, and save again")
        assert store.steps() == [1]
        assert sorted(path for path in store.directory.rglob("*")) == before, "a refused write leaves nothing"
        for reader in (store, TableStore(store.directory)):
            np.testing.assert_array_equal(reader.read("values", slice(None)), numbers(0, N_ROWS, 24))
    store.write(slice(None), {"values": numbers(1, N_ROWS, 24)}, step=2)
    np.testing.assert_array_equal(store.read("values", slice(None)), numbers(1, N_ROWS, 24))
    used = disk_bytes(store)
    store.keep([2])
    store.compact()
    assert disk_bytes(store) < used, "what the failed writes left is deleted too"
    np.testing.assert_array_equal(store.read("values", slice(None), step=2), numbers(1, N_ROWS, 24))


def test_an_interrupted_write_leaves_the_state_before(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a commit; what it has left is swept."""
    store = TableStore.create(tmp_path / "t", 64, {"values": RowArray(4)})
    store.write([1, 2], {"values": np.ones((2, 4), np.float32)}, 1)

    def interrupted(about):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jaxmem.checkpoints.table_store.sealed", interrupted)
        store.write([2, 3], {"values": np.full((2, 4), 9, np.float32)}, 2)
    for found in (store, TableStore(tmp_path / "t")):
        assert found.steps() == [1]
        np.testing.assert_array_equal(found.read("values", [1, 2, 3])[:, 0], [1, 1, 0])
    store.write([3], {"values": np.full((1, 4), 5, np.float32)}, 2)
    store.keep([2])
    store.compact()
    np.testing.assert_array_equal(TableStore(tmp_path / "t").read("values", [1, 2, 3])[:, 0], [1, 1, 5])


def test_a_full_disk_that_keeps_old_steps_has_the_new_one(tmp_path, monkeypatch):
    store = new(tmp_path, arrays={"values": RowArray(64)})
    for step in range(3):
        store.write([step], {"values": numbers(step, 1, 64)}, step)
    with largest_file(10), pytest.warns(UserWarning, match="older steps are still there: .* make room there"):
        store.keep_or_warn([2])
    assert store.steps() == [0, 1, 2]
    store.write([3], {"values": numbers(3, 1, 64)}, 3)
    store.keep_or_warn([3])
    assert store.steps() == [3]


def test_a_storm_of_full_disks(tmp_path):
    """JAXMEM_FULL_DISKS=20 is the full proof: whatever there is room for, a step is there wholly or not at all."""
    store, chance = new(tmp_path, arrays={"values": RowArray(64)}), np.random.default_rng(0)
    store.write([], {}, 0)
    expected, step, refused = np.zeros((N_ROWS, 64), np.float32), 0, 0
    while refused < FULL_DISKS:
        rows, step = chance.permutation(N_ROWS)[:200], step + 1
        written = numbers(step, 200, 64)
        try:
            with largest_file(int(chance.integers(100, 300_000))):
                store.write(rows, {"values": written}, step)
        except CheckpointError as error:
            assert "make room there, and save again" in str(error)
            refused += 1
            for reader in (store, TableStore(store.directory)):
                np.testing.assert_array_equal(reader.read("values", slice(None)), expected)
            store.write(rows, {"values": written}, step)
        expected[rows] = written
        store.keep([step])
    np.testing.assert_array_equal(TableStore(store.directory).read("values", slice(None), step=step), expected)
    print(f"\n{refused} of {refused + step} saves of a table had no room; each was made again")


def test_commits_read_as_much_after_many_others(tmp_path, monkeypatch):
    """Without `keep`: no list of versions, no index, and of files only that which is new."""
    store, counted = new(tmp_path, arrays={"values": RowArray(64)}), Counter()
    for cls, name in ((Versions, "_dump"), (NamedFiles, "_written_name"), (Versions, "store")):

        def count(*arguments, method=getattr(cls, name), name=name, **options):
            counted[name] += 1
            return method(*arguments, **options)

        monkeypatch.setattr(cls, name, count)
    seen = []
    for step in range(40):
        counted.clear()
        store.write([step], {"values": numbers(step, 1, 64)}, step)
        seen.append(dict(counted))
    assert seen[1] == seen[20] == seen[-1] and "_dump" not in seen[-1], seen
    assert seen[-1]["_written_name"] == 1


def test_a_second_writer_is_told(tmp_path):
    store, other = new(tmp_path), TableStore(tmp_path / "table")
    store.write([1], {"mu": numbers(0, 1, 24)}, step=1)
    with pytest.raises(CheckpointError, match="one writer at a time, .*; open it again, or stop the other"):
        other.write([1], {"mu": numbers(1, 1, 24)}, step=2)
    np.testing.assert_array_equal(store.read("mu", [1]), numbers(0, 1, 24))
    assert json.dumps(store.steps()) == "[1]"


def test_a_reader_beside_a_writer_sees_whole_commits(tmp_path):
    store = new(tmp_path, arrays={"values": RowArray(64)})
    store.write(slice(0, 400), {"values": np.zeros((400, 64), np.float32)}, step=0)
    reader, seen = TableStore(store.directory), set()

    def write():
        for step in range(1, 60):
            store.write(slice(0, 400), {"values": np.full((400, 64), step, np.float32)}, step)
            store.keep([step])

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        values = reader.read("values", slice(0, 400))
        assert np.all(values == values[0, 0])
        seen.add(float(values[0, 0]))
    writer.join()
    assert len(seen) > 2 and np.all(reader.read("values", [0, 399]) == 59)
