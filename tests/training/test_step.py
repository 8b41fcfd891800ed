"""The training step: one result on every mesh and in every number of parts, and a state that nothing can break."""

import math
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from steps import VOCAB, B, T, as_batch, assert_close, fresh, make_batch, relative_errors, relative_rms

from jaxmem.layers.attention import AttentionConfig
from jaxmem.layers.gated_delta_net import GatedDeltaNetConfig
from jaxmem.layers.mixture_of_memories import MixtureOfMemoriesConfig, MixtureState, route
from jaxmem.models.decoder import DecoderConfig
from jaxmem.planning.replica_groups import is_alone
from jaxmem.sharding import MeshConfig, current_rules, make_mesh, use_mesh
from jaxmem.sharding.rules import rules_of
from jaxmem.training.data import DataConfig
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.optimizer import OptimizerConfig, parameter_groups
from jaxmem.training.placement import on_mesh
from jaxmem.training.step import balance_loss, init_state, make_train_step, merge

EVERY_MIXER = (
    AttentionConfig(2),
    AttentionConfig(2, window=5),
    GatedDeltaNetConfig(2, 8, 8, chunk_tokens=8),
    MixtureOfMemoriesConfig(GatedDeltaNetConfig(2, 8, 8, chunk_tokens=8)),
)
MIXTURE = EVERY_MIXER[-1:]
SLOW, FULL = pytest.mark.slow, (pytest.mark.slow, pytest.mark.full)
PRODUCT = MeshConfig(data=2, fsdp=2, model=2)
SPLIT = MeshConfig(data=1, fsdp=2, seq=2, model=2)
BALANCED = MeshConfig(data=1, fsdp=2, seq=4, layout="zigzag", parameters=("fsdp", "seq"))
"""For models of attention alone; SPLIT is for all."""
DATA = MeshConfig(data=8)
MESHES = (
    DATA,
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=4, model=2),
    PRODUCT,
    MeshConfig(data=1, fsdp=4, model=2),
)


def experiment(pattern=(AttentionConfig(2),), *, accumulate=1, load_balance=0.0, z_loss=0.0, optimizer=None, **model):
    """A run of a tiny decoder. The optimiser, unless given, keeps each gradient as it is in its state: see `gradients`."""
    return TrainConfig(
        model=DecoderConfig(d_model=16, d_ffn=32, pattern=pattern, vocab_size=VOCAB, **model),
        data=DataConfig(train=("unused",), batch_size=B),
        optimizer=optimizer or OptimizerConfig(learning_rate=0.1, schedule="constant", b1=0.0, clip_norm=None),
        steps=10,
        accumulate=accumulate,
        load_balance=load_balance,
        z_loss=z_loss,
    )


@cache
def compiled(config):
    return jax.jit(make_train_step(config))


def run(config, n_steps=1, state=None, batch=None):
    """The state and the metrics after some steps."""
    state = fresh(config) if state is None else state
    for seed in range(n_steps):
        state, metrics = compiled(config)(state, as_batch(*(batch or make_batch(seed, config.accumulate))))
    return state, metrics


def gradients(state):
    """By name, of the last step of an optimiser with b1 = 0: Adam's mean of gradients is then the gradient."""
    means = optax.tree_utils.tree_get(state.opt_state, "mu")
    return dict(zip(parameter_groups(means), jax.device_get(jax.tree.leaves(means)), strict=True))


def assert_bitwise(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


OPTIMIZERS = {
    # Adam's first steps divide a gradient by its own size, which makes noise of zeros: eps of the size of the gradients
    # keeps the update a smooth function of them. The embedding starts at 0.02; a step that moves it by its own size would
    # multiply the rounding of the first gradient a hundredfold into the second.
    "adamw": OptimizerConfig(learning_rate=0.01, schedule="constant", eps=0.1),
    "muon": OptimizerConfig(kind="muon", learning_rate=0.1, schedule="constant", eps=0.1),
    "stacked": OptimizerConfig(learning_rate=0.01, schedule="constant", eps=0.1),
}


@cache
def of_optimizer(kind):
    """Every mixer under AdamW; Muon, which compiles slowly and sees no more than gradients, with one; and a stack of two."""
    if kind == "stacked":
        options = {"pattern": MIXTURE, "repeats": 2, "remat": "block"}
    else:
        options = {"pattern": EVERY_MIXER if kind == "adamw" else EVERY_MIXER[:1]}
    return experiment(**options, optimizer=OPTIMIZERS[kind], load_balance=0.1, z_loss=1e-3)


def two_steps(step, state, place):
    """The states and metrics behind each of two steps, on the host, and the last state where it is.

    Adam's mean of squares is told by its root, whose relative error is that of the gradients.
    """
    after = []
    for seed in range(2):
        state, metrics = step(state, jax.tree.map(place, as_batch(*make_batch(seed))))
        root = jax.tree.map(jnp.sqrt, optax.tree_utils.tree_get(state.opt_state, "nu"))
        told = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, nu=root))
        after.append(jax.device_get((told, metrics)))
    return after, state


@cache
def alone(kind):
    return two_steps(compiled(of_optimizer(kind)), fresh(of_optimizer(kind)), jnp.asarray)[0]


@cache
def moved_by_rounding(kind):
    """How far one device alone comes from its own result when every parameter is first rounded anew, up or down.

    Of four draws the farthest: from one to the next, a norm moves by ten times more or less.

    Eight devices add up in other orders than one, which is no more than such rounding in between. The second step's
    gradients of a stack, and sums that cancel such as that of a_log, feel it by 1e-5 and more.
    """
    config, moved = of_optimizer(kind), Counter()
    for seed in range(4):
        numbers, state = np.random.default_rng(seed), fresh(config)
        towards = jax.tree.map(lambda p: numbers.choice(np.float32([-np.inf, np.inf]), p.shape), state.params)  # noqa: B023
        state = state._replace(params=jax.tree.map(np.nextafter, state.params, towards))
        moved |= Counter(relative_errors(two_steps(compiled(config), state, jnp.asarray)[0], alone(kind)))
    return moved


def where_it_belongs(config, mesh):
    """The sharding of every array of a state: parameters and the optimiser's copies of them by the rules."""
    is_param = lambda node: isinstance(node, nnx.Variable)

    def sharding(node):
        axes = (None,) * (node.ndim - len(node.axes)) + tuple(node.axes) if is_param(node) else ()
        return NamedSharding(mesh, current_rules().spec(axes, "parameters"))

    state = jax.eval_shape(lambda: init_state(config))
    return jax.tree.map(lambda node: jax.tree.map(lambda _: sharding(node), node), state, is_leaf=is_param)


def assert_placed(state, shardings):
    placed = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), state, shardings)
    wrong = [path for path, ok in jax.tree_util.tree_leaves_with_path(placed) if not ok]
    assert not wrong, [jax.tree_util.keystr(path) for path in wrong]


def collectives(program) -> Counter:
    """How often each collective stands in a compiled program; those of every device with itself do not count."""
    names = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    text = "\n".join(line for line in program.as_text().splitlines() if not is_alone(line))
    return Counter(re.findall(names, text))


def kinds_and_meshes():
    """One in every session; each kind on one more, and where exchanges are counted, in `.ci/run`; the others are full."""
    marks = {("muon", PRODUCT): (), ("muon", BALANCED): SLOW, ("adamw", SPLIT): SLOW}
    marks |= {("adamw", DATA): SLOW, ("stacked", MESHES[1]): SLOW}
    for kind in OPTIMIZERS:
        for mesh in (*MESHES, BALANCED if kind == "muon" else SPLIT):
            yield pytest.param(kind, mesh, id=f"{kind}-{mesh}", marks=marks.get((kind, mesh), FULL))


@pytest.mark.parametrize("kind, config", list(kinds_and_meshes()))
def test_two_steps_on_a_mesh_are_those_of_one_device(kind, config):
    mesh, experiment = make_mesh(config), of_optimizer(kind)
    with use_mesh(mesh, rules_of(config)):
        shardings, place = where_it_belongs(experiment, mesh), on_mesh(mesh)
        state = jax.device_put(fresh(experiment), shardings)
        step = jax.jit(make_train_step(experiment))
        program = step.lower(state, jax.tree.map(place, as_batch(*make_batch()))).compile()
        after, state = two_steps(program, state, place)

    assert_close(after, alone(kind), rounding=moved_by_rounding(kind))
    assert_placed(state, shardings)
    mixer = state.params["blocks"][0]["mixer"]
    query = (mixer["query"] if "query" in mixer else mixer["projections"]["weight"]["query"])[...]
    n_parts = math.prod(getattr(config, axis) for axis in config.parameters)
    assert query.addressable_shards[0].data.shape[1:] == (16 // n_parts, 2 // config.model, 8)
    if config == DATA:
        found = collectives(program)
        assert found.keys() == {"all-reduce"} and found["all-reduce"] <= 5, "only gradients and metrics need others"


def test_a_state_is_born_where_it_belongs():
    config, mesh = of_optimizer("stacked"), make_mesh(MESHES[3])
    with use_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        assert_placed(state, where_it_belongs(config, mesh))
    assert_close(jax.device_get(state), fresh(config), 1e-6)


# On one device.


def plain_loss(config, params, tokens, segment_ids):
    """Mean nats over targets from all logits, the targets found one by one."""
    model = merge(config.model, params)
    logits = model.logits(model(jnp.asarray(tokens[:, :-1]), segment_ids=jnp.asarray(segment_ids[:, :-1]))[0])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    counted = [(b, t) for b, t in np.ndindex(B, T) if segment_ids[b, t] == segment_ids[b, t + 1] != 0]
    rows, times = np.array(counted).T
    return jnp.mean(nats[rows, times]), len(counted)


def test_targets_are_of_the_same_segment():
    segments = np.array([[1, 1, 2, 3, 3, 0], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(as_batch(segments, segments).counts, [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_loss_and_gradients_are_those_of_all_logits_in_any_number_of_parts(parts):
    config = experiment(accumulate=parts)
    state, metrics = run(config)
    tokens, segments = (x[0] for x in make_batch())
    weights = [np.sum(as_batch(part, part).counts) for part in np.split(segments, 4)]
    assert len(set(map(float, weights))) > 2, "parts of equal weight could not tell one mean from the other"

    @jax.jit
    def oracle(params):
        return jax.value_and_grad(lambda params: plain_loss(config, params, tokens, segments), has_aux=True)(params)

    (loss, n_targets), wanted = oracle(fresh(config).params)
    assert metrics.n_targets == n_targets
    assert metrics.n_bytes == tokens[segments != 0].sum(), "also those of a row's first token"
    assert_close(metrics.nats / metrics.n_targets, loss)
    assert_close(gradients(state), dict(zip(parameter_groups(wanted), jax.tree.leaves(wanted), strict=True)))
    assert_close(metrics.grad_norm, optax.tree.norm(wanted))


def test_padding_counts_nothing_whatever_it_holds():
    config = experiment()
    tokens, segments = make_batch()
    other = np.where(segments == 0, 63 - tokens, tokens)
    assert (other != tokens).sum() > 30
    want, got = run(config, batch=(tokens, segments)), run(config, batch=(other, segments))
    assert_close(got[0].params, want[0].params, 1e-7)
    assert got[1].n_targets == want[1].n_targets and got[1].nats == want[1].nats


def test_a_batch_of_nothing_but_padding_gives_no_gradient():
    state, metrics = run(experiment(), batch=tuple(0 * x for x in make_batch()))
    assert metrics.finite and metrics.nats == 0 and metrics.grad_norm == 0
    assert not any(np.any(gradient) for gradient in gradients(state).values())


def test_a_step_is_a_pure_function():
    config = experiment()
    assert_bitwise(run(config, 2), run(config, 2))
    (once, _), (twice, _) = run(config, 1), run(config, 2)
    assert (once.step, twice.step) == (1, 2)
    assert relative_rms(twice.params["embedding"]["table"][...], once.params["embedding"]["table"][...]) > 1e-3


@pytest.mark.slow
def test_bf16_computes_near_fp32_and_keeps_everything_else_in_fp32():
    (state, metrics), (wanted, told) = (run(experiment(MIXTURE, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, wanted)
    assert metrics.finite
    assert_close(metrics.nats, told.nats, 1e-2)
    for name, gradient in gradients(state).items():
        other = gradients(wanted)[name]
        cosine = np.sum(gradient * other) / np.sqrt(np.sum(gradient**2) * np.sum(other**2))
        assert cosine > 0.97, f"{name}: {cosine}"  # 8 bits, and a choice of memories now and then


BROKEN = {
    "a parameter": (lambda params: params["blocks"][0]["ffn"]["up"], np.nan, "param_norms", ["blocks/0/ffn"]),
    # logits = <output, scale x>: each gradient has the size of the other factor, and 1e25 has a square beyond fp32.
    "a gradient": (lambda params: params["norm"]["scale"], 1e-25, "grad_norms", ["norm"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_finite_is_named_and_leaves_the_state_as_it_was(what):
    config = experiment(tie_embeddings=False)
    parameter, value, norms, groups = BROKEN[what]
    state, _ = run(config)
    state = jax.tree.map(jnp.copy, state)
    parameter(state.params)[...] = jnp.full_like(parameter(state.params)[...], value)
    if what == "a gradient":
        state.params["output"][...] = state.params["output"][...] * 1e25

    after, metrics = run(config, state=state)
    assert not metrics.finite
    assert [group for group, norm in getattr(metrics, norms).items() if not np.isfinite(norm)] == groups
    assert_bitwise(after, state)
    assert after.step == 1


def test_a_run_traces_once_and_gives_its_state_away():
    config, traces = experiment(), []

    def counted(*args):
        traces.append(None)
        return make_train_step(config)(*args)

    step = jax.jit(counted, donate_argnums=0)
    state = jax.device_put(fresh(config))
    for seed in range(3):
        before = state
        state, metrics = step(state, jax.tree.map(jnp.asarray, as_batch(*make_batch(seed))))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert len(traces) == 1
    assert_bitwise((state, metrics), run(config, 3))


@pytest.mark.slow
def test_the_load_balancing_loss_reaches_the_routers():
    (_, without), (_, balanced) = (run(experiment(MIXTURE, **loss)) for loss in ({}, {"load_balance": 1.0}))
    assert without.load_balance == balanced.load_balance >= 1.9, "2 memories of 4 per token: 2 if even"
    assert without.nats == balanced.nats
    assert relative_rms(balanced.grad_norms["blocks/0/mixer"], without.grad_norms["blocks/0/mixer"]) > 1e-3


SMALL = MixtureOfMemoriesConfig(GatedDeltaNetConfig(1, 4, 4, chunk_tokens=8), top_k=1, shared_memory=False)


@pytest.mark.parametrize("repeats", [4, 2, 1])
def test_the_load_balancing_loss_is_of_single_routers_however_layers_are_written(repeats):
    """The router of layer l sends all of its tokens to memory l: even over layers, and collapsed in each."""
    pattern = (4 // repeats) * (SMALL,)
    config = DecoderConfig(d_model=16, d_ffn=16, pattern=pattern, repeats=repeats)

    @jax.jit
    @jax.value_and_grad
    def loss(routers):
        real = jnp.ones((2, 16), bool)
        use = [route(jnp.broadcast_to(logits, (2, 16, 4)), real, 1)[2] for logits in routers]
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *use[place :: len(pattern)]) for place in range(len(pattern))]
        return balance_loss(config, tuple(MixtureState(None, None, None, use, {}, None) for use in stacked))

    value, gradient = loss(4 * jnp.eye(4))
    alone = 4 * jax.nn.softmax(jnp.array([4.0, 0, 0, 0]))[0]
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    assert np.all(np.diag(gradient) > 0.04), "every router feels it"
