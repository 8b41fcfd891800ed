"""The report of a realistic run, of a run without this or that, and of hostile text."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxmem.evals.compression import compress_sizes
from jaxmem.training.memory_plots import memory_use, slots_by_rank
from jaxmem.training.memory_use import MemoryUse
from jaxmem.training.metrics import MetricsWriter, read_metrics
from jaxmem.training.report import write_report
from jaxmem.training.router_plots import collapse, memories_in_use

LAYERS, MEMORIES, CONTEXT_TOKENS = ("2", "4", "6", "8"), 4, 512


def zipf_text(n_words=8000, n_different=3000, seed=0):
    """Words of random letters, the k-th most frequent with probability proportional to 1/k."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(1, 9))) for _ in range(n_different)]
    share = 1 / np.arange(1, n_different + 1)
    return " ".join(rng.choice(words, n_words, p=share / share.sum())).encode()


TEXT = zipf_text()


def memory_use_at(step, layers=("1", "3", "shared"), n_slots=10_000):
    """Memories that spread out: slot m is read (m + 1)^-a times, less steeply from step to step."""
    ranks, n = [1, 10, 100, 1000, n_slots], len(layers)
    weights = np.arange(1, n_slots + 1) ** -(0.5 + 100 / step)
    weights[-n_slots // (1 + step // 200) :] = 0
    p = weights[weights > 0] / weights.sum()
    return MemoryUse(
        layers=list(layers),
        n_slots=n * [n_slots],
        share_used=[float(np.mean(weights > 0)) * (i + 1) / n for i in range(n)],
        share_within_reach=n * [0.9],
        kl_from_uniform=[math.log(n_slots) + float(np.sum(p * np.log(p))) + 0.1 * i for i in range(n)],
        ranks=n * [ranks],
        weight_at_rank=n * [(weights[np.array(ranks) - 1] / weights.mean()).tolist()],
    )


def write_run(run_dir, n_steps=2000, eval_every=200, with_final=True, **final):
    """A run that looks like one: falling loss, a spike, a slow first step, evaluations, a router that specialises."""
    rng = np.random.default_rng(0)
    edges = [0, *(2**i for i in range(CONTEXT_TOKENS.bit_length()))]
    centres = np.sqrt(np.maximum(edges[:-1], 0.5) * np.array(edges[1:]))
    with MetricsWriter(run_dir) as metrics:
        for step in range(1, n_steps + 1):
            level = 1.15 + 4.4 * math.exp(-step / 120) + 0.6 * (1 + step / 50) ** -0.7
            loss = level + 0.06 * rng.standard_normal()
            metrics.write(
                "train",
                step,
                loss=loss,
                bits_per_byte=loss / math.log(2),
                grad_norm=0.4 * math.exp(0.25 * rng.standard_normal()) * (40 if step == n_steps * 2 // 3 else 1),
                learning_rate=3e-4 * min(1, step / 100),
                tokens_per_s=105e3,
                step_s=31.0 if step == 1 else 0.155 + 0.01 * rng.exponential() + 0.2 * (step % eval_every == 0),
                wait_s=0.004 + 0.003 * rng.exponential(),
                load_balance=1 + 0.5 * math.exp(-step / 300),
            )
            if step % eval_every == 0:
                by_position = (level + 0.1) / math.log(2) * (0.86 + 0.5 * (1 + centres) ** -0.5)
                tilt = rng.dirichlet(np.full(MEMORIES, 1 + 4000 / step), len(LAYERS))
                metrics.write(
                    "eval",
                    step,
                    loss=level + 0.1,
                    bits_per_byte=float(by_position[-3:].mean()),
                    bits_per_byte_by_position=by_position,
                    position_edges=edges,
                    router_use=tilt,
                    router_layers=LAYERS,
                    router_top_k=len(LAYERS) * [1],
                    router_balance=MEMORIES * np.sum(tilt**2, axis=1),
                    memory_use=memory_use_at(step),
                    n_bytes=len(TEXT),
                )
        if with_final:
            metrics.write(
                "final",
                n_steps,
                compression=compress_sizes([("held_out.txt", TEXT)], CONTEXT_TOKENS),
                n_parameters=12_345_678,
                n_tokens=n_steps * 16_384,
                n_bytes=len(TEXT),
                wall_s=371.2,
                machine={"devices": "1 x CPU", "memory": "16 GiB"},
                versions={"jaxmem": "0.1.0", "jax": "0.10.2", "python": "3.11.9"},
                **{"prompt": "line 601: ", "sample": "67 words of a held-out file\n<b>5 & more</b>\n", **final},
            )
    config = {"model": {"layers": 8, "pattern": ["attention", "mixture"]}, "steps": n_steps, "note": "a < b"}
    (run_dir / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mixture-of-memories"
    write_run(path)
    return path


@pytest.fixture(scope="module")
def page(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text()


def svgs(page):
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def test_all_figures_are_there_and_well_formed(page):
    assert len(svgs(page)) == 10
    assert "Not shown" not in page
    for svg in svgs(page):
        ET.fromstring(svg)


def test_it_is_one_small_file_without_scripts_or_links(page):
    assert len(page) < 2e6
    assert not re.search(r"<script|<link|<img|@import|src=|url\((?!#)", page)
    assert not [href for href in re.findall(r'href="([^"]*)"', page) if not href.startswith("#")]


def test_drawings_take_every_colour_from_the_page(page):
    for svg in svgs(page):
        assert not re.findall(r"(?:fill|stroke): ?#(?:[0-9a-f]{6})", svg)


def test_ids_of_different_figures_do_not_collide(page):
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in svgs(page)]
    assert sum(map(len, ids)) == len(set().union(*ids))


def test_the_figures_of_memories_name_axes_units_and_layers(page):
    over_steps, by_rank = (svg for svg in svgs(page) if "shared table" in svg)
    for svg in (over_steps, by_rank):
        assert all(f">{name}<" in svg for name in ("layer 1", "layer 3", "shared table"))
    for text in ("share of slots used", "KL from uniform (nats)", "step"):
        assert f">{text}<" in over_steps
    for text in ("slot, by rank of use (1 is the most used)", "weight read, relative to the mean slot", "even use"):
        assert f">{text}<" in by_rank
    assert "So few reads reach at most 90% of the slots of a layer." in page


def router_line(step, use, top_k):
    names = [2 * i for i in range(len(use))]
    return {"step": step, "router_use": use, "router_layers": names, "router_top_k": len(use) * [top_k]}


COLLAPSED, EVEN = [0.97, 0.01, 0.01, 0.01], [0.3, 0.3, 0.2, 0.2]


def test_the_report_names_the_layers_whose_routers_have_collapsed(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step, second in ((100, EVEN), (200, COLLAPSED)):
            line = router_line(step, [EVEN, second, EVEN, second], top_k=1)
            metrics.write("eval", bits_per_byte=1.0, router_balance=[1.0, 3.2, 1.0, 3.2], **line)
    page = write_report(tmp_path).read_text()
    warning = re.search(r'<p class="warning">(.*?)</p>', page).group(1)
    assert warning == (
        "2 of 4 routers have collapsed: layer 2 (1.18 of 4 memories in use), layer 6 (1.18 of 4 memories in use); fewer than "
        "1.75 in use count as a collapse. A larger load_balance evens them out."
    )
    assert "Routers: 2 of 4 collapsed" in page and "Load-balancing losses of the layers: 1 to 3.2, 1 is even." in page
    figure = next(svg for svg in svgs(page) if "memories in use" in svg)
    assert all(f">{text}<" in figure for text in ("layers 2, 6", "the others", "collapse"))


@pytest.mark.parametrize(
    "shares, top_k, collapsed",
    [
        (EVEN, 1, False),
        (COLLAPSED, 1, True),
        ([0.5, 0.5, 0, 0], 2, True),
        ([0.5, 0.5, 0, 0], 1, False),
        ([0.4, 0.4, 0.1, 0.1], 2, False),
        ([0.5, 0.5], 2, False),
        ([0, 0, 0, 0], 1, False),
    ],
    ids=str,
)
def test_a_router_has_collapsed_if_it_uses_hardly_more_than_top_k(shares, top_k, collapsed):
    line = router_line(100, [shares], top_k)
    assert (collapse(line) is not None) == collapsed
    ET.fromstring(memories_in_use([line]).svg)


def memory_lines(*steps, **options):
    plain = json.loads(json.dumps(dataclasses.asdict(memory_use_at(400, **options))))
    return [{"step": step, "n_tokens": 1000, "memory_use": plain} for step in steps]


@pytest.mark.parametrize("n_layers", [1, 13])
@pytest.mark.parametrize("steps", [(100,), (100, 200)])
def test_memories_have_figures_whatever_their_number(steps, n_layers):
    lines = memory_lines(*steps, layers=[str(i) for i in range(n_layers)])
    lines[-1]["memory_use"]["kl_from_uniform"][0] = math.nan
    lines[-1]["memory_use"]["weight_at_rank"][0] = 5 * [math.nan]
    ET.fromstring(memory_use(lines).svg)
    by_rank = slots_by_rank(lines)
    assert by_rank is None if n_layers == 1 else "layer 12" in by_rank.svg


def test_an_evaluation_of_more_text_is_drawn_apart():
    lines = memory_lines(100, 200)
    assert "Hollow" not in memory_use(lines).caption
    lines[-1]["n_tokens"] = 5000
    assert "Hollow: the last evaluation, 5 times as much text." in memory_use(lines).caption


def test_the_summary_compares_with_the_compressors(page, run_dir):
    summary = re.search(r'class="summary">(.*?)</p>', page).group(1)
    evals = [line for line in read_metrics(run_dir) if line["kind"] == "eval"]
    measured = f"{evals[-1]['bits_per_byte']:.3f}"
    assert summary.startswith(f"After 2,000 steps the model needs {measured} bits per held-out byte")
    assert "the best of gzip, bzip2 and xz on whole files" in summary


@pytest.mark.parametrize("sample", ["NaN", "Infinity", "\\NaN"])
def test_a_sample_that_reads_like_a_number_is_shown(sample, tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("final", 3, prompt="-Infinity", sample=sample)
    assert f"<pre><b>-Infinity</b>{sample}</pre>" in write_report(tmp_path).read_text()


def test_a_prompt_that_is_no_utf8_does_not_lose_the_report(tmp_path):
    """A byte of a command line that cannot be decoded is a lone surrogate in Python."""
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("final", 3, prompt="caf\udce9", sample="!")
    assert r"<pre><b>caf\udce9</b>!</pre>" in write_report(tmp_path).read_text()


def test_a_sample_of_an_older_version_that_was_read_as_a_number_is_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "final", "step": 3, "prompt": "", "sample": "NaN"}\n')
    assert "<pre>nan</pre>" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", "", r"needs a JSON object in .*config.json, got an empty file; put it back, or remove it"),
        ("config.json", '{"steps": 1', r"needs a JSON object in .*config.json, got other text \(Expecting"),
        ("config.json", "[1]", r"needs a JSON object in .*config.json, got a list; put it back"),
        ("config.json", "\0\1", r"needs a JSON object in .*config.json, got other text"),
        ("metrics.jsonl", "[]\n", r"got line=1 of .*metrics.jsonl without; repair or remove that line"),
        (
            "metrics.jsonl",
            '{"kind": "eval", "step": 1, "bits_per_byte": "much"}\n',
            r"report: needs lines as a run writes them, got others in .*metrics.jsonl \(",
        ),
    ],
)
def test_a_file_that_is_damaged_is_named(name, text, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_text_of_the_run_is_escaped(page):
    assert "<b>line 601: </b>67 words of a held-out file\n&lt;b&gt;5 &amp; more&lt;/b&gt;" in page
    assert "a &lt; b" in page


def test_the_table_of_the_run_is_for_people(page):
    for text in ("12,345,678", "32,768,000", "0:06:11", "devices: 1 x CPU, memory: 16 GiB", "jax: 0.10.2"):
        assert f"<td>{text}" in page or f", {text}" in page


def test_the_report_is_reproducible(run_dir, page):
    assert write_report(run_dir).read_text() == page


def test_a_killed_run_has_a_report(tmp_path):
    write_run(tmp_path, n_steps=400, with_final=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    page = write_report(tmp_path).read_text()
    assert "After 400 steps of a run that has not ended the model needs" in page
    assert "Not shown, for lack of numbers: comparison with compressors." in page
    assert len(svgs(page)) == 9


def test_an_empty_run_has_a_report(tmp_path):
    MetricsWriter(tmp_path).close()
    page = write_report(tmp_path).read_text()
    assert "After 0 steps nothing held out has been measured yet." in page
    assert svgs(page) == []


def test_a_diverged_run_has_a_report(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        for step in range(1, 50):
            bad = math.nan if step > 30 else 100.0 / step
            metrics.write("train", step, loss=bad, grad_norm=math.inf if step > 30 else 1.0, step_s=0.1)
            if step % 10 == 0:
                metrics.write("eval", step, loss=bad, bits_per_byte=bad)
    page = write_report(tmp_path).read_text()
    assert "Not finite, so not drawn: 19 steps." in page
    assert "needs nan bits per held-out byte" in page


def test_without_metrics_there_is_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, jaxmem.training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
