"""The training loop: batches in, checkpoints and metrics out, exact when interrupted and resumed.

What a run's folder holds: `jaxmem.training.run_folder`.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxmem.checkpoints import CheckpointError, CheckpointStore
from jaxmem.config import to_json
from jaxmem.models.tokenizer import Tokenizer
from jaxmem.programs import keep_programs, timed
from jaxmem.sharding import make_mesh, use_mesh
from jaxmem.sharding.rings import compiler_options
from jaxmem.sharding.rules import rules_of
from jaxmem.training import rates
from jaxmem.training.agreement import agree, run_facts
from jaxmem.training.clock import Clock
from jaxmem.training.data import heldout_batches, read_text, train_batches
from jaxmem.training.evaluation import Evaluation, evaluate, make_eval_step
from jaxmem.training.experiment import TrainConfig
from jaxmem.training.finish import finish
from jaxmem.training.identity import NAMES, check_identity, data_identity, keep_tokenizer, tokenizer_to_train_with
from jaxmem.training.metrics import MetricsWriter, replace_file
from jaxmem.training.not_finite import NotFinite, advice, describe_not_finite
from jaxmem.training.optimizer import without_kind
from jaxmem.training.own_code import keep_code
from jaxmem.training.placement import (
    any_process,
    gather_states,
    on_devices,
    on_mesh,
    require_fit,
    scatter_state,
    share_of_rows,
    to_host,
)
from jaxmem.training.profile import Profile
from jaxmem.training.progress import Progress
from jaxmem.training.resume import MAY_CHANGE as MAY_CHANGE
from jaxmem.training.resume import check_config, check_run_dir, notes_on_config
from jaxmem.training.run_folder import CHECKPOINTS, CONFIG_FILE, TABLES, locked, mark_checkpoints
from jaxmem.training.signals import Stop, stop_on_signals
from jaxmem.training.step import Shifted, StepMetrics, TrainState, init_state, make_train_step, shifted
from jaxmem.training.table_checkpoints import TableCheckpoints
from jaxmem.training.utilisation import Utilisation, peak_memory_bytes

STEPS_BETWEEN_STOPS = 16
"""With several processes, a signal stops the run at a multiple of this many steps, on which all agree."""

Metrics = MetricsWriter | None
"""The writer of the first process; the others write nothing."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    stopped: bool
    """A signal ended it early, with everything saved."""


def train(
    config: TrainConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    from_step: int | None = None,
    experiment: str | Path | None = None,
    command: str | None = None,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Runs an experiment to its end, or until `signals` ask it to stop, then saved so that `resume` goes on exactly there.

    Args:
      resume: go on from the newest checkpoint in run_dir, or from the start if there is none yet.
      from_step: go on from this checkpoint instead; later ones are renamed, and are then no longer the newest.
      experiment: the file that made the config; the run keeps a copy.
      command: the command line without --resume, for messages.
      profile: the first and the last of some steps to trace, into run_dir/profile.

    Raises:
      ValueError: a folder with another run or in use, a config, data or mesh that does not fit; each says what to change.
      NotFinite: the loss became NaN or infinite; the last checkpoint is kept.
      CheckpointError: a checkpoint could not be written; earlier ones are intact.
    """
    run_dir = Path(run_dir)
    keep_programs()
    agree(lambda: run_facts(config, run_dir, resume) | {"--from-step": from_step})
    tokenizer = tokenizer_to_train_with(config.data.tokenizer, run_dir, resume)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"train: needs model.vocab_size of at least the tokenizer's {tokenizer.vocab_size}, "
            f"got vocab_size={config.model.vocab_size}; raise it, or use the tokenizer of this model"
        )
    is_main, began = jax.process_index() == 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        notes = [_lock(run_dir, stack)]
        check_run_dir(run_dir, config, resume, from_step)
        mesh = make_mesh(config.mesh) if jax.device_count() > 1 or max(config.mesh.sizes) > 1 else None
        run = _Run(config, tokenizer, mesh, run_dir)
        agree(lambda: {NAMES[name]: digest for name, digest in run.identity.items()})
        store = stack.enter_context(CheckpointStore(run_dir / CHECKPOINTS, config.checkpoint, to_json(config)))
        stop = stack.enter_context(stop_on_signals())
        with use_mesh(mesh, rules_of(config.mesh)):
            state, batches, told = run.start(store, from_step)
            config = run.config  # with the rates that the run goes on with
            as_json, first = to_json(config), int(state.step)
            traced = Profile(profile if is_main else None, run_dir, first, config.steps)
            stack.callback(traced.end)
            notes += told + ([said] if (said := without_kind(state.params)) else [])
            if resume and not first:
                notes.append(f"no checkpoint in {run_dir} to resume from: starting at step 0")
            metrics = None
            if is_main:
                keep_tokenizer(tokenizer, config.data.tokenizer, run_dir)
                notes += keep_code(run_dir, as_json, experiment, first)
                replace_file(run_dir / CONFIG_FILE, json.dumps(as_json, indent=2) + "\n")
                mark_checkpoints(run_dir)
                drop_steps = 2 * config.checkpoint.every_steps if from_step is None else 0  # a kill leaves no more
                metrics = stack.enter_context(MetricsWriter(run_dir, first, drop_steps))
                notes += metrics.notes
            console = None if is_main else Console(quiet=True)
            progress = stack.enter_context(Progress(config.steps, first, console, on_closed=stop.close_output))
            for line in (*run.reports(), *filter(None, notes)):
                progress.say(line)
            if first < config.steps:
                progress.say("compiling the training step, which may take a minute")
            try:
                state, evaluation, stopped = run.steps(state, batches, store, stop, metrics, progress, traced)
            except NotFinite as error:
                with contextlib.suppress(CheckpointError):
                    store.wait()
                command = command or f"jaxmem train EXPERIMENT.py --out {run_dir}"
                raise NotFinite(f"{error}; {advice(config, store.steps(), command)}") from error
            step = int(state.step)
            store.wait()
            if stopped:
                progress.say(
                    f"{stop}: stopped after step {step}, all is saved; --resume goes on from there", always=True
                )
                return Outcome(step, stopped=True)
            if evaluation is None:
                evaluation = run.evaluate(state, None)
        for report in run.failed_reads():
            progress.say(f"some text could not be read again, or was not the same, and was left out: {report}")
        params = to_host(state.params)
        if metrics is not None:
            summary = finish(config, tokenizer, params, run.heldout, evaluation, metrics, run_dir, began)
            progress.say(summary)
    return Outcome(step, stopped=False)


def _lock(run_dir: Path, stack: contextlib.ExitStack) -> str:
    """The first of the processes of a run holds its folder, for all of them; returns what to tell.

    Raises: ValueError on all, if another run holds it; OSError if it cannot be written.
    """
    note, failed = "", None
    if jax.process_index() == 0:
        try:
            note = stack.enter_context(locked(run_dir))
        except (ValueError, OSError) as error:
            failed = error
    if any_process(failed is not None):
        raise failed or ValueError(
            f"run: needs a folder that no other run writes to, got {str(run_dir)!r}, which the first process could not lock; "
            "see what that says"
        )
    return note


class _Run:
    """What stays the same from the first step to the last."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh | None, run_dir: Path):
        touched = config.checkpoint.tables == "touched"
        self.tables = TableCheckpoints(run_dir / TABLES, config) if touched else None
        self.config, self.tokenizer, self.mesh, self.run_dir = config, tokenizer, mesh, run_dir
        self.share, self.place = share_of_rows(mesh), on_mesh(mesh)
        text = read_text(config.data, tokenizer)
        self.pieces, self.heldout = text
        self.identity = data_identity(text, tokenizer)
        self.told_of_failures, self.save_s = False, 0.0
        self.utilisation = Utilisation(config.model, config.data.context_tokens)
        require_fit(config, mesh)
        self.train_step = self._compiled_step(config)
        self.eval_step = jax.jit(make_eval_step(config.model))

    def _compiled_step(self, config: TrainConfig) -> Callable[[TrainState, Shifted], tuple[TrainState, StepMetrics]]:
        options = compiler_options(self.mesh)
        return jax.jit(make_train_step(config), donate_argnums=0, compiler_options=options)

    def start(self, store: CheckpointStore, from_step: int | None = None) -> tuple[TrainState, Any, list[str]]:
        """The state and the data to begin with: those of a checkpoint, of the newest intact one if not said, or new ones."""
        batches = train_batches(self.config.data, self.tokenizer, *self.share, pieces=self.pieces)
        fresh = jax.jit(lambda: init_state(self.config))
        if not store.steps() and from_step is None:
            if self.tables is not None:
                self.tables.forget()  # what was saved for a checkpoint that was never complete
            state = fresh()
            if self.mesh is None:  # committed, as restored arrays are, so that both go on with the same compiled step
                state = jax.device_put(state, jax.local_devices()[0])
            return state, batches, []
        abstract = on_devices(jax.eval_shape(fresh), self.mesh)
        restored = store.restore(abstract._asdict() if self.tables is None else self.tables.rest(abstract), from_step)
        check_config(self.run_dir, restored.run_config, self.config)
        check_identity(restored.data_state.get("data"), self.identity, restored.step)
        if restored.step > self.config.steps:
            raise ValueError(
                f"resume: needs at least the {restored.step} steps that the checkpoint has made, "
                f"got steps={self.config.steps}; raise --steps, or start a new run with --out"
            )
        batches.set_state(scatter_state(restored.data_state["iterators"]))
        notes = [f"passed over: {note}" for note in restored.notes]
        if from_step is not None and (later := store.set_aside_after(from_step)):
            tables = "" if self.tables is None else ", without the rows of their memory tables, which are rewound"
            notes.append(f"set aside, and not deleted: the checkpoints of steps {later}{tables}")
        notes += notes_on_config(self.run_dir, restored.run_config, self.config)
        state = TrainState(**restored.tree) if self.tables is None else self.tables.restore(restored.tree, abstract)
        is_done = ", the last: no step is left, the report is made again" if restored.step == self.config.steps else ""
        notes.append(f"resumed from the checkpoint of step {restored.step}{is_done}")
        config, of_rates = rates.resumed(self.config, restored.run_config, restored.step)
        if config != self.config:
            self.config, self.train_step = config, self._compiled_step(config)
            store.describe(to_json(config))
        return state, batches, [*notes, *of_rates]

    def steps(
        self,
        state: TrainState,
        batches,
        store: CheckpointStore,
        stop: Stop,
        metrics: Metrics,
        progress: Progress,
        profile: Profile,
    ) -> tuple[TrainState, Evaluation | None, bool]:
        """Steps to the end or to a signal; each is read back when the next is on its way, so that neither waits.

        Returns the state, the evaluation of that state if there was one, and whether a signal stopped it.
        """
        config, clock, pending, evaluation, stopping = self.config, Clock(), None, None, False
        step = first = int(state.step)
        while step < config.steps and not stopping:
            if profile.begins_at(step + 1):
                if pending is not None:  # what is under way is none of it
                    self.tell(*pending, clock, metrics, progress)
                    pending = None
                profile.begin()
            batch = next(batches)
            placed = jax.tree.map(lambda rows: self.place(self.parts(rows)), shifted(batch))
            clock.dispatch(idle=pending is None or pending[1].finite.is_ready())
            if step == first:
                with timed() as compiling:
                    state, told = self.train_step(state, placed)
                progress.say(f"the training step was {compiling}")
            else:
                state, told = self.train_step(state, placed)
            step += 1
            if pending is not None:
                self.tell(*pending, clock, metrics, progress)
            pending, evaluation = (step, told), None

            last = step == config.steps
            evaluation_due = last or step % config.eval_every_steps == 0
            save_due = last or step % config.checkpoint.every_steps == 0
            if jax.process_count() == 1 or step % STEPS_BETWEEN_STOPS == 0:
                stopping = any_process(bool(stop)) and not last
            if evaluation_due or save_due or stopping or profile.ends_at(step):
                self.tell(*pending, clock, metrics, progress)
                pending = None
                if (profile.ends_at(step) or stopping) and (traced := profile.end()):
                    progress.say(traced)
                if evaluation_due:
                    evaluation = self.evaluate(state, None if last else config.eval_bytes)
                    if metrics is not None and evaluation is not None:
                        metrics.write("eval", step, **dataclasses.asdict(evaluation))
                if save_due or stopping:
                    began = time.perf_counter()
                    data_state = {
                        "data": self.identity,
                        "iterators": gather_states(batches.get_state()),
                    }
                    if self.tables is not None:
                        store.wait()  # so that what is complete stays so
                        state = self.tables.save(state, store.steps())
                    tree = state._asdict() if self.tables is None else self.tables.rest(state)
                    store.save(step, tree, data_state, evaluation and evaluation.bits_per_byte)
                    self.save_s += time.perf_counter() - began
                clock.restart()
        return state, evaluation, stopping

    def tell(self, step: int, told: StepMetrics, clock: "Clock", metrics: Metrics, progress: Progress) -> None:
        """Waits for a step, then writes and shows it. Raises NotFinite if it was not made."""
        told = jax.device_get(told)
        step_s, wait_s = clock.read()
        n_targets = float(told.n_targets)
        bits_per_byte = float(told.nats) / math.log(2) / max(int(told.n_bytes), 1)
        loss = float(told.nats) / max(n_targets, 1)
        mfu, memory_bytes, save_s = self.utilisation.mfu(n_targets / step_s), peak_memory_bytes(), self.save_s
        self.save_s = 0.0
        if metrics is not None:
            metrics.write(
                "train",
                step,
                loss=loss,
                bits_per_byte=bits_per_byte,
                load_balance=told.load_balance,
                grad_norm=told.grad_norm,
                learning_rate=told.learning_rate,
                tokens_per_s=n_targets / step_s,
                step_s=step_s,
                wait_s=wait_s,
                save_s=save_s,
                **({} if mfu is None else {"mfu": mfu}),
                **({} if memory_bytes is None else {"peak_memory_bytes": memory_bytes}),
            )
        more = [] if mfu is None else [f"MFU {mfu:.1%}"]
        more += [] if memory_bytes is None else [f"{memory_bytes / 2**30:.2f} GiB"]
        more += [
            f"{word} {s:.1f} s" for word, s in (("waited", wait_s), ("saved", save_s)) if s > max(0.05 * step_s, 0.05)
        ]
        progress.update(step, loss, bits_per_byte, n_targets / step_s, more)
        if self.pieces.report.failed_reads and not self.told_of_failures:
            self.told_of_failures = True
            progress.say(f"step {step}: some text cannot be read again, or is not the same: {self.pieces.report}")
        if not told.finite:
            raise NotFinite(describe_not_finite(step, told))

    def evaluate(self, state: TrainState, max_bytes: int | None) -> Evaluation | None:
        """None if there is no held-out text."""
        if self.heldout is None:
            return None
        batches = heldout_batches(
            self.config.data, self.tokenizer, *self.share, max_bytes=max_bytes, pieces=self.heldout
        )
        step = lambda batch: self.eval_step(state.params, batch)
        return evaluate(step, batches, self.config.model, self.place)

    def parts(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(self.config.accumulate, -1, rows.shape[-1])

    def reports(self) -> list[str]:
        """A line each on the text to train on and the text held out."""
        heldout = "none, so there is no evaluation" if self.heldout is None else self.heldout.report
        return [f"training data: {self.pieces.report}", f"held-out data: {heldout}"]

    def failed_reads(self) -> list[str]:
        """What each process could not read again, every line once; all must ask."""
        reports = [pieces.report for pieces in (self.pieces, self.heldout) if pieces is not None]
        everyone = gather_states([str(report) for report in reports if report.failed_reads])
        return list(dict.fromkeys(line for lines in everyone for line in lines))
