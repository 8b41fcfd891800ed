"""Tokenizers: round trips, bytes per token, streaming, and what is said about a file that is none."""

import json

import numpy as np
import pytest

from jaxmem.models.tokenizer import BOS_NAMES, ByteTokenizer, FileTokenizer, load_tokenizer

TEXT = "the cat sat — hélas — on the mat 😀, the end"


def _save(path, *, special="<|endoftext|>", byte_level=True):
    """A tiny tokenizer.json, trained on TEXT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[special, "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "byte-level", "metaspace"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(_save(tmp_path / "tokenizer.json", byte_level=request.param == "byte-level"))


def test_round_trip_and_bytes_per_token(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == len(tokenizer.token_bytes)
    assert np.array_equal(ids, tokenizer.encode(TEXT.encode()))
    assert tokenizer.decode(ids).decode() == TEXT
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode())


def test_bos_is_nobodys_text(tokenizer):
    assert tokenizer.token_bytes[tokenizer.bos_id] == 0
    assert tokenizer.bos_id not in tokenizer.encode(TEXT + "".join(BOS_NAMES))
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("the cat")]) == b"the cat"


def test_stream_gives_whole_characters_in_time(tokenizer):
    arrived, seen = [], []

    def ids():
        for token in [tokenizer.bos_id, *tokenizer.encode(TEXT)]:
            seen.append("".join(arrived))
            yield token

    for text in tokenizer.stream(ids()):
        arrived.append(text)
        assert "\ufffd" not in text
    assert "".join(arrived) == TEXT
    assert len(set(seen)) > 5


def test_undecodable_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")).decode() == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\ud800")).decode() == "a\ufffd\ufffd\ufffd"
    assert list(tokenizer.stream([0x61, 0xC3])) == ["a", "\ufffd"]


def test_file_tokenizer_of_a_folder(tmp_path):
    _save(tmp_path / "tokenizer.json", special="<s>")
    assert FileTokenizer(str(tmp_path)).bos_id == 0


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"needs 'bytes' or a readable tokenizer.json, got .*No such file.*use 'bytes'"
    ):
        load_tokenizer(str(tmp_path / "missing.json"))
    for content in ("not json", "", json.dumps({"model": 1})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"needs a tokenizer.json of the tokenizers library, got .*bad.json"):
            load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match=r"beginning of a document, got .*without any of <s>, .*add one of them"):
        load_tokenizer(_save(tmp_path / "nobos.json", special="[START]"))
