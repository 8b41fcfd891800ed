"""The command `jaxmem`: arguments and printing only. Heavy packages are imported by the command that needs them."""

import contextlib
import difflib
import inspect
import json
import logging
import os
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxmem import __version__, arguments, output
from jaxmem.fields import Bounds, Count, Natural, NonNegative, Seed

INTERRUPTED = 130
"""Exit code of a command that a second Ctrl-C, or one outside training, has ended."""
TRACEBACK = "JAXMEM_TRACEBACK"
"""Environment variable: set it to 1 to see where an error comes from."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done (or stopped by a signal with all saved), 1 failed, 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    output.occupy()
    output.print_anything()
    try:
        if argv[:1] != ["train"]:
            return _flushed(_told(argv))
        from jaxmem.training import peers

        return _flushed(peers.together(lambda: _told(argv)))
    except (BrokenPipeError, SystemExit) as end:  # `| head` has read enough, which rich makes an exit of
        if not isinstance(end if isinstance(end, BrokenPipeError) else end.__context__, BrokenPipeError):
            raise
        output.abandon()
        return 0


def _flushed(code: int) -> int:
    """The exit code, when all is written out that was printed; 1 if there is no room for it."""
    try:
        output.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        output.abandon()
        output.complain(
            f"jaxmem: standard output: needs room for what is printed, got {error.strerror}; send it elsewhere"
        )
        return code or 1
    return code


def _told(argv: list[str]) -> int:
    """The exit code of a command, whose error is one sentence."""
    try:
        return _run(argv)
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        if argv[:1] == ["train"]:
            error = _of_all_processes(error)
        output.complain(f"jaxmem: {error}")
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        output.complain("jaxmem: interrupted")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1" or (sentence := _of_own_code(error, argv)) is None:
            raise
        if argv[:1] == ["train"]:
            _of_all_processes(ValueError(sentence))
        output.complain(f"jaxmem: {sentence}")
        return 2


def _of_own_code(error: Exception, argv: list[str]) -> str | None:
    """What to say of an error of a mixer of one's own, in a file among the words; None if it comes from elsewhere."""
    from jaxmem.training.experiment import explained

    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    own = [word.rpartition("=")[2] for word in argv if word.endswith(".py")]
    path = next((path for path in own if os.path.abspath(path) in map(os.path.abspath, files)), None)
    return None if path is None else explained(error, Path(path))


def _run(argv: list[str]) -> int:
    name, words = argv[0] if argv else "--help", argv[1:]
    if name in ("-h", "--help"):
        print(_about())
        return 0
    if name == "--version":
        print(_versions())
        return 0
    if name not in COMMANDS:
        near = ["--help"] if name == "help" else difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], 1)
        advice = f"did you mean {near[0]}?" if near else "`jaxmem --help` says what they do"
        raise ValueError(f"command line: needs a command, one of {', '.join(COMMANDS)}, got {name!r}; {advice}")
    function = COMMANDS[name]
    asks_for_help = not {"-h", "--help"}.isdisjoint(words)
    config = _config(name, words, asks_for_help) if function in (train, plan) else None
    command = arguments.command(name, function, config)
    if asks_for_help:
        print(arguments.help_text(command))
        return 0
    return arguments.run(command, words) or 0


def _config(name: str, words: list[str], asks_for_help: bool) -> Any:
    """What the experiment file among the words makes; each of its fields is an option."""
    files = [i for i, word in enumerate(words) if word.endswith(".py") and not word.startswith("--")]
    is_value = lambda i: (
        i > 0 and words[i - 1].startswith("--") and "=" not in words[i - 1] and words[i - 1] not in _FLAGS
    )
    path = next((words[i] for i in sorted(files, key=is_value)), None)
    if path is None and asks_for_help:
        return None
    if path is None:
        got = repr(words[0]) if words and not words[0].startswith("--") else "none"
        raise ValueError(
            f"{name}: needs an experiment file that ends in .py, got {got}; name one, e.g. experiments/quickstart.py"
        )
    if name == "train" and not asks_for_help:
        _find_other_processes(words)
    from jaxmem.training.experiment import load_experiment

    return load_experiment(path)


def _about() -> str:
    lines = ["usage: jaxmem COMMAND ...", "       jaxmem COMMAND --help", "       jaxmem --version"]
    lines += ["", "Sequence models that remember.", ""]
    for name, function in COMMANDS.items():
        about = inspect.getdoc(function).splitlines()[0]
        lines += textwrap.wrap(f"{name:10}{about}", 78, initial_indent="  ", subsequent_indent=" " * 12)
    return "\n".join([*lines, "", f"Set {TRACEBACK}=1 to see where an error comes from."])


def _versions() -> str:
    """Of all that decides numbers."""
    found = [f"jaxmem {__version__}", f"Python {sys.version.split()[0]}"]
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "libtpu"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def train(
    experiment: str,
    /,
    config: Any,
    out: str | None = None,
    resume: bool = False,
    from_step: Natural | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: Count | None = None,
    process: Natural | None = None,
    profile: str | None = None,
) -> int:
    """Train the model of an experiment file; every field of its config is an option.

    `jaxmem train EXPERIMENT.py --help` lists them.

    Args:
        experiment: Python file with a function config(), e.g. experiments/quickstart.py.
        out: Folder of the run; runs/NAME if not given, NAME being that of the experiment file.
        resume: Go on with the run in that folder from its newest checkpoint.
        from_step: With --resume: from this checkpoint instead; later ones are set aside.
        distributed: This is one of several processes, in a cluster that JAX knows; find the others first.
        coordinator: Where process 0 runs, HOST:PORT with a free port, for several processes in no such cluster.
        processes: With --coordinator: how many there are.
        process: With --coordinator: which this is, from 0.
        profile: Steps to trace, as 10..12, into RUN/profile, which xprof opens.
    """
    from jaxmem.training import loop
    from jaxmem.training.profile import steps_to_profile

    if out is not None and not out.strip():
        raise ValueError("train: needs the name of a folder for --out, got an empty one; name one, or leave --out away")
    if out is not None and not _is_text(out):
        raise ValueError(f"train: needs a name of UTF-8 for --out, got {out!a}; name another folder")
    if os.environ.get(TRACEBACK) != "1":
        _quieten_failed_saves()
    loop.train(
        config,
        Path(out) if out else Path("runs") / Path(experiment).stem,
        resume=resume,
        from_step=from_step,
        experiment=experiment,
        command=_without_resume(sys.argv[1:]),
        profile=None if profile is None else steps_to_profile(profile),
    )
    return 0


def _is_text(word: str) -> bool:
    """Bytes of a command line that are no UTF-8 come as lone surrogates, which orbax cannot write."""
    try:
        return bool(word.encode())
    except UnicodeEncodeError:
        return False


def _without_resume(argv: list[str]) -> str:
    """The command line for messages that add --resume and another rate."""
    kept, words = ["jaxmem"], iter(argv)
    for word in words:
        if (name := word.partition("=")[0].replace("_", "-")) in ("--from-step", "--optimizer.learning-rate"):
            if "=" not in word:
                next(words, None)
        elif name not in ("--resume", "--no-resume"):
            kept.append(word)
    return shlex.join(kept)


def plan(experiment: str, /, config: Any, tpu: str) -> int:
    """Compile the training step of an experiment for TPUs that are not here (libtpu): memory, exchanges, arithmetic.

    Every field of its config is an option; `jaxmem plan EXPERIMENT.py --help` lists them.

    Args:
        experiment: Python file with a function config(), e.g. experiments/long_context.py.
        tpu: Topology, e.g. v5p:8x8x8, or the name of a slice, e.g. v5p-1024 or v5litepod-16.
    """
    from jaxmem.planning import training_plan
    from jaxmem.planning.steps import Steps
    from jaxmem.planning.tpu import use_compiler

    training_plan.check(config, tpu)
    use_compiler()
    with Steps() as steps:
        told = training_plan.plan(config, tpu, steps.say)
    print(told)
    return 0


def _find_other_processes(argv: list[str]) -> None:
    """Before the experiment is loaded, which may ask JAX for devices."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = {name: words[words.index(f"--{name}") + 1 :][:1] for name in _OF_PROCESSES if f"--{name}" in words}
    joins = "--distributed" in words and words[words.index("--distributed") + 1 :][:1] not in (["false"], ["False"])
    if not given and not joins:
        return
    from jaxmem.training import peers

    if not given:
        peers.join()
        return
    values = {name: value[0] if value else "" for name, value in given.items()}
    coordinator, n, index = (values.get(name, "") for name in _OF_PROCESSES)
    host, _, port = coordinator.rpartition(":")
    is_address = host and port.isdecimal() and 0 < int(port) < 2**16
    if not is_address or not n.isdigit() or not index.isdigit() or int(index) >= int(n):
        raise ValueError(
            "train: needs --coordinator HOST:PORT, the same on all processes, with --processes N and --process 0..N-1, "
            f"got {', '.join(f'--{name} {value}' for name, value in values.items())}; give all three"
        )
    peers.join(coordinator, int(n), int(index))


_FLAGS = ("--resume", "--no-resume", "--distributed", "--no-distributed")
_OF_PROCESSES = ("coordinator", "processes", "process")


def _of_all_processes(error: BaseException) -> BaseException:
    from jaxmem.training import peers

    return peers.explained(error)


def _quieten_failed_saves() -> None:
    """A save that fails ends the run with one sentence; orbax's threads would add a few hundred lines to it."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)


def generate(
    run: str,
    /,
    prompt: str = "",
    prompt_file: str | None = None,
    prompts: str | None = None,
    stop: tuple[str, ...] = (),
    escapes: bool = False,
    max_tokens: Count = 256,
    temperature: NonNegative = 0.8,
    top_k: Count | None = None,
    top_p: Annotated[float, Bounds("(0, 1]")] | None = None,
    seed: Seed = 0,
    capacity: Count | None = None,
    step: Natural | None = None,
    import_: tuple[str, ...] = (),
) -> int:
    """Let a trained model continue a prompt; the text goes to standard output as it is made.

    Args:
        run: Folder of a run.
        prompt: Text to continue.
        prompt_file: File whose whole text is to be continued; - is standard input.
        prompts: File with one prompt per line, or -; continued all at once, and printed as lines of JSON.
        stop: Texts before which the text ends.
        escapes: Read \\n, \\t, \\\\ and \\u00e9 in prompts and stops as what they stand for.
        max_tokens: Tokens to write.
        temperature: Of the softmax; 0 always takes the likeliest token.
        top_k: Sample from so many likeliest tokens only.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Of the sampling; of several prompts each has the next.
        capacity: Tokens that growing caches hold; prompt and text together, and a little more, if not given.
        step: Checkpoint to use; the newest if not given.
        import_: Python files to run first, which define classes of the run's model that are not jaxmem's, e.g. RUN/code/x.py.
    """
    if sum(given not in ("", None) for given in (prompt, prompt_file, prompts)) > 1:
        raise ValueError(
            "generate: needs one of --prompt, --prompt-file and --prompts, got several; leave the others out"
        )
    read = _unescaped if escapes else str
    stop = tuple(map(read, stop))
    if prompt_file is not None:
        prompt = _text(prompt_file)
    lines = None if prompts is None else _text(prompts).removesuffix("\n")
    several = None if lines is None else [read(line.removesuffix("\r")) for line in lines.split("\n")]
    if lines == "":
        raise ValueError(f"generate: needs a prompt on a line of {prompts!r}, got an empty file; write one")
    from jaxmem.models.generation import generate_text, generate_texts
    from jaxmem.models.sampling import SamplingConfig
    from jaxmem.training.run import load_run

    if os.environ.get(TRACEBACK) != "1":
        _quieten_failed_saves()  # nor of a checkpoint that a training run drops while it is read
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    loaded = load_run(run, step, import_)
    for note in loaded.notes:
        output.complain(note)
    options = {"max_tokens": max_tokens, "sampling": sampling, "seed": seed, "capacity": capacity, "stop": stop}
    if several is not None:
        texts, statistics = generate_texts(loaded.model, loaded.tokenizer, several, **options)
        for asked, text in zip(several, texts, strict=True):
            print(json.dumps({"prompt": asked, "text": text}, ensure_ascii=False), flush=True)
        output.complain(str(statistics))
        return 0
    text = generate_text(loaded.model, loaded.tokenizer, prompt := read(prompt), **options)
    print(prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    output.complain(f"\n{text.statistics}")
    return 0


def _text(path: str) -> str:
    """Of a file, or of standard input."""
    if path == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    try:
        return Path(path).read_bytes().decode(errors="replace")
    except OSError as error:
        raise ValueError(
            f"generate: needs a file of text, got {path!r} ({error.strerror}); correct the path, or use - for standard input"
        ) from error


def _unescaped(text: str) -> str:
    r"""
    >>> _unescaped(r"a\tb\n\u00e9\\\\n")
    'a\tb\né\\\\n'
    """
    named = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
    pattern = r"\\(?:u([0-9a-fA-F]{4})|([ntr0\\]))"
    return re.sub(pattern, lambda found: chr(int(found[1], 16)) if found[1] else named[found[2]], text)


def info(model: str, /, context: Count = 2048) -> int:
    """Print what a model costs: parameters by part, state bytes per sequence, FLOPs per token; of a run also how it stands.

    Args:
        model: Name of a preset, an experiment file, or the folder of a run.
        context: Tokens of context for the state of growing caches and for FLOPs.
    """
    from jaxmem.models import accounting

    if os.path.isdir(model):
        from jaxmem.training.run import describe_run

        config, lines = describe_run(model)
        print("\n".join(lines), end="\n\n")
    elif model.endswith(".py"):
        from jaxmem.training.experiment import load_experiment

        config = load_experiment(model).model
    else:
        from jaxmem.models.presets import preset

        config = preset(model)
    print(accounting.summary(config, context, name=model))
    return 0


def kernels(
    tpu: tuple[str, ...] | None = None,
    gpu: tuple[str, ...] | None = None,
    tokens: Count = 8192,
    heads: Count = 8,
    width: Count = 128,
) -> int:
    """What compilers on this machine make of the attention kernels, for accelerators that need not be here.

    TPUs: static cycles beside JAX's splash attention (needs libtpu). GPUs: shared memory and registers for many widths and
    masks (needs JAX's CUDA plugin). Without either option, three generations of TPUs.

    Args:
        tpu: Generations: v5e, v5p, v6e, tpu7x.
        gpu: Compute capabilities: sm_80, sm_90.
        tokens: Of a causal sequence.
        heads: Of queries, keys and values, on TPUs.
        width: Of a head, on TPUs.
    """
    from jaxmem.planning.steps import Steps

    for name, given in (("tpu", tpu), ("gpu", gpu)):
        if given == ():
            raise ValueError(f"kernels: needs names behind --{name}, got none; `jaxmem kernels --help` lists them")
    with Steps() as steps:
        if gpu:
            from jaxmem.planning import gpu_report

            for chip in gpu:
                steps.show(gpu_report.report(chip, tokens, steps.say))
        if tpu or not gpu:
            from jaxmem.planning import kernel_report

            for generation in tpu or ("v5p", "v6e", "tpu7x"):
                problem = kernel_report.Problem(heads, tokens, width)
                for line in kernel_report.report(generation, problem, steps.say):
                    steps.show(line)
    return 0


def table(
    action: Literal["info", "create", "grow"],
    directory: str,
    /,
    rows: Count | None = None,
    width: Count | None = None,
    input_width: Count | None = None,
    dtype: str | None = None,
    seed: Seed | None = None,
    moments: bool = False,
) -> int:
    """A table of memory rows on disk: what is in it, a new one, or more rows; nothing of these reads or writes a row.

    Args:
        action: info, create or grow.
        directory: Of the table.
        rows: To create, or to have after growing.
        width: Of a value, to create.
        input_width: Of an expert's input vector, to create; there are none if not given.
        dtype: Of values and inputs, to create: float32 (if not given), bfloat16 or float16.
        seed: Of the normal numbers that new rows are, to create; 0 if not given.
        moments: Create the moments of lazy Adam too, values_mu and values_nu.
    """
    from jaxmem.checkpoints.table_store import RowArray, TableStore

    if action != "info" and (rows is None or (action == "create" and width is None)):
        needed = {"--rows": rows} | ({} if action == "grow" else {"--width": width})
        got = " and ".join(f"{name} {value}" for name, value in needed.items() if value is not None) or "none"
        raise ValueError(f"table {action}: needs {' and '.join(needed)}, got {got}; say how many")
    to_create = {"width": width, "input-width": input_width, "dtype": dtype, "seed": seed, "moments": moments}
    given = (
        {} if action == "create" else {name: value for name, value in to_create.items() if value not in (None, False)}
    )
    if unused := [*given] + ["rows"] * (action == "info" and rows is not None):
        raise ValueError(f"table {action}: needs no --{unused[0]}, got it; leave it out")
    if action == "create":
        widths = {"values": width} | ({} if input_width is None else {"inputs": input_width})
        drawn = lambda n, seed: RowArray(n, dtype or "float32", stddev=max(n, 1) ** -0.5, seed=seed)
        arrays = {name: drawn(n, (seed or 0) + i) for i, (name, n) in enumerate(widths.items())}
        if moments:
            arrays |= {f"{name}_{moment}": RowArray(n) for name, n in widths.items() for moment in ("mu", "nu")}
        TableStore.create(directory, rows, arrays)
    store = TableStore(directory)
    if action == "grow":
        store.grow(rows)
    print(store.info())
    return 0


COMMANDS = {"train": train, "generate": generate, "info": info, "plan": plan, "kernels": kernels, "table": table}


def entry() -> None:
    """The program `jaxmem`: `main`, and the end of the process."""
    code = main()
    if code == INTERRUPTED:  # XLA may still compile in other threads: a regular end waits for them, or dies in them
        output.abandon()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
