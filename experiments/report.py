"""Write one HTML page about any runs: what differs, curves, samples and final figures. Nothing in it is fetched.

    python -m experiments.report out/dense_cpu out/lpa_cpu --out=results/report.html
"""

import dataclasses
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
from lpa import checkpoint

POINTS = 500  # of a curve in a picture
SAMPLES = 4  # of a run, from the first to the last
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
h2 {{ font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #bbb; padding-top: 0.7rem; }}
.wide {{ overflow-x: auto; }} svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
pre {{ font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
<h1>{title}</h1><p>{about}</p>
{sections}
</body></html>
"""


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or log.jsonl files of any name."""
    out: Path = Path("results/report.html")
    title: str = "Training runs"

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is named, wanted one or more run folders")


def main(o: Options) -> None:
    runs = [read_run(path) for path in dict.fromkeys(o.runs)]
    names = label_runs(runs)
    sections = {
        "Runs": table(names, [overview(run) for run in runs]),
        "What differs": table(names, differences(runs)),
        "Curves": curves(runs, names),
        "Samples": samples(runs, names),
        "Machines": table(names, [run.start["versions"] | {"device": run.start["device"]} for run in runs]),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in sections.items() if part)
    about = f"{datetime.date.today()}, written by: python -m experiments.report {shlex.join(sys.argv[1:])}"
    text = PAGE.format(title=html.escape(o.title), about=html.escape(about), sections=body)
    try:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(o.out, text)
    except OSError as error:
        raise UserError(f"cannot write {o.out}: {error.strerror}") from None
    print(f"wrote {o.out}, {len(text.encode()) / 1e6:.2f} MB")


def label_runs(runs: list[Run]) -> list[str]:
    """Return what sets each run apart, where that is short; else its folder. No two are the same."""
    names = name_runs([run.options for run in runs], SILENT)
    short = len(set(names)) == len(names) and all(0 < len(name) <= 40 for name in names)
    return names if short else [str(run.path.parent) for run in runs]


def overview(run: Run) -> dict[str, Any]:
    step = run.steps[-1] if run.steps else dict(step=0, tokens=0, seconds=0.0)
    last = run.evaluations[-1] if run.evaluations else {}
    speeds = [s["tokens_per_second"] for s in run.steps if s.get("tokens_per_second")]
    return {
        "folder": str(run.path.parent),
        "parameters": run.parameters,
        "parameters in the blocks": run.parameters_in_blocks,
        "training FLOPs per token": run.flops_per_token,
        "step": f"{step['step']:,} of {run.options['max_steps']:,}" + ("" if run.finished else ", not finished"),
        "training tokens": step["tokens"],
        "training seconds": round(step["seconds"]),
        "tokens per second, median": round(np.median(speeds)) if speeds else None,
        "last validation loss (nats per token)": last.get("val_loss"),
        "lowest validation loss": min((e["val_loss"] for e in run.evaluations), default=None),
        "bits per byte": last.get("val_bits_per_byte"),
    }


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Return for each run the options that are not the same in all of them."""
    names = {name: None for run in runs for name in run.options if name != "out_dir"}  # a set that keeps its order
    differing = [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]
    return [{name: run.options.get(name) for name in differing} for run in runs]


def curves(runs: list[Run], names: list[str]) -> str:
    try:
        require_common_axis(runs, "loss")
        shown = ["loss", "val_loss"]
    except UserError:  # the runs read other tokens
        shown = ["bits_per_byte"]
    parts = []
    for y in shown:
        records = [run.steps if y == "loss" else run.evaluations for run in runs]
        having = [i for i, record in enumerate(records) if len(record) > 1]
        if having:
            parts.append(draw(y, [runs[i] for i in having], [names[i] for i in having]))
    return "\n".join(parts)


def draw(y: str, runs: list[Run], names: list[str]) -> str:
    """Return the curves as an SVG; `y` keeps its ids apart from those of other pictures on the page."""
    o = plot.Options(runs=tuple(run.path for run in runs), y=y, each_seed=True)
    found, width = plot.make_curves(o, runs)
    drawn = []
    for name, curve in zip(names, found):
        kept = np.linspace(0, len(curve.x) - 1, min(len(curve.x), POINTS)).round().astype(int)
        values = {f.name: getattr(curve, f.name)[kept] for f in dataclasses.fields(curve) if f.name != "name"}
        drawn.append(dataclasses.replace(curve, name=name, **values))
    figure, axes = plot.new_figure(5.4, 3.0 + 0.2 * len(runs))
    plot.draw_curves(o, drawn, width, axes[0, 0])
    plot.add_legend(figure, axes[0, 0])
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{y}_", svg)
    return re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")


def samples(runs: list[Run], names: list[str]) -> str:
    parts = []
    for run, name in zip(runs, names):
        for i in np.linspace(0, len(run.samples) - 1, min(len(run.samples), SAMPLES)).round().astype(int):
            head = f"{name}, step {run.samples[i]['step']:,}"
            parts.append(f"<h4>{html.escape(head)}</h4><pre>{html.escape(run.samples[i]['sample'][:500])}</pre>")
    return "\n".join(parts)


def table(columns: list[str], runs: list[dict[str, Any]]) -> str:
    """Return a table with a column for each run; '' where there is nothing to show."""
    rows = {name: [run.get(name) for run in runs] for name in {name: None for run in runs for name in run}}
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *columns))
    lines = [f"<th>{html.escape(name)}</th>{''.join(map(cell, values))}" for name, values in rows.items()]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<div class=wide><table><tr>{head}</tr>\n{body}</table></div>" if rows else ""


def cell(value: Any) -> str:
    shown = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return f"<td>{html.escape('-' if value is None else shown)}</td>"


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
