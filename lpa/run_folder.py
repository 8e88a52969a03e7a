"""The folder of a run: make it, find what to resume from, and note why a run stopped."""

import dataclasses
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError
from lpa import checkpoint


def prepare(run: Path, c: TrainConfig, order: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Make the run's folder. Return the checkpoint to resume from and its manifest, or None and {} for a new run.

    Never overwrite an earlier run: move it aside. Raise UserError where there is nothing to resume, or the checkpoint
    is of another model, other data, another seed or optimizer.
    """
    if run.resolve() == Path.cwd().resolve():
        raise UserError(f"out_dir is {str(run)!r}, wanted a folder of its own, such as out/run")
    folder, manifest, complaints = checkpoint.newest(run) if c.resume != "never" else (None, {}, [])
    if folder is None and (c.resume == "must" or complaints):
        raise UserError("; ".join(complaints) or f"nothing to resume: {run} holds no checkpoint; leave --resume out")
    for complaint in complaints:
        print(f"warning: {complaint}; skipped")
    if folder is not None:
        options = dataclasses.asdict(c)
        changed = checkpoint.differences(manifest["options"]["gpt"], options["gpt"])
        changed += checkpoint.differences(manifest["order"], order)
        if changed:
            raise UserError(f"{folder} is of another run. " + "; ".join(changed))
    try:
        if c.resume == "never" and ((run / "log.jsonl").exists() or (run / "ckpt").exists()):
            number = next(n for n in itertools.count(1) if not Path(f"{run}.{n}").exists())
            run.rename(f"{run}.{number}")
            print(f"an earlier run in {run} was moved to {run}.{number}")
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.clear_leftovers(run)
        for broken in checkpoint.steps(run)[: len(complaints)]:  # or they would count among those that are kept
            checkpoint.set_aside(broken)
        (run / "stopped.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to out_dir {run}: {error.strerror}") from None
    return folder, manifest


def note_stop(run: Path, reason: str, step: int) -> None:
    """Write stopped.json, for people and job scripts: torchrun does not start again what exits with 0."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    checkpoint.write_whole(run / "stopped.json", json.dumps(dict(reason=reason, step=step, time=now)) + "\n")
