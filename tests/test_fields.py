"""Fields of configs: each states what it may be, and everything else is one sentence when the config is made."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem.fields import Bounds, Count, Fraction, check, checked, kinds
from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig
from jaxmem.layers.recurrent import RecurrentConfig
from jaxmem.layers.word_experts import WordExpertsConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.sharding import MeshConfig
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig, TableOptimizerConfig

pytestmark = pytest.mark.usefixtures("unchecked")

DATA = DataConfig(train=("text",))
MODEL = DecoderConfig(8, 8, pattern=(AttentionConfig(2),))
NEEDED = {
    "AttentionConfig": {"n_heads": 4},
    "DataConfig": {"train": ("text",)},
    "DecoderConfig": {"d_model": 8, "d_ffn": 8, "pattern": (AttentionConfig(2),)},
    "RowArray": {"width": 4},
    "TrainConfig": {"model": MODEL, "data": DATA, "optimizer": OptimizerConfig(), "steps": 3},
}
"""Of fields without a default: values that are right."""


def config_classes() -> list[type]:
    """Every config of the package: what is called one, and what else has checked fields."""
    found = []
    for module in pkgutil.walk_packages(jaxmem.__path__, "jaxmem."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if cls.__module__ != module.name or not dataclasses.is_dataclass(cls) or inspect.isabstract(cls):
                continue
            checks = getattr(getattr(cls, "__post_init__", None), "__qualname__", "").startswith("checked.")
            if checks or cls.__name__.endswith("Config"):
                found.append(cls)
    return found


CLASSES = config_classes()
FIELDS = [(cls, name) for cls in CLASSES for name in kinds(cls)]


def arms(kind) -> list[Any]:
    """The kinds that a field may have."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [part for arm in typing.get_args(kind) for part in arms(arm)] if is_union else [kind]


def make(cls: type, **fields) -> Any:
    return cls(**NEEDED.get(cls.__name__, {}) | fields)


def sentence(cls: type, name: str, value: Any) -> str:
    with pytest.raises(ValueError) as error:
        make(cls, **{name: value})
    told = str(error.value)
    assert "\n" not in told and "; " in told and ": needs " in told and name in told, told
    return told


def test_all_are_found():
    assert {TrainConfig, OptimizerConfig, TableOptimizerConfig, MeshConfig, GatedDeltaNetConfig} < set(CLASSES)
    assert len(CLASSES) > 35 and len(FIELDS) > 200


@pytest.mark.parametrize("cls, name", FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_what_a_field_may_not_be_is_one_sentence(cls, name):
    """Another type, a value outside a closed set, a number outside the range that every number states."""
    kind = kinds(cls)[name]
    wrong = [object(), {"a": 1}, AttentionConfig]
    for arm in arms(kind):
        base, *notes = typing.get_args(arm) if typing.get_origin(arm) is Annotated else [typing.get_origin(arm) or arm]
        if base in (int, float):
            (bounds,) = [note for note in notes if isinstance(note, Bounds)]
            low, high = bounds.ends
            wrong += [math.nan, math.inf, -math.inf, True, "many", (1,)]
            wrong += [low - 1] * math.isfinite(low) + [high + 1] * math.isfinite(high)
            wrong += [0.5] if base is int else []
        elif base is Literal or base is str:
            wrong += [1, True, ("a",)] + ["no such choice"] * (base is not str)
        elif base is bool:
            wrong += [1, "yes", 0.0]
        elif base is tuple:
            wrong += [3, "text"]
        elif base is Mapping:
            wrong = [object(), AttentionConfig]
        elif isinstance(base, type) and base is not types.NoneType:
            wrong += [base, 3]
    for value in wrong:
        told = sentence(cls, name, value)
        assert told.startswith(f"{cls.__name__}: needs {name} to be ") and f", got {name}=" in told, told
    if type(None) not in typing.get_args(kind):
        sentence(cls, name, None)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (
            lambda: OptimizerConfig(kind="sgd"),
            "OptimizerConfig: needs kind to be one of adamw, muon, got kind='sgd'; change",
        ),
        (lambda: OptimizerConfig(kind="adam"), "got kind='adam'; did you mean adamw?"),
        (
            lambda: OptimizerConfig(schedule="linear"),
            "needs schedule to be one of cosine, wsd, constant, got schedule='lin",
        ),
        (
            lambda: OptimizerConfig(learning_rate="3e-4"),
            "needs learning_rate to be a number > 0, got learning_rate='3e-4'",
        ),
        (
            lambda: OptimizerConfig(learning_rate=10**400),
            "needs learning_rate to be a number > 0, got learning_rate=1000",
        ),
        (lambda: OptimizerConfig(b1=1), "needs b1 to be a number in [0, 1), got b1=1; change it"),
        (
            lambda: OptimizerConfig(tables=TableOptimizerConfig),
            "got tables=the class TableOptimizerConfig; write Table",
        ),
        (
            lambda: OptimizerConfig(warmup_steps=2**70),
            "needs warmup_steps to be an integer >= 0, got warmup_steps=118059",
        ),
        (
            lambda: dataclasses.replace(DATA, train="text"),
            "needs train to be a tuple of strings, got train='text'; write",
        ),
        (lambda: dataclasses.replace(DATA, train=("a", 3)), "needs train[1] to be a string, got train[1]=3; change it"),
        (
            lambda: dataclasses.replace(DATA, train=()),
            "needs at least one folder, file or glob to train on, got train=()",
        ),
        (
            lambda: dataclasses.replace(MODEL, pattern=(AttentionConfig,)),
            "got pattern[0]=the class AttentionConfig; write",
        ),
        (lambda: dataclasses.replace(MODEL, pattern=AttentionConfig(2)), "write (AttentionConfig(...),)"),
        (
            lambda: dataclasses.replace(MODEL, pattern=("attention",)),
            "a pattern of one or more mixer configs, got pattern=",
        ),
        (
            lambda: MixtureOfMemoriesConfig(AttentionConfig(2)),
            "needs inner to be a RecurrentConfig, got inner=AttentionConf",
        ),
        (
            lambda: MixtureOfMemoriesConfig(top_k=5),
            "needs top_k <= n_memories, got top_k=5 of n_memories=4; choose fewer",
        ),
        (
            lambda: DecoderConfig(8, 8, pattern=(AttentionConfig(2),), dtype=jnp.bfloat16),
            "needs dtype to be one of float32, bfloat16, got dtype=the class bfloat16; write 'bfloat16'",
        ),
        (
            lambda: MeshConfig(parameters="fsdp"),
            "needs parameters to be a tuple of strings, got parameters='fsdp'; write",
        ),
        (
            lambda: WordExpertsConfig(8, routing=(1, -1)),
            "needs routing[1] to be an integer >= 0, got routing[1]=-1; change",
        ),
        (
            lambda: WordExpertsConfig(8, routing=(*range(99), -1)),
            "needs routing[99] to be an integer >= 0, got routing[99]=-1",
        ),
    ],
)
def test_the_sentence(wrong, told):
    with pytest.raises(ValueError) as error:
        wrong()
    assert told in str(error.value) and "\n" not in str(error.value)


def test_what_means_the_same_is_made_the_same():
    told = DecoderConfig(np.int32(8), 16.0, pattern=[AttentionConfig(np.int64(2))], norm_eps=np.float64(1e-6))
    assert told == DecoderConfig(8, 16, pattern=(AttentionConfig(2),)) and hash(told) == hash(eval(repr(told)))
    assert type(told.d_model) is type(told.d_ffn) is int and type(told.norm_eps) is float
    one = OptimizerConfig(weight_decay=1, warmup_steps=1e3)
    assert type(one.weight_decay) is float and one.warmup_steps == 1000 and type(one.warmup_steps) is int


def test_configs_of_an_experiment_are_checked_too():
    @dataclasses.dataclass(frozen=True)
    @checked
    class Own:
        width: Count
        share: Fraction = 0.5
        kind: Literal["a", "b"] = "a"

    with pytest.raises(ValueError, match="Own: needs width to be an integer >= 1, got width=0; change it"):
        Own(0)

    @dataclasses.dataclass(frozen=True)
    class OwnNet(GatedDeltaNetConfig):
        n_turns: Count = 1

    with pytest.raises(ValueError, match="OwnNet: needs n_turns to be an integer >= 1, got n_turns='two'; change it"):
        OwnNet(n_turns="two")
    assert issubclass(OwnNet, RecurrentConfig)


def test_what_is_shown_of_a_value_is_short():
    with pytest.raises(ValueError) as error:
        check("x", "n", "a\nb" * 500, Count)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
    assert check("x", "path", "text", str) == "text"
    with pytest.raises(ValueError, match="needs path to be a string, got path=PosixPath"):
        check("x", "path", Path("text"), str)
