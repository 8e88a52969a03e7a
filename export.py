"""Export a run to Hugging Face's format, for transformers and programs that read it.

    python export.py out/setting2_cpu --to=hf exported            then AutoModelForCausalLM.from_pretrained("exported")
    python export.py gpt2 --to=preset > config/mine.py            the options that fit a folder, or a name on the hub
    python train.py config/mine.py --init_from=gpt2 --dataset=books    to train it further; see lpa/init_from.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from config import parse, user_errors
from lpa import checkpoint, hf


@dataclass(frozen=True)
class ExportConfig:
    source: tyro.conf.Positional[Path]
    """A run folder, or one of its checkpoints, such as RUN/ckpt/best; with --to=preset a Hugging Face folder, or a name
    on the hub."""
    target: tyro.conf.Positional[Path | None] = None
    """The folder to write, new, empty, or an earlier export."""
    to: Literal["hf", "preset"] = "hf"
    """hf: write `target`. preset: print a preset for train.py --init_from."""

    def __post_init__(self) -> None:
        if self.to == "hf" and self.target is None:
            raise ValueError("no folder to write; wanted: export.py RUN --to=hf FOLDER")


def main(c: ExportConfig) -> None:
    if c.to == "preset" or c.target is None:
        print(hf.preset(c.source))
        return
    model, tokenizer, manifest = checkpoint.load_model(c.source, torch.device("cpu"))
    origin = dict(run=str(c.source), step=manifest["step"], options=manifest["options"])
    hf.export(model, tokenizer, c.target, origin)
    print(f"step {manifest['step']} of {c.source} is in {c.target}, for AutoModelForCausalLM and AutoTokenizer")


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], ExportConfig, __doc__))
