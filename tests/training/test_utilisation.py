"""The share of a machine's arithmetic that a run puts into its model, against a count by hand; profiles."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxmem.layers.attention import AttentionConfig
from jaxmem.models.decoder import DecoderConfig
from jaxmem.training import utilisation
from jaxmem.training.profile import Profile, steps_to_profile
from jaxmem.training.utilisation import Utilisation, peak_memory_bytes

CONFIG = DecoderConfig(d_model=32, d_ffn=64, pattern=(AttentionConfig(n_heads=4),), repeats=3, vocab_size=100)
CONTEXT = 50


def on(monkeypatch, kind: str, platform: str, n: int = 4):
    monkeypatch.setattr(utilisation.jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform=platform)] * n)
    monkeypatch.setattr(utilisation.jax, "device_count", lambda: n)


def test_mfu_is_that_of_a_count_by_hand(monkeypatch):
    on(monkeypatch, "TPU v5 lite", "tpu")
    projections, feed_forward, head = 4 * 32 * 32, 3 * 32 * 64, 32 * 100
    scores = 2 * 32 * (CONTEXT + 1) / 2  # of half of the context on average, and the values
    by_hand = 2 * (3 * (projections + feed_forward + scores) + head + 7 * 32)  # seven norms
    mfu = Utilisation(CONFIG, CONTEXT).mfu(tokens_per_s=1e9)
    assert mfu == pytest.approx(1e9 * 3 * by_hand / (4 * 197e12), rel=1e-2)
    on(monkeypatch, "TPU v99", "tpu")
    assert Utilisation(CONFIG, CONTEXT).mfu(1e9) is None


def test_the_peak_of_a_cpu_is_measured_once(monkeypatch):
    peak = utilisation.peak_flops_per_s()
    assert 1e9 < peak < 1e14 and utilisation.peak_flops_per_s() == peak
    assert Utilisation(CONFIG, CONTEXT).mfu(1000.0) > 0


def test_memory_is_that_of_the_fullest_device_or_of_the_process(monkeypatch):
    resident = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1]
    )
    assert peak_memory_bytes() == pytest.approx(1024 * resident, rel=0.1)
    stats = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}, None]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory_bytes() == 9


def test_steps_to_profile_are_of_the_run(tmp_path):
    for text in ("", "a", "3..", "3-4", "-1"):
        with pytest.raises(
            ValueError, match=f"needs --profile to be a step or two, as 10..12, got {text!r}; change it"
        ):
            steps_to_profile(text)
    for steps in ((3, 5), (9, 13), (6, 5)):
        with pytest.raises(ValueError, match=rf"to profile, of 6\.\.12, got {steps[0]}\.\.{steps[1]}; change them"):
            Profile(steps, tmp_path, 5, 12)
    profile = Profile((6, 7), tmp_path, 5, 12)
    assert [s for s in range(13) if profile.begins_at(s)] == [6] and [s for s in range(13) if profile.ends_at(s)] == [7]
    assert profile.end() == "" and Profile(None, tmp_path, 5, 12).end() == ""
