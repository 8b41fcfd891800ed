"""Code as users write it, which type checkers accept: `mypy` in .ci/run, and `pyright tests/user_code.py`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

import jaxmem as jm


def a_layer() -> jax.Array:
    layer = jm.GatedDeltaNetConfig(n_heads=2, key_dim=4, value_dim=4).make(8, rngs=nnx.Rngs(0))
    y, state = jax.jit(layer)(jnp.zeros((1, 5, 8)))
    y, state = layer(y, state, segment_ids=jnp.ones((1, 5), jnp.int32))
    return y


def a_decoder() -> jm.Decoder:
    memories = jm.MixtureOfMemoriesConfig(
        jm.GatedDeltaNetConfig(n_heads=1, key_dim=4, value_dim=4), n_memories=2, top_k=1
    )
    config = jm.DecoderConfig(d_model=8, d_ffn=16, pattern=(memories, jm.AttentionConfig(n_heads=2)), vocab_size=256)
    print(jm.summary(config), jm.preset("mom-340m").n_layers)
    model = config.make(rngs=nnx.Rngs(0))
    hidden, _ = model(jnp.zeros((1, 4), jnp.int32))
    print(repr(model), model.logits(hidden).shape)
    return model


def a_run(config: jm.DecoderConfig, folder: str) -> int:
    experiment = jm.TrainConfig(
        model=config,
        data=jm.DataConfig(train=(folder,), context_tokens=16, batch_size=2),
        optimizer=jm.OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        checkpoint=jm.CheckpointConfig(every_steps=2),
        mesh=jm.MeshConfig(data=1),
        steps=2,
    )
    outcome = jm.train(experiment, f"{folder}/run", resume=False)
    return outcome.step + 1


def a_text(folder: str) -> Iterator[str]:
    run = jm.load_run(f"{folder}/run")
    yield from jm.generate_text(
        run.model, run.tokenizer, "a", max_tokens=3, sampling=jm.SamplingConfig(top_k=5), stop=["\n"]
    )
    texts, statistics = jm.generate_texts(run.model, run.tokenizer, ["a", "b"], max_tokens=3)
    yield f"{texts[0].upper()} {statistics.tokens_per_s:.1f}"


def on_a_mesh() -> jm.Decoder:
    with jm.use_mesh(jm.make_mesh(jm.MeshConfig(data=1))):
        return a_decoder()
