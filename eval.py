"""Compute perplexity, nats per token and bits per byte of a checkpoint over all of a split; or run benchmarks.

    python eval.py out/lpa_cpu --split=val                                       disjoint windows
    python eval.py out/lpa_370m_s1 --split=test --stride=256 --dtype=bfloat16    more context for every token
    torchrun --nproc_per_node=8 eval.py out/lpa_370m_s1 --split=test --json      the windows shared by all processes
    python eval.py out/lpa_370m --tasks=lambada_openai,hellaswag,own.yaml        through lm-eval, see lpa/lm_eval.py

Windows of block_size tokens begin every `stride` tokens. Each token but the first of the split is a target exactly
once, in the first window that reaches it; with a stride S below block_size T it sees at least T - S tokens before it.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import data
from config import UserError, parse, user_errors
from data.tokenizers import Tokenizer
from lpa import checkpoint
from lpa.distributed import DistInfo, init_distributed
from lpa.perplexity import count_words, evaluate
from model import GPT


@dataclass(frozen=True)
class EvalConfig:
    run: tyro.conf.Positional[Path]
    """A run folder, or one of its checkpoints, such as RUN/ckpt/best."""
    dataset: str | None = None
    """A corpus below data/ or a folder, prepared with the checkpoint's tokenizer; None = what the run trained on."""
    split: str = "val"
    stride: int | None = None
    """Tokens between the starts of two windows; None = block_size, disjoint windows."""
    batch_size: int = 8
    """Windows per process and forward pass."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: bool = False
    """Print one JSON object in place of a table."""
    tasks: str | None = None
    """Benchmarks in place of the split: tasks of lm-eval by name, or your own by YAML file, with commas between."""
    num_fewshot: int | None = None
    """Solved examples before each question of a task; None = the default of the task."""
    limit: int | None = None
    """Ask only the first questions of each task, this many."""

    def __post_init__(self) -> None:
        for name in ("stride", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted 1 or more")
        if self.tasks is None and (self.limit, self.num_fewshot) != (None, None):
            raise ValueError("limit and num_fewshot need --tasks")


def main(c: EvalConfig) -> None:
    info = init_distributed(c.device)
    model, tokenizer, manifest = checkpoint.load_model(c.run, info.device)
    if c.tasks is not None:
        print(benchmark(c, [task.strip() for task in c.tasks.split(",")], model, tokenizer, info))
        return
    corpus = data.open_corpus(c.dataset or manifest["options"]["dataset"], c.split)
    require_tokenizer(corpus, manifest["tokenizer"])
    context = model.config.block_size
    stride = context if c.stride is None else c.stride
    if stride > context:
        raise UserError(f"stride is {stride}, wanted at most block_size = {context}: it would skip tokens")
    nats = evaluate(model, corpus, stride, c.batch_size, c.dtype, info)
    if info.rank == 0:
        place = dict(run=str(c.run), step=manifest["step"], dataset=str(corpus.folder), split=c.split)
        results = place | dict(context=context, stride=stride) | summary(nats, corpus, count_words(corpus, tokenizer))
        print(json.dumps(results, indent=1) if c.json else table(results))
    info.close()


def benchmark(c: EvalConfig, tasks: list[str], model: GPT, tokenizer: Tokenizer, info: DistInfo) -> str:
    """Return the figures of the tasks, as lm-eval's table or its JSON."""
    if info.world_size > 1:
        raise UserError(f"tasks run in one process, not in {info.world_size}; leave torchrun out")
    try:
        from lm_eval.utils import make_table

        from lpa import lm_eval
    except ImportError:
        raise UserError("--tasks needs: pip install 'lm-eval>=0.4.13,<0.5'") from None
    lm = lm_eval.NativeLM(model, tokenizer, c.batch_size, c.dtype)
    results = lm_eval.run_tasks(lm, tasks, c.num_fewshot, c.limit)
    if c.json:
        return json.dumps(dict(run=str(c.run), results=results["results"]), indent=1, default=str)
    return make_table(results) + (make_table(results, "groups") if results.get("groups") else "")


def require_tokenizer(corpus: data.Corpus, spec: dict[str, Any]) -> None:
    """Raise UserError where the corpus was prepared with another tokenizer than the checkpoint's."""
    changed = [name for name in spec | corpus.meta["tokenizer"] if spec.get(name) != corpus.meta["tokenizer"].get(name)]
    if changed:
        shown = [str(tokenizer.get("name", tokenizer["kind"])) for tokenizer in (corpus.meta["tokenizer"], spec)]
        raise UserError(
            f"{corpus.folder} has the tokenizer {shown[0]}, the checkpoint {shown[1]}; they differ in"
            f" {', '.join(changed)}. Prepare the text with the checkpoint's tokenizer: --tokenizer=CORPUS_OF_THE_RUN"
        )


def summary(nats: float, corpus: data.Corpus, words: int) -> dict[str, Any]:
    """Return the mean loss in every unit. The first token, which no window predicts, counts with the mean."""
    total = nats * corpus.tokens
    return dict(
        targets=corpus.tokens - 1,
        nats_per_token=nats,
        perplexity=exp(nats),
        bits_per_byte=total / corpus.bytes / math.log(2),
        words=words,
        word_perplexity=exp(total / words) if words else None,
    )


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def table(results: dict[str, Any]) -> str:
    """Return one line per figure."""
    forms = {int: "{:,}", float: "{:,.6f}"}
    return "\n".join(f"{name:16}{forms.get(type(value), '{}').format(value)}" for name, value in results.items())


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], EvalConfig, __doc__))
