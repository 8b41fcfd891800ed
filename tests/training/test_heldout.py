"""What is held out: near the share that was asked for, by the coarsest unit that gives it, nothing twice, nothing lost."""

import json
import random

import pytest

from jaxmem.training.data import DataConfig, heldout_pieces, read_text, training_pieces


def config(root, fraction, context_tokens=32, **fields):
    return DataConfig((str(root),), heldout_fraction=fraction, context_tokens=context_tokens, **fields)


def words(n, seed=0):
    numbers = random.Random(seed)
    return " ".join("".join(numbers.choices("abcdefghié😀", k=5)) for _ in range(n))


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def split(fields):
    """The texts of both parts, and the share of bytes that is held out."""
    train, heldout = read_text(fields)
    texts = [[pieces[i] for i in range(len(pieces))] for pieces in (train, heldout)]
    sizes = [sum(map(len, part)) for part in texts]
    assert sizes == [train.report.bytes, heldout.report.bytes]
    assert [len(part) for part in texts] == [train.report.pieces, heldout.report.pieces]
    return *texts, sizes[1] / sum(sizes), heldout.report.split


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", ["one.txt", "one.jsonl"])
def test_one_document_is_divided_to_the_byte(tmp_path, name, fraction):
    text = words(800)
    write_lines(tmp_path / name, [text]) if name.endswith("jsonl") else (tmp_path / name).write_text(text)
    train, heldout, share, how = split(config(tmp_path / name, fraction))
    assert share == pytest.approx(fraction, rel=0.02, abs=20 / len(text.encode()))
    assert how.startswith("held out as ") and how.endswith(" % of the bytes") and "stretch" in how
    assert sum(map(len, train + heldout)) == len(text.encode())
    assert all(part.decode() in text for part in train + heldout), "characters are whole"


def test_stretches_are_spread_and_do_not_overlap(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i:05d}" for i in range(4000)))
    train, heldout, share, how = split(config(tmp_path, 0.1))
    assert how == "held out as 10 stretches of text, 10 % of the bytes" and share == pytest.approx(0.1)
    text = "".join(f"{i:05d}" for i in range(4000))
    starts = [text.index(piece.decode()) // 2000 for piece in heldout if len(piece) == 32]
    assert set(starts) == set(range(10)), "one in every tenth"
    assert sum(map(len, train + heldout)) == 20_000


def test_of_two_shards_neither_is_lost(tmp_path):
    """As many documents in each as a real shard has few of: half of the text was held out at 0.05."""
    for shard in range(2):
        write_lines(tmp_path / f"{shard}.jsonl", [words(20, seed=100 * shard + i) for i in range(100)])
    train, heldout, share, how = split(config(tmp_path, 0.05))
    assert 0.05 / 1.5 <= share <= 0.05 * 1.5 and how.startswith("held out by document, ") and " of 200, " in how
    assert not set(train) & set(heldout)


def test_many_files_are_divided_by_file(tmp_path):
    for i in range(60):
        write_lines(tmp_path / f"{i}.jsonl", [words(5, seed=10 * i + k) for k in range(3)])
    fields = config(tmp_path, 0.1)
    train, heldout = (dict(pieces.by_file()) for pieces in read_text(fields))
    assert not set(train) & set(heldout) and len(train) + len(heldout) == 60 and 4 <= len(heldout) <= 8
    assert heldout_pieces(fields).report.split.startswith(f"held out by file, {len(heldout)} of 60, ")
    assert training_pieces(fields).report.files == len(train)


def test_one_large_file_among_small_ones_is_not_held_out_whole(tmp_path):
    (tmp_path / "large.txt").write_text(words(3000))
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(words(4, seed=i))
    *_, share, how = split(config(tmp_path, 0.05))
    assert share == pytest.approx(0.05, rel=0.05) and "stretches" in how


@pytest.mark.parametrize("text", ["ab", "é😀", "a b c"])
def test_the_smallest_text_that_can_be_divided(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    train, heldout, _, _ = split(config(tmp_path, 0.05, context_tokens=1024))
    assert train and heldout and b"".join(train + heldout).decode() == text


def test_one_character_cannot_be_divided(tmp_path):
    (tmp_path / "a.txt").write_text("😀")
    with pytest.raises(ValueError, match=r"needs more than a character of text to hold some .* set heldout_fraction=0"):
        read_text(config(tmp_path, 0.05))
    train, heldout = read_text(config(tmp_path, 0.0))
    assert train[0].decode() == "😀" and heldout is None


def test_the_choice_does_not_depend_on_the_place(tmp_path):
    parts = []
    for place in ("here", "there/far"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.txt").write_text(words(500))
        text = read_text(config(tmp_path / place, 0.1))
        parts.append((text.train.fingerprint, text.heldout.fingerprint))
    assert parts[0] == parts[1]
