"""Wrong input and what is said of it: every row is run, and the table in docs/bad_input.md is what came out.

    python tests/bad_input.py --write docs/bad_input.md     about a minute; fails if a row is silent or shows a traceback

To add a row, add a tuple to a group below. Rows run in a folder of their own with `tiny.py`, an experiment on the texts in
`text`, `small.py`, the same with attention alone, and `run`, a folder of that with two checkpoints; they share it, so a row
that changes a file works on a copy.
"""

import contextlib
import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem import cli
from jaxmem.checkpoints import CheckpointStore, RowArray, TableStore
from jaxmem.config import to_json
from jaxmem.sharding import MeshConfig, make_mesh, use_mesh
from jaxmem.training.experiment import load_experiment
from jaxmem.training.step import init_state

ROOT = Path(cli.__file__).parent.parent
TINY = Path(__file__).parent / "training" / "tiny.py"
D = 16

MODULES = (
    "checkpoints config layers.attention layers.cross_entropy layers.embedding layers.fast_weight_memory "
    "layers.gated_delta_net layers.griffin layers.hgrn layers.kimi_delta_attention layers.linear_attention "
    "layers.mamba layers.memory layers.mixture_of_memories layers.product_keys layers.rwkv7 layers.short_convolution "
    "layers.state_space layers.tucker_keys layers.word_experts models.decoder models.presets models.sampling "
    "models.tokenizer planning.tpu sharding sharding.attention training.data training.optimizer"
)
"""Of jaxmem, whose names expressions use."""

CONFIGS = """
OptimizerConfig(kind="sgd")
OptimizerConfig(kind="adam")
OptimizerConfig(kind=None)
OptimizerConfig(schedule="linear")
OptimizerConfig(schedule="cosin")
OptimizerConfig(learning_rate=0)
OptimizerConfig(learning_rate=-1e-3)
OptimizerConfig(learning_rate="3e-4")
OptimizerConfig(learning_rate=float("nan"))
OptimizerConfig(warmup_steps=-1)
OptimizerConfig(warmup_steps=2.5)
OptimizerConfig(warmup_steps=True)
OptimizerConfig(b1=1)
OptimizerConfig(b2=1.5)
OptimizerConfig(eps=0)
OptimizerConfig(momentum=-0.5)
OptimizerConfig(decay_fraction=0)
OptimizerConfig(final_fraction=2)
OptimizerConfig(weight_decay=-0.1)
OptimizerConfig(clip_norm=0)
OptimizerConfig(clip_norm=float("inf"))
OptimizerConfig(tables=TableOptimizerConfig)
OptimizerConfig(tables={"update": "lazy"})
TableOptimizerConfig(update="sparse")
TableOptimizerConfig(max_rows=0)
CheckpointConfig(every_steps=0)
CheckpointConfig(keep_last=0)
CheckpointConfig(keep_best=-1)
CheckpointConfig(tables="half")
CheckpointConfig(checksum_arrays="yes")
DataConfig(train="text")
DataConfig(train=())
DataConfig(train=("text", 3))
DataConfig(train=Path("text"))
DataConfig(train=("text",), heldout="text")
DataConfig(train=("text",), heldout_fraction=1.0)
DataConfig(train=("text",), heldout_fraction=-0.1)
DataConfig(train=("text",), context_tokens=3)
DataConfig(train=("text",), batch_size=0)
DataConfig(train=("text",), seed=-1)
DataConfig(train=("text",), seed=2**32)
DataConfig(train=("text",), read_threads=-1)
DataConfig(train=("text",), read_threads=10**6)
MeshConfig(data=0)
MeshConfig(data=-2)
MeshConfig(data=-1, fsdp=-1)
MeshConfig(layout="zig-zag")
MeshConfig(parameters="fsdp")
MeshConfig(parameters=("model",))
MeshConfig(table_rows=("data", "data"))
DecoderConfig(0, 32, pattern=(AttentionConfig(2),))
DecoderConfig(16, 32.5, pattern=(AttentionConfig(2),))
DecoderConfig(16, 32, pattern=())
DecoderConfig(16, 32, pattern=AttentionConfig(2))
DecoderConfig(16, 32, pattern=(AttentionConfig,))
DecoderConfig(16, 32, pattern=("attention",))
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), repeats=0)
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), vocab_size=-1)
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), memories=(None, None))
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), memories=(AttentionConfig(2),))
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), norm_eps=0)
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), remat="all")
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), dtype="fp16")
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), dtype=jnp.bfloat16)
DecoderConfig(16, 32, pattern=(AttentionConfig(2),), ffn_block_tokens=0)
AttentionConfig(0)
AttentionConfig(4, n_kv_heads=3)
AttentionConfig(4, n_kv_heads=0)
AttentionConfig(4, window=0)
AttentionConfig(4, rope_theta=-1.0)
AttentionConfig(4, implementation="flash")
AttentionConfig(4, scheme="ring")
Scheme("rings")
Scheme(ulysses=0)
GatedDeltaNetConfig(n_heads=0)
GatedDeltaNetConfig(n_heads=4, n_key_heads=3)
GatedDeltaNetConfig(key_dim=-4)
GatedDeltaNetConfig(chunk_tokens=33)
GatedDeltaNetConfig(convolution_width=1)
GatedDeltaNetConfig(norm_eps=0)
GatedDeltaNetConfig(negative_eigenvalues=1)
GatedDeltaProductConfig(n_householder=0)
KimiDeltaAttentionConfig(lower_bound=0.5)
Hgrn2Config(lower_bound=1.0)
GriffinConfig(n_heads="eight")
LightningAttentionConfig(slopes="alibi")
LightningAttentionConfig(layer=-1)
RetNetConfig(rope_theta=0)
MambaConfig(n_states=0)
Mamba2Config(n_heads=6, n_key_heads=4)
StateSpaceConfig(n_states=3)
Rwkv7Config(gate_rank=0)
ShortConvolutionConfig(width=1)
MixtureOfMemoriesConfig(n_memories=2, top_k=3)
MixtureOfMemoriesConfig(top_k=0)
MixtureOfMemoriesConfig(inner=AttentionConfig(2))
MixtureOfMemoriesConfig(inner=GatedDeltaNetConfig)
MemoryConfig(score="cosine")
MemoryConfig(table_dtype="int8")
MemoryConfig(keys=None)
ProductKeysConfig(n_slots=10)
ProductKeysConfig(n_slots=4, top_k=5)
ProductKeysConfig(n_parts=1)
ProductKeysConfig(key_dim=15)
TuckerKeysConfig(core_rank=0)
WordExpertsConfig(routing=(0, 40_000))
WordExpertsConfig(routing=())
WordExpertsConfig(n_experts=2**20, d_expert=2**12)
FastWeightMemoryConfig(key_dim=3)
FastWeightMemoryConfig(step="sum")
SamplingConfig(temperature=-1)
SamplingConfig(top_k=0)
SamplingConfig(top_p=1.5)
RowArray(0)
RowArray(4, dtype="int4")
preset("quickstrat")
from_json({"type": "jaxmem.nowhere.Config"})
from_json({"data": 1})
from_json(to_json(MeshConfig()) | {"data": 0})
from_json(to_json(MeshConfig()) | {"expert": 2})
to_json((1, object()))
"""
"""Expressions that must raise."""

COMMANDS = """
trian tiny.py
help
--steps 3
train
train tiny
train nowhere.py
train empty
train tiny.py --stepz 3
train tiny.py --step 3
train tiny.py --optimizer.lr 3e-4
train tiny.py --lr 3e-4
train tiny.py --optimizer.wd 0.1
train tiny.py --batch-size 8
train tiny.py --data.batch 8
train tiny.py --optimizer.tables.lr 0.1
train tiny.py --epochs 3
train tiny.py --output-dir x
train tiny.py --frobnicate
train tiny.py --steps
train tiny.py --steps many
train tiny.py --steps 1.5
train tiny.py --steps 0
train tiny.py --steps -3
train tiny.py --steps 1e30
train tiny.py --steps 3 --steps 4
train tiny.py --steps=
train tiny.py 3
train tiny.py --resume yes
train tiny.py --seed -1
train tiny.py --sample-tokens -1
train tiny.py --z-loss -0.1
train tiny.py --load-balance nan
train tiny.py --eval-every-steps 0
train tiny.py --eval-bytes 0
train tiny.py --accumulate 3
train tiny.py --optimizer.kind sgd
train tiny.py --optimizer.schedule linear
train tiny.py --optimizer.learning-rate fast
train tiny.py --optimizer.clip-norm -1
train tiny.py --model.dtype fp16
train tiny.py --model.vocab-size 99
train tiny.py --model.pattern.0.top-k 9
train tiny.py --accumulate 1 --model.pattern.1.n-heads 3
train tiny.py --model.pattern.1.window 0
train tiny.py --model.pattern.2.n-heads 3
train tiny.py --model.memories none
train tiny.py --model.pattern attention
train tiny.py --model.pattern.1.scheme ring
train tiny.py --checkpoint.keep-last 0
train tiny.py --checkpoint.tables half
train tiny.py --checkpoint.tables touched --optimizer.tables.update dense
train tiny.py --data.heldout-fraction 1
train tiny.py --data.context-tokens 2
train tiny.py --no-steps
train tiny.py --profile ten
train small.py --accumulate 1 --profile 14..15
train tiny.py --coordinator nowhere
train tiny.py --coordinator localhost:1 --processes 2 --process 2
info
info quikstart
info mom-34m
info nowhere.py
info empty
info tiny.py extra
info quickstart --context 0
info quickstart --context many
generate
generate empty
generate nowhere
generate tiny.py
generate run --step 7
generate run --step -1
generate run --max-tokens 0
generate run --max-tokens lots
generate run --temperature -1
generate run --temperature hot
generate run --top-k 0
generate run --top-p 0
generate run --top-p 2
generate run --seed -1
generate run --prompt
generate run --prompt --seed 3
generate run --prompt a --prompts b
generate run --prompt-file nowhere.txt
generate run --prompts text
generate run --stop=
generate run --prompt memories --capacity 6
generate run --max-tokens 9 --capacity 9
generate run --promt x
table
table list empty
table info
table info nowhere
table info empty
table info empty --rows 5
table info empty --seed 1
table grow empty --rows 9 --dtype float16
table create new
table create new --rows 9
table create new --rows 0 --width 4
table create new --rows 9 --width 0
table create new --rows 9 --width 4 --dtype int8
table create rows --rows 9 --width 4
table grow empty
table grow rows --rows 5
table grow rows --rows many
kernels --tokens -1
kernels --tpu v99
kernels --tpu v5p-100
kernels --gpu sm_10
kernels --gpu
kernels --tpu --tokens 64
plan
plan tiny --tpu v5p
plan tiny.py
plan nowhere.py --tpu v5p
plan tiny.py --tpu v99
plan tiny.py --tpu v5p:0x2x2
plan tiny.py --tpu v5p:4x4
plan tiny.py --tpu v5litepod-17
plan tiny.py --tpu v6e_256
"""
"""Words after `jaxmem`."""

MESHES = """
train tiny.py --mesh.data 3
train tiny.py --mesh.data 16
train tiny.py --mesh.data 8
train tiny.py --mesh.data 2 --mesh.model 4
train tiny.py --mesh.data 1 --mesh.fsdp 1
train tiny.py --mesh.seq 8 --data.context-tokens 36
train tiny.py --mesh.seq 8 --mesh.layout zigzag --data.context-tokens 40
train tiny.py --mesh.seq 2 --mesh.layout spiral
train tiny.py --mesh.parameters model
train tiny.py --mesh.table-rows rows
plan tiny.py --tpu v5e:2x2 --mesh.data 3
plan tiny.py --tpu v5p-128 --mesh.data 4
plan tiny.py --tpu v5litepod-16
plan tiny.py --tpu v6e-256 --mesh.data 2
plan tiny.py --tpu v4-8 --mesh.seq 4 --data.context-tokens 34
plan tiny.py --tpu tpu7x-128 --mesh.seq 128 --mesh.layout zigzag
make_mesh(MeshConfig(data=3))
make_mesh(MeshConfig(), jax.devices()[:3]) and make_mesh(MeshConfig(fsdp=2), jax.devices()[:3])
on_mesh(MeshConfig(data=2, model=4), lambda: AttentionConfig(2).make(D, rngs=nnx.Rngs(0)))
on_mesh(MeshConfig(data=2, model=4), lambda: make(GatedDeltaNetConfig(n_heads=6, key_dim=4, value_dim=4)))
use_mesh(jax.make_mesh((8,), ("x",))).__enter__()
full_name("v5p-9")
"""

EXPERIMENTS = [
    ("a syntax error", "def config(:\n    pass"),
    ("a tab among spaces", "def config():\n    x = 1\n\treturn x"),
    ("a null byte", "x = 1\0"),
    ("a package that is not there", "import nothing_of_the_kind"),
    ("a name that jaxmem does not have", "from jaxmem.layers.attention import AttentionsConfig"),
    ("an exception", "raise KeyError('width')"),
    ("an exception in config()", "def config():\n    return {}['width']"),
    ("an exception deeper", "def half(n):\n    return n // 0\ndef config():\n    return half(3)"),
    ("sys.exit()", "import sys\nsys.exit(3)"),
    ("no config()", "settings = 3"),
    ("config is no function", "config = 3"),
    ("config is a class", "class config:\n    steps = 3"),
    ("config() returns nothing", "def config():\n    pass"),
    ("config() returns a dict", "def config():\n    return {'steps': 3}"),
    (
        "config() returns the class",
        "from jaxmem.training.experiment import TrainConfig\ndef config():\n    return TrainConfig",
    ),
    ("config() returns the model", "def config():\n    return tiny().model"),
    ("config() wants an argument", "def config(size):\n    return tiny()"),
    ("config() calls itself", "def config():\n    return config()"),
    ("a field that there is not", "def config():\n    return replace(tiny(), optimizer=OptimizerConfig(lr=1e-3))"),
    ("a field that there is not, of replace", "def config():\n    return replace(tiny(), step=3)"),
    ("a missing field", "def config():\n    return DecoderConfig(d_model=16)"),
    ("a string for a number", "def config():\n    return replace(tiny(), steps='12')"),
    ("a number for a string", "def config():\n    return replace(tiny(), sample_prompt=3)"),
    ("a float for an integer", "def config():\n    return replace(tiny(), steps=1.5)"),
    ("a class for an instance", "def config():\n    return replace(tiny(), optimizer=OptimizerConfig)"),
    ("a mixer's class in the pattern", "def config():\n    return model(pattern=(AttentionConfig,))"),
    ("one mixer for a tuple", "def config():\n    return model(pattern=AttentionConfig(2))"),
    ("a string for a mixer", "def config():\n    return model(pattern=('attention',))"),
    ("a mixer for the data", "def config():\n    return replace(tiny(), data=AttentionConfig(2))"),
    ("a dict for a config", "def config():\n    return replace(tiny(), mesh={'data': 1})"),
    ("an unknown optimizer", "def config():\n    return replace(tiny(), optimizer=OptimizerConfig(kind='sgd'))"),
    ("an unknown schedule", "def config():\n    return replace(tiny(), optimizer=OptimizerConfig(schedule='linear'))"),
    (
        "heads that do not divide the width",
        "def config():\n    return replace(model(pattern=(AttentionConfig(3),)), accumulate=1)",
    ),
    ("no steps", "def config():\n    return replace(tiny(), steps=0)"),
]
"""What is wrong, and the file `wrong.py` after the lines of `HEADER`."""

HEADER = """\
from dataclasses import replace
from jaxmem.layers.attention import AttentionConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.training.optimizer import OptimizerConfig
from tiny import config as tiny
def model(**fields):
    return replace(tiny(), model=replace(tiny().model, **fields))
"""


def _write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def _cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def _tokenizer(path: str, **changes) -> None:
    vocab = {"<s>": 26} | {chr(97 + i): i for i in range(26)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "?"} | changes
    _write(path, json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": None, "model": model}))


LARGE = {"<s>": 999} | {str(i): i for i in range(999)}
DATA = [
    ("a folder that is not there", lambda: None, "train tiny.py --data.train nowhere"),
    ("all of it held out by name", lambda: None, "train tiny.py --data.heldout text"),
    ("a run's folder without a name", lambda: None, "train tiny.py --out ''"),
    ("a file for a run's folder", lambda: None, "train tiny.py --out tiny.py"),
    ("a flag of no command", lambda: None, "--verison"),
    ("an empty folder", lambda: None, "train tiny.py --data.train empty"),
    ("a glob that matches nothing", lambda: None, "train tiny.py --data.train text/*.md"),
    ("an empty file", lambda: _write("d1/a.txt", ""), "train tiny.py --data.train d1"),
    ("all of it excluded", lambda: None, "train tiny.py --data.exclude *.txt"),
    ("a gzip file", lambda: _write("d2/a.txt.gz", gzip.compress(b"text " * 99)), "train tiny.py --data.train d2"),
    ("a parquet file", lambda: _write("d3/a.parquet", b"PAR1" + bytes(99) + b"PAR1"), "train tiny.py --data.train d3"),
    ("an image", lambda: _write("d4/a.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9), "train tiny.py --data.train d4"),
    ("NumPy arrays", lambda: _npz("d5/a.npz"), "train tiny.py --data.train d5"),
    ("JSON lines without the field", lambda: _write("d6/a.jsonl", '{"body": "x"}\n' * 9), "train tiny.py --data.train d6"),
    ("JSON lines that are none", lambda: _write("d7/a.jsonl", "{{{\n" * 9), "train tiny.py --data.train d7"),
    ("records that are none", lambda: _write("d8/a.array_record", b"x" * 99), "train tiny.py --data.train d8"),
    ("a named pipe", lambda: _pipe("d9/a.jsonl"), "train tiny.py --data.train d9"),
    ("held-out text that is not there", lambda: None, "train tiny.py --data.heldout nowhere"),
    ("held-out text that is empty", lambda: None, "train tiny.py --data.heldout empty"),
    ("a tokenizer that is not there", lambda: None, "train tiny.py --data.tokenizer nowhere.json"),
    ("a tokenizer that is none", lambda: _write("t1.json", "{}"), "train tiny.py --data.tokenizer t1.json"),
    ("a tokenizer that is cut", lambda: _write("t2.json", '{"version": "1'), "train tiny.py --data.tokenizer t2.json"),
    ("a tokenizer that is larger than the vocabulary", lambda: _tokenizer("t3.json", vocab=LARGE),
     "train tiny.py --data.tokenizer t3.json"),
    ("a tokenizer without an unknown token", lambda: _tokenizer("t4.json", unk_token="?"),
     "train tiny.py --data.tokenizer t4.json"),
    ("no rows in a batch", lambda: None, "train tiny.py --data.batch-size 0"),
]  # fmt: skip
"""What is wrong, how it comes about, words after `jaxmem`."""


def _npz(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    np.savez(path, x=np.arange(999))


def _pipe(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    if not Path(path).exists():
        os.mkfifo(path)


def _run(name: str) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree("run", name, dirs_exist_ok=True)
    return Path(name)


def _damage_all(run: Path, pattern: str = "run_config/run_config.json", n_bytes: int = 9) -> None:
    for path in run.glob(f"checkpoints/*/{pattern}"):
        _cut(path, n_bytes)


def _config(run: Path, **changes) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


RUNS = [
    ("config.json is empty", lambda: _write(f"{_run('r1')}/config.json", ""), "generate r1"),
    ("config.json is cut", lambda: _cut(_run("r2") / "config.json", 99), "generate r2"),
    ("config.json is a list", lambda: _write(f"{_run('r3')}/config.json", "[1, 2]"), "generate r3"),
    ("config.json is of no class", lambda: _write(f"{_run('r4')}/config.json", '{"steps": 3}'), "generate r4"),
    ("steps='NaN' in config.json", lambda: _config(_run("r5"), steps="NaN"), "generate r5 --max-tokens 1"),
    ("config.json of a class that is not there", lambda: _config(_run("r6"), type="own.Config"), "generate r6"),
    ("config.json is gone", lambda: (_run("r7") / "config.json").unlink(), "generate r7"),
    ("config.json is binary", lambda: _write(f"{_run('r8')}/config.json", b"\xff\xfe\x00"), "generate r8"),
    ("checkpoints are gone", lambda: shutil.rmtree(_run("r9") / "checkpoints"), "generate r9"),
    ("checkpoints are all damaged", lambda: _damage_all(_run("r10")), "generate r10"),
    ("checkpoints with another vocabulary", lambda: _vocabulary(_run("r11")), "generate r11"),
    ("the model's arrays are gone", lambda: [shutil.rmtree(p) for p in _run("r12").glob("checkpoints/*/arrays*")],
     "generate r12"),
    ("a new run over another", lambda: _run("r13"), "train small.py --out r13"),
    ("a resume with another config", lambda: _run("r14"), "train small.py --out r14 --resume --seed 7"),
    ("a resume without checkpoints", lambda: shutil.rmtree(_lines(_run("r15")) / "checkpoints"),
     "train small.py --out r15 --resume"),
    ("a resume from damaged checkpoints", lambda: _damage_all(_run("r18")), "train small.py --out r18 --resume"),
    ("the folder is a file", lambda: _write("r19", "x"), "train tiny.py --out r19"),
    ("the folder is below a file", lambda: _write("r20", "x"), "train tiny.py --out r20/x"),
    ("a checkpoint's number is no number", lambda: (_run("r21") / "checkpoints" / "2").rename("r21/checkpoints/two"),
     "generate r21 --step 2"),
    ("checkpoints swapped", lambda: _swap(_run("r22") / "checkpoints"), "generate r22"),
    ("a table that is a run", lambda: None, "table info run"),
    ("a table whose manifest is cut", lambda: _cut(_table("r23") / "manifest.ocdbt", 9), "table info r23"),
    ("a table without data", lambda: [shutil.rmtree(p) for p in _table("r24").iterdir() if p.is_dir()],
     "table grow r24 --rows 99"),
]  # fmt: skip


def _vocabulary(run: Path) -> None:
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["model"]["vocab_size"] = 512
    path.write_text(json.dumps(config))


def _lines(run: Path) -> Path:
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 5.0}\n')
    return run


def _swap(checkpoints: Path) -> None:
    (checkpoints / "1").rename(checkpoints / "x")
    (checkpoints / "2").rename(checkpoints / "1")
    (checkpoints / "x").rename(checkpoints / "2")


def _table(name: str) -> Path:
    TableStore.create(name, 9, {"values": RowArray(4)})
    return Path(name)


CALLS = """
AttentionConfig(3).make(D, rngs=nnx.Rngs(0))
AttentionConfig(2, head_dim=5).make(D, rngs=nnx.Rngs(0))
AttentionConfig(2).make(D, rngs=0)
AttentionConfig(2).make(0, rngs=nnx.Rngs(0))
GatedDeltaNetConfig(2, 4, 4).make("16", rngs=nnx.Rngs(0))
GatedDeltaNetConfig(2, 4, 4).make(0, rngs=nnx.Rngs(0))
GatedDeltaNetConfig().make(D, rngs=jax.random.key(0))
MixtureOfMemoriesConfig().make(D, rngs=None)
make(AttentionConfig(2)).init_state(1)
make(AttentionConfig(2)).init_state(1, capacity=0)
make(AttentionConfig(2))(x[0])
make(AttentionConfig(2))(x[:, :, :7])
make(AttentionConfig(2))(np.zeros((2, 8, D), np.int32))
make(AttentionConfig(2))(x, segment_ids=ids[:, :5])
make(AttentionConfig(2))(x, segment_ids=ids[:1])
make(AttentionConfig(2))(x, segment_ids=1.0 * ids)
make(AttentionConfig(2))(x, positions=ids[:, :5])
make(AttentionConfig(2))(x, ids)
make(AttentionConfig(2))(x, make(AttentionConfig(2)).init_state(3, capacity=9))
make(AttentionConfig(2))(x, make(GatedDeltaNetConfig(2, 4, 4)).init_state(2))
make(GatedDeltaNetConfig(2, 4, 4))(x[0])
make(GatedDeltaNetConfig(2, 4, 4))(x[:, :, :7])
make(GatedDeltaNetConfig(2, 4, 4))(x, ids)
make(GatedDeltaNetConfig(2, 4, 4))(x, make(GatedDeltaNetConfig(2, 4, 4)).init_state(3))
make(GatedDeltaNetConfig(2, 4, 4))(x, make(AttentionConfig(2)).init_state(2, capacity=9))
make(MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 4, 4)))(x[:, :, :7])
make(MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 4, 4)))(x, ids)
make(MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 4, 4)))(x, segment_ids=left_padded)
make(MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 4, 4)))(x, segment_ids=-ids)
make(MambaConfig(2 * D, 4))(x[0])
make(GriffinConfig(2, 4))(x, make(GriffinConfig(2, 4)).init_state(5))
Embedding(9, D, rngs=nnx.Rngs(0))(1.0 * ids)
Embedding(9, D, rngs=nnx.Rngs(0))(9 * ids)
ByteTokenizer().decode([300])
ByteTokenizer().encode(None)
chunked_cross_entropy(x, jnp.ones((9, D)), 9 * ids, 1.0 * ids)
chunked_cross_entropy(x, jnp.ones((9, D)), ids, -1.0 * ids)
"""
"""Layers of D = 16 channels; x is [2, 8, D], ids [2, 8] of ones."""


class Row(NamedTuple):
    group: str
    shown: str
    """What is put in."""
    code: str
    """Exit code of a command, name of the exception of an expression."""
    sentence: str

    @property
    def is_clear(self) -> bool:
        """One sentence, that the input was bad."""
        if "\n" in self.sentence or "Traceback" in self.sentence:
            return False
        if self.code == "0":  # it went on, and says with what
            return self.sentence.endswith("the checkpoint's own copy is used")
        return self.code in ("2", "1", "ValueError", "NotImplementedError") and "needs " in self.sentence


GROUPS = ("configs", "experiment files", "command lines", "meshes", "data", "runs and tables", "calls of layers")


def rows(every: int = 1) -> Iterator[Row]:
    """Runs every n-th row of each group in the current directory, which `prepare` has filled."""
    sys.dont_write_bytecode = True  # files of one name, written within a second
    for text in CONFIGS.strip().splitlines()[::every]:
        yield _expression("configs", text)
    for what, source in EXPERIMENTS[::every]:
        Path("wrong.py").write_text(HEADER + source + "\n")
        shown = source.splitlines()[-1].strip().replace("\0", "\\0")
        yield _command("experiment files", "train wrong.py", f"{what}: `{shown}`")
    for line in COMMANDS.strip().splitlines()[::every]:
        yield _command("command lines", line)
    for line in MESHES.strip().splitlines()[::every]:
        yield _command("meshes", line) if line.startswith(("train", "plan")) else _expression("meshes", line)
    for group, listed in (("data", DATA), ("runs and tables", RUNS)):
        for what, prepare, line in listed[::every]:
            prepare()
            yield _command(group, line, f"{what}: `jaxmem {line}`")
    for text in CALLS.strip().splitlines()[::every]:
        yield _expression("calls of layers", text)


SMALL = """import dataclasses
from jaxmem.layers.attention import AttentionConfig
from tiny import config as tiny

def config():
    return dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, pattern=(AttentionConfig(n_heads=2),)))
"""


def prepare() -> None:
    """Fills the current directory."""
    shutil.copy(TINY, "tiny.py")
    sys.path.insert(0, os.getcwd())
    Path("empty").mkdir()
    Path("text").mkdir()
    for i in range(4):
        Path("text", f"{i}.txt").write_text(f"{i}: what a model of text remembers")
    Path("small.py").write_text(SMALL)
    config = load_experiment("small.py")
    arrays = {"params": jax.eval_shape(lambda: init_state(config)).params}
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arrays)
    with CheckpointStore("run/checkpoints", config.checkpoint, to_json(config)) as store:
        store.save(1, arrays, {})
        store.save(2, arrays, {})
    Path("run", "config.json").write_text(json.dumps(to_json(config)))
    TableStore.create("rows", 9, {"values": RowArray(4)})


def _make(config):
    return config.make(D, rngs=nnx.Rngs(0))


def _on_mesh(config: MeshConfig, build):
    with use_mesh(make_mesh(config)):
        return jax.eval_shape(build)


def _names() -> dict:
    ones = jnp.ones((2, 8), jnp.int32)
    left_padded = jnp.broadcast_to(jnp.array([0, 0, 1, 1, 1, 1, 1, 1]), (2, 8))
    known = {}
    for module in MODULES.split():
        known |= vars(importlib.import_module(f"jaxmem.{module}"))
    here = {"make": _make, "on_mesh": _on_mesh, "x": jnp.zeros((2, 8, D)), "ids": ones, "left_padded": left_padded}
    return known | globals() | here


def _expression(group: str, text: str) -> Row:
    try:
        eval(text, _names())
    except Exception as error:
        code = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        return Row(group, f"`{text}`", code, _scrubbed(str(error)))
    return Row(group, f"`{text}`", "", "")


def _command(group: str, line: str, shown: str | None = None) -> Row:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = str(cli.main(shlex.split(line)))
        except BaseException as error:
            code, _ = type(error).__name__, errors.write(f"Traceback: {error}")
    sentence = "\n".join(
        line for line in errors.getvalue().splitlines() if line and not line[0].isdigit()
    )  # statistics
    prefix = "jaxmem: " if sentence.startswith("jaxmem: ") else ""
    return Row(group, shown or f"`jaxmem {line}`", code, _scrubbed(sentence.removeprefix(prefix)))


def _scrubbed(text: str) -> str:
    """Without what another machine or moment would say otherwise."""
    for path, name in ((os.path.realpath("."), "."), (os.getcwd(), "."), (sys.prefix, "PYTHON"), (str(ROOT), "...")):
        text = text.replace(path, name)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
    return re.sub(r"\b(pid|process) \d{3,}\b", r"\1 N", text)


def table(found: list[Row]) -> str:
    """The page docs/bad_input.md."""
    lines = [
        "# What is said of wrong input",
        "",
        f"{len(found)} wrong inputs and what comes of each: the exit code (2: the input, 1: the machine, 0: it went on and",
        "says with what; of expressions in Python the exception) and the one sentence. `python tests/bad_input.py --write",
        "docs/bad_input.md` runs them all and writes this page; `tests/test_bad_input.py` runs some. On eight devices;",
        "`tiny.py` is `tests/training/tiny.py`, `small.py` the same with attention alone.",
    ]
    escaped = lambda text: text.replace("|", "\\|").replace("\n", " / ")
    for group in GROUPS:
        lines += ["", f"## {group.capitalize()}", "", "| input | code | sentence |", "|---|---|---|"]
        for row in found:
            if row.group == group:
                lines.append(f"| {escaped(row.shown)} | {row.code} | {escaped(row.sentence)} |")
    return "\n".join(lines) + "\n"


def read(page: str) -> dict[str, tuple[str, str]]:
    """What the page says: input -> (code, sentence)."""
    cells = (
        re.split(r"(?<!\\) \| ", line[2:-2])
        for line in page.splitlines()
        if line.startswith("| ") and "|---" not in line
    )
    return {cell[0].replace("\\|", "|"): (cell[1], cell[2].replace("\\|", "|")) for cell in cells if cell[0] != "input"}


def main(argv: list[str]) -> int:
    page = Path(argv[1]).absolute() if argv[:1] == ["--write"] else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        found = list(rows())
        os.chdir("/")
    if page is not None:
        page.write_text(table(found))
    unclear = [row for row in found if not row.is_clear]
    for row in unclear:
        print(f"UNCLEAR {row.group}: {row.shown}\n    {row.code or 'no error'}: {row.sentence[:600]}")
    print(f"{len(found)} rows, {len(unclear)} of them unclear")
    return 1 if unclear else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
