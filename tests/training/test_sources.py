"""Files, formats and pieces: what is found, how it is cut, and that every fault is counted and none raised."""

import io
import json
import os

import pytest

from jaxmem.training.data import DataConfig, training_pieces
from jaxmem.training.pieces import cut
from jaxmem.training.sources import DataReport, find_files


def write(folder, files):
    """Files with text or bytes, by name; returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def write_array_record(path, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def read(*patterns, context_tokens=16, **fields):
    """All pieces without any held out."""
    return training_pieces(DataConfig(patterns, heldout_fraction=0.0, context_tokens=context_tokens, **fields))


def names(*patterns, exclude=()):
    return [file.name for file in find_files("train", patterns, exclude, DataReport())]


def test_find_files(tmp_path):
    root = write(tmp_path, {"a.txt": "1", "sub/b.py": "2", "sub/deep/c.py": "3", "test/d.py": "4", ".hidden.txt": "5"})
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("6")
    everything = ["a.txt", "sub/b.py", "sub/deep/c.py", "test/d.py"]
    assert names(root) == names(f"{root}/", root, f"{root}/a.txt") == everything
    assert names(f"{root}/**/*.py") == ["sub/b.py", "sub/deep/c.py", "test/d.py"]
    assert names(f"{root}/*") == ["a.txt"]
    assert names(f"{root}/a.txt") == ["a.txt"]
    assert names(root, exclude=("test", "*.txt")) == ["sub/b.py", "sub/deep/c.py"]
    assert names(root, exclude=("sub/deep", "**/d.py", "?.txt")) == ["sub/b.py"]


def test_relative_patterns(tmp_path, monkeypatch):
    write(tmp_path, {"corpus/a.txt": "one", "corpus/b.txt": "two"})
    monkeypatch.chdir(tmp_path)
    assert names("corpus") == names("corpus/*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.txt") == ["corpus/a.txt", "corpus/b.txt"]
    assert names("corpus/a.txt") == ["a.txt"]


@pytest.mark.parametrize("limit", [4, 5, 6, 7, 13])
@pytest.mark.parametrize("text", ["", "abcdefghij" * 5, "é" * 20, "a😀é—" * 9], ids=["empty", "ascii", "two", "mixed"])
def test_cut_is_exact_and_never_inside_a_character(text, limit):
    pieces = list(cut(io.BytesIO(text.encode()), limit))
    assert b"".join(raw for _, raw in pieces).decode() == text
    assert [start for start, _ in pieces] == [sum(len(r) for _, r in pieces[:i]) for i in range(len(pieces))]
    assert all(0 < len(raw.decode().encode()) <= limit for _, raw in pieces)
    assert all(len(raw) > limit - 4 for _, raw in pieces[:-1])


@pytest.mark.parametrize("limit", [4, 5, 6, 7, 13])
def test_pieces_decode_as_their_document(limit):
    raw = b"\x80\x80\x80\x80\x80\xe2\x82A\xf0\x9f\x98\xc3\xa9\xff\xfe ok \xed\xa0\x80 \xc3" * 3
    pieces = [piece.decode(errors="replace") for _, piece in cut(io.BytesIO(raw), limit)]
    assert "".join(pieces) == raw.decode(errors="replace")


def test_text_files(tmp_path):
    pieces = read(write(tmp_path, {"a.txt": "a" * 40, "b.md": "bé"}))
    assert [pieces[i] for i in range(len(pieces))] == [b"a" * 16, b"a" * 16, b"a" * 8, "bé".encode()]
    assert str(pieces.report) == "2 documents in 2 files, 43 bytes in 4 pieces"


def test_jsonl(tmp_path):
    lines = [{"text": "one"}, {"text": "two " * 8}, {"text": "drei ü 😀", "id": 3}, {"text": "last"}]
    content = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    pieces = read(write(tmp_path, {"a.jsonl": content}))
    texts = [line["text"].encode() for line in lines]
    assert [pieces[i] for i in range(5)] == [texts[0], texts[1][:16], texts[1][16:], texts[2], texts[3]]
    assert pieces.report.documents == 4
    other = read(write(tmp_path / "other", {"a.jsonl": '{"body": "hello"}\n'}), jsonl_field="body")
    assert other[0] == b"hello"


def test_jsonl_faults(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut off',
        b'["a", "list"]',
        b'{"body": "no text"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": ' + b"[" * 100_000,
        b'{"text": "caf\xe9"}',
        rb'{"text": "\ud800"}',
        b'{"text": "end"}',
    ]
    pieces = read(write(tmp_path, {"a.jsonl": b"\n".join(lines)}))
    assert [pieces[i].decode() for i in range(len(pieces))] == ["good", "caf\ufffd", "\ufffd" * 3, "end"]
    report = pieces.report
    assert (report.documents, report.empty, report.unreadable, report.undecodable_bytes) == (5, 1, 5, 4)
    assert report.examples[:3] == [
        "a.jsonl:2: not a JSON object",
        "a.jsonl:3: not a JSON object",
        "a.jsonl:4: no text in field 'text'",
    ]


def test_array_record(tmp_path):
    texts = [b"plain", b"{ not json", b'{"text": "from json"}', b'{"other": 1}', b"", b"x" * 20, b"caf\xe9"]
    write_array_record(tmp_path / "a.array_record", texts * 20)
    write_array_record(tmp_path / "b.arrayrecord", [])
    pieces = read(str(tmp_path))
    expected = [b"plain", b"{ not json", b"from json", b'{"other": 1}', b"x" * 16, b"x" * 4, "caf\ufffd".encode()]
    assert [pieces[i] for i in range(len(pieces))] == expected * 20
    report = pieces.report
    assert (report.files, report.documents, report.empty, report.undecodable_bytes) == (2, 140, 21, 20)


def test_array_record_that_is_broken(tmp_path):
    write_array_record(tmp_path / "good.array_record", [b"good"])
    whole = (tmp_path / "good.array_record").read_bytes()
    write(tmp_path, {"cut.txt": "", "garbage.array_record": "garbage", "empty.array_record": ""})
    (tmp_path / "cut.array_record").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "link.array_record").symlink_to(tmp_path / "nowhere")
    report = read(str(tmp_path)).report
    assert (report.documents, report.empty, report.unreadable) == (2, 1, 4)
    assert "cut.array_record: not a complete ArrayRecord file" in report.examples
    assert "link.array_record: No such file or directory" in report.examples


def test_a_link_to_a_folder_is_told(tmp_path):
    """Such folders are not followed, lest a link to a folder above never ends; without a word their text would be missed."""
    root = write(tmp_path / "here", {"good.txt": "good"})
    write(tmp_path / "there", {"more.txt": "more"})
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    report = read(root).report
    assert (report.documents, report.unreadable) == (1, 1)
    assert report.examples == ["link: a link to a folder, not followed; name that folder itself"]
    (tmp_path / "here" / "good.txt").unlink()
    with pytest.raises(ValueError, match="with none .link: a link to a folder"):
        read(root)


def test_a_bad_record_does_not_spoil_its_block(tmp_path):
    pytest.importorskip("array_record")
    from jaxmem.training.formats import ArrayRecords
    from jaxmem.training.sources import SourceFile

    class Reader:
        def num_records(self):
            return 100

        def read(self, positions):
            if 70 in positions:
                raise RuntimeError("corrupted chunk")
            return [b"%d" % position for position in positions]

    class Broken(ArrayRecords):
        def _reader(self, path):
            return Reader()

    report = DataReport()
    found = {position: stream.read() for position, stream in Broken("text").scan(SourceFile("a", "a"), report)}
    assert found == {i: b"%d" % i for i in range(100) if i != 70}
    assert report.examples == ["a:70: corrupted chunk"]


def test_faults_of_files_are_counted_and_reported(tmp_path, monkeypatch):
    root = write(
        tmp_path, {"good.txt": "good", "empty.txt": "", "bad.txt": b"caf\xe9 \xff\xfe", "denied.txt": "secret"}
    )
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    really_open = open

    def refusing_open(path, *args):
        if str(path).endswith("denied.txt"):
            raise PermissionError(13, "Permission denied")
        return really_open(path, *args)

    monkeypatch.setattr("jaxmem.training.formats.open", refusing_open, raising=False)
    pieces = read(root)
    assert [pieces[i].decode() for i in range(len(pieces))] == ["caf\ufffd \ufffd\ufffd", "good"]
    assert pieces.report.bytes == sum(len(text) for _, text in pieces.by_file())
    assert str(pieces.report) == (
        "3 documents in 6 files, 17 bytes in 2 pieces, 1 empty, 3 undecodable bytes, 3 unreadable "
        "(denied.txt: Permission denied; link.txt: No such file or directory; pipe.txt: not a regular file)"
    )


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    root = write(tmp_path, {"a/good.txt": "good", "b/secret.txt": "secret"})
    really_scandir = os.scandir

    def refusing_scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return really_scandir(path)

    monkeypatch.setattr(os, "scandir", refusing_scandir)
    report = read(root).report
    assert (report.files, report.unreadable) == (1, 1)
    assert report.examples[0].endswith("b: Permission denied")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("fault", ["gone", "shorter", "other", "same size"])
def test_a_file_that_changes_after_indexing(tmp_path, name, fault):
    path = tmp_path / name
    path.write_text("long enough" if name == "a.txt" else '{"text": "long enough"}')
    write(tmp_path, {"z.txt": "stays"})
    pieces = read(str(tmp_path))
    path.unlink() if fault == "gone" else path.write_text(
        {"shorter": "{", "other": "[" * 99, "same size": path.read_text().replace("long", "lung")}[fault]
    )
    assert [pieces[0], pieces[1], pieces[0], pieces[1]] == [b"", b"stays", b"", b"stays"]
    assert pieces.report.failed_reads == 2
    assert "2 failed reads (" + name in str(pieces.report)


def test_only_when_everything_is_gone_a_read_raises(tmp_path):
    pieces = read(write(tmp_path, {"a.txt": "one", "b.txt": "two"}))
    for path in tmp_path.iterdir():
        path.unlink()
    assert [pieces[0], pieces[1]] == [b"", b""]
    with pytest.raises(OSError, match=r"needs at least one readable piece in 2, got 3 failed reads .*bring the files"):
        pieces[0]


def test_limit_is_spread_and_bounded(tmp_path):
    root = write(tmp_path, {f"f{i}.txt": f"{i}" * 160 for i in range(8)})
    pieces = read(root)
    limited = pieces.limit(400)
    texts = dict(limited.by_file())
    assert limited.by_file() == pieces.limit(400).by_file()
    assert sum(map(len, texts.values())) == 400 and {len(text) for text in texts.values()} <= {32, 48, 64}
    assert len(texts) == 8
    assert pieces.limit(None) is pieces and pieces.limit(8 * 160) is pieces
    assert len(pieces.limit(1)) == 1


def test_fingerprint_depends_on_data_and_not_on_the_place(tmp_path):
    here, there = (
        read(write(tmp_path / place, {"a.txt": "one", "b.txt": "two"})).fingerprint for place in ("x", "y/z")
    )
    assert here == there
    assert here != read(write(tmp_path / "x", {"a.txt": "longer"})).fingerprint
    assert here != read(write(tmp_path / "x", {"a.txt": "eno"})).fingerprint, "of the same size"
    assert here == read(write(tmp_path / "x", {"a.txt": "one", "c.png": b"\x89PNG\r\n\x1a\n" + bytes(40)})).fingerprint
    (tmp_path / "x" / "c.png").unlink()
    assert here != read(write(tmp_path / "y", {"a.txt": "one", "c.txt": "two"}), exclude=("z",)).fingerprint


def test_errors_say_what_to_do(tmp_path):
    empty = str(tmp_path)
    with pytest.raises(ValueError, match=r"train data: needs at least one file, got train='.*' with none; put text"):
        read(empty)
    with pytest.raises(
        ValueError, match=r"needs an existing folder, file or glob, got train='.*nowhere', which does not"
    ):
        read(empty + "/nowhere")
    with pytest.raises(ValueError, match=r"needs at least one file, got train='.*\*.txt' with none; put text"):
        read(empty + "/**/*.txt")
    write(tmp_path, {"a.txt": "", "b.txt": ""})
    with pytest.raises(ValueError, match=r"got train='.*' with none \(2 excluded\)"):
        read(empty, exclude=("*.txt",))
    with pytest.raises(
        ValueError, match=r"at least one document with text, got 2 documents in 2 files, .* 2 empty; put"
    ):
        read(empty)
