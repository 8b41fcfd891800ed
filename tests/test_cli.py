"""The command line: help, what a model costs, and bad input told in one sentence."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmem
from jaxmem import arguments, cli, output
from jaxmem.checkpoints import CheckpointStore
from jaxmem.config import to_json
from jaxmem.layers.attention import AttentionConfig
from jaxmem.models.accounting import count_parameters
from jaxmem.models.presets import PRESETS, preset
from jaxmem.training import peers
from jaxmem.training.experiment import load_experiment
from jaxmem.training.step import init_state

TINY = Path(__file__).parent / "training" / "tiny.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands are run: an experiment, its text, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    shutil.copy(TINY, "tiny.py")
    Path("empty").mkdir()
    Path("text").mkdir()
    for i in range(4):
        Path("text", f"{i}.txt").write_text(f"{i}: what a model of text remembers")
    return tmp_path


@pytest.fixture
def written_run(folder):
    """A run with a model of full attention, never trained, and two checkpoints."""
    tiny = load_experiment("tiny.py")
    model = dataclasses.replace(tiny.model, pattern=(AttentionConfig(n_heads=2),))
    config = dataclasses.replace(tiny, model=model)
    draw = np.random.default_rng(0).normal
    arrays = {"params": jax.eval_shape(lambda: init_state(config)).params}
    arrays = jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), arrays)
    with CheckpointStore("run/checkpoints", config.checkpoint, to_json(config)) as store:
        store.save(1, arrays, {})
        store.save(2, arrays, {})
    Path("run", "config.json").write_text(json.dumps(to_json(config)))
    return Path("run")


def run(*words) -> int:
    """The exit code of a command."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:  # of the argument parser
        return end.code


def in_process(*words, **environment) -> subprocess.CompletedProcess:
    """A command as a process of its own, on one device."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    command = [sys.executable, "-m", "jaxmem.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "command, words",
    [
        ((), ("train", "generate", "info", "table", "Sequence models that remember", cli.TRACEBACK)),
        (("train",), ("EXPERIMENT.py --help", "--out", "--resume")),
        (
            ("train", "tiny.py"),
            (
                "--steps  an integer >= 1  [12]",
                "--optimizer.learning-rate  a number > 0  [0.01]",
                "--mesh.fsdp",
                "--out",
            ),
        ),
        (("generate",), ("--prompt", "--temperature", "--capacity", "Folder of a run")),
        (("info",), ("Name of a preset, an experiment file, or the folder", "--context")),
        (("plan", "tiny.py"), ("--tpu  a string  [needed]", "--mesh.seq", "--mesh.layout", "Topology, e.g. v5p:8x8x8")),
        (("kernels",), ("--tpu", "--gpu", "Of a causal sequence")),
    ],
    ids=" ".join,
)
def test_help(command, words, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run(*command, "--help") == 0
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize("model", ["quickstart", "mom-1.3b", "tiny.py"])
def test_info_says_what_a_model_costs(model, folder, capsys):
    assert run("info", model, "--context", 4096) == 0
    printed = capsys.readouterr().out
    for words in (f"{model}: ", "  mixture of memories", "state bytes at 4,096 tokens"):
        assert words in printed
    assert model == "mom-1.3b" or max(map(len, printed.splitlines())) <= 44
    of_parameters = printed.partition("state bytes")[0].splitlines()[2:]
    shares = [float(line.split()[-1][:-1]) for line in of_parameters if "active per token" not in line]
    assert abs(sum(shares) - 100) < 0.5
    (total,) = (line.split()[1] for line in printed.splitlines() if line.startswith("parameters  "))
    config = load_experiment(model).model if model.endswith(".py") else preset(model)
    assert total == f"{count_parameters(nnx.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)))):,}"


def test_info_makes_no_array(folder):
    """Else the largest preset would take gigabytes and minutes."""
    assert max(PRESETS, key=lambda name: PRESETS[name]().d_model) == "mom-1.3b"
    code = """
        import re
        from pathlib import Path
        from jaxmem.cli import main
        assert main(["info", "mom-1.3b"]) == 0
        print(re.search("VmHWM:\\\\s*(\\\\d+) kB", Path("/proc/self/status").read_text())[1])
    """
    printed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(printed.stdout.split()[-1]) < 2**20, "KiB"


@pytest.mark.parametrize(
    "words, message",
    [
        ("info mom-34m", "preset: needs one of quickstart, .*, got 'mom-34m'; did you mean mom-340m"),
        ("info quikstart", "did you mean quickstart"),
        (
            "table info empty",
            "table .*/empty: needs a directory made by .*jaxmem table create.*, got one without manifest.ocdbt; ",
        ),
        ("table create new --rows 9", "table create: needs --rows and --width, got --rows 9; say how many"),
        (
            "table create new --rows 9 --width 4 --dtype int8",
            "table: needs dtype to be one of float32, .* in rows that begin as drawn numbers, got",
        ),
        ("table grow empty", "table grow: needs --rows, got none; say how many"),
        ("info nowhere.py", "experiment: needs a Python file, got 'nowhere.py', which is not there; name one"),
        ("train nowhere.py", "experiment: needs a Python file, got 'nowhere.py', which is not there; name one"),
        ("train tiny", "train: needs an experiment file that ends in .py, got 'tiny'; name one"),
        ("plan tiny --tpu v5p", "plan: needs an experiment file that ends in .py, got 'tiny'; name one"),
        (
            "plan nowhere.py --tpu v5p",
            "experiment: needs a Python file, got 'nowhere.py', which is not there; name one",
        ),
        (
            "train wrong.py",
            r"experiment: needs a function config\(\) that returns a TrainConfig, got none in 'wrong.py'",
        ),
        (
            "train tiny.py --data.train empty",
            "train data: needs at least one file, got train='empty' with none; put text",
        ),
        (
            "train tiny.py --data.train nowhere",
            "train data: needs an existing folder, .*, got train='nowhere'.*; correct",
        ),
        ("train tiny.py --steps 0", "train: needs --steps to be an integer >= 1, got --steps=0; change it"),
        (
            "train tiny.py --accumulate 3",
            "needs data.batch_size divisible by accumulate, got batch_size=8, accumulate=3",
        ),
        (
            "train tiny.py --model.vocab-size 99",
            "needs model.vocab_size of at least the tokenizer's 256, got vocab_size=99",
        ),
        ("train tiny.py --mesh.data 3", "mesh: needs data x fsdp x seq x model = 8 devices, got .*'data': 3"),
        ("train tiny.py --mesh.data 8", "needs 'batch' divisible by the 8 devices of mesh axes dataxfsdp, got batch=4"),
        (
            "train tiny.py --mesh.data 2 --mesh.model 4",
            "divisible by the 4 devices of mesh axes model, got .*=2 in an array",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, message, folder, capfd):
    Path("wrong.py").write_text("def settings(): pass\n")
    assert run(*words.split()) == 2
    (sentence,) = capfd.readouterr().err.splitlines()
    assert sentence.startswith("jaxmem: ")
    assert re.search(message, sentence), sentence
    assert not Path("runs", "tiny", "config.json").exists()


def test_a_table_is_made_grown_and_looked_at(folder, capsys):
    assert run("table", "create", "rows", "--rows", 10**9, "--width", 256, "--input-width", 8, "--moments") == 0
    assert run("table", "grow", "rows", "--rows", 2 * 10**9) == 0
    capsys.readouterr()
    assert run("table", "info", "rows") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        "2,000,000,000 rows",
        "values: float32[2000000000, 256], 4 rows a chunk, new rows: normal, deviation 0.0625, seed 0",
    ]
    names = ["inputs", "values_mu", "values_nu", "inputs_mu", "inputs_nu", "0 chunks written", "steps"]
    assert [line.split(",")[0].split(":")[0] for line in told[2:]] == names
    assert run("table", "grow", "rows", "--rows", 5) == 2
    assert "needs at least its 2000000000 rows, got n_rows=5; rows are never dropped" in capsys.readouterr().err


def test_help_lists_every_option_within_80_columns(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("train", "tiny.py", "--help") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    command = arguments.command("train", cli.train, load_experiment("tiny.py"))
    assert len(command.options) > 70 and [name for name in command.options if f"--{name}" not in printed] == []
    assert "Adam's decay of the mean of gradients" in printed and "model.pattern.0.inner" in printed


def test_a_command_by_itself_is_its_help_and_the_version_is_told(capsys):
    assert run() == 0
    assert "  generate  Let a trained model continue a prompt" in capsys.readouterr().out
    assert run("--version") == 0
    assert re.match(
        rf"jaxmem {jaxmem.__version__}, Python 3\.\d+\.\d+, jax {jax.__version__}, ", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words, path, value",
    [
        ("--steps 1e3", "steps", 1000),
        ("--steps=7", "steps", 7),
        ("--optimizer.learning_rate 3e-4", "optimizer.learning_rate", 3e-4),
        ("--optimizer.clip-norm None", "optimizer.clip_norm", None),
        ("--optimizer.tables.b2 0.5", "optimizer.tables.b2", 0.5),
        ("--mesh.data -1", "mesh.data", -1),
        ("--data.train a b/*.txt --steps 3", "data.train", ("a", "b/*.txt")),
        ("--data.train", None, "at least one folder"),
        ("--model.no-tie-embeddings", "model.tie_embeddings", False),
        ("--model.tie-embeddings=False", "model.tie_embeddings", False),
        ("--model.pattern.0.inner.key-dim 32", "model.pattern.0.inner.key_dim", 32),
        ("--model.pattern.1.window None", "model.pattern.1.window", None),
        ("--mesh.table-columns data fsdp", "mesh.table_columns", ("data", "fsdp")),
        ("--sample-prompt=--no", "sample_prompt", "--no"),
        ("--sample-prompt --- --steps 3", "sample_prompt", "---"),
    ],
)
def test_options_become_fields(words, path, value, folder, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("jaxmem.training.loop.train", lambda config, *_, **__: made.append(config))
    code = run("train", "tiny.py", *words.split())
    if path is None:
        assert code == 2 and value in capsys.readouterr().err
        return
    assert code == 0
    (got,) = made
    for part in path.split("."):
        got = got[int(part)] if part.isdecimal() else getattr(got, part)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "words, told",
    [
        ("trian", "needs a command, one of train, generate, .*, got 'trian'; did you mean train?"),
        ("train", "train: needs an experiment file that ends in .py, got none; name one"),
        ("train tiny.py --stepz 3", "train: needs an option that it has, got --stepz; did you mean --steps?"),
        ("train tiny.py --optimizer.lr 1", "got --optimizer.lr; did you mean --optimizer.learning-rate?"),
        ("train tiny.py --lr 1", "got --lr; did you mean --optimizer.learning-rate?"),
        ("train tiny.py --optimizer.tables.lr 1", "did you mean --optimizer.tables.learning-rate?"),
        ("train tiny.py --batch-size 1", "did you mean --data.batch-size?"),
        ("train tiny.py --epochs 1", "did you mean --steps?"),
        ("train tiny.py --model.pattern.2.n-heads 3", "did you mean --model.pattern.1.n-heads?"),
        ("train tiny.py --zzz", "got --zzz; `jaxmem train EXPERIMENT.py --help` lists them"),
        (
            "train tiny.py --model.pattern.1.scheme.keys ring",
            "to be set in the experiment file, got --model.pattern.1.sch",
        ),
        ("train tiny.py --steps", "train: needs a value after --steps, got none; give an integer >= 1"),
        (
            "train tiny.py --sample-prompt --steps 3",
            "got '--steps', which reads like an option; give a string, or write --sample-prompt=--steps if it is the value",
        ),
        ("train tiny.py --steps 1.5", "train: needs --steps to be an integer >= 1, got --steps=1.5; change it"),
        ("train tiny.py --sample-tokens -1", "needs --sample-tokens to be an integer >= 0, got --sample-tokens=-1"),
        ("train tiny.py --steps 1 --steps 2", "train: needs each option once, got --steps again; leave one out"),
        ("info", "info: needs MODEL, got none; name of a preset, an experiment file, or the folder"),
        (
            "info mom-340m --context many",
            "info: needs --context to be an integer >= 1, got --context='many'; change it",
        ),
        ("info mom-340m more", "info: needs options after 'mom-340m', got 'more'; `jaxmem info --help` lists them"),
        ("table crate x", "needs action to be one of info, create, grow, got action='crate'; did you mean create?"),
        ("plan tiny.py", "plan: needs --tpu, got none; topology, e.g. v5p:8x8x8"),
    ],
)
def test_words_that_are_no_command_are_one_sentence(words, told, folder, capsys):
    assert run(*words.split()) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("jaxmem: ") and re.search(told.replace("?", "[?]"), sentence), sentence


def test_another_run_in_the_folder(folder, capsys):
    Path("run").mkdir()
    Path("run", "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 5.0}\n')
    assert run("train", "tiny.py", "--out", "run") == 2
    assert "needs a new folder for a new run, got 'run', where one has begun; add --resume" in capsys.readouterr().err
    config = json.dumps({"steps": 12, "seed": 7})
    Path("run", "config.json").write_text(config)
    assert run("train", "tiny.py", "--out", "run", "--resume") == 2
    assert "needs the config of the run in 'run', got another: seed: checkpoint 7, now 0;" in capsys.readouterr().err
    assert Path("run", "config.json").read_text() == config


def test_generate_continues_a_prompt_and_passes_over_a_truncated_checkpoint(written_run, capsys):
    words = ("generate", "run", "--prompt", "memory ", "--max-tokens", 8, "--seed", 3)
    assert run(*words) == 0
    text, told = capsys.readouterr()
    assert text.startswith("memory ") and len(text.encode()) >= len("memory ") + 8
    assert told.startswith("\n8 tokens, ") and "prompt of 8 tokens" in told
    damaged = written_run / "checkpoints" / "2" / "run_config" / "run_config.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(*words) == 0
    again, told = capsys.readouterr()
    assert again == text
    assert told.startswith("passed over: checkpoint 2 is damaged: run_config/run_config.json has ")


def test_generate_reads_files_and_standard_input(written_run, capsys, monkeypatch):
    options = ("--max-tokens", 6, "--seed", 3)
    assert run("generate", "run", "--prompt", "a\n", *options) == 0
    text = capsys.readouterr().out
    Path("prompt.txt").write_text("a\n")
    assert run("generate", "run", "--prompt-file", "prompt.txt", *options) == 0
    assert capsys.readouterr().out == text
    assert run("generate", "run", "--prompt", r"a\n", "--escapes", *options) == 0
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\\n\nmemories of\n")))
    assert run("generate", "run", "--prompts", "-", "--escapes", *options) == 0
    printed, told = capsys.readouterr()
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["prompt"] for line in lines] == ["a\n", "memories of"] and told.startswith("12 tokens, ")
    assert lines[0]["prompt"] + lines[0]["text"] == text
    Path("empty.txt").write_text("")
    assert run("generate", "run", "--prompts", "empty.txt", *options) == 2
    assert "needs a prompt on a line of 'empty.txt', got an empty file; write one" in capsys.readouterr().err
    stop = text[4:6]
    assert run("generate", "run", "--prompt-file", "prompt.txt", "--stop", stop, *options) == 0
    assert capsys.readouterr().out == text[: text.index(stop, 2)]


def test_info_says_how_a_run_stands(written_run, capsys):
    assert run("info", "run") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("run: 0 of 12 steps\ncheckpoints: 1, 2\n\nrun: 1 layers, d_model ")
    metrics = [{"kind": "train", "step": 3, "bits_per_byte": 2.5, "tokens_per_s": 1234.5}]
    metrics += [{"kind": "eval", "step": 3, "bits_per_byte": 2.75}]
    Path("run", "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    assert run("info", "run") == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "run: 3 of 12 steps",
        "checkpoints: 1, 2",
        "held out: 2.750 bits per byte at step 3",
        "trained: 2.500 bits per byte, 1,234 tokens/s",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "generate run --prompt a --prompts b",
            "needs one of --prompt, --prompt-file and --prompts, got several; leave",
        ),
        (
            "generate run --prompt-file no.txt",
            r"needs a file of text, got 'no.txt' \(No such file or directory\); correct",
        ),
        ("generate run --stop=", "needs stop to be a list of texts, none of them empty, got"),
        ("info empty", "run: needs a folder with a run, got 'empty', which has no config.json; name the --out of"),
        ("generate empty", "run: needs a folder with a run, got 'empty', which has no config.json; name the --out of"),
        ("generate run --step 7", r"checkpoints in run/checkpoints: needs one of the steps \[1, 2\], got step=7"),
        (
            "generate run --prompt memories --capacity 6",
            "the prompt alone is longer than the cache.*; raise capacity or",
        ),
        ("generate run --max-tokens 9 --capacity 9", "got capacity=9 .the text would outgrow it.; raise capacity or"),
        ("generate run --max-tokens 0", "needs --max-tokens to be an integer >= 1, got --max-tokens=0"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(words, message, written_run, capfd):
    assert run(*words.split()) == 2
    (sentence,) = capfd.readouterr().err.splitlines()
    assert sentence.startswith("jaxmem: ") and re.search(message, sentence), sentence


@pytest.mark.parametrize(
    "text, told",
    [
        (
            '"vocab_size": 512',
            "run/config.json is not the checkpoint's, which counts (model.vocab_size: checkpoint 256, ",
        ),
        ("", "run: needs a JSON object in run/config.json, got an empty file: the checkpoint's own copy is used"),
        ("[1, 2", "run: needs a JSON object in run/config.json, got other text (Expecting ',' delimiter: "),
        ("[1]", "run: needs a JSON object in run/config.json, got a list: the checkpoint's own copy is used"),
        ("\0\xff", "run: needs a JSON object in run/config.json, got other text ("),
        (None, "run: needs a JSON object in run/config.json, got none (No such file or directory): "),
    ],
    ids=["another vocabulary", "empty", "cut", "a list", "binary", "missing"],
)
def test_a_checkpoint_knows_its_model_whatever_config_json_says(text, told, written_run, capsys):
    file = written_run / "config.json"
    whole = file.read_text()
    if text is None:
        file.unlink()
    else:
        file.write_text(whole.replace('"vocab_size": 256', text) if "vocab" in text else text)
    assert run("generate", "run", "--max-tokens", 1) == 0
    assert capsys.readouterr().err.splitlines()[0].startswith(told)
    shutil.rmtree(written_run / "checkpoints")
    if text is not None and "vocab" not in text:
        assert run("generate", "run") == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith(f"jaxmem: {told.partition(': the')[0]}") and sentence.endswith(
            "put it back, or remove it"
        )


def test_a_config_with_text_for_a_number_is_named(written_run, capfd):
    config = json.loads((written_run / "config.json").read_text())
    shutil.rmtree(written_run / "checkpoints")
    for change in ({"steps": "NaN"}, {"type": 7}, {"model": "NaN"}, {"type": "jaxmem.sharding.mesh.MeshConfig"}):
        (written_run / "config.json").write_text(json.dumps(config | change))
        assert run("generate", "run") == 2
        (sentence,) = capfd.readouterr().err.splitlines()
        assert "run/config.json" in sentence, sentence


def test_what_a_reader_no_longer_wants_is_no_error(folder):
    """As with `| head`: the first write, or the last when the program ends, finds nobody."""
    for words in (("info", "quickstart"), ("--help",)):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "jaxmem.cli", *words]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_the_command_in_a_message_has_no_place_for_what_it_adds():
    words = (
        "train x.py --resume --optimizer.learning_rate=1 --from-step 3 --steps 9 --optimizer.learning-rate 2 --out a b"
    )
    assert cli._without_resume(words.split()) == "jaxmem train x.py --steps 9 --out a b"


def test_a_failure_is_1_and_ctrl_c_is_130(folder, capsys, monkeypatch):
    def fail(error):
        def train(*_, **__):
            raise error

        monkeypatch.setattr("jaxmem.training.loop.train", train)
        return run("train", "tiny.py"), capsys.readouterr().err

    assert fail(RuntimeError("step 3: needs a finite loss")) == (1, "jaxmem: step 3: needs a finite loss\n")
    assert fail(OSError(28, "No space left on device", "x")) == (1, "jaxmem: [Errno 28] No space left on device: 'x'\n")
    assert fail(KeyboardInterrupt()) == (130, "jaxmem: interrupted\n")
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(RuntimeError, match="step 3"):
        fail(RuntimeError("step 3: needs a finite loss"))


def test_processes_that_cannot_find_each_other(folder, capsys, monkeypatch):
    def nobody(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    monkeypatch.setattr(peers, "NativeErrors", lambda explain: None)  # takes the place of standard error
    assert run("train", "tiny.py", "--distributed") == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("jaxmem: train --distributed: needs a cluster that JAX recognises (a TPU pod, Slurm,")
    assert "got none (coordinator_address should be defined.); start it there, or give --coordinator" in sentence


def test_a_process_says_one_sentence_or_shows_where(folder):
    told = in_process("info", "mom-34m")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.count("\n") == 1 and told.stderr.startswith("jaxmem: preset: ")
    shown = in_process("info", "mom-34m", **{cli.TRACEBACK: "1"})
    assert shown.returncode == 1
    assert shown.stderr.startswith("Traceback") and told.stderr.removeprefix("jaxmem: ") in shown.stderr


def test_no_room_for_what_is_printed(monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["--version"]) == 1
    sentence = f"needs room for what is printed, got {os.strerror(errno.ENOSPC)}; send it elsewhere"
    assert capsys.readouterr().err == f"jaxmem: standard output: {sentence}\n"


def test_a_value_that_is_a_file_is_no_experiment(folder, capsys):
    Path("other.py").write_text("1 / 0")
    Path("somewhere.py").write_text("")
    assert cli.main(["train", "somewhree.py"]) == 2
    assert capsys.readouterr().err.endswith("got 'somewhree.py', which is not there; did you mean somewhere.py?\n")
    assert cli.main(["train", "--sample-prompt", "other.py", "nowhere.py"]) == 2
    assert "needs a Python file, got 'nowhere.py'" in capsys.readouterr().err


def test_help_does_not_wait_for_jax(folder):
    code = "import sys, jaxmem.cli; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'orbax', 'grain')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    """Under another locale, or a file's name that is no UTF-8, which the report on the data prints."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    output.print_anything()
    print("caf\xe9 \udcff.txt", flush=True)
    assert raw.getvalue() == b"caf\\xe9 \\udcff.txt\n"
