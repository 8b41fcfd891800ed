"""Tokenizers: round trips, bytes per token, streaming, and what is said about a file that is none."""

import json
import os

import numpy as np
import pytest
from tokenizer_kinds import KINDS, save_tokenizer

from jaxmem.models.tokenizer import BOS_NAMES, ByteTokenizer, FileTokenizer, load_tokenizer, replace_undecodable

TEXT = "the cat sat — hélas — on the mat 😀, the end"


@pytest.fixture(params=["bytes", "byte level", "metaspace"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer(save_tokenizer(request.param, tmp_path / "tokenizer.json", [TEXT] * 4))


def test_round_trip_and_bytes_per_token(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == len(tokenizer.is_text)
    assert np.array_equal(ids, tokenizer.encode(TEXT.encode()))
    assert tokenizer.decode(ids).decode() == TEXT
    again, n_bytes = tokenizer.encode_counted(TEXT)
    assert np.array_equal(again, ids) and n_bytes.dtype == np.int32
    assert n_bytes.sum() == len(TEXT.encode()) and n_bytes.min() >= 1


def test_bos_is_nobodys_text(tokenizer):
    assert not tokenizer.is_text[tokenizer.bos_id] and tokenizer.is_text[tokenizer.encode(TEXT)].all()
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


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_text_whatever_a_tokenizer_does_to_it(kind, tmp_path):
    """Spaces that it adds or drops, letters that it changes, words that it does not know, characters that it splits."""
    tokenizer = FileTokenizer(save_tokenizer(kind, tmp_path / "tokenizer.json", [TEXT] * 4))
    for text in (
        TEXT,
        "x",
        " the  cat ",
        "CAT \ufb01n \u212b e\u0301",
        "qqq zzz",
        "\U0001f600" * 3,
        "\n\tthe\n \n",
        b"the\xff cat",
    ):
        ids, n_bytes = tokenizer.encode_counted(text)
        assert np.array_equal(ids, tokenizer.encode(text)) and n_bytes.min() >= 0
        assert n_bytes.sum() == len(replace_undecodable(text if isinstance(text, bytes) else text.encode()))


def test_bytes_stand_where_their_token_does(tmp_path):
    tokenizer = FileTokenizer(save_tokenizer("unknown words", tmp_path / "tokenizer.json", ["the cat sat"]))
    assert tokenizer.encode_counted("the unicorn sat ")[1].tolist() == [3, 8, 5], (
        "a space counts to what comes behind it"
    )
    tokenizer = FileTokenizer(save_tokenizer("byte level", tmp_path / "tokenizer.json", ["the cat sat"]))
    assert tokenizer.encode_counted("\U0001f600é")[1].tolist() == [1] * 6, "tokens of one character share its bytes"


@pytest.mark.parametrize("kind", KINDS)
def test_what_streams_behind_a_prompt_is_what_is_decoded_with_it(kind, tmp_path):
    tokenizer = FileTokenizer(save_tokenizer(kind, tmp_path / "tokenizer.json", [TEXT] * 4))
    ids = tokenizer.encode(TEXT).tolist()
    whole = tokenizer.decode(ids).decode()
    for cut in range(1, len(ids) + 1):
        prompt = tokenizer.decode(ids[:cut]).decode()
        if not prompt.endswith("\ufffd"):  # inside a character
            assert prompt + "".join(tokenizer.stream(ids[cut:], after=[tokenizer.bos_id, *ids[:cut]])) == whole
    assert "".join(tokenizer.stream([tokenizer.bos_id, *ids])) == whole


@pytest.mark.parametrize("kind", ["metaspace", "llama", "wordpiece"])
def test_the_middle_of_a_text_keeps_its_first_space(kind, tmp_path):
    tokenizer = FileTokenizer(save_tokenizer(kind, tmp_path / "tokenizer.json", ["the cat sat"] * 4))
    ids = tokenizer.encode("the cat sat").tolist()
    cut = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]) == b"the")
    assert "".join(tokenizer.stream(ids[cut:])) == " cat sat"


def test_a_character_that_never_ends_is_shown_at_the_end(tmp_path):
    tokenizer = FileTokenizer(save_tokenizer("llama", tmp_path / "tokenizer.json", [TEXT] * 4))
    bytes_of = {raw: tokenizer._tokenizer.token_to_id(f"<0x{raw:02X}>") for raw in "é—".encode()}
    ids = [bytes_of[raw] for raw in "é".encode()]
    texts = list(tokenizer.stream([tokenizer.bos_id, *ids, *ids[:1]]))
    assert texts == ["é", "\ufffd\ufffd"], "this decoder takes the whole run for broken, what was shown stays"


def test_a_long_stream_decodes_a_few_tokens_at_a_time(tmp_path, monkeypatch):
    tokenizer = FileTokenizer(save_tokenizer("llama", tmp_path / "tokenizer.json", [TEXT] * 4))
    ids, sizes, decode = tokenizer.encode(TEXT).tolist(), [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    list(tokenizer.stream(ids * 20, after=ids))
    assert max(sizes[20:]) < 16


def test_undecodable_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")).decode() == "a\ufffdb"
    for lone in ("a\ud800", b"a\xff".decode(errors="surrogateescape")):  # as in a command line that is no UTF-8
        assert tokenizer.decode(tokenizer.encode(lone)).decode() == "a\ufffd"
    assert list(tokenizer.stream([0x61, 0xC3])) == ["a", "\ufffd"]


def test_file_tokenizer_of_a_folder(tmp_path):
    save_tokenizer("byte level", tmp_path / "tokenizer.json", [TEXT], special="<s>")
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
        load_tokenizer(save_tokenizer("byte level", tmp_path / "nobos.json", [TEXT], special="[START]"))
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"or a readable tokenizer.json, got .*pipe.json' \(not a regular file\)"):
        load_tokenizer(str(tmp_path / "pipe.json"))


def test_a_word_that_has_no_token_is_named(tmp_path):
    tokenizer = FileTokenizer(save_tokenizer("words without unknown", tmp_path / "tokenizer.json", ["the cat sat"]))
    assert len(tokenizer.encode("the cat")) == 2
    with pytest.raises(
        ValueError, match=r"needs a token for every word, got .* fails on 'the dog' .*give its model an unk"
    ):
        tokenizer.encode("the dog")
