"""Write one HTML page about any runs: what differs, curves, samples and final figures. It loads nothing.

    python -m experiments.report out/dense_cpu out/lpa_cpu --out=results/report.html
"""

import datetime
import html
import io
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from config import UserError, parse, user_errors
from experiments import plot
from experiments.logs import SILENT, Run, name_runs, read_run, require_common_axis
from experiments.sweep import write_page

POINTS, SAMPLES = 500, 4  # at most, of a curve and of a run
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training runs</title><style>
body {{ max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
svg {{ width: 100%; height: auto; }} table {{ font-size: 0.85rem; display: block; overflow-x: auto; }}
th, td {{ padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
pre {{ font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
<h1>Training runs</h1><p>{about}</p>
{sections}
</body></html>
"""


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or log.jsonl files of any name."""
    out: Path = Path("results/report.html")


def main(o: Options) -> None:
    if not o.runs:
        raise UserError("no run is named, wanted one or more run folders")
    runs = [read_run(path) for path in dict.fromkeys(o.runs)]
    names = name_runs([run.options for run in runs], SILENT)
    if len(set(names)) < len(names) or any(not 0 < len(name) <= 40 for name in names):
        names = [str(run.path.parent) for run in runs]
    sections = {
        "Runs": table(names, [overview(run) for run in runs]),
        "What differs": table(names, differences(runs)),
        "Curves": curves(runs, names),
        "Samples": samples(runs, names),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in sections.items() if part)
    about = f"{datetime.date.today()}, written by: python -m experiments.report {shlex.join(sys.argv[1:])}"
    text = PAGE.format(about=html.escape(about), sections=body)
    write_page(o.out, text)
    print(f"wrote {o.out}, {len(text.encode()) / 1e6:.2f} MB")


def overview(run: Run) -> dict[str, Any]:
    step = run.steps[-1] if run.steps else dict(step=0, tokens=0, seconds=0.0)
    last = run.evaluations[-1] if run.evaluations else {}
    return {
        "folder": str(run.path.parent),
        "parameters": run.parameters,
        "parameters in the blocks": run.parameters_in_blocks,
        "training FLOPs per token": run.flops_per_token,
        "step": f"{step['step']:,} of {run.options['max_steps']:,}" + ("" if run.finished else ", not finished"),
        "training tokens; seconds": f"{step['tokens']:,}; {step['seconds']:,.0f}",
        "last validation loss (nats per token)": last.get("val_loss"),
        "lowest": min((e["val_loss"] for e in run.evaluations), default=None),
        "bits per byte": last.get("val_bits_per_byte"),
        "machine": f"{run.start['device']}, torch {run.start['versions']['torch']}",
    }


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Return for each run the options that are not the same in all of them."""
    names = {name: None for run in runs for name in run.options if name != "out_dir"}  # a set that keeps its order
    differing = [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]
    return [{name: run.options.get(name) for name in differing} for run in runs]


def curves(runs: list[Run], names: list[str]) -> str:
    shown, parts = ["loss", "val_loss"], []
    try:
        require_common_axis(runs, "loss")
    except UserError:  # the runs read other tokens
        shown = ["bits_per_byte"]
    for y in shown:
        named = [(r, name) for r, name in zip(runs, names) if len(r.steps if y == "loss" else r.evaluations) > 1]
        if named:
            parts.append(draw(y, *map(list, zip(*named))))
    return "\n".join(parts)


def draw(y: str, runs: list[Run], names: list[str]) -> str:
    """Return the curves as an SVG. Its ids start with `y`, so that they differ from those of other plots."""
    o = plot.Options(runs=tuple(run.path for run in runs), y=y, each_seed=True)
    found, width = plot.make_curves(o, runs)
    drawn = []
    for name, curve in zip(names, found):
        kept = spaced(len(curve.x), POINTS)
        drawn.append(plot.Curve(name, curve.x[kept], curve.y[kept], curve.low[kept], curve.high[kept]))
    figure, axes = plot.new_figure(5.4, 3.0 + 0.2 * len(runs))
    plot.draw_curves(o, drawn, width, axes[0, 0])
    plot.add_legend(figure, axes[0, 0])
    written, no_metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=no_metadata)
    svg = written.getvalue().partition("<svg")[2]
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{y}_", svg)
    return "<svg" + re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")


def samples(runs: list[Run], names: list[str]) -> str:
    parts = []
    for run, name in zip(runs, names):
        for i in spaced(len(run.samples), SAMPLES):
            head = f"{name}, step {run.samples[i]['step']:,}"
            parts.append(f"<h4>{html.escape(head)}</h4><pre>{html.escape(run.samples[i]['sample'][:500])}</pre>")
    return "\n".join(parts)


def spaced(n: int, most: int) -> np.ndarray:
    """Return at most so many of the numbers from 0 to n - 1, the first and the last included."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def table(columns: list[str], runs: list[dict[str, Any]]) -> str:
    """Return a table with a column for each run; '' where there is nothing to show."""
    rows = {name: [run.get(name) for run in runs] for name in {name: None for run in runs for name in run}}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *columns))
    lines = [f"<tr><th>{html.escape(name)}</th>{''.join(map(cell, row))}</tr>\n" for name, row in rows.items()]
    return f"<table><tr>{head}</tr>\n{''.join(lines)}</table>" if rows else ""


def cell(value: Any) -> str:
    shown = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return f"<td>{html.escape('-' if value is None else shown)}</td>"


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
