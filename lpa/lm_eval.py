"""Run the tasks of lm-eval on a model, in batches and with its cache: eval.py --tasks.

A request is scored as lm-eval's own hf backend scores it, so an exported model gets the same figures.

Shapes: B requests of a batch, G different contexts among them, S and T tokens, C n_embd, V vocabulary.
"""

import difflib
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from config import UserError
from data.tokenizers import END_OF_TEXT, Tokenizer
from lpa import decode, hardware
from model import GPT

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # the token ids of a context, and of what is to follow it


class NativeLM(TemplateLM):
    """Answers the three kinds of requests that lm-eval makes. The model must be in eval mode."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int, dtype: str = "float32") -> None:
        super().__init__()
        self.model, self.tokens, self.batch_size, self.dtype = model, tokenizer, batch_size, dtype
        self.max_length = model.config.block_size

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def eot_token_id(self) -> int:
        """Return what stands before a text without context; as in sample.py, 0 where no token ends one."""
        return 0 if self.tokens.end_of_text is None else self.tokens.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.tokens.encode(string))

    # Likelihoods

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each text, in windows of block_size that share one token."""
        texts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            texts.append([(None, *make_disjoint_window(window)) for window in windows])
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*texts))))
        return [sum(score for score, _ in itertools.islice(scores, len(windows))) for windows in texts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether greedy decoding gives it, of (text, context, continuation)."""
        pairs = [self.shortened(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i]))  # equal contexts together
        found: dict[int, tuple[float, bool]] = {}
        for batch in batches(order, self.batch_size):
            found |= zip(batch, self.score([pairs[i] for i in batch]))
        return [found[i] for i in range(len(pairs))]

    def shortened(self, context: list[int], continuation: list[int]) -> Pair:
        """Drop the context's first tokens where the model could not see all. Raise UserError if nothing were left.

        lm-eval moves the spaces at a context's end to what follows, so that one of spaces alone is empty here.
        """
        if len(continuation) > self.max_length:
            length = f"a task asks for {len(continuation)} tokens at once"
            raise UserError(f"{length}, wanted at most block_size = {self.max_length}")
        seen = self.max_length + 1 - max(1, len(continuation))
        return tuple(context[-seen:]) or (self.eot_token_id,), tuple(continuation)

    @torch.inference_mode()
    def score(self, batch: list[Pair]) -> list[tuple[float, bool]]:
        contexts = list(dict.fromkeys(context for context, _ in batch))
        longest = max(len(continuation) for _, continuation in batch)
        width = max(map(len, contexts))
        # Read a context that several continuations share only once, where it is the longer part and padding fits.
        shared = len(contexts) < len(batch) and longest <= width and width + longest - 1 <= self.max_length
        with hardware.autocast(self.device, self.dtype):
            states = self.states_by_context(contexts, batch) if shared else self.states(batch)
            logits = self.model.lm_head(torch.cat(states))[:, : self.tokens.vocab_size].float()  # (all tokens, V)
        tokens = [token for _, continuation in batch for token in continuation]
        targets = torch.tensor(tokens, dtype=torch.long, device=self.device)  # there may be none
        losses = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        lengths = [len(continuation) for _, continuation in batch]
        parts = zip(losses.cpu().double().split(lengths), (logits.argmax(-1) == targets).cpu().split(lengths))
        return [(score.sum().item(), bool(greedy.all())) for score, greedy in parts]

    def states(self, batch: list[Pair]) -> list[Tensor]:
        """Return what the head reads before each token of each continuation: (its tokens, C) per request."""
        x = self.model.hidden(self.padded(context + continuation[:-1] for context, continuation in batch))  # (B, T, C)
        starts = [len(context) - 1 for context, _ in batch]
        return [row[i : i + len(continuation)] for row, i, (_, continuation) in zip(x, starts, batch)]

    def states_by_context(self, contexts: list[tuple[int, ...]], batch: list[Pair]) -> list[Tensor]:
        """Return the same, from a cache of the contexts, a row of which serves every continuation."""
        cache = decode.new_cache(self.model, len(contexts))
        idx = self.padded(contexts, left=True)  # (G, S)
        cache.padding = torch.tensor([idx.size(1) - len(context) for context in contexts], device=self.device)
        first = self.model.hidden(idx, cache)[:, -1:]  # (G, 1, C)
        rows = torch.tensor([contexts.index(context) for context, _ in batch], device=self.device)
        x = first[rows]  # (B, 1, C)
        later = self.padded([continuation[:-1] for _, continuation in batch])  # (B, T)
        if later.size(1):
            cache.held = [{name: tensor[rows] for name, tensor in layer.items()} for layer in cache.held]
            cache.padding = cache.padding[rows]
            x = torch.cat([x, self.model.hidden(later, cache)], dim=1)  # (B, 1 + T, C)
        return [row[: len(continuation)] for row, (_, continuation) in zip(x, batch)]

    def padded(self, rows: Iterable[tuple[int, ...]], left: bool = False) -> Tensor:
        """Return rows of unequal length as one tensor, with zeros after or before them."""
        rows = list(rows)
        idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in zip(idx, rows):
            row[len(row) - len(tokens) if left else 0 :][: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return idx.to(self.device)

    # Text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each context, up to a stop string, the end of text or the task's number of tokens."""
        prompts = [(tuple(self.tok_encode(context)), options) for context, options in (r.args for r in requests)]
        order = sorted(range(len(prompts)), key=lambda i: (repr(prompts[i][1]), -len(prompts[i][0])))
        written: dict[int, str] = {}
        for _, alike in itertools.groupby(order, key=lambda i: repr(prompts[i][1])):
            for batch in batches(list(alike), self.batch_size):
                contexts, (options, *_) = zip(*(prompts[i] for i in batch))
                written |= zip(batch, self.write(list(contexts), options))
        return [written[i] for i in range(len(prompts))]

    def write(self, contexts: list[tuple[int, ...]], options: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(options))
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            tokens = f"a task asks for {options['max_gen_toks']} new tokens"
            raise UserError(f"{tokens}, wanted fewer than block_size = {self.max_length}")
        contexts = [(context or (self.eot_token_id,))[-room:] for context in contexts]
        stops = [stop for stop in (*options["until"], END_OF_TEXT) if stop]
        amount = (options["max_gen_toks"], self.tokens.vocab_size)
        sampling = (options.get("temperature") or 0.0, options.get("top_k"), options.get("top_p"))
        idx = self.padded(contexts, left=True)  # (B, T)
        with hardware.autocast(self.device, self.dtype):
            lengths = torch.tensor(list(map(len, contexts)), device=self.device)
            drawn: list[list[int]] = [[] for _ in contexts]
            for step in decode.generate(self.model, idx, *amount, *sampling, lengths=lengths):
                for row, token in zip(drawn, step.tolist()):
                    row.append(token)
                if all(self.ended(row, stops) for row in drawn):
                    break
        return [postprocess_generated_text(self.text(row), stops, None) for row in drawn]

    def ended(self, row: list[int], stops: list[str]) -> bool:
        return self.tokens.end_of_text in row or any(stop in self.tokens.decode(row) for stop in stops)

    def text(self, row: list[int]) -> str:
        ends = row.index(self.tokens.end_of_text) if self.tokens.end_of_text in row else len(row)
        return self.tokens.decode(row[:ends])


def batches(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def run_tasks(lm: TemplateLM, names: list[str], num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """Return lm-eval's results of tasks by name or YAML file. Raise UserError where one or its data is missing."""
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=len(files) < len(names))
    for name in set(names) - set(files) - set(manager.all_tasks):
        close = " or ".join(difflib.get_close_matches(name, manager.all_tasks, 3)) or "a YAML file of your own"
        raise UserError(f"lm-eval has no task {name}; perhaps you meant {close}")
    try:
        loaded = manager.load(names)
    except Exception as error:  # of lm-eval, datasets, the hub or the network: each has its own
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"cannot load {', '.join(names)}, which are read from the hub or a file: {why}") from None
    within = set(itertools.chain(*loaded["group_map"].values()))
    tasks = [task for kind in ("groups", "tasks") for name, task in loaded[kind].items() if name not in within]
    shown = dict(num_fewshot=num_fewshot, limit=limit, log_samples=False)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, **shown)
