"""The command `jaxmem`: arguments and printing only. Heavy packages are imported by the command that needs them."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

TRACEBACK = "JAXMEM_TRACEBACK"
"""Environment variable: set it to 1 to see where an error comes from."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done (or stopped by a signal with all saved), 1 failed, 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] != ["train"]:
        return _run(argv)
    from jaxmem.training import peers

    return peers.together(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    try:
        commands = {"train": _train_command(argv), "generate": generate, "info": info}
        commands |= {"plan": _plan_command(argv), "kernels": kernels, "table": table}
        return tyro.extras.subcommand_cli_from_dict(commands, prog="jaxmem", description=_ABOUT, args=argv) or 0
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        if argv[:1] == ["train"]:
            error = _of_all_processes(error)
        print(f"jaxmem: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("jaxmem: interrupted", file=sys.stderr)
        return 130


_ABOUT = f"Sequence models that remember. Set {TRACEBACK}=1 to see where an error comes from."


def _train_command(argv: list[str]) -> Callable[..., int]:
    """The command `train`, whose options are the fields of the experiment's config, with its values as defaults."""
    from jaxmem.training.experiment import TrainConfig, load_experiment

    path = _experiment_file(argv, "train")
    if path and not {"-h", "--help"} & set(argv):
        _find_other_processes(argv)

    def train_file(
        experiment: Positional[str],
        config: Annotated[TrainConfig, arg(name="")] = load_experiment(path) if path else tyro.MISSING,
        out: str | None = None,
        resume: bool = False,
        distributed: bool = False,
        coordinator: str | None = None,
        processes: int | None = None,
        process: int | None = None,
    ) -> int:
        """Train the model of an experiment file; every field of its config is an option.

        Args:
            experiment: Python file with a function config(), e.g. experiments/quickstart.py.
            config: The experiment.
            out: Folder of the run; runs/NAME if not given, NAME being that of the experiment file.
            resume: Go on with the run in that folder from its newest checkpoint.
            distributed: This is one of several processes, in a cluster that JAX knows; find the others first.
            coordinator: Where process 0 runs, HOST:PORT with a free port, for several processes in no such cluster.
            processes: With --coordinator: how many there are.
            process: With --coordinator: which this is, from 0.
        """
        from jaxmem.training.loop import train

        if os.environ.get(TRACEBACK) != "1":
            _quieten_failed_saves()
        train(config, Path(out) if out else Path("runs") / Path(experiment).stem, resume=resume)
        return 0

    def train_nothing(experiment: Positional[str], out: str | None = None, resume: bool = False) -> int:
        """Train the model of an experiment file; `jaxmem train EXPERIMENT.py --help` lists the options of its config.

        Args:
            experiment: Python file with a function config(), e.g. experiments/quickstart.py.
            out: Folder of the run; runs/NAME if not given, NAME being that of the experiment file.
            resume: Go on with the run in that folder from its newest checkpoint.
        """
        raise ValueError(f"train: needs an experiment file that ends in .py, got {experiment!r}; name one")

    return train_file if path else train_nothing


def _experiment_file(argv: list[str], command: str) -> str | None:
    """The Python file among the arguments of a command whose options are the fields of the config that it makes."""
    return next((word for word in argv[1:] if word.endswith(".py")), None) if argv[:1] == [command] else None


def _plan_command(argv: list[str]) -> Callable[..., int]:
    """The command `plan`, with the options of `train` for its config."""
    from jaxmem.training.experiment import TrainConfig, load_experiment

    path = _experiment_file(argv, "plan")

    def plan(
        experiment: Positional[str],
        tpu: str,
        config: Annotated[TrainConfig, arg(name="")] = load_experiment(path) if path else tyro.MISSING,
    ) -> int:
        """Compile the training step of an experiment for TPUs that are not here (libtpu): memory, exchanges, arithmetic.

        Args:
            experiment: Python file with a function config(), e.g. experiments/long_context.py.
            tpu: Topology, e.g. v5p:8x8x8.
            config: The experiment.
        """
        from jaxmem.planning.tpu import use_compiler
        from jaxmem.planning.training_plan import plan

        use_compiler()
        print(plan(config, tpu))
        return 0

    def plan_nothing(experiment: Positional[str], tpu: str = "") -> int:
        """Compile the training step of an experiment for TPUs that are not here; `jaxmem plan EXPERIMENT.py --help`.

        Args:
            experiment: Python file with a function config(), e.g. experiments/long_context.py.
            tpu: Topology, e.g. v5p:8x8x8.
        """
        raise ValueError(f"plan: needs an experiment file that ends in .py, got {experiment!r}; name one")

    return plan if path else plan_nothing


def _find_other_processes(argv: list[str]) -> None:
    """Before the experiment is loaded, which may ask JAX for devices."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = {name: words[words.index(f"--{name}") + 1 :][:1] for name in _OF_PROCESSES if f"--{name}" in words}
    if not given and "--distributed" not in words:
        return
    from jaxmem.training import peers

    if not given:
        peers.join()
        return
    values = {name: value[0] if value else "" for name, value in given.items()}
    coordinator, n, index = (values.get(name, "") for name in _OF_PROCESSES)
    if ":" not in coordinator or not n.isdigit() or not index.isdigit() or int(index) >= int(n):
        raise ValueError(
            "train: needs --coordinator HOST:PORT, the same on all processes, with --processes N and --process 0..N-1, "
            f"got {', '.join(f'--{name} {value}' for name, value in values.items())}; give all three"
        )
    peers.join(coordinator, int(n), int(index))


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
    run: Positional[str],
    prompt: str = "",
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    capacity: int | None = None,
    step: int | None = None,
) -> int:
    """Let a trained model continue a prompt; the text goes to standard output as it is made.

    Args:
        run: Folder of a run.
        prompt: Text to continue.
        max_tokens: Tokens to write.
        temperature: Of the softmax; 0 always takes the likeliest token.
        top_k: Sample from so many likeliest tokens only.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Of the sampling.
        capacity: Tokens that growing caches hold; prompt and text together if not given.
        step: Checkpoint to use; the newest if not given.
    """
    from jaxmem.models.generation import generate_text
    from jaxmem.models.sampling import SamplingConfig
    from jaxmem.training.run import load_run

    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    loaded = load_run(run, step)
    for note in loaded.notes:
        print(f"passed over: {note}", file=sys.stderr)
    text = generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        capacity=capacity,
    )
    print(prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print(f"\n{text.statistics}", file=sys.stderr)
    return 0


def info(model: Positional[str], context: int = 2048) -> int:
    """Print what a model costs: parameters by part, state bytes per sequence, FLOPs per token.

    Args:
        model: Name of a preset, or an experiment file.
        context: Tokens of context for the state of growing caches and for FLOPs.
    """
    from rich.console import Console

    from jaxmem.models import accounting
    from jaxmem.models.presets import preset
    from jaxmem.training.experiment import load_experiment

    config = load_experiment(model).model if model.endswith(".py") else preset(model)
    Console().print(accounting.table(model, config, accounting.account(config, context), context))
    return 0


def kernels(
    tpu: tuple[str, ...] = (),
    gpu: tuple[str, ...] = (),
    tokens: int = 8192,
    heads: int = 8,
    width: int = 128,
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
    if gpu:
        from jaxmem.planning import gpu_report

        for chip in gpu:
            print(gpu_report.report(chip, tokens), flush=True)
    if tpu or not gpu:
        from jaxmem.planning import kernel_report

        for generation in tpu or ("v5p", "v6e", "tpu7x"):
            for line in kernel_report.report(generation, kernel_report.Problem(heads, tokens, width)):
                print(line, flush=True)
    return 0


def table(
    action: Positional[Literal["info", "create", "grow"]],
    directory: Positional[str],
    rows: int | None = None,
    width: int | None = None,
    input_width: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    moments: bool = False,
) -> int:
    """A table of memory rows on disk: what is in it, a new one, or more rows; nothing of these reads or writes a row.

    Args:
        action: info, create or grow.
        directory: Of the table.
        rows: To create, or to have after growing.
        width: Of a value, to create.
        input_width: Of an expert's input vector, to create; there are none if not given.
        dtype: Of values and inputs, to create: float32, bfloat16 or float16.
        seed: Of the normal numbers that new rows are.
        moments: Create the moments of lazy Adam too, values_mu and values_nu.
    """
    from jaxmem.checkpoints.table_store import RowArray, TableStore

    if action != "info" and (rows is None or (action == "create" and width is None)):
        needed = "--rows" if action == "grow" else "--rows and --width"
        raise ValueError(f"table {action}: needs {needed}, got rows={rows}, width={width}; give them")
    if action == "create":
        widths = {"values": width} | ({} if input_width is None else {"inputs": input_width})
        drawn = lambda n, seed: RowArray(n, dtype, stddev=max(n, 1) ** -0.5, seed=seed)
        arrays = {name: drawn(n, seed + i) for i, (name, n) in enumerate(widths.items())}
        if moments:
            arrays |= {f"{name}_{moment}": RowArray(n) for name, n in widths.items() for moment in ("mu", "nu")}
        TableStore.create(directory, rows, arrays)
    store = TableStore(directory)
    if action == "grow":
        store.grow(rows)
    print(store.info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
