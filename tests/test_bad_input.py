"""Wrong input is one sentence, and docs/bad_input.md says which."""

from pathlib import Path

import bad_input
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "bad_input.md"


@pytest.mark.usefixtures("unchecked")
def test_a_part_of_the_table_is_as_written(tmp_path, monkeypatch):
    """Up to what Python's own messages say, which its versions word differently; every ninth row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    bad_input.prepare()
    said, told = bad_input.read(PAGE.read_text()), list(bad_input.rows(every=9))
    assert len(told) > 30
    assert [row for row in told if not row.is_clear] == []
    start = lambda sentence: sentence.partition(", got ")[0]
    assert {row.shown: (row.code, start(row.sentence)) for row in told} == {
        row.shown: (said[row.shown][0], start(said[row.shown][1])) for row in told
    }


def test_the_table_is_large_and_clear():
    said = bad_input.read(PAGE.read_text())
    assert len(said) >= 200
    for shown, (code, sentence) in said.items():
        assert bad_input.Row("", shown, code, sentence).is_clear, (shown, code, sentence)
