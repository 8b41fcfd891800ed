"""Classes of a config that are not jaxmem's: a mixer of one's own in an experiment file.

A run keeps the files that define them in RUN/code, under the names by which its config calls them. Nothing there is run
by itself, since a run's folder may come from anywhere: who trusts it passes a file of it to `--import`.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxmem.config import UnknownClass, from_json
from jaxmem.training.experiment import TrainConfig, running
from jaxmem.training.metrics import explain_failed_write, replace_file

CODE = "code"


def keep_code(run_dir: Path, config: Any, experiment: str | Path | None, step: int) -> list[str]:
    """Copies the experiment's file, what it imports from beside it, and the files that define classes of the config.

    A copy that differs is kept beside it as NAME.before_STEP.py.

    Args:
      config: as JSON.
      experiment: its file; None if there is none.
      step: from which the run goes on.

    Returns: what to tell.
    """
    files = {}
    for name in sorted({name.rpartition(".")[0] for name in _types(config)}):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if path.suffix == ".py" and not name.startswith("jaxmem.") and "." not in name:
            files[path.name] = path
    if experiment is not None:
        files[Path(experiment).name] = Path(experiment)
        files |= _beside(Path(experiment).resolve().parent)
    notes = []
    for name, path in files.items():
        text, copy = path.read_bytes(), run_dir / CODE / name
        before = copy.read_bytes() if copy.is_file() else None
        if before == text:
            continue
        with explain_failed_write(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
        if before is not None and step:
            older = copy.with_name(f"{copy.stem}.before_{step}.py")
            if not older.exists():  # else a start before it kept what the checkpoint was made with
                replace_file(older, before)
            notes.append(f"{path} is not as it was when the run began: {copy} is new, the earlier one is {older}")
        replace_file(copy, text)
    return notes


def read_own(data: dict[str, Any], where: Path, run_dir: Path, imports: Sequence[str | Path] = ()) -> TrainConfig:
    """The config of a run, with the classes that the files `imports` define.

    Args:
      data: as JSON.
      where: it was read from, for messages.

    Raises: ValueError for a class that is nowhere, naming the file that is needed; for what is no config.
    """
    own = [import_file(path) for path in imports]
    try:
        config = from_json(data, own)
        if not isinstance(config, TrainConfig):
            raise ValueError(f"config: needs that of a run, got a {type(config).__name__}; put back the file")
        return config
    except UnknownClass as error:
        module, _, name = error.name.rpartition(".")
        if not module or module.startswith("jaxmem."):
            raise ValueError(f"{where}: {error}") from error
        copies = sorted((run_dir / CODE).rglob("*.py"))
        defining = [path for path in copies if re.search(rf"^class {name}\b", path.read_text(errors="replace"), re.M)]
        if got := ", ".join(map(str, imports)):
            got = f"{got} without it"
        if found := next((path for path in defining if ".before_" not in path.name), None):
            raise ValueError(
                f"run: needs the class {error.name} of the run's own code, got {got or 'no leave to run that'}; "
                f"read {found}, and if you trust it add --import {found}"
            ) from error
        raise ValueError(
            f"run: needs the class {error.name}, got {got or f'no file that defines it in {run_dir / CODE}'}; "
            f"find the file {module.replace('.', '/')}.py with which the run was made and add --import FILE"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def import_file(path: str | Path) -> ModuleType:
    """Runs a Python file as a module, which finds what lies beside it.

    Raises: ValueError for a file that is not there, or that raises.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"import: needs a Python file, got {str(path)!r}; name one that ends in .py")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == os.path.abspath(path):
        return loaded
    with running(path) as module:
        return module


def _types(config: Any) -> Iterator[str]:
    """The classes in a config's JSON."""
    if isinstance(config, dict):
        yield config.get("type", "")
        yield from (name for value in config.values() for name in _types(value))
    elif isinstance(config, list):
        yield from (name for value in config for name in _types(value))


def _beside(folder: Path) -> dict[str, Path]:
    """Files of imported modules that are found from this folder, by their path below it; jaxmem's are not among them."""
    found = {}
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "")
        if path.suffix == ".py" and name.partition(".")[0] != "jaxmem" and path.is_relative_to(folder):
            below = path.relative_to(folder)
            if ".".join(below.with_suffix("").parts) in (name, f"{name}.__init__"):
                found[str(below)] = path
    return found
