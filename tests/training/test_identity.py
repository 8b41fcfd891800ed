"""What a checkpoint remembers of the data: contents, not sizes; and which of them is named when they differ."""

import json

import pytest
from tokenizer_kinds import save_tokenizer

from jaxmem.models.tokenizer import FileTokenizer
from jaxmem.training.data import DataConfig, read_text
from jaxmem.training.identity import check_identity, data_identity, keep_tokenizer, tokenizer_of_run


@pytest.fixture
def folder(tmp_path):
    for name, texts in (("train", ["one one", "two two"]), ("held", ["three three"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_tokenizer("metaspace", tmp_path / "tokenizer.json", ["one two three"])
    return tmp_path


def identity(folder):
    config = DataConfig((f"{folder}/train",), heldout=(f"{folder}/held",), tokenizer=f"{folder}/tokenizer.json")
    tokenizer = FileTokenizer(config.tokenizer)
    return data_identity(read_text(config, tokenizer), tokenizer)


def _permute(path):
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["o"], vocab["n"] = vocab["n"], vocab["o"]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda f: (f / "train/a.jsonl").write_text((f / "train/a.jsonl").read_text().replace("one", "eno")),
            "the training data",
        ),
        (lambda f: (f / "train/a.jsonl").rename(f / "train/b.jsonl"), "the training data"),
        (lambda f: (f / "train/b.txt").write_text("more"), "the training data"),
        (lambda f: (f / "held/a.jsonl").write_text(json.dumps({"text": "three three"[::-1]})), "the held-out data"),
        (lambda f: (f / "held/b.txt").write_text("more"), "the held-out data"),
        (lambda f: _permute(f / "tokenizer.json"), "the tokenizer"),
        (
            lambda f: [(f / name / "b.txt").write_text("more") for name in ("train", "held")],
            "the training data and the held-out data",
        ),
    ],
    ids=["train", "name", "file", "heldout", "heldout file", "tokenizer", "both"],
)
def test_what_changed_is_named(folder, change, named):
    before = identity(folder)
    check_identity(before, identity(folder), step=3)
    change(folder)
    with pytest.raises(
        ValueError, match=rf"^resume: needs {named} that the checkpoint of step 3 was made with, got other"
    ):
        check_identity(before, identity(folder), step=3)


def test_a_library_that_makes_other_tokens_is_noticed(folder, monkeypatch):
    before = identity(folder)
    encode = FileTokenizer.encode_counted
    monkeypatch.setattr(FileTokenizer, "encode_counted", lambda self, text: [part[::-1] for part in encode(self, text)])
    with pytest.raises(ValueError, match="needs the version of the tokenizers library that the checkpoint of step 3"):
        check_identity(before, identity(folder), step=3)


def test_a_checkpoint_of_an_older_version(folder):
    with pytest.raises(ValueError, match="got that of step 3, of an older jaxmem; finish the run with that version"):
        check_identity(None, identity(folder), step=3)


def test_the_tokenizer_of_a_run(folder, tmp_path):
    path, run_dir = str(folder / "tokenizer.json"), tmp_path / "run"
    run_dir.mkdir()
    given = FileTokenizer(path)
    assert tokenizer_of_run(path, run_dir).content == given.content, "an older run has none of its own"
    keep_tokenizer(given, path, run_dir)
    _permute(folder / "tokenizer.json")
    assert tokenizer_of_run(path, run_dir).content == given.content
    assert [file.name for file in run_dir.iterdir()] == ["tokenizer.json"]
    keep_tokenizer(tokenizer_of_run("bytes", run_dir), "bytes", run_dir)
    assert not list(run_dir.iterdir())
