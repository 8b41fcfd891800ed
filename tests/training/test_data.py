"""Batches: every byte once an epoch, packing, global shuffle, exact resumption, processes, and the held-out split."""

import collections
import dataclasses
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from tokenizer_kinds import KINDS, save_tokenizer

from jaxmem.models.tokenizer import ByteTokenizer, FileTokenizer
from jaxmem.training.data import (
    GROUP_BATCHES,
    DataConfig,
    heldout_batches,
    heldout_files,
    heldout_pieces,
    read_text,
    train_batches,
    training_pieces,
)
from jaxmem.training.step import shifted

CONTEXT, ROWS = 24, 4
BOS = ByteTokenizer.bos_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 files of 8 to 480 bytes: words that occur once, three to a context, so that no piece occurs twice."""
    root = tmp_path_factory.mktemp("corpus")
    words = (f"{i:06d}é" for i in itertools.count())
    rng = random.Random(0)
    for i in range(30):
        (root / f"{i:02d}.txt").write_text("".join(itertools.islice(words, rng.randint(1, 60))))
    return root


def config(root, **fields):
    return DataConfig((str(root),), **{"context_tokens": CONTEXT, "batch_size": ROWS, "heldout_fraction": 0.0} | fields)


def take(batches, n):
    return [{name: array.copy() for name, array in batch.items()} for batch in itertools.islice(batches, n)]


def segments(batches):
    """The tokens of every segment, in the order of rows, without BOS; checks what every batch must keep."""
    found = []
    for batch in batches:
        tokens, ids = batch["tokens"], batch["segment_ids"]
        assert tokens.shape == ids.shape == (ROWS, CONTEXT + 1) and tokens.dtype == ids.dtype == np.int32
        for row_tokens, row_ids in zip(tokens, ids):
            n_real = np.count_nonzero(row_ids)
            steps = np.diff(row_ids[:n_real])
            assert not row_ids[n_real:].any() and not row_tokens[n_real:].any(), "padding only at the end"
            assert n_real == 0 or row_ids[0] == 1
            assert np.isin(steps, (0, 1)).all(), "1, 2, 3, ..."
            for segment in np.split(row_tokens[:n_real], np.flatnonzero(steps) + 1):
                if n_real:
                    assert segment[0] == BOS and len(segment) > 1
                    found.append(bytes(segment[1:].tolist()))
    return found


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(left, right) for name in ("tokens", "segment_ids", "bytes")
    )


def test_every_byte_once_an_epoch(folder):
    pieces = training_pieces(config(folder))
    texts = [pieces[i] for i in range(len(pieces))]
    assert b"".join(texts) == b"".join(path.read_bytes() for path in sorted(folder.iterdir()))
    assert len(set(texts)) == len(texts) and max(map(len, texts)) == CONTEXT

    n_batches = 3 * len(texts) // ROWS // GROUP_BATCHES * GROUP_BATCHES
    counts = collections.Counter(segments(take(train_batches(config(folder), pieces=pieces), n_batches)))
    assert set(counts) == set(texts)
    assert min(counts.values()) >= 2 and max(counts.values()) <= min(counts.values()) + 1


def test_epochs_are_exact_and_differ(tmp_path):
    """Pieces that fill a row each leave nothing for the packer to reorder: four rows are one epoch."""
    for i in range(ROWS * 6):
        (tmp_path / f"{i}.txt").write_text(chr(ord("A") + i) * CONTEXT)
    found = segments(take(train_batches(config(tmp_path)), 18))
    epochs = [found[i : i + ROWS * 6] for i in range(0, len(found), ROWS * 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == ROWS * 6 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_shuffle_is_global_and_only_the_seed_decides(folder):
    pieces = training_pieces(config(folder))
    order = {pieces[i]: i for i in range(len(pieces))}
    first = take(train_batches(config(folder)), 8)
    places = [order[text] for text in segments(first[:3])]
    assert max(places) - min(places) > 0.7 * len(pieces), "a few batches draw on the whole corpus"
    assert same(first, take(train_batches(config(folder)), 8))
    assert not same(first, take(train_batches(config(folder, seed=1)), 8))


def test_rows_are_well_filled(folder):
    filled = [np.mean(batch["segment_ids"] > 0) for batch in take(train_batches(config(folder)), 40)]
    assert np.mean(filled) > 0.9


@pytest.mark.parametrize("read_threads", [0, 2])
def test_restoring_continues_bitwise(folder, read_threads):
    fields = config(folder, read_threads=read_threads)
    batches = train_batches(fields)
    states, whole = [], []
    for _ in range(40):
        states.append(json.dumps(batches.get_state()))
        whole += take(batches, 1)
    for start in (0, 1, 2, 3, 4, 5, 9, 17, 30, 39):
        fresh = train_batches(fields)
        fresh.set_state(json.loads(states[start]))
        assert json.dumps(fresh.get_state()) == states[start]
        assert same(take(fresh, min(6, 40 - start)), whole[start : start + 6])
    used = train_batches(fields)
    take(used, 13)
    used.set_state(json.loads(states[7]))
    assert same(take(used, 33), whole[7:])


def test_processes_share_the_rows(folder):
    pieces = training_pieces(config(folder))
    n_processes = 2
    streams = [train_batches(config(folder, batch_size=2 * ROWS), None, p, n_processes) for p in range(n_processes)]
    parts = [segments(take(stream, 8)) for stream in streams]
    assert not set(parts[0]) & set(parts[1]), "disjoint within an epoch"
    again = train_batches(config(folder, batch_size=2 * ROWS), None, 1, n_processes)
    assert segments(take(again, 8)) == parts[1]

    streams = [train_batches(config(folder, batch_size=2 * ROWS), None, p, n_processes) for p in range(n_processes)]
    counts = sum(
        (collections.Counter(segments(take(stream, len(pieces) // ROWS))) for stream in streams),
        start=collections.Counter(),
    )
    assert set(counts) == {pieces[i] for i in range(len(pieces))}, "complete"


def test_a_file_that_vanishes_does_not_stop_the_run(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"file {i:02d}")
    pieces = training_pieces(config(tmp_path))
    batches = train_batches(config(tmp_path), pieces=pieces)
    take(batches, 2)
    (tmp_path / "3.txt").unlink()
    found = segments(take(batches, 40))
    assert set(found[60:]) == {b"file %02d" % i for i in range(12) if i != 3}
    assert pieces.report.failed_reads > 0 and "3.txt: No such file" in str(pieces.report)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_heldout_bytes_are_targets_exactly_once(folder, n_processes):
    fields = config(folder, heldout=(f"{folder}/*[05].txt",))
    parts = [list(heldout_batches(fields, None, p, n_processes)) for p in range(n_processes)]
    assert len({len(part) for part in parts}) == 1
    batches = [{name: np.concatenate([batch[name] for batch in step]) for name in step[0]} for step in zip(*parts)]
    pieces = heldout_pieces(fields)
    assert sorted(segments(batches)) == sorted(pieces[i] for i in range(len(pieces)))
    targets = sum(
        np.count_nonzero((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)) for ids in (b["segment_ids"] for b in batches)
    )
    files = heldout_files(fields)
    assert files == [(f"{i:02d}.txt", (folder / f"{i:02d}.txt").read_bytes()) for i in range(0, 30, 5)]
    assert targets == sum(len(text) for _, text in files)


def test_heldout_is_in_order_and_starts_anew(folder):
    fields = config(folder, heldout=(f"{folder}/*5.txt",))
    batches = heldout_batches(fields)
    assert same(list(batches), list(batches))
    pieces = heldout_pieces(fields)
    order = {pieces[i]: i for i in range(len(pieces))}
    places = [order[text] for text in segments(batches)]
    assert all(abs(place - i) < 2 * ROWS for i, place in enumerate(places))


def test_heldout_limit(folder):
    fields = config(folder, heldout_fraction=0.5)
    limited = heldout_files(fields, max_bytes=500)
    assert 500 - CONTEXT < sum(len(text) for _, text in limited) <= 500
    assert len(limited) > len(heldout_files(fields)) // 2
    assert sorted(b"".join(segments(heldout_batches(fields, max_bytes=500)))) == sorted(b"".join(t for _, t in limited))


def test_split_by_file_is_stable_and_disjoint(folder, tmp_path):
    def names(pieces):
        return {name for name, _ in pieces.by_file()}

    fields = config(folder, heldout_fraction=0.3)
    train, heldout = names(training_pieces(fields)), names(heldout_pieces(fields))
    assert train | heldout == {path.name for path in folder.iterdir()} and not train & heldout
    assert 3 <= len(heldout) <= 15

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "new.txt").write_text("one more file")
    assert names(heldout_pieces(config(tmp_path, heldout_fraction=0.3))) - {"new.txt"} == heldout


def test_of_two_files_one_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    for fraction in (0.001, 0.5, 0.999):
        fields = config(tmp_path, heldout_fraction=fraction)
        assert len(training_pieces(fields)) == len(heldout_pieces(fields)) == 1


@pytest.mark.parametrize("extension", ["jsonl", "array_record"])
def test_a_single_file_of_records_is_split_by_record(tmp_path, extension):
    texts = [f"record {i}" for i in range(200)]
    records = [json.dumps({"text": text}) for text in texts]
    path = tmp_path / f"data.{extension}"
    if extension == "jsonl":
        path.write_text("\n".join(records))
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record.encode())
        writer.close()
    fields = config(path, heldout_fraction=0.2)
    train, heldout = training_pieces(fields), heldout_pieces(fields)
    found = [{pieces[i].decode() for i in range(len(pieces))} for pieces in (train, heldout)]
    assert found[0] | found[1] == set(texts) and not found[0] & found[1]
    assert 20 < len(found[1]) < 60
    assert (train.report.documents, heldout.report.documents) == (len(found[0]), len(found[1]))


def test_files_held_out_by_name_are_not_trained_on(folder):
    fields = config(folder, heldout=(str(folder / "07.txt"),))
    assert "07.txt" not in dict(training_pieces(fields).by_file())
    assert len(training_pieces(fields).by_file()) == 29


def test_tokenizer_file(folder, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([path.read_text() for path in sorted(folder.iterdir())], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))

    tokenizer = FileTokenizer(str(tmp_path))
    fields = config(folder, tokenizer=str(tmp_path), heldout=(str(folder),))
    batches = list(heldout_batches(fields))
    targets = np.concatenate(
        [
            b["tokens"][:, 1:][(b["segment_ids"][:, 1:] == b["segment_ids"][:, :-1]) & (b["segment_ids"][:, 1:] > 0)]
            for b in batches
        ]
    )
    assert tokenizer.bos_id not in targets
    assert sum(b["bytes"].sum() for b in batches) == sum(len(text) for _, text in heldout_files(fields))
    assert all((b["tokens"][:, 0] == tokenizer.bos_id)[b["segment_ids"][:, 0] > 0].all() for b in batches)

    stream = train_batches(config(folder, tokenizer=str(tmp_path)))
    state, after = [(stream.get_state(), take(stream, 5)) for _ in range(3)][-1]
    fresh = train_batches(config(folder, tokenizer=str(tmp_path)), tokenizer)
    fresh.set_state(state)
    assert same(take(fresh, 5), after)


def test_errors_at_the_start(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"train data: needs at least one file, got .*; put text, .jsonl or .array_rec"
    ):
        train_batches(config(tmp_path))
    with pytest.raises(
        ValueError, match=r"batch_size divisible by the 3 processes, got batch_size=4; change batch_size"
    ):
        train_batches(config(folder), None, 0, 3)
    with pytest.raises(ValueError, match=r"a process index in \[0, 2\), got process_index=2; pass jax.process_index"):
        train_batches(config(folder), None, 2, 2)
    with pytest.raises(
        ValueError, match=r"heldout data: needs at least one document with text, .* raise heldout_fraction"
    ):
        heldout_batches(config(folder))


@pytest.fixture(scope="module")
def odd_text(tmp_path_factory):
    """Text of which a tokenizer may make more, less or nothing: spaces, accents, ligatures, blank documents, bad bytes."""
    root = tmp_path_factory.mktemp("odd")
    numbers = random.Random(0)
    words = ["the", "cat", "Sat", "hélas", "\ufb01n", "😀", " ", "\n", "e\u0301", "qqq"]
    for i in range(12):
        (root / f"{i:02d}.txt").write_text(" ".join(numbers.choices(words, k=numbers.randint(3, 60))))
    (root / "blank.txt").write_text(" \n" * 40)
    (root / "bad.txt").write_bytes(b"caf\xe9 the cat")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_batches_are_those_of_the_text(odd_text, tmp_path, kind):
    """To the byte, over all batches and as `evaluate` and a training step count them, also where a piece has no token."""
    save_tokenizer(kind, tmp_path / "tokenizer.json", ["the cat sat hélas fin"] * 4)
    fields = config(odd_text, tokenizer=str(tmp_path), heldout=(str(odd_text),))
    tokenizer = FileTokenizer(str(tmp_path))
    expected = sum(len(text) for _, text in heldout_files(fields, tokenizer))
    batches = list(heldout_batches(fields, tokenizer))
    assert sum(int(batch["bytes"].sum()) for batch in batches) == expected
    assert sum(int(shifted(batch).target_bytes.sum()) for batch in batches) == expected

    pieces = training_pieces(dataclasses.replace(fields, heldout=()), tokenizer)
    lengths = collections.Counter(len(pieces[i]) for i in range(len(pieces)))
    assert sum(size * n for size, n in lengths.items()) == expected
    batch = next(train_batches(dataclasses.replace(fields, heldout=()), tokenizer, pieces=pieces))
    assert 0 < batch["bytes"].sum() <= expected and not batch["bytes"][batch["segment_ids"] == 0].any()


@pytest.mark.parametrize("read_threads", [0, 2])
def test_a_tokenizer_that_makes_no_token_is_an_error(folder, tmp_path, read_threads):
    """It was waited for without end."""
    from tokenizers import Regex, Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    tokenizer.normalizer = normalizers.Replace(Regex("[\\s\\S]"), "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fields = config(folder, tokenizer=str(tmp_path), read_threads=read_threads)
    with pytest.raises(
        ValueError, match=r"makes tokens of this text, got none of \d+ pieces in a row, .*\.txt'; use anoth"
    ):
        take(train_batches(fields), 1000)


@pytest.mark.parametrize("read_threads", [0, 2])
def test_a_word_without_a_token_is_named_with_its_file(folder, tmp_path, read_threads):
    save_tokenizer("words without unknown", tmp_path / "tokenizer.json", ["the cat sat"])
    fields = config(folder, tokenizer=str(tmp_path), read_threads=read_threads)
    with pytest.raises(ValueError, match=r"data: cannot use '\d\d.txt': tokenizer: needs a token for every word, got"):
        take(train_batches(fields), 1)


def test_nothing_held_out(folder):
    train, heldout = read_text(config(folder))
    assert heldout is None and train.report.files == 30


def test_importing_does_not_load_grain():
    script = (
        "import sys, jaxmem.training.data; print([m for m in ('grain', 'tensorflow', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
