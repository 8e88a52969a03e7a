"""Steps that must not reach the weights: not finite, or a spike. Judged on the device, so that the host never waits.

The verdict is a number that the optimizers read as `found_inf`: at 1 they leave weights and moments as they are.
"""

from typing import Any

import torch
from torch import Tensor

from config import UserError

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run
RECENT_STEPS = 128  # whose spread says what a spike is


class Guard:
    """Says which steps the optimizer is to skip, on the device: not finite ones, and spikes where they are asked for.

    A spike is a step whose loss or gradient norm is more than `spikes` standard deviations above the mean of the
    RECENT_STEPS finite ones before it, spikes among them, so that a level which lasts is no spike for long; 0 = none.
    """

    def __init__(self, device: torch.device, spikes: float = 0.0, saved: dict[str, Any] | None = None) -> None:
        """saved: what state() gave."""
        self.spikes = spikes
        counts = torch.zeros(5, dtype=torch.int32, device=device)
        self.skipped, self.clipped, self.in_a_row, self.longest, self.seen = counts
        self.recent = torch.zeros(2, RECENT_STEPS, device=device)  # of loss and norm
        if saved is not None:
            self.skipped += saved["skipped"]
            self.clipped += saved.get("clipped", 0)  # checkpoints of before it was counted have none
            self.in_a_row += saved["in_a_row"]
        if saved is not None and "recent" in saved:
            self.seen += saved["seen"]
            self.recent.copy_(torch.tensor(saved["recent"]))

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Of a step, both scalars on the device -> 1.0 where the optimizer is to skip it, else 0.0."""
        bad = ~(loss.isfinite() & norm.isfinite())
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)
        if self.spikes:
            now = torch.stack([loss, norm]).float()[:, None]  # (2, 1)
            std, mean = torch.std_mean(self.recent, dim=1, keepdim=True)
            spike = (now > mean + self.spikes * std).any() & (self.seen >= RECENT_STEPS)
            self.recent = torch.where(bad, self.recent, torch.cat([self.recent[:, 1:], now], dim=1))
            self.seen += ~bad
            bad = bad | spike
        self.skipped += bad
        return bad.float()

    def counts(self) -> dict[str, int]:
        """The steps so far that were skipped, and those whose gradient was clipped. The host waits for the device."""
        skipped, clipped = torch.stack([self.skipped, self.clipped]).tolist()
        return dict(skipped=skipped, clipped=clipped)

    def state(self) -> dict[str, Any]:
        """For the manifest. The host waits for the device."""
        counts = self.counts() | dict(in_a_row=self.in_a_row.item())
        return counts | (dict(seen=self.seen.item(), recent=self.recent.tolist()) if self.spikes else {})

    def stop_if_lost(self, step: int) -> None:
        if self.longest >= MAX_BAD_STEPS:
            raise UserError(
                f"{self.longest.item()} steps in a row, seen at step {step}, had a loss or gradient that is not finite;"
                " none of them reached the weights. Try a lower learning_rate, or --resume from the last checkpoint"
            )
