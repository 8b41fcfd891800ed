"""jaxmem: sequence models that remember, in JAX.

    import jaxmem as jm

    mixers = jm.GatedDeltaNetConfig(n_heads=2, key_dim=32, value_dim=32), jm.AttentionConfig(n_heads=2)
    config = jm.DecoderConfig(d_model=64, d_ffn=128, pattern=mixers)
    print(jm.summary(config))  # parameters, state, FLOPs; nothing is built
    run = jm.load_run("runs/quickstart")
    print("".join(jm.generate_text(run.model, run.tokenizer, "def main(", max_tokens=64)))

`__init__.pyi` lists the names by what they are for; each is imported when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
