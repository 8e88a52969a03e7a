"""bench.py --mode=plan against what real steps take from the allocator, on the CPU, on two gloo ranks, on a GPU.

    .venv/bin/pytest tests/test_planning.py        CPU, about a minute
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FORKSERVER, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

import bench
from config import TrainConfig, UserError, load_config
from lpa import hardware, optim, planning
from lpa.recompute import apply_recompute
from model import GPT, GPTConfig, LowDim

GPT_SMALL = GPTConfig(
    n_layer=5, n_head=4, n_embd=128, block_size=128, vocab_size=1024, lowdim=LowDim(32, 32, 32, 32), norm="layernorm"
)
SMALL = TrainConfig(gpt=GPT_SMALL, batch_size=16)
TINY = ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=128", "--vocab_size=128", "--mode=plan"]


def train_two_steps(model: nn.Module, c: TrainConfig, device: torch.device, autocast: bool = True) -> None:
    """Each of two micro-steps: the second step has moments, its second micro-step has gradients."""
    optimizers = optim.make_optimizers(model, c)
    idx = torch.zeros(c.batch_size, c.gpt.block_size, dtype=torch.long, device=device)
    for _ in range(2):
        for _ in range(2):
            with hardware.autocast(device, c.dtype if autocast else "float32"):
                loss = model(idx, idx)
            loss.backward()
            del loss
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def cpu_peak(memory: profile) -> int:
    """The most bytes that the CPU's allocator had given out, by the profiler's record of each."""
    events = [event for event in memory.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def recorded() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(recompute="latents", dtype="bfloat16"),
        dict(recompute="block", optimizer="muon"),
        dict(batch_size=1, optimizer="muon"),  # whose step needs more than so few activations do
    ],
)
def test_one_process_takes_what_is_planned(changes: dict, tmp_path: Path) -> None:
    process = FORKSERVER.Process(target=peak_alone, args=(replace(SMALL, **changes), tmp_path / "peak"))
    process.start()
    process.join()
    planned, peak = map(int, (tmp_path / "peak").read_text().split())
    assert planned == pytest.approx(peak, rel=0.001)


def peak_alone(c: TrainConfig, path: Path) -> None:
    """Write what is planned and what is taken, in a process without the CPU kernels that other tests install."""
    torch.set_num_threads(1)
    with recorded() as memory:
        model = GPT(c.gpt)
        apply_recompute(model, c.recompute)
        train_two_steps(model, c, torch.device("cpu"))
    path.write_text(f"{planning.needed(c, 'ddp', 1).total} {cpu_peak(memory)}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_stays_is_what_a_real_model_and_its_optimizers_hold(optimizer: str) -> None:
    c = replace(SMALL, optimizer=optimizer)
    model = GPT(c.gpt)
    optimizers = optim.make_optimizers(model, c)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    for o in optimizers:
        o.step()
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    need = planning.needed(c, "ddp", 4)
    assert need.parameters == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert need.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert need.optimizer == sum(t.nbytes for t in states)


def peak_of_rank(rank: int, engine: str, c: TrainConfig, folder: Path) -> None:
    """Train on gloo, and leave the peak of rank 0 in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    dtype = hardware.DTYPES[c.dtype]
    options = dict(mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    with recorded() as memory:
        with torch.device("cpu" if engine == "ddp" else "meta"):
            model = GPT(c.gpt)
        apply_recompute(model, c.recompute)
        for block in model.transformer.h if engine == "fsdp" else ():
            fully_shard(block, **options)
        if engine == "fsdp":
            fully_shard(model, **options).to_empty(device="cpu")
        else:
            # init_sync: what gloo's thread holds of the weights it sends around may be freed much later.
            model = DDP(model, gradient_as_bucket_view=True, init_sync=False)
        train_two_steps(model, c, torch.device("cpu"), autocast=engine == "ddp")
    if rank == 0:
        (folder / "peak").write_text(f"{planning.needed(c, engine, 2).total} {cpu_peak(memory)}")
    dist.destroy_process_group()


@pytest.mark.parametrize(("engine", "recompute"), [("ddp", "latents"), ("fsdp", "none"), ("fsdp", "block")])
def test_two_ranks_take_what_is_planned(engine: str, recompute: str, tmp_path: Path) -> None:
    c = replace(SMALL, dtype="bfloat16", recompute=recompute)
    ranks = [FORKSERVER.Process(target=peak_of_rank, args=(rank, engine, c, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    planned, peak = map(int, (tmp_path / "peak").read_text().split())
    assert planned == pytest.approx(peak, rel=0.1)  # fsdp frees by other threads


def test_more_recompute_more_gpus_and_fewer_sequences_need_less() -> None:
    def total(engine: str, gpus: int, **changes: str | int) -> int:
        return planning.needed(replace(SMALL, **changes), engine, gpus).total

    for engine in ("ddp", "fsdp"):
        assert total(engine, 2) > total(engine, 2, recompute="latents") > total(engine, 2, recompute="block")
        assert total(engine, 2, batch_size=15) < total(engine, 2) < total(engine, 2, batch_size=17)
    assert total("fsdp", 8) < total("fsdp", 4) < total("fsdp", 2) < total("ddp", 2) == total("ddp", 8)


def test_a_batch_beyond_those_counted_lies_on_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = planning.activation_peak(GPT_SMALL, "float32", 40, "none", False)
    planning.activation_peak.cache_clear()
    monkeypatch.setattr(planning, "LINE_FROM", 8 * GPT_SMALL.block_size)
    assert planning.activation_peak(GPT_SMALL, "float32", 40, "none", False) == pytest.approx(counted, rel=0.04)
    planning.activation_peak.cache_clear()


@pytest.mark.parametrize("limit", [50, 164, 165, 1000, 10**6])
def test_the_largest_batch_is_the_last_that_fits(limit: int) -> None:
    def total(n: int) -> int:
        return max(100 + 7 * n, 60 + 11 * n)

    wanted = max((n for n in range(10**5) if n and total(n) <= limit), default=0)
    assert planning.largest_batch(total, limit) == wanted


def test_the_plan_as_json_and_as_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LINE_FROM", 2 * 128)  # few batches counted, which are quick
    bench.main(load_config([*TINY, "--gpus=2", "--memory=40MB", "--batch_size=8", "--json"], bench.BenchConfig))
    plan = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["recompute"]) for row in plan["rows"]] == [
        (engine, recompute) for engine in ("ddp", "fsdp") for recompute in ("none", "elementwise", "latents", "block")
    ]
    for row in plan["rows"]:
        kept = row["parameters"] + row["gradients"] + row["optimizer"]
        assert row["total"] == kept + max(row["gathered"] + row["activations"], row["optimizer_step"])
        assert row["fits"] == (row["total"] <= plan["usable"] == 36_000_000) == (row["largest_batch_size"] >= 8)
    bench.main(load_config([*TINY, "--gpus=2", "--memory=40MB", "--batch_size=8"], bench.BenchConfig))
    text = capsys.readouterr().out
    assert all(f"{row['largest_batch_size']:,}" in text for row in plan["rows"])
    planning.activation_peak.cache_clear()


@pytest.mark.parametrize(("memory", "size"), [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8)])
def test_sizes(memory: str, size: int) -> None:
    assert planning.size_of(memory) == size


@pytest.mark.parametrize("memory", ["abc", "80", "GB", "-1GB", "0GB", "nanGB", "1e3GB", "", "80KB"])
def test_what_is_no_size_is_refused(memory: str) -> None:
    with pytest.raises(UserError, match=r"^memory is '.*', wanted a size such as 80GB or 79\.2GiB$"):
        planning.size_of(memory)


def test_what_fits_nowhere_is_one_line() -> None:
    result = run("bench.py", *TINY, "--gpus=2", "--memory=0.5MB", expect=2)
    assert result.stderr.startswith("error: memory is 0.5MB on 2 GPUs, wanted more of either: one sequence")
    assert result.stderr.count("\n") == 1
    with pytest.raises(UserError, match="gpus is 0, wanted 1 or more"):
        load_config([*TINY, "--gpus=0"], bench.BenchConfig)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the plan against its allocator")
@pytest.mark.parametrize("recompute", ["none", "latents", "block"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_takes_what_is_planned(recompute: str, optimizer: str) -> None:
    """Within 10 % of the peak of torch's allocator, cuBLAS's workspace included; without torch.compile."""
    ranks = LowDim(q=256, k=256, v=256, o=256)
    gpt = GPTConfig(n_layer=6, n_head=16, n_embd=1024, block_size=1024, vocab_size=32000, lowdim=ranks)
    options = dict(batch_size=16, dtype="bfloat16", recompute=recompute, optimizer=optimizer)
    for c in (TrainConfig(gpt=gpt, **options), TrainConfig(gpt=replace(gpt, norm="layernorm", mlp="relu"), **options)):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.device("cuda"):
            model = GPT(c.gpt)
        apply_recompute(model, recompute)
        train_two_steps(model, c, torch.device("cuda"))
        measured = torch.cuda.max_memory_allocated() - before
        assert planning.needed(c, "ddp", 1).total == pytest.approx(measured, rel=0.1)
        del model
