"""Reading schedules, on one written by hand in the compiler's format; the table of topologies."""

import pytest

from jaxmem.planning.kernel_report import Candidate, report, visited
from jaxmem.planning.kernel_schedules import SLOTS, read_schedules
from jaxmem.planning.tpu import devices


def write_dump(folder, loop):
    """One kernel: 3 bundles, a loop of them [text, matmuls], 2 bundles."""
    bundles = [["{ nop }", 0]] * 3 + loop + [["{ nop }", 0]] * 2
    depth = lambda i: "> " if 3 <= i < 3 + len(loop) else " "
    lines = [f" {hex(i)}   : {depth(i)}{text}" for i, (text, _) in enumerate(bundles)]
    (folder / "17-kernel.1-72-final_bundles.txt").write_text("= a header\nLB: loop body\n" + "\n".join(lines))
    rows = [f"{n} " + "0 " * (len(SLOTS) - 1) for _, n in bundles]
    table = ["== CAPACITY:", ", ".join(SLOTS).upper(), "2 " * len(SLOTS), "== USE:", *rows]
    (folder / "17-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text("\n".join(table))


def test_a_loop_with_an_arm(tmp_path):
    skipped = [["{ vmatmul }", 2]] * 100
    branch, end = [["{ sbr.rel (%p1) target = $region7 }", 0]], [["{ nop } /* Start/End empty region 7 */", 1]]
    write_dump(tmp_path, [["{ nop }", 0], *branch, *skipped, *end])
    schedule = read_schedules(tmp_path)["kernel.1"]
    outside, loop = schedule.parts
    assert (outside.bundles, loop.bundles, [arm.bundles for arm in loop.arms]) == (5, 3, [100])
    assert (loop.used["matmul"], loop.arms[0].used["matmul"], schedule.capacity["matmul"]) == (1, 200, 2)
    turns = {5: 1, 3: 10, 100: 4}
    assert schedule.cycles(lambda part: turns[part.bundles]) == 5 + 30 + 400


def test_arms_in_arms(tmp_path):
    nop, branch = ["{ nop }", 0], lambda region: [f"{{ sbr.rel (%p1) target = $region{region} }}", 0]
    end = lambda region: [f"{{ nop }} /* End region {region} */", 0]
    work, begin = [branch(1), *[nop] * 200, end(1)], [branch(2), *[nop] * 70, end(2)]
    write_dump(tmp_path, [branch(9), *begin, *work, end(9)])
    (run,) = read_schedules(tmp_path)["kernel.1"].parts[1].arms
    assert (run.bundles, [arm.bundles for arm in run.arms]) == (4, [70, 200])
    assert [part.bundles for part in run.all_parts] == [4, 70, 200]


def test_short_branches_are_no_arms(tmp_path):
    skipped = [["{ nop }", 0]] * 10
    branch, end = [["{ sbr.rel (%p1) target = $region7 }", 0]], [["{ nop } /* End region 7 */", 0]]
    write_dump(tmp_path, [*branch, *skipped, *end])
    assert read_schedules(tmp_path)["kernel.1"].parts[1].arms == ()


def test_blocks_that_a_causal_head_visits():
    for size_q, size_k in ((128, 128), (256, 128), (128, 512)):
        whole, masked = visited(1024, size_q, size_k)
        pairs = [(i, j) for i in range(0, 1024, size_q) for j in range(0, 1024, size_k) if j < i + size_q]
        assert whole + masked == len(pairs)
        assert whole == sum(j + size_k - 1 <= i for i, j in pairs)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"needs dumps of libtpu's bundles in .*, got none; compile something"):
        read_schedules(tmp_path)
    with pytest.raises(ValueError, match=r"needs one of v4, v5e, v5p, v6e, tpu7x, such a name with sizes.*, got 'v9'"):
        devices("v9")


def test_a_report_is_refused_before_anything_is_compiled(monkeypatch):
    with pytest.raises(ValueError, match="tpu topology: needs one of v4, v5e, v5p, v6e, tpu7x, .* got 'v9'; change it"):
        next(report("v9"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"tpu compiler: needs the package libtpu, got none; pip install 'jaxmem\[tpu-compiler\]'"
    ):
        next(report("v6e"))


def test_names_say_the_blocks():
    assert Candidate("splash", True, 1024, 512).name == "splash backward, 1024 x 512 by 512"
