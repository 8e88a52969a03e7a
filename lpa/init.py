"""How the two factors of a layer start: drawn by a law, or cut from a trained matrix.

Shapes: R rank, C_in and C_out the widths of the layer, K blocks.
"""

import torch
from torch import Tensor


def fill(A: Tensor, B: Tensor, law: str, s: float, std: float, generator: torch.Generator) -> None:
    """Draw A (R, C_in) and B (C_out, R) by a law of the table in GPT.init_weights; blocks (K, ...) are orthogonal."""
    if A.ndim == 3:
        for factor in (A, B):
            orthogonal_(factor, generator)
        B.mul_(s / std)
        return
    rank, d_in = A.shape
    d_out = len(B)
    if law == "matched":
        for factor in (A, B):
            factor.normal_(0, (s / rank**0.5) ** 0.5, generator=generator)
    elif law == "torch":
        A.uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        B.uniform_(-(rank**-0.5), rank**-0.5, generator=generator).mul_(s / std)
    else:
        # The singular vectors of a Gaussian matrix are uniform and independent of its singular values, which follow
        # the Marchenko-Pastur law. So two thin QRs and the law's quantiles replace the SVD of a C_out x C_in matrix.
        root = (s * singular_values(d_in, d_out, rank)).sqrt().to(A)  # (R,)
        for factor, width in ((A.T, d_in), (B, d_out)):
            q, r = torch.linalg.qr(torch.randn(width, rank, device=A.device, generator=generator))
            factor.copy_(q * r.diagonal().sign() * root)  # the signs make q uniform (arXiv math-ph/0609050)


def orthogonal_(factor: Tensor, generator: torch.Generator) -> None:
    """Draw a matrix, or each block of (K, rows, columns), with singular values of 1."""
    gaussian = torch.randn(factor.shape, device=factor.device, generator=generator)
    tall = gaussian if factor.size(-2) >= factor.size(-1) else gaussian.mT
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # makes q uniform (arXiv math-ph/0609050)
    factor.copy_(q if tall is gaussian else q.mT)


def singular_values(d_in: int, d_out: int, rank: int) -> Tensor:
    """Return the largest `rank` singular values of a d_out x d_in matrix of N(0, 1), as quantiles of their limit."""
    small, large = sorted((d_in, d_out))
    ratio = (small / large) ** 0.5
    # x^2 is Marchenko-Pastur on [1 - ratio, 1 + ratio]; x = 1 - ratio cos(t) takes the square roots out of its ends.
    t = torch.linspace(0, torch.pi, 20_001, dtype=torch.float64)
    x = 1 - ratio * t.cos()
    density = (((1 + ratio) ** 2 - x**2) * (x**2 - (1 - ratio) ** 2)).clamp(min=0).sqrt() / x.clamp(min=1e-12)
    mass = torch.cumulative_trapezoid(density * ratio * t.sin(), t)
    mass = mass / mass[-1]
    quantile = 1 - (torch.arange(rank, dtype=torch.float64) + 0.5) / small
    return large**0.5 * x[1:][torch.searchsorted(mass, quantile)]


def product_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of B A: U (C_out, R), singular values (R,), V^T (R, C_in), without forming B A.

    With B = Q_b R_b and A^T = Q_a R_a by QR, B A = Q_b (R_b R_a^T) Q_a^T, and the matrix in the middle is only R x R.
    """
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ u, s, vh @ q_a.T


def truncate(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A (R, C_in) and B (C_out, R) whose product is nearest to the matrix of a thin SVD, and the energy kept.

    Each factor takes the root of the singular values, so both have the same scale. The energy is the sum of the squared
    singular values that stay over the sum of all (Eckart and Young: 1 - energy is the relative squared error).
    """
    u, s, vh = svd
    root = s[:rank].sqrt()
    energy = s.double().square()
    kept = (energy[:rank].sum() / energy.sum()).item() if energy.any() else 1.0  # of nothing, all
    return root[:, None] * vh[:rank], u[:, :rank] * root, kept
