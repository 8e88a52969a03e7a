"""One page about any runs, to look at and to send: what differs, curves, samples, singular values, figures of bench.py.

    python -m experiments.report out/dense_cpu out/lpa_cpu --out=results/report.html
    python -m experiments.report out/*_cpu --bench=bench_train.json --singular_values=false

Reads log.jsonl, the newest checkpoint, and bench*.json in the run folder, which `bench.py ... --json > RUN/bench.json`
writes, where they are there. The page holds everything in itself: no script, no network, pictures as vectors.
"""

import dataclasses
import datetime
import html
import io
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from config import UserError, parse, user_errors
from experiments import plot, spectrum
from experiments.logs import SILENT, Run, name_runs, read_run, require_common_axis
from lpa import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 500  # of a curve in a picture, more than its width in points of print
SAMPLES = 4  # of a run, from the first to the last
SAMPLE_LENGTH = 500  # characters
NAME_LENGTH = 40  # of a run; where what sets it apart takes more, its folder is its name
WIDTH = 5.4  # inches; as wide as a phone is in points, so that letters keep their size there


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or log.jsonl files of any name."""
    out: Path = Path("results/report.html")
    title: str = "Training runs"
    bench: tuple[Path, ...] = ()
    """What `bench.py --json` printed, besides bench*.json in the run folders."""
    singular_values: bool = True
    """Of the newest checkpoints; large models take minutes."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is named, wanted one or more run folders")


@dataclass
class Section:
    """A heading and what stands below it."""

    title: str
    parts: list[str] = field(default_factory=list)
    """HTML."""


def main(o: Options) -> None:
    runs = [read_run(path) for path in dict.fromkeys(o.runs)]
    names = label_runs(runs)
    sections = [overview(runs, names), differences(runs, names), curves(runs, names), samples(runs, names)]
    if o.singular_values:
        sections.append(singular_values(runs, names))
    sections += [bench_figures(o.bench, runs, names), machines(runs, names), details(runs, names)]
    text = page(o.title, [section for section in sections if section.parts])
    try:
        o.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(o.out, text)
    except OSError as error:
        raise UserError(f"cannot write {o.out}: {error.strerror}") from None
    print(f"wrote {o.out}, {len(text.encode()) / 1e6:.2f} MB")


def label_runs(runs: list[Run]) -> list[str]:
    """What sets each run apart, where that is short; else its folder. No two are the same."""
    names = name_runs([run.options for run in runs], SILENT)
    folders = [run.path.parent.name for run in runs]
    for labels in (names, folders):
        if len(set(labels)) == len(labels) and all(0 < len(label) <= NAME_LENGTH for label in labels):
            return labels
    return [str(run.path.parent if run.path.name == "log.jsonl" else run.path) for run in runs]


# --- Sections --------------------------------------------------------------------------------------------------------


def overview(runs: list[Run], names: list[str]) -> Section:
    rows = []
    for run in runs:
        step = run.steps[-1] if run.steps else dict(step=0, tokens=0, seconds=0.0)
        evaluation = run.evaluations[-1] if run.evaluations else {}
        best = min((e["val_loss"] for e in run.evaluations), default=None)
        speeds = [s["tokens_per_second"] for s in run.steps if s.get("tokens_per_second")]
        rows.append({
            "folder": str(run.path.parent),
            "parameters": run.parameters,
            "of them in the blocks": run.parameters_in_blocks,
            "FLOPs a token, training": run.flops_per_token,
            "step": f"{step['step']:,} of {run.options['max_steps']:,}" + ("" if run.finished else ", not finished"),
            "training tokens": step["tokens"],
            "training time": duration(step["seconds"]),
            "tokens a second, median": round(np.median(speeds)) if speeds else None,
            "last validation loss (nats a token)": decimals(evaluation.get("val_loss")),
            "lowest validation loss": decimals(best),
            "last validation loss (bits a byte)": decimals(evaluation.get("val_bits_per_byte")),
        })  # fmt: skip
    return Section("Runs", [table(names, {name: [row[name] for row in rows] for name in rows[0]})])


def differences(runs: list[Run], names: list[str]) -> Section:
    """Every option but out_dir, which is the folder above."""
    differing = {name: values for name, values in options_of(runs).items() if len(set(map(repr, values))) > 1}
    if len(runs) == 1:
        return Section("What differs")
    parts = [table(names, differing)] if differing else [paragraph("Nothing: all options are the same.")]
    return Section("What differs", parts)


def options_of(runs: list[Run]) -> dict[str, list[Any]]:
    """Option -> its value in each run, "None" as text, and None where an older run has no such option."""
    every = {name: None for run in runs for name in run.options if name != "out_dir"}  # a set that keeps its order
    told = [{name: "None" if value is None else value for name, value in run.options.items()} for run in runs]
    return {name: [options.get(name) for options in told] for name in every}


def curves(runs: list[Run], names: list[str]) -> Section:
    section = Section("Curves")
    try:
        require_common_axis(runs, "loss")
        shown = ["loss", "val_loss"]
    except UserError:
        shown = ["bits_per_byte"]
        section.parts.append(paragraph("The runs read other tokens, so only their bits a byte can be compared."))
    for y in shown:
        having = [(run, name) for run, name in zip(runs, names) if (run.steps if y == "loss" else run.evaluations)]
        if any(len(run.steps if y == "loss" else run.evaluations) > 1 for run, _ in having):  # else the table says it
            section.parts.append(draw_curves(y, *map(list, zip(*having))))
    return section


def draw_curves(y: str, runs: list[Run], names: list[str]) -> str:
    o = plot.Options(runs=tuple(run.path for run in runs), y=y, each_seed=True)
    drawn, width = plot.make_curves(o, runs)  # a curve for each run, in their order
    longest = max(len(curve.x) for curve in drawn)
    drawn = [thinned(dataclasses.replace(curve, name=name)) for curve, name in zip(drawn, names)]
    figure, axes = plot.new_figure(WIDTH, 3.0 + 0.2 * len(runs))
    plot.draw_curves(o, drawn, width, axes[0, 0])
    axes[0, 0].set_ylabel(plot.Y[y])
    plot.add_legend(figure, axes[0, 0])
    caption = f"{plot.Y[y].partition(' (')[0].capitalize()}"
    caption += f", the mean over {width:,.0f} tokens around each point." if width else ", each evaluation a point."
    if longest > POINTS:
        caption += f" Curves are thinned out: of up to {longest:,} points, {POINTS} are drawn."
    return picture(figure, caption, y)


def thinned(curve: plot.Curve) -> plot.Curve:
    """At most POINTS of its points, evenly spread, the first and the last among them."""
    kept = evenly(len(curve.x), POINTS)
    return plot.Curve(curve.name, *(values[kept] for values in (curve.x, curve.y, curve.low, curve.high)))


def evenly(n: int, most: int) -> np.ndarray:
    """Indices of at most `most` of n things."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def samples(runs: list[Run], names: list[str]) -> Section:
    section = Section("Samples through training")
    for run, name in zip(runs, names):
        if run.samples:
            section.parts.append(f"<h3>{escape(name)}</h3>")
        for i in evenly(len(run.samples), SAMPLES) if run.samples else []:
            text = run.samples[i]["sample"]
            text = text[:SAMPLE_LENGTH] + (" ..." if len(text) > SAMPLE_LENGTH else "")
            section.parts.append(f"<h4>step {run.samples[i]['step']:,}</h4><pre class=text>{escape(text)}</pre>")
    return section


def singular_values(runs: list[Run], names: list[str]) -> Section:
    spectra, section = {}, Section("Singular values")
    for number, (run, name) in enumerate(zip(runs, names)):
        if checkpoint.steps(run.path.parent):
            try:
                spectra[number] = spectra_of(run.path.parent)
            except UserError as error:
                section.parts.append(paragraph(f"{name}: {error}"))
    sublayers = [s for s in ("q", "k", "v", "o", "gate", "up", "down") if any(s in found for found in spectra.values())]
    if not sublayers:
        return section
    in_column = -(-len(sublayers) // 2)
    figure, axes = plot.new_figure(WIDTH, 0.2 * len(spectra) + 1.9 * in_column, in_column, 2)
    from matplotlib.ticker import NullFormatter  # after new_figure, which says where matplotlib is missing

    for ax, sublayer in zip(axes.flat, sublayers):
        for number, found in spectra.items():
            if sublayer in found:
                spectrum.draw_values(ax, found[sublayer], plot.style(number) | dict(label=names[number]))
        ax.set_title(sublayer, fontsize=10)
        ax.set_ylim(1e-3, 1.5)
        ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes.flat[len(sublayers) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("number of the value")
    plot.add_legend(figure, axes[0, 0])
    caption = "Singular values over the largest: the mean over layers, in a band from the lowest to the highest."
    section.parts.append(picture(figure, caption, "spectra"))
    ranks = {
        sublayer: [mean_rank(spectra.get(number, {}).get(sublayer)) for number in range(len(runs))]
        for sublayer in sublayers
    }
    told = "Effective rank, exp(-sum p ln p) with p the singular values over their sum: the mean over layers."
    section.parts += [paragraph(told), table(names, ranks)]
    return section


@torch.no_grad()
def spectra_of(folder: Path) -> dict[str, list[Tensor]]:
    """Sublayer -> the singular values of its matrix in each layer. Raises UserError where no checkpoint is whole."""
    model, _, _ = checkpoint.load_model(folder, torch.device("cpu"), mapped=True)
    found: dict[str, list[Tensor]] = {}
    for block in model.transformer.h:
        for sublayer in model.config.sublayers:
            values = spectrum.spectrum(block.get_submodule(spectrum.place(sublayer)))
            found.setdefault(sublayer, []).append(values)
    return found


def mean_rank(values: list[Tensor] | None) -> str | None:
    if values is None:
        return None
    return f"{np.mean([spectrum.effective_rank(v) for v in values]):.1f} of {len(values[0])}"


def bench_figures(given: tuple[Path, ...], runs: list[Run], names: list[str]) -> Section:
    """A table for each file, with a column for each variant that it measured."""
    stored = [(name, path) for run, name in zip(runs, names) for path in sorted(run.path.parent.glob("bench*.json"))]
    section = Section("Figures of bench.py")
    for name, path in [("", path) for path in given] + stored:
        variants = read_bench(path)
        rows = {figure: None for variant in variants.values() for figure in variant}
        cells = {figure: [variant.get(figure) for variant in variants.values()] for figure in rows}
        section.parts += [f"<h3>{escape(f'{name}: {path.name}' if name else path)}</h3>", table(list(variants), cells)]
    return section


def read_bench(path: Path) -> dict[str, dict[str, Any]]:
    """Variant -> figure -> value, 'ratio_to_dense.ms' among them. Raises UserError where bench.py did not write it."""
    try:
        variants = json.loads(path.read_text(encoding="utf-8"))
        flat = {}
        for variant, figures in variants.items():
            flat[variant] = {k: v for k, v in figures.items() if not isinstance(v, dict)}
            for name, part in figures.items():
                flat[variant] |= {f"{name}.{k}": v for k, v in part.items()} if isinstance(part, dict) else {}
        return flat
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not what bench.py --json prints") from None


def machines(runs: list[Run], names: list[str]) -> Section:
    rows = []
    for run in runs:
        rate = run.start.get("matmul_flops")
        versions = {k: v or "none" for k, v in run.start["versions"].items()}
        measured = {"ranks": run.start.get("ranks"), "large products (TFLOP/s)": rate and round(rate / 1e12, 3)}
        rows.append({"device": run.start["device"], **measured, **versions})
    every = {name: None for row in rows for name in row}
    return Section("Machines and versions", [table(names, {name: [row.get(name) for row in rows] for name in every})])


def details(runs: list[Run], names: list[str]) -> Section:
    """Closed until someone opens them."""
    shared = {name: values[:1] for name, values in options_of(runs).items() if len(set(map(repr, values))) == 1}
    section = Section("Details", [folded(f"{len(shared)} options that all runs share", table(["all runs"], shared))])
    for run, name in zip(runs, names):
        layers = "\n".join(run.start["parameters"])
        section.parts.append(folded(f"Parameters of {name}", f"<pre class=wide>{escape(layers)}</pre>"))
    return section


# --- HTML ------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 44rem; margin: 2rem auto; padding: 0 1rem; color: #111; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin-bottom: 0.3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 0.7rem; padding-top: 0.7rem; border-top: 1px solid #bbb; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 0.4rem; }}
h4 {{ font-size: 0.85rem; font-weight: normal; color: #444; margin: 0.8rem 0 0.2rem; }}
.about, figcaption {{ font-size: 0.85rem; color: #444; margin: 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
th:first-child {{ position: sticky; left: 0; background: #fff; }}
thead th {{ border-bottom: 1px solid #111; vertical-align: bottom; }}
td {{ min-width: 5rem; overflow-wrap: anywhere; }}
tbody th {{ font-weight: normal; color: #444; min-width: 8rem; }}
figure {{ margin: 1.2rem 0 1.8rem; }}
svg {{ width: 100%; height: auto; }}
pre {{ font: 0.8rem/1.45 ui-monospace, monospace; margin: 0 0 1rem; }}
pre.text {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #bbb; padding-left: 0.8rem; }}
details {{ margin: 0.5rem 0; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class=about>{about}</p>
{sections}
</body>
</html>
"""


def page(title: str, sections: list[Section]) -> str:
    about = f"{datetime.date.today()}, written by: python -m experiments.report {' '.join(sys.argv[1:])}"
    body = "\n".join(f"<h2>{section.title}</h2>\n" + "\n".join(section.parts) for section in sections)
    return PAGE.format(title=escape(title), about=escape(about), sections=body)


def table(columns: list[str], rows: dict[str, list[Any]]) -> str:
    """A column for each run; it scrolls by itself where the page is narrow."""
    head = "<th></th>" + "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr><th>{escape(name)}</th>{''.join(map(cell, values))}</tr>\n" for name, values in rows.items())
    return f"<div class=wide><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"


def cell(value: Any) -> str:
    if isinstance(value, float):
        shown = f"{value:,.0f}" if abs(value) >= 1e5 and math.isfinite(value) else f"{value:.5g}"
    else:
        shown = f"{value:,}" if type(value) is int else "–" if value is None else escape(value)
    return f"<td>{shown}</td>"


def picture(figure: "Figure", caption: str, name: str) -> str:
    """The figure as SVG inside the page, its letters in the page's fonts; `name` keeps its ids apart from others'."""
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["system-ui", "DejaVu Sans"]}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", svg, count=5)  # of the svg element itself
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def folded(summary: str, contents: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{contents}</details>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def escape(text: object) -> str:
    return html.escape(str(text))


def decimals(loss: float | None) -> str | None:
    return None if loss is None else f"{loss:.4f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
