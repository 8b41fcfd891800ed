"""The GPU's compiler where it is not installed, and reading what it dumps where it is."""

import importlib.util

import pytest

from jaxmem.planning import gpu
from jaxmem.planning.gpu_report import Kernel, Problem, problems, read_kernels, report


def test_reads_what_xla_dumps(tmp_path, monkeypatch):
    name = Problem(64, 64, "bfloat16", "causal").name
    start = "011: kCustomKernel [prev=010 (1) | sink        ] flash_attention_forward grid: [64, 8, 1]"
    (tmp_path / f"module_0007.jit_{name}.thunk_sequence.txt").write_text(
        f"010: kCustomKernel [source] loop_fusion grid: [1, 1, 1] threads: [32, 1, 1]  shared_memory: 0 bytes\n"
        f"{start} threads: [256, 1, 1]  shared_memory: 65536 bytes\n"
    )
    (tmp_path / f"module_0007.jit_{name}.3.ptx").write_text(
        ".target sm_90a\n.visible .entry flash_attention_forward(\n"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no ptxas
    assert read_kernels(tmp_path, name, "sm_90") == {"forward": Kernel(65536, None, None)}
    assert str(Kernel(65536, None, None)) == "64 KiB"
    assert str(Kernel(65536, 255, 8)) == "64 KiB, 255 regs, 8 B spilled"


def test_problems_have_names_of_their_own():
    assert len({problem.name for problem in problems()}) == len(problems())


def test_without_the_plugin(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"gpu compiler: needs JAX's CUDA plugin, got none; pip install --no-deps"):
        gpu.environment()


@pytest.mark.parametrize("f", [report, gpu.devices])
def test_unknown_chip(f):
    with pytest.raises(ValueError, match="gpu: needs one of sm_80, sm_90, got 'sm_1'"):
        f("sm_1")


def test_a_chip_as_the_compiler_is_told():
    text = gpu.target(gpu.CHIPS["sm_90"])
    assert "shared_memory_per_block_optin: 232448" in text
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
