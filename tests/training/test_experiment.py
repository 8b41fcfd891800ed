"""Experiment files: whatever goes wrong in one is a sentence with its line."""

import sys
from pathlib import Path

import pytest

from jaxmem import cli
from jaxmem.training.experiment import load_experiment

HEADER = """\
from dataclasses import replace
from jaxmem.layers.attention import AttentionConfig
from jaxmem.training.optimizer import OptimizerConfig
from base import config as base
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    Path("base.py").write_text((Path(__file__).parent / "tiny.py").read_text())
    Path("broken.py").write_text("x = 1\ny = (\n")
    yield tmp_path
    for name in ("own", "base", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "source, told",
    [
        ("x = 1\ndef config(:", "own.py, line 6: needs a file that runs without an error, got SyntaxError: "),
        (
            "import broken",
            "own.py, line 5: needs a file that runs without an error, got SyntaxError: '(' was never closed in ",
        ),
        (
            "import nowhere",
            "line 5: needs a file that runs without an error, got ModuleNotFoundError: No module named 'now",
        ),
        (
            "from base import nothing",
            "line 5: needs a file that runs without an error, got ImportError: cannot import name",
        ),
        (
            "def half(n):\n    return n // 0\ndef config():\n    return half(3)",
            "line 6: needs a file that runs",
        ),
        ("raise KeyError", "line 5: needs a file that runs without an error, got KeyError; correct it"),
        (
            "class Rare(BaseException): pass\nraise Rare(7)",
            "line 6: needs a file that runs without an error, got Rare: 7; correct it",
        ),
        ("raise SystemExit(3)", "line 5: needs a file that runs without an error, got SystemExit: 3; correct it"),
        (
            "def config():\n    return replace(base(), steps='12')",
            "line 6: TrainConfig: needs steps to be an integer >= 1, go",
        ),
        (
            "def config():\n    return replace(base(), steps=0)",
            "line 6: TrainConfig: needs steps to be an integer >= 1, got st",
        ),
        (
            "def config():\n    return OptimizerConfig(lr=1)",
            "line 6: OptimizerConfig: needs fields that it has, got lr; did y",
        ),
        ("def config():\n    return OptimizerConfig(zzz=1)", "got zzz; it has kind, learning_rate"),
        (
            "def config():\n    model = replace(base().model, pattern=(AttentionConfig,))",
            "line 6: DecoderConfig: needs pattern[0] to be an instance, got pattern[0]=the class AttentionConfig; write",
        ),
        (
            "def config(size): return base()",
            "config: needs no arguments, got config(size) in line 5; give them defaults or leave them out",
        ),
        (
            "",
            "needs a function config() that returns a TrainConfig, got none in 'own.py'; experiments/quickstart.py is one",
        ),
        ("config = 3", "needs a function config() that returns a TrainConfig, got 3 of that name in 'own.py'"),
        ("def config(): pass", "needs a function config() that returns a TrainConfig, got None from it in 'own.py'"),
        ("def config(): return base().model", "got DecoderConfig(...) from it in 'own.py'"),
        (
            "config = base()",
            "needs a function config() that returns a TrainConfig, got TrainConfig(...) of that name in",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_the_sentence(source, told, folder, capsys):
    Path("own.py").write_text(HEADER + source + "\n")
    assert cli.main(["info", "own.py"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("jaxmem: experiment") and told in sentence, sentence


@pytest.mark.usefixtures("unchecked")
def test_an_error_in_a_mixer_of_ones_own_is_a_sentence_too(folder, capsys):
    """It is raised long after the file was loaded."""
    lines = ["import dataclasses", "@dataclasses.dataclass(frozen=True)", "class Own(AttentionConfig):"]
    lines += ["    def make(self, d_model, *, rngs):", "        return {}['width']", "def config():"]
    lines += ["    return replace(base(), model=replace(base().model, pattern=(Own(2),)))"]
    Path("own.py").write_text(HEADER + "\n".join(lines) + "\n")
    assert cli.main(["info", "own.py"]) == 2
    told = "line 9: needs a file that runs without an error, got KeyError: 'width'; correct it"
    assert capsys.readouterr().err == f"jaxmem: experiment own.py, {told}\n"


def test_where_it_comes_from_can_be_shown(folder, monkeypatch):
    Path("own.py").write_text(HEADER + "raise KeyError('width')\n")
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ValueError, match="line 5") as error:
        cli.main(["info", "own.py"])
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.usefixtures("unchecked")
def test_a_list_is_as_good_as_a_tuple_and_a_file_may_be_corrected(folder):
    Path("own.py").write_text("raise KeyError\n")
    with pytest.raises(ValueError):
        load_experiment("own.py")
    source = (
        "def config(): return replace(base(), model=replace(base().model, pattern=[AttentionConfig(2)]), steps=1e2)\n"
    )
    Path("own.py").write_text(HEADER + source)
    made = load_experiment("own.py")
    assert type(made.model.pattern) is tuple and made.steps == 100 and type(made.steps) is int
