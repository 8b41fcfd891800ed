"""`import jaxmem as jm`: what it gives, what it costs, and how what it makes is shown."""

import importlib
import os
import pydoc
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import user_code
from flax import nnx

import jaxmem as jm
from jaxmem.showing import tree_text

SMALL = jm.DecoderConfig(
    d_model=8,
    d_ffn=16,
    pattern=(jm.GatedDeltaNetConfig(n_heads=1, key_dim=4, value_dim=4), *2 * (jm.AttentionConfig(n_heads=2),)),
)


def test_importing_loads_nothing_heavy():
    program = (
        "import sys, jaxmem; print({'jax', 'flax', 'numpy', 'optax', 'rich'} & set(sys.modules), jaxmem.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == (f"set() {jm.__version__}\n", "")


@pytest.mark.parametrize("name", dir(jm))
def test_names_are_those_of_their_modules_and_documented(name):
    found = getattr(jm, name)
    if not isinstance(found, type(jm)):
        assert getattr(importlib.import_module(found.__module__), name) is found
    assert found.__doc__
    assert name in pydoc.render_doc(jm) if name == "train" else True


@pytest.mark.slow
def test_code_as_users_write_it_runs(tmp_path):
    """And type checkers accept it: .ci/run."""
    (tmp_path / "a.txt").write_text("memory, state, chunk\n" * 40)
    with jax.default_device(jax.devices()[0]):
        assert user_code.a_layer().shape == (1, 5, 8)
        model = user_code.a_decoder()
    program = f"import user_code; m = user_code.a_decoder(); print(user_code.a_run(m.config, {str(tmp_path)!r})); print(*user_code.a_text({str(tmp_path)!r}), user_code.on_a_mesh().config.vocab_size)"  # noqa: E501
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert "\n3\n" in found.stdout and found.stdout.endswith(" 256\n") and model.config.vocab_size == 256


def test_what_is_no_name_is_refused():
    with pytest.raises(AttributeError, match="No jaxmem attribute trian"):
        jm.trian  # noqa: B018


def test_models_and_states_are_shown_as_trees_of_shapes():
    model = SMALL.make(rngs=nnx.Rngs(0))
    text = repr(model)
    assert text == str(model)
    assert text.splitlines()[0] == f"Decoder: {jm.summary(SMALL).cost.n_parameters:,} parameters, {4 * jm.summary(SMALL).cost.n_parameters:,} bytes"  # fmt: skip  # noqa: E501
    assert "  blocks.1 to blocks.2  Block: " in text, "equal neighbours are shown once"
    assert "      scale  float32[1, 8]" in text and len(text.splitlines()) < 60
    state = model.init_state(2, capacity=16)
    assert repr(state[1]).splitlines() == [
        "AttentionState: 2,072 bytes",
        "  k       float32[1, 2, 16, 2, 4]",
        "  v       float32[1, 2, 16, 2, 4]",
        "  length  int32[1, 2]",
        "  cursor  Cursor: 16 bytes",
        "    segment   int32[1, 2]",
        "    position  int32[1, 2]",
    ]
    abstract = nnx.eval_shape(lambda: SMALL.make(rngs=nnx.Rngs(0)))
    assert sorted(repr(abstract).splitlines()) == sorted(text.splitlines())
    shown = []
    jax.jit(lambda model: shown.append(repr(model)))(model)
    assert sorted(shown[0].splitlines()) == sorted(text.splitlines())
    assert "float32[2, 3]" in tree_text({"a": jnp.zeros((2, 3))})


def test_a_summary_is_a_table_of_what_a_model_costs(unchecked):
    text = repr(jm.summary(SMALL, 64))
    assert text.startswith("decoder: 3 layers, d_model 8, float32\n")
    assert text == repr(jm.summary(SMALL.make(rngs=nnx.Rngs(0)), 64)) and "state bytes at 64 tokens" in text
    assert repr(jm.summary("mom-340m")).startswith("mom-340m: 24 layers")
    with jm.use_mesh(jm.make_mesh(jm.MeshConfig(data=4, model=2))):
        assert repr(jm.summary(SMALL, 64)) == text
    with pytest.raises(ValueError, match="summary: needs a decoder, its config or a preset's name, got 3; pass one of"):
        jm.summary(3)
    with pytest.raises(ValueError, match="preset: needs one of"):
        jm.summary("mom")
