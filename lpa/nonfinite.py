"""Skip the steps whose loss or gradient is not finite. They are found on the device, so the host never waits.

The verdict is a number that the optimizers read as `found_inf`: at 1 they leave weights and moments as they are.
"""

from typing import Any

import torch
from torch import Tensor

from config import UserError

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run


class NonFiniteCheck:
    """Counts the steps that were skipped and those whose gradient was clipped, on the device."""

    def __init__(self, device: torch.device, saved: dict[str, Any] | None = None) -> None:
        """saved: what state() returned when the checkpoint was written."""
        self.skipped, self.clipped, self.in_a_row, self.longest = torch.zeros(4, dtype=torch.int32, device=device)
        if saved is not None:
            self.skipped += saved["skipped"]
            self.clipped += saved["clipped"]
            self.in_a_row += saved["in_a_row"]

    def verdict(self, loss: Tensor, norm: Tensor, largest: float) -> Tensor:
        """Return 1.0 where the optimizers must skip this step, else 0.0. All are scalars; largest clips the norm."""
        bad = ~(loss.isfinite() & norm.isfinite())
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)
        self.skipped += bad
        self.clipped += ~bad & (norm > largest)
        return bad.float()

    def counts(self) -> dict[str, int]:
        """Return how many steps so far were skipped and clipped. The host waits for the device."""
        skipped, clipped = torch.stack([self.skipped, self.clipped]).tolist()
        return dict(skipped=skipped, clipped=clipped)

    def state(self) -> dict[str, Any]:
        return self.counts() | dict(in_a_row=self.in_a_row.item())

    def stop_if_lost(self, step: int) -> None:
        if self.longest >= MAX_BAD_STEPS:
            raise UserError(
                f"{self.longest.item()} steps in a row, seen at step {step}, had a loss or gradient that is not finite;"
                " none of them changed the weights. Try a lower learning_rate, or --resume from the last checkpoint"
            )
