"""lm-eval on our model: against transformers a request at a time, lm-eval's own hf backend, and as a user runs it.

    .venv/bin/pytest tests/test_lm_eval.py        CPU, about 20 s

Skipped without lm-eval (417 MB, installed by make test-slow): .venv/bin/pip install 'lm-eval>=0.4.13,<0.5'
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here

import eval as evaluation
from config import UserError, parse
from data.tokenizers import BPETokenizer, Tokenizer, train_bpe
from lpa import hf
from model import GPT, GPTConfig, LowDim

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lpa.lm_eval import NativeLM, run_tasks  # noqa: E402

TEXT = "The owl sat on the oak. One two three, four five six; seven eight nine. The cat sat on the mat and sang.\n"
LLAMA = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=48, vocab_size=384, lowdim=LowDim(q=8, k=8, v=8, o=8))
GPT2 = replace(LLAMA, norm="layernorm", pos="learned", mlp="gelu", bias=True)
QUESTIONS = [
    ("The owl sat on", [" the oak", " the mat and sang", " a"]),
    ("One two three,", [" four five six", " seven", " one two three four"]),
    ("The", [" owl", " cat"]),
    ("The cat sat on the mat and sang. One two three, four five six; seven eight nine. The", [" owl", " cat sat on"]),
]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([TEXT], 300)


def random_model(c: GPTConfig) -> GPT:
    """Large weights, so that scores differ; and ids of the padding that would win wherever they could."""
    model = GPT(c).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    model.lm_head.weight.data[300:] *= 1000
    return model


def hf_twin(model: GPT, tokenizer: Tokenizer, folder: Path) -> torch.nn.Module:
    hf.export(model, tokenizer, folder / "hf", {})
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()


def asked(*arguments: object) -> SimpleNamespace:
    """A request as lm-eval makes it."""
    return SimpleNamespace(args=arguments)


@torch.no_grad()
def alone(theirs: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A request on its own: log p of each token from the last block_size tokens before it that lm-eval would show."""
    ids = torch.tensor([(context + continuation)[-49:]])
    scores = theirs(ids[:, :-1]).logits[0].double().log_softmax(-1)[-len(continuation) :]
    tokens = torch.tensor(continuation)
    return scores[torch.arange(len(tokens)), tokens].sum().item(), bool((scores.argmax(-1) == tokens).all())


@pytest.mark.parametrize("c", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_are_those_of_transformers(
    c: GPTConfig, batch_size: int, tokenizer: BPETokenizer, tmp_path: Path
) -> None:
    model = random_model(c)
    theirs = hf_twin(model, tokenizer, tmp_path)
    lm = NativeLM(model, tokenizer, batch_size)
    pairs = [(context, choice) for context, choices in QUESTIONS for choice in choices]
    pairs += [("", "The owl"), ("The owl ", "sat"), (TEXT * 3, " The owl sat"), (TEXT * 3, " One")]
    pairs += [(" ", " owl")]  # lm-eval's own backend fails at a context of spaces alone
    scores = lm.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, choice), (score, greedy) in zip(pairs, scores):
        kept = context.rstrip()
        whole, first = tokenizer.encode(context + choice), tokenizer.encode(kept)
        wanted = alone(theirs, first or [tokenizer.end_of_text], whole[len(first) :])
        assert score == pytest.approx(wanted[0], abs=1e-4)
        assert greedy == wanted[1]
    assert len({round(score, 3) for score, _ in scores}) == len(pairs)


def test_greedy_continuations_are_known_as_such(tokenizer: BPETokenizer, tmp_path: Path) -> None:
    model = random_model(LLAMA)
    context = tokenizer.encode("The owl sat on")
    idx = torch.tensor([context])
    for _ in range(3):
        idx = torch.cat([idx, model(idx)[:, -1:, :300].argmax(-1)], dim=1)
    best = idx[0, len(context) :].tolist()
    lm = NativeLM(model, tokenizer, 4)
    tried = [best, best[:2], [*best[:2], (best[2] + 1) % 300], [(best[0] + 1) % 300]]
    answers = lm._loglikelihood_tokens([(None, context, continuation) for continuation in tried])
    assert [greedy for _, greedy in answers] == [True, True, False, False]
    for length in (1, 20):  # merged with the context's last token
        assert lm._loglikelihood_tokens([(None, length * context, [])]) == [(0.0, True)]


def test_a_shared_context_is_read_once(tokenizer: BPETokenizer) -> None:
    model = random_model(LLAMA)
    seen = []
    model.transformer.wte.register_forward_hook(lambda _module, args, _out: seen.append(args[0].numel()))
    lm = NativeLM(model, tokenizer, 8)
    context = list(range(40))
    lm._loglikelihood_tokens([(None, context, [7, i]) for i in range(8)])
    assert sum(seen) == 40 + 8


@pytest.mark.parametrize("c", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_long_text_is_scored_in_windows(c: GPTConfig, tokenizer: BPETokenizer, tmp_path: Path) -> None:
    model = random_model(c)
    theirs = hf_twin(model, tokenizer, tmp_path)
    texts = [TEXT * 3, "The", TEXT]
    ids = tokenizer.encode(texts[0])
    assert 96 < len(ids) < 192
    wanted, shown = 0.0, [tokenizer.end_of_text, *ids]
    for start in range(0, len(ids), 48):  # windows of lm-eval share one token with what precedes them
        scored = ids[start : start + 48]
        end = start + len(scored)
        wanted += alone(theirs, shown[max(0, end - 48) : start + 1], scored)[0]
    for batch_size in (1, 5):
        scores = NativeLM(model, tokenizer, batch_size).loglikelihood_rolling([asked(text) for text in texts])
        assert scores[0] == pytest.approx(wanted, abs=1e-3)
        assert scores[1] == pytest.approx(alone(theirs, [tokenizer.end_of_text], tokenizer.encode("The"))[0], abs=1e-4)


@pytest.mark.parametrize("c", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_written_text_is_that_of_transformers(c: GPTConfig, tokenizer: BPETokenizer, tmp_path: Path) -> None:
    model = random_model(c)
    theirs = hf_twin(model, tokenizer, tmp_path)
    contexts = ["The owl sat", "One", "", "The cat sat on the mat", TEXT * 2]
    options = dict(until=["\n\n"], max_gen_toks=12, do_sample=False)
    whole = []
    for context in contexts:
        ids = torch.tensor([tokenizer.encode(context)[-36:] or [tokenizer.end_of_text]])
        out = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=299, pad_token_id=299)
        new = out[0, ids.size(1) :].tolist()
        whole.append(tokenizer.decode(new[: new.index(299)] if 299 in new else new).split("\n\n")[0])
    for batch_size in (1, 2, 8):
        lm = NativeLM(model, tokenizer, batch_size)
        assert lm.generate_until([asked(context, options) for context in contexts]) == whole
    context, text = max(zip(contexts, whole), key=lambda pair: len(pair[1]))
    stop = text[2:4]
    assert len(stop) == 2
    written = NativeLM(model, tokenizer, 4).generate_until([asked(context, {**options, "until": [stop]})])
    assert written == [text.split(stop)[0]]


def test_what_cannot_be_asked(tokenizer: BPETokenizer) -> None:
    lm = NativeLM(random_model(LLAMA), tokenizer, 2)
    with pytest.raises(UserError, match="49 tokens at once, wanted at most block_size = 48"):
        lm._loglikelihood_tokens([(None, [1], [2] * 49)])
    with pytest.raises(UserError, match="256 new tokens, wanted fewer than block_size = 48"):
        lm.generate_until([asked("One", dict(until=["."]))])


# Own tasks, from files


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Multiple choice, the last words of a line, a text, and an answer to write; each a YAML beside its jsonl."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [dict(q=q, choices=c, gold=i % len(c)) for i, (q, c) in enumerate(QUESTIONS * 3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    metric = "metric_list:\n  - metric: {}\n    aggregation: {}\n    higher_is_better: true\n"
    kinds = {
        "choose": ("multiple_choice", "doc_to_target: gold\ndoc_to_choice: choices\n", ("acc", "mean")),
        "last_words": ("loglikelihood", 'doc_to_target: "{{choices[0]}}"\n', ("perplexity", "perplexity")),
        "whole": (
            "loglikelihood_rolling",
            'doc_to_target: "{{q}}{{choices[1]}}"\n',
            ("bits_per_byte", "bits_per_byte"),
        ),
        "answer": ("generate_until", 'doc_to_target: "{{choices[0]}}"\n', ("exact_match", "mean")),
    }
    for name, (kind, rest, (measure, mean)) in kinds.items():
        source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'questions.jsonl'}\n"
        source += f"  cache_dir: {folder / 'cache'}\ntest_split: test\noutput_type: {kind}\n"
        asks = 'doc_to_text: ""\n' if kind == "loglikelihood_rolling" else 'doc_to_text: "{{q}}"\n'
        stops = 'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 6\n' if kind == "generate_until" else ""
        own = f"task: own_{name}\n{source}{asks}{rest}{stops}{metric.format(measure, mean)}"
        (folder / f"{name}.yaml").write_text(own)
    return [str(folder / f"{name}.yaml") for name in kinds]


def figures(results: dict) -> dict[str, dict[str, float]]:
    return {task: {k: v for k, v in row.items() if isinstance(v, float)} for task, row in results["results"].items()}


def test_own_tasks_without_a_network(tasks: list[str], tokenizer: BPETokenizer, tmp_path: Path) -> None:
    model = random_model(LLAMA)
    theirs = hf_twin(model, tokenizer, tmp_path)
    got = figures(run_tasks(NativeLM(model, tokenizer, 4), tasks[:2], None, None))
    right, log_p = [], []
    for i, (question, choices) in enumerate(QUESTIONS * 3):
        context = tokenizer.encode(question)
        scores = [alone(theirs, context, tokenizer.encode(question + c)[len(context) :])[0] for c in choices]
        right.append(scores.index(max(scores)) == i % len(choices))
        log_p.append(scores[0])
    assert got["own_choose"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)
    mean = torch.tensor(log_p, dtype=torch.float64).mean()
    assert got["own_last_words"]["perplexity,none"] == pytest.approx((-mean).exp().item(), rel=1e-4)


@pytest.mark.slow
def test_scores_are_those_of_the_hf_backend(tasks: list[str], tokenizer: BPETokenizer, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's hf backend needs accelerate")
    from lm_eval.models.huggingface import HFLM

    for number, c in enumerate((LLAMA, GPT2)):
        model = random_model(c)
        hf_twin(model, tokenizer, tmp_path / str(number))
        backend = HFLM(str(tmp_path / str(number) / "hf"), device="cpu", batch_size=4)
        ours = figures(run_tasks(NativeLM(model, tokenizer, 4), tasks, 1, None))
        wanted = figures(run_tasks(backend, tasks, 1, None))
        assert ours.keys() == wanted.keys()
        for task in ours:
            assert ours[task] == pytest.approx(wanted[task], rel=1e-5, nan_ok=True), task


def test_as_a_user_runs_it(corpus: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=128", "--lowdim.q=8", "--batch_size=2"]
    places = [f"--dataset={corpus}", f"--out_dir={tmp_path / 'run'}"]
    run_here(["train.py", *shape, *places, "--max_steps=1", "--eval_tokens=128", "--compile=off", "--device=cpu"])
    capsys.readouterr()

    def told(*options: str) -> str:
        evaluation.main(parse([str(tmp_path / "run"), "--device=cpu", *options], evaluation.EvalConfig))
        return capsys.readouterr().out

    printed = json.loads(told(f"--tasks={tasks[0]}", "--json", "--limit=4"))
    assert 0 <= printed["results"]["own_choose"]["acc,none"] <= 1
    both = told(f"--tasks={tasks[0]}, {tasks[1]}", "--limit=4")
    assert "own_choose" in both and "own_last_words" in both
    broken = tmp_path / "broken.yaml"
    broken.write_text(Path(tasks[0]).read_text().replace("questions.jsonl", "absent.jsonl"))
    with pytest.raises(UserError, match="cannot load") as error:
        told(f"--tasks={broken}")
    assert "\n" not in str(error.value)


@pytest.mark.slow  # lm-eval takes long to index its 14,683 tasks
def test_a_misspelt_task_is_named(tokenizer: BPETokenizer) -> None:
    with pytest.raises(UserError, match="no task lambada_opena; perhaps you meant lambada_openai"):
        run_tasks(NativeLM(random_model(LLAMA), tokenizer, 2), ["lambada_opena"], None, None)
