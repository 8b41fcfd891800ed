"""Configs as JSON: what comes back is what went out, through text, and what cannot be read says why."""

import dataclasses
import json
import sys

import pytest

from jaxmem.checkpoints import CheckpointConfig
from jaxmem.config import UnknownClass, from_json, to_json
from jaxmem.layers.attention import AttentionConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.models.presets import PRESETS, preset
from jaxmem.sharding import MeshConfig
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    """A mixer of somebody's experiment file."""

    width: int
    scale: float = 1e-30

    def make(self, d_model, *, rngs): ...


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_comes_back_as_it_went_out(name):
    run = TrainConfig(
        model=preset(name),
        data=DataConfig(train=("book.txt", "ä/**"), heldout=()),
        optimizer=OptimizerConfig(kind="muon", clip_norm=None, eps=1e-30),
        steps=2**40,
        checkpoint=CheckpointConfig(),
        mesh=MeshConfig(data=-1, fsdp=2),
    )
    back = from_json(json.loads(json.dumps(to_json(run))))
    assert back == run and hash(back) == hash(run)
    assert type(back.model.pattern[0]) is type(run.model.pattern[0])


def test_json_says_what_it_is():
    assert to_json(MeshConfig(data=1))["type"] == "jaxmem.sharding.mesh.MeshConfig"
    assert to_json((1, (2.5, None), "x", True)) == [1, [2.5, None], "x", True]


def test_a_config_of_an_imported_experiment_comes_back(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, type(sys)(__name__)))
    monkeypatch.setattr(sys.modules[__name__], "OwnConfig", OwnConfig, raising=False)
    model = DecoderConfig(8, 8, pattern=(OwnConfig(3), AttentionConfig(2)))
    assert from_json(json.loads(json.dumps(to_json(model)))) == model


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1, 2}, 1j], ids=lambda value: type(value).__name__)
def test_only_plain_values_are_written(value):
    with pytest.raises(ValueError, match=r"config: needs plain values, tuples and dataclasses, got .*; change that"):
        to_json((1, value))


@pytest.mark.parametrize(
    "name",
    [
        "jaxmem.sharding.mesh.NoConfig",
        "jaxmem.nowhere.Config",
        "jaxmem.sharding.mesh.make_mesh",
        "jaxmem.typing.Array",
        "nowhere.Config",
        "subprocess.Popen",
        "MeshConfig",
    ],
)
def test_a_class_that_is_no_config(name):
    with pytest.raises(ValueError, match=f"config: needs the name of a config class, got '{name}'; import the module"):
        from_json({"type": name})


def test_no_class_of_jaxmem_stands_for_one_of_the_same_name():
    """Another file that only imports AttentionConfig does not define own.AttentionConfig."""
    other = sys.modules[__name__]
    data = to_json(AttentionConfig(2)) | {"type": "own.AttentionConfig"}
    with pytest.raises(UnknownClass, match="got 'own.AttentionConfig'"):
        from_json(data, [other])


def test_an_object_without_a_type():
    with pytest.raises(ValueError, match=r"needs the name of a config class, got '\(nothing\)'"):
        from_json({"data": 1})


def test_fields_that_the_class_does_not_have():
    with pytest.raises(ValueError) as error:
        from_json(to_json(MeshConfig()) | {"pipeline": 2, "expert": 4})
    assert str(error.value) == (
        "config: needs fields of MeshConfig, got expert, pipeline; "
        "the file was written by another version of jaxmem, use that one"
    )


def test_fields_that_are_missing():
    written = to_json(DecoderConfig(8, 8, pattern=(AttentionConfig(2),)))
    del written["d_ffn"], written["pattern"], written["remat"]
    with pytest.raises(ValueError) as error:
        from_json(written)
    assert str(error.value) == (
        "config: needs values for d_ffn, pattern of DecoderConfig, got none; "
        "the file was written by another version of jaxmem, use that one"
    )


def test_values_are_checked_when_they_come_back():
    with pytest.raises(ValueError, match="mesh: needs positive sizes"):
        from_json(to_json(MeshConfig()) | {"data": 0})
