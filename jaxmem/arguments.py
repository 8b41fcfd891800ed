"""The words of a command line as the arguments of a function, and its help; bad words are one sentence.

A command is a function. Its positional-only parameters are words in order, the others options: `--max-tokens 8`,
`--max-tokens=8`, `--resume`, `--no-resume`, `--data.train a b`. Where a config goes with it, every field is an option,
`--optimizer.learning-rate`, but for those that hold what no word can say, such as another mixer.
"""

import dataclasses
import difflib
import inspect
import re
import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union

from jaxmem.fields import check, describe, kinds

REQUIRED = inspect.Parameter.empty

SYNONYMS = {
    "batch": "batch-size", "dim": "d-model", "hidden-size": "d-model", "epochs": "steps", "iterations": "steps",
    "max-steps": "steps", "warmup": "warmup-steps", "context": "context-tokens", "sequence-length": "context-tokens",
    "grad-clip": "clip-norm", "max-grad-norm": "clip-norm", "output": "out", "output-dir": "out", "dir": "out",
    "length": "max-tokens", "max-new-tokens": "max-tokens", "optimizer": "kind", "epsilon": "eps", "beta1": "b1",
    "beta2": "b2", "checkpoint": "step", "experts": "n-memories", "heads": "n-heads", "topology": "tpu",
}  # fmt: skip
"""What others call an option -> what it is called here."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, and where its value goes."""

    path: tuple[str | int, ...]
    """Parameter, then fields and places in tuples."""
    kind: Any
    default: Any
    doc: str

    @property
    def words(self) -> list[str]:
        return [str(part).rstrip("_").replace("_", "-") for part in self.path]


@dataclasses.dataclass(frozen=True)
class Command:
    """What a function's command line may hold."""

    name: str
    function: Callable[..., int]
    positional: dict[str, Any]
    """Parameter -> kind."""
    options: dict[str, Option]
    """By name, without the dashes."""
    docs: dict[str, str]
    config: Any = None
    """Of an experiment."""
    fixed: frozenset[str] = frozenset()
    """Names of its fields that only the experiment file can set."""


def command(name: str, function: Callable[..., int], config: Any = None) -> Command:
    """A function as a command; the fields of `config` are options too, for its parameter of that name."""
    hints = typing.get_type_hints(function, include_extras=True)
    docs = _argument_docs(function.__doc__ or "")
    positional, options, fixed = {}, {}, set()
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional[parameter.name] = kind
        elif parameter.name != "config":
            option = Option((parameter.name,), kind, parameter.default, docs.get(parameter.name, ""))
            options[option.words[0]] = option
    for option in [] if config is None else _fields(config, ("config",)):
        named = ".".join(option.words[1:])
        if _can_be_said(option.kind):
            options[named] = option
        else:
            fixed.add(named)
    return Command(name, function, positional, options, docs, config, frozenset(fixed))


def run(command: Command, argv: list[str]) -> int:
    """Calls the function with what `argv` says.

    Raises: ValueError for words that it does not take; what the function does.
    """
    said = _read(command, argv)
    for name, option in command.options.items():
        if option.default is REQUIRED and option.path not in said:
            raise ValueError(f"{command.name}: needs --{name}, got none; {_sentence(option.doc) or _see_help(command)}")
    options = {path[0]: value for path, value in said.items() if len(path) == 1}
    if command.config is not None:
        fields = {path[1:]: value for path, value in said.items() if len(path) > 1}
        options["config"] = _replace(command.config, fields) if fields else command.config
    words = [options.pop(name) for name in command.positional]
    return command.function(*words, **options)


def _read(command: Command, words: list[str]) -> dict[tuple[str | int, ...], Any]:
    """Path -> value, of what was said."""
    said: dict[tuple[str | int, ...], Any] = {}
    positional = list(command.positional.items())
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--|-[a-zA-Z]", word):
            if not positional:
                last = f" after {words[words.index(word) - 1]!r}" if word != words[0] else ""
                raise ValueError(f"{command.name}: needs options{last}, got {word!r}; {_see_help(command)}")
            name, kind = positional.pop(0)
            said[(name,)] = check(command.name, name, word, kind)
            continue
        given, has_value, value = word.lstrip("-").partition("=")
        option, flag = _find(command, given.replace("_", "-"), word.partition("=")[0])
        if option.path in said:
            raise ValueError(f"{command.name}: needs each option once, got {word} again; leave one out")
        if has_value:
            values = [value]
        elif flag is not None:
            said[option.path] = flag
            continue
        else:
            n = next((i for i, word in enumerate(rest) if re.match(r"--[a-zA-Z]", word)), len(rest))
            n = n if _is_tuple(option.kind) else min(n, 1)
            if not n and not _is_tuple(option.kind):
                got = f"{rest[0]!r}, which reads like an option" if rest else "none"
                form = f", or write {word}={shlex.quote(rest[0])} if it is the value" if rest else ""
                raise ValueError(
                    f"{command.name}: needs a value after {word}, got {got}; give {describe(option.kind)}{form}"
                )
            values, rest = rest[:n], rest[n:]
        said[option.path] = check(command.name, word.partition("=")[0], convert(values, option.kind), option.kind)
    if positional:
        name, _ = positional[0]
        raise ValueError(f"{command.name}: needs {name.upper()}, got none; {_sentence(command.docs.get(name, ''))}")
    return said


def _find(command: Command, name: str, word: str) -> tuple[Option, bool | None]:
    """The option of that name, and what it says by itself: True or False of `--resume` and `--no-resume`."""
    if name in command.options:
        option = command.options[name]
        return option, True if option.kind is bool else None
    section, dot, last = name.rpartition(".")
    positive = command.options.get(f"{section}{dot}{last.removeprefix('no-')}")
    if last.startswith("no-") and positive is not None and positive.kind is bool:
        return positive, False
    below = [field for field in command.fixed if not any(known.startswith(f"{field}.") for known in command.options)]
    if name in command.fixed or any(name.startswith(f"{field}.") for field in below):
        raise ValueError(
            f"{command.name}: needs {word[2:]} to be set in the experiment file, got {word}; write it there"
        )
    near = nearest(name, command.options)
    advice = f"did you mean --{near}?" if near else _see_help(command)
    raise ValueError(f"{command.name}: needs an option that it has, got {word}; {advice}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What `name` was meant to be, if anything is like it: by its letters, its initials, or another name of the same.

    >>> nearest("optimizer.lr", ["optimizer.b1", "optimizer.learning-rate", "optimizer.tables.learning-rate"])
    'optimizer.learning-rate'
    """
    section, _, last = name.rpartition(".")

    def likeness(other: str) -> tuple[float, float, int]:
        of, _, own = other.rpartition(".")
        initials = "".join(part[:1] for part in own.split("-"))
        same = last in (own, initials) or SYNONYMS.get(last) == own
        part = 0.8 if last in own.split("-") or own in last.split("-") else 0.0
        alike = 1.0 if same else max(part, difflib.SequenceMatcher(None, last, own).ratio())
        return alike, difflib.SequenceMatcher(None, section, of).ratio(), -len(other)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.7 else None


def convert(words: list[str], kind: Any) -> Any:
    """What `words` mean where `kind` is wanted; as they are if they mean nothing there.

    >>> convert(["1e3"], int), convert(["None"], float | None), convert(["a", "b"], tuple[str, ...])
    (1000, None, ('a', 'b'))
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return convert(words, args[0])
    if origin in (Union, types.UnionType):
        if words == ["None"] and types.NoneType in args:
            return None
        return next(convert(words, arm) for arm in args if arm is not types.NoneType)
    if origin is tuple:
        return tuple(convert([word], args[0]) for word in words)
    (word,) = words
    try:
        if kind is int and not re.search(r"[.eE]", word):
            return int(word)
        if kind in (int, float):
            number = float(word)
            return int(number) if kind is int and number.is_integer() else number
    except ValueError:
        return word
    if kind is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    if origin is Literal:
        return next((choice for choice in args if str(choice) == word), word)
    return word


def _fields(value: Any, path: tuple[str | int, ...]) -> Iterable[Option]:
    """Options of all that is below a config, as deep as configs are in it."""
    docs = field_docs(type(value))
    for name, kind in kinds(type(value)).items():
        inner, below = getattr(value, name), (*path, name)
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, below)
        elif isinstance(inner, tuple) and any(dataclasses.is_dataclass(item) for item in inner):
            yield Option(below, Any, inner, "")
            for i, item in enumerate(inner):
                if dataclasses.is_dataclass(item):
                    yield from _fields(item, (*below, i))
        else:
            yield Option(below, kind, inner, docs.get(name, ""))


def _can_be_said(kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _can_be_said(args[0])
    if origin in (Union, types.UnionType, tuple):
        return all(_can_be_said(arm) for arm in args if arm not in (types.NoneType, ...))
    return origin is Literal or kind in (int, float, bool, str)


def _is_tuple(kind: Any) -> bool:
    return any(typing.get_origin(arm) is tuple for arm in (kind, *typing.get_args(kind)))


def _replace(value: Any, changes: dict[tuple[str | int, ...], Any]) -> Any:
    """A config, or a tuple of them, with changes below it."""
    parts: dict[str | int, dict] = {}
    for (first, *rest), new in changes.items():
        parts.setdefault(first, {})[tuple(rest)] = new
    at = lambda part: value[part] if isinstance(value, tuple) else getattr(value, part)
    made = {part: below[()] if () in below else _replace(at(part), below) for part, below in parts.items()}
    if isinstance(value, tuple):
        return tuple(made.get(i, item) for i, item in enumerate(value))
    return dataclasses.replace(value, **made)


def field_docs(cls: type) -> dict[str, str]:
    """What stands below the fields of a dataclass in its source, its bases' too."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            try:
                source = inspect.getsource(base)
            except (OSError, TypeError):
                continue
            found = re.findall(r'^    (\w+): [^\n]*\n(?:    """(.*?)""")?', source, re.MULTILINE | re.DOTALL)
            docs |= {name: inspect.cleandoc(doc) for name, doc in found if doc or name not in docs}
    return docs


def _argument_docs(doc: str) -> dict[str, str]:
    lines = doc.partition("Args:\n")[2].splitlines()
    return dict(line.strip().split(": ", 1) for line in lines if ": " in line)


def _sentence(doc: str) -> str:
    """For the end of an error."""
    return f"{doc[:1].lower()}{doc[1:].rstrip('.')}" if doc and doc[1:2].islower() else doc.rstrip(".")


def _see_help(command: Command) -> str:
    return f"`jaxmem {command.name} {'EXPERIMENT.py ' * ('experiment' in command.positional)}--help` lists them"


def help_text(command: Command) -> str:
    """The help of one command, as wide as the terminal, at most 100 columns."""
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    wrap = lambda text, indent: [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    ]
    about = inspect.cleandoc(command.function.__doc__ or "").partition("\nArgs:")[0].strip()
    how = " ".join(["usage: jaxmem", command.name, *map(str.upper, command.positional), "[OPTIONS]"])
    lines = [how, "", *wrap(about, ""), ""]
    for name in command.positional:
        lines += [f"{name.upper()}", *wrap(command.docs.get(name, ""), "      ")]
    sections: dict[str, list[str]] = {}
    for name in command.options:
        sections.setdefault(name.rpartition(".")[0], []).append(name)
    for section, names in sections.items():
        lines += ["", section or "options"]
        for name in names:
            usage = _usage(name, command.options[name])
            lines += textwrap.wrap(
                usage, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
            )
            lines += wrap(command.options[name].doc, "      ")
    return "\n".join(lines)


def _usage(name: str, option: Option) -> str:
    if option.kind is bool:
        section, dot, last = name.rpartition(".")
        return f"--{name}, --{section}{dot}no-{last}  [{option.default}]"
    default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
    shown = "needed" if default is REQUIRED else repr(default) if isinstance(default, str) else default
    return f"--{name}  {describe(option.kind)}  [{shown}]"
