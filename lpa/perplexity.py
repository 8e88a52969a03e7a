"""Score every token of a split once, in windows that may overlap, and count its words: eval.py.

Shapes: B batch, T time, V vocabulary; N tokens of the split.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import UserError
from data import Corpus
from data.tokenizers import Tokenizer
from lpa import hardware
from lpa.distributed import DistInfo
from model import GPT

CHUNK = 1 << 20  # tokens that are decoded at a time


@torch.no_grad()
def evaluate(model: GPT, corpus: Corpus, stride: int, batch_size: int, dtype: str, info: DistInfo) -> float:
    """Return the mean loss over the N - 1 targets of the split, in nats per token, in float64.

    The model must be in eval mode. Raise UserError where the split has fewer than two tokens.
    """
    if corpus.tokens < 2:
        raise UserError(f"the {corpus.split} split of {corpus.folder} has {corpus.tokens} tokens, wanted 2 or more")
    mine = windows(corpus.tokens, model.config.block_size, stride)[info.rank :: info.world_size]
    total = torch.zeros((), dtype=torch.float64)
    for i in tqdm(range(0, len(mine), batch_size), corpus.split, leave=False, disable=True if info.rank else None):
        rows = mine[i : i + batch_size]
        longest = max(end - start for start, _, end in rows)
        x = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T); what fills a short row stands after its tokens
        for row, (start, _, end) in zip(x, rows):
            row[: end - start] = torch.from_numpy(corpus.window(start, end - start))
        with hardware.autocast(info.device, dtype):
            logits = model(x.to(info.device))  # (B, T, V)
        for row, (start, scored, end) in zip(logits, rows):
            y = torch.from_numpy(corpus.window(scored, end + 1 - scored)).to(info.device)
            losses = F.cross_entropy(row[scored - 1 - start : end - start].float(), y, reduction="none")
            total += losses.cpu().double().sum()
    # On the CPU, where gloo adds them: not every device has float64.
    return (info.mean(total) * info.world_size / (corpus.tokens - 1)).item()


def windows(tokens: int, block_size: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, scored, end) of each window: inputs start ... end - 1, targets scored ... end.

    The targets of all windows are 1 ... tokens - 1, each once.
    """
    found, scored = [], 1
    for start in range(0, tokens - 1, stride):
        end = min(start + block_size, tokens - 1)
        found.append((start, scored, end))
        scored = end + 1
        if scored == tokens:
            break
    return found


def count_words(corpus: Corpus, tokenizer: Tokenizer) -> int:
    """Count the words of the split as word-level papers do: what white space separates, and one <eos> per line.

    So the WikiText-2 test split has its published 245,569.
    """
    pieces = [tokenizer.decode_bytes(token) for token in range(tokenizer.vocab_size)]
    if tokenizer.end_of_text is not None:
        pieces[tokenizer.end_of_text] = b" "  # not a word, but it ends one
    words, inside = 0, False  # inside: the text so far ends within a word, which the next chunk may continue
    for start in range(0, corpus.tokens, CHUNK):
        ids: np.ndarray = corpus.window(start, min(CHUNK, corpus.tokens - start))
        text = b"".join(map(pieces.__getitem__, ids.tolist()))
        words += len(text.split()) + text.count(b"\n")
        if text:
            words -= inside and not text[:1].isspace()
            inside = not text[-1:].isspace()
    return words
