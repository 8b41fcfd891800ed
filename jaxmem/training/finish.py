"""What a finished run leaves for people: a sample, the comparison with compressors, the report."""

import dataclasses
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxmem import __version__
from jaxmem.evals.compression import compress_sizes
from jaxmem.models.accounting import count_parameters
from jaxmem.models.tokenizer import Tokenizer
from jaxmem.training.evaluation import Evaluation
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.metrics import MetricsWriter
from jaxmem.training.pieces import Pieces
from jaxmem.training.report import write_report
from jaxmem.training.step import merge


def finish(
    config: TrainConfig,
    tokenizer: Tokenizer,
    params: nnx.State,
    heldout: Pieces | None,
    evaluation: Evaluation | None,
    metrics: MetricsWriter,
    run_dir: Path,
    began: float,
) -> str:
    """Writes the "final" line and report.html; returns a few lines that say how the run went.

    Args:
      heldout, evaluation: None: no text was held out, and nothing is said of it.
      began: time.monotonic() when this process began the run.
    """
    model = merge(config.model, params)
    sample = ""
    if config.sample_tokens:
        from jaxmem.models.generation import generate_text

        text = generate_text(model, tokenizer, config.sample_prompt, max_tokens=config.sample_tokens, seed=config.seed)
        sample = "".join(text)
    measured, rows = {}, ["no held-out text: nothing was evaluated"]
    if heldout is not None and evaluation is not None:
        measured, rows = _compared(config, heldout, evaluation)
    tokens_per_step = config.data.batch_size * config.data.context_tokens
    metrics.write(
        "final",
        config.steps,
        **measured,
        n_parameters=count_parameters(model),
        n_tokens=config.steps * tokens_per_step,
        wall_s=time.monotonic() - began,
        prompt=config.sample_prompt,
        sample=sample,
        machine=f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.platform()}",
        versions={"jaxmem": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    )
    path = write_report(run_dir)
    return "\n".join([*rows, f"report: {path}"])


def _compared(config: TrainConfig, heldout: Pieces, evaluation: Evaluation) -> tuple[dict[str, Any], list[str]]:
    """Fields of the "final" line and a few lines of text: the model's bits per byte beside those of compressors."""
    from jaxmem.training.router_plots import collapse  # draws, so not before there is something to draw

    piece_bytes = max(round(config.data.context_tokens * evaluation.n_bytes / evaluation.n_tokens), 1)
    compression = compress_sizes(heldout.by_file(), piece_bytes)
    rows = [f"  {'this model':12} {evaluation.bits_per_byte:6.3f} in pieces of {piece_bytes} bytes"]
    rows += [
        f"  {r.program:12} {r.bits_per_byte_pieces:6.3f} in pieces, {r.bits_per_byte_whole:.3f} whole files"
        for r in compression
    ]
    rows += [collapsed] if (collapsed := collapse(dataclasses.asdict(evaluation))) else []
    measured = {"bits_per_byte": evaluation.bits_per_byte, "n_bytes": evaluation.n_bytes, "compression": compression}
    return measured, ["held-out bits per byte:", *rows]
