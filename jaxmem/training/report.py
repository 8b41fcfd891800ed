"""The report of a run: one HTML file without scripts or links, from metrics.jsonl and config.json alone.

It can be written while the run goes on, after it, or after it was killed: a figure whose numbers are missing is left
out, and the report says so.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from jaxmem.config import read_json_object
from jaxmem.training.metrics import METRICS_FILE, read_metrics, replace_file

REPORT_FILE = "report.html"
CONFIG_FILE = "config.json"

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f7f7f8; --ink: #1b1b1d; --muted: #6b6b70; --grid: #dcdce0;
  --blue: #0072b2; --orange: #d55e00; --grey: #a8a8ad; }
@media (prefers-color-scheme: dark) { :root { --page: #131316; --card: #1c1c20; --ink: #ececee; --muted: #a2a2a8;
  --grid: #38383e; --blue: #56b4e9; --orange: #f08a3c; --grey: #77777e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; font-size: 1.2rem; }
.summary { max-width: 46rem; margin: 0; font-size: 1.15rem; }
.warning { max-width: 46rem; margin: .8rem 0 0; color: var(--orange); }
.missing, figcaption p, .note { color: var(--muted); font-size: .875rem; }
.charts { columns: 26rem 2; column-gap: 1.25rem; margin-top: 2.5rem; }
figure { break-inside: avoid; margin: 0 0 1.25rem; padding: 1.1rem 1.1rem .6rem; border-radius: .6rem;
  background: var(--card); }
figcaption h3 { margin: 0 0 .8rem; font-size: 1rem; line-height: 1.35; text-wrap: balance; }
figcaption p { margin: .4rem 0 .4rem; line-height: 1.4; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.5rem .35rem 0; border-bottom: 1px solid var(--grid); text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; font-size: .875rem; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; }
.numbers td, .numbers thead th + th { text-align: right; }
.numbers .model th, .numbers .model td { color: var(--blue); font-weight: 600; }
.numbers .model td { text-align: center; }
pre { margin: 0; padding: 1rem 1.1rem; background: var(--card); border-radius: .6rem; font: .85rem/1.5 ui-monospace,
  "SF Mono", Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 3rem; } summary { cursor: pointer; font-weight: 600; font-size: 1.2rem; margin-bottom: 1rem; }
"""

FACTS = {  # of the "final" line, with their names in the table of the run
    "n_parameters": "parameters",
    "n_tokens": "training tokens",
    "n_bytes": "held-out bytes",
    "wall_s": "wall time",
    "machine": "machine",
    "versions": "versions",
}
SHOWN_ELSEWHERE = {"kind", "step", "compression", "prompt", "sample", *FACTS}


@dataclass(frozen=True)
class Run:
    """What a run has written so far."""

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    final: dict[str, Any]
    config: dict[str, Any] | None

    @property
    def step(self) -> int:
        return max((line["step"] for line in [*self.train, *self.evals]), default=0)

    @property
    def bits_per_byte(self) -> int | float | None:
        """Held-out, of the end of the run, or of the last evaluation if the run did not reach its end."""
        measured = [line["bits_per_byte"] for line in [*self.evals, self.final] if "bits_per_byte" in line]
        return measured[-1] if measured else None

    @property
    def compression(self) -> list[dict[str, Any]]:
        return self.final.get("compression", [])


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Writes RUN_DIR/report.html from RUN_DIR/metrics.jsonl and, if there, RUN_DIR/config.json.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: the folder has no metrics.jsonl.
        ValueError: metrics.jsonl or config.json is damaged.
    """
    run_dir = Path(run_dir)
    path, run = run_dir / REPORT_FILE, _read_run(Path(run_dir))
    try:
        page = _page(run)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"report: needs lines as a run writes them, got others in {run_dir / METRICS_FILE} ({error!r}); "
            "put the file back as it was"
        ) from error
    replace_file(path, page)
    return path


def _read_run(run_dir: Path) -> Run:
    lines = read_metrics(run_dir)
    config = run_dir / CONFIG_FILE
    return Run(
        name=run_dir.resolve().name,
        train=[line for line in lines if line["kind"] == "train"],
        evals=[line for line in lines if line["kind"] == "eval"],
        final=next((line for line in reversed(lines) if line["kind"] == "final"), {}),
        config=read_json_object(config, "put it back, or remove it: the report does without")
        if config.exists()
        else None,
    )


def _page(run: Run) -> str:
    from jaxmem.training import memory_plots, plots, router_plots

    charts = {
        "comparison with compressors": plots.compressors(run.bits_per_byte, run.compression),
        "loss": plots.loss(run.train, run.evals),
        "held-out bits per byte over training": plots.held_out(run.evals, run.compression),
        "bits per byte by position": plots.by_position(run.evals),
        "router use": plots.router_use(run.evals),
        "memories in use of routers": router_plots.memories_in_use(run.evals),
        "memory use": memory_plots.memory_use(run.evals),
        "memory slots by rank": memory_plots.slots_by_rank(run.evals),
        "gradient norm": plots.gradient_norm(run.train),
        "time per step": plots.step_time(run.train),
    }
    missing = [name for name, chart in charts.items() if chart is None]
    collapsed = router_plots.collapse(run.evals[-1]) if run.evals else None
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(run.name)}</title>\n<style>{CSS}</style>\n</head>\n<body>",
            f"<h1>{escape(run.name)}</h1>",
            f'<p class="summary">{escape(_summary(run))}</p>',
            f'<p class="warning">{escape(collapsed)}</p>' if collapsed else "",
            '<section class="charts">',
            *(
                f'<figure role="group" aria-label="{escape(chart.title)}"><figcaption><h3>{escape(chart.title)}</h3>'
                f"</figcaption>{chart.svg}<figcaption><p>{escape(chart.caption)}</p></figcaption></figure>"
                for chart in charts.values()
                if chart is not None
            ),
            "</section>",
            f'<p class="missing">Not shown, for lack of numbers: {", ".join(missing)}.</p>' if missing else "",
            _compression_table(run),
            _facts_table(run),
            _sample(run),
            _config(run),
            "</body>\n</html>\n",
        ]
    )


def _summary(run: Run) -> str:
    if run.bits_per_byte is None:
        return f"After {run.step:,} steps nothing held out has been measured yet."
    steps = f"After {run.step:,} steps" + ("" if run.final else " of a run that has not ended")
    sentence = f"{steps} the model needs {run.bits_per_byte:.3f} bits per held-out byte"
    if not run.compression:
        return sentence + "."
    whole = min(run.compression, key=lambda r: r["bits_per_byte_whole"])
    pieces = min(run.compression, key=lambda r: r["bits_per_byte_pieces"])
    ratio = run.bits_per_byte / whole["bits_per_byte_whole"] - 1
    return (
        f"{sentence}, {abs(ratio):.0%} {'fewer' if ratio < 0 else 'more'} than the best of gzip, bzip2 and xz on whole "
        f"files ({whole['program']}: {whole['bits_per_byte_whole']:.3f}); in pieces of the model's context length, "
        f"{pieces['piece_bytes']:,} bytes, the best is {pieces['program']} with {pieces['bits_per_byte_pieces']:.3f}."
    )


def _compression_table(run: Run) -> str:
    if not run.compression or run.bits_per_byte is None:
        return ""
    first = run.compression[0]
    keys = ("bits_per_byte_whole", "bits_per_byte_pieces", "bits_per_byte_pieces_headerless")
    rows = "".join(
        f"<tr><th>{escape(r['program'])}</th>" + "".join(f"<td>{r[key]:.3f}</td>" for key in keys) + "</tr>"
        for r in run.compression
    )
    return (
        "<h2>Bits per held-out byte</h2>\n"
        '<div class="table"><table class="numbers"><thead><tr><th></th><th>whole files</th>'
        f"<th>pieces of {first['piece_bytes']:,} bytes</th><th>pieces, no headers</th></tr></thead><tbody>"
        f'<tr class="model"><th>model</th><td colspan="3">{run.bits_per_byte:.3f}</td></tr>{rows}</tbody></table></div>'
        f'<p class="note">Over {first["n_bytes"]:,} bytes. Every file, and every piece, is compressed by itself.</p>'
    )


def _facts_table(run: Run) -> str:
    facts = {title: _to_text(key, run.final[key]) for key, title in FACTS.items() if key in run.final}
    facts |= {k.replace("_", " "): _to_text(k, v) for k, v in run.final.items() if k not in SHOWN_ELSEWHERE}
    if not facts:
        return '<p class="missing">Not shown, for lack of a "final" line: the table of the run.</p>'
    rows = "".join(f"<tr><th>{escape(title)}</th><td>{escape(text)}</td></tr>" for title, text in facts.items())
    return f'<h2>The run</h2>\n<div class="table"><table><tbody>{rows}</tbody></table></div>'


def _sample(run: Run) -> str:
    if "sample" not in run.final:
        return '<p class="missing">Not shown, for lack of numbers: a generated sample.</p>'
    prompt, sample = (str(run.final.get(name, "")) for name in ("prompt", "sample"))  # "NaN" was a number once
    prompt = f"<b>{escape(prompt)}</b>" if prompt else ""
    note = '<p class="note">Bold: the prompt.</p>' if prompt else ""
    return f"<h2>A sample from the model</h2>\n<pre>{prompt}{escape(sample)}</pre>{note}"


def _config(run: Run) -> str:
    if run.config is None:
        return f'<p class="missing">Not shown: the configuration, since there is no {CONFIG_FILE}.</p>'
    text = json.dumps(run.config, indent=2, ensure_ascii=False)
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


def _to_text(key: str, value: Any) -> str:
    """A value of the "final" line for people: times as h:mm:ss, thousands apart, nested values as "name: value"."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_to_text(name, v)}" for name, v in value.items())
    if isinstance(value, list):
        return ", ".join(_to_text(key, v) for v in value)
    if key == "wall_s":
        return str(timedelta(seconds=round(value)))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
