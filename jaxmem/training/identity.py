"""What decides which tokens a model reads, as digests that a checkpoint holds: the texts, the split, and the tokenizer.

A run's folder holds its tokenizer.json, byte for byte: generation and a resumed run use that one, whatever has become of the
file that the config names.
"""

import hashlib
from pathlib import Path

import numpy as np

from jaxmem.models.tokenizer import Tokenizer, load_tokenizer, tokenizer_file
from jaxmem.training.data import Text
from jaxmem.training.metrics import replace_file
from jaxmem.training.run_folder import has_begun

TOKENIZER_FILE = "tokenizer.json"
PROBE_BYTES = 1 << 16
"""Of training text, whose tokens are part of what is compared: another version of a library may make others."""

NAMES = {
    "train": "the training data",
    "heldout": "the held-out data",
    "tokenizer": "the tokenizer",
    "tokens": "the version of the tokenizers library",
}


def data_identity(text: Text, tokenizer: Tokenizer) -> dict[str, str]:
    """One digest each of what is trained on, what is held out, the tokenizer, and the tokens of some of the text."""
    probe = hashlib.blake2b(digest_size=16)
    some = text.train.limit(PROBE_BYTES)
    for piece in range(len(some)):
        try:
            tokens = tokenizer.encode_counted(some[piece])
        except ValueError as error:
            raise ValueError(f"data: cannot use {some.name(piece)!r}: {error}") from error
        probe.update(np.stack(tokens).astype("<i4").tobytes())
    return {
        "train": text.train.fingerprint,
        "heldout": text.heldout.fingerprint if text.heldout is not None else "none",
        "tokenizer": _digest(tokenizer),
        "tokens": probe.hexdigest(),
    }


def check_identity(saved: dict[str, str] | None, now: dict[str, str], step: int) -> None:
    """Raises ValueError if a checkpoint was made with other data than those at hand; it names which."""
    if saved is None:
        raise ValueError(
            f"resume: needs a checkpoint that says what text it was made with, got that of step {step}, of an older jaxmem; "
            "finish the run with that version, or start a new one with --out"
        )
    changed = [name for name in NAMES if saved.get(name) != now[name]]
    if changed[:-1]:
        changed = [name for name in changed if name != "tokens"]  # of another text or tokenizer they are others
    if changed:
        names = " and ".join(NAMES[name] for name in changed)
        raise ValueError(
            f"resume: needs {names} that the checkpoint of step {step} was made with, "
            "got other contents; put them back, or start a new run with --out"
        )


def check_tokenizer(saved: dict[str, str] | None, tokenizer: Tokenizer, run_dir: Path) -> None:
    """Raises ValueError if a run's tokenizer is not that of its checkpoint; one of an older jaxmem does not say."""
    if saved is not None and saved.get("tokenizer") != _digest(tokenizer):
        raise ValueError(
            f"run: needs the tokenizer that the model was trained with, got other contents in {run_dir / TOKENIZER_FILE}; "
            "put back the file"
        )


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.blake2b(tokenizer.content, digest_size=16).hexdigest()


def tokenizer_of_run(spec: str, run_dir: Path) -> Tokenizer:
    """The tokenizer that a run's folder holds, or, in a folder of an older jaxmem, the one that the config names.

    Raises: ValueError as `load_tokenizer`.
    """
    kept = run_dir / TOKENIZER_FILE
    return load_tokenizer(str(kept) if spec != "bytes" and kept.exists() else spec)


def tokenizer_to_train_with(spec: str, run_dir: Path, resume: bool) -> Tokenizer:
    """The tokenizer of a new run, or of one that goes on.

    Raises: ValueError as `load_tokenizer`, and if what the config of a resumed run names is another one now; that it is
      gone does not matter.
    """
    if not (resume and has_begun(run_dir)):
        return load_tokenizer(spec)
    tokenizer = tokenizer_of_run(spec, run_dir)
    if spec != "bytes" and tokenizer_file(spec).exists() and load_tokenizer(spec).content != tokenizer.content:
        raise ValueError(
            f"resume: needs the tokenizer of the run in {str(run_dir)!r}, got tokenizer={spec!r} with other contents "
            f"than its copy {TOKENIZER_FILE} there; put back the one of them that was changed, or start a new run with --out"
        )
    return tokenizer


def keep_tokenizer(tokenizer: Tokenizer, spec: str, run_dir: Path) -> None:
    """Writes a new run's tokenizer into its folder, in one step."""
    kept = run_dir / TOKENIZER_FILE
    if spec == "bytes":
        kept.unlink(missing_ok=True)  # of a run that never began
        return
    replace_file(kept, tokenizer.content)
