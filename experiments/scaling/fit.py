"""Fit the law L(N, D) = E + A / N^alpha + B / D^beta to finished runs, with errors, and compute what follows from it.

The fit is Chinchilla's third (Hoffmann et al., arXiv 2203.15556) as corrected by Besiroglu et al. (arXiv 2404.10102):
the sum over runs of the Huber loss of ln L - ln L(N, D), minimised with L-BFGS from a grid of starts. N is a number of
parameters, D of training tokens, L a validation loss in nats per token, C = 6 N D the FLOPs of training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError

HUBER = 1e-3  # where the loss of a residual of ln L turns from square to linear
FEWEST_RUNS, FEWEST_VALUES = 6, 3  # of runs, and of different N and of different D among them
EXPONENTS = (0.01, 3.0)  # bounds of alpha and beta: below, the term is a constant; above, it is a step
TAIL = 0.05  # share of the resamples beyond either end of an interval, and that may be outside the bounds
FAR = 10  # a C, N or D this many times outside those of the runs is not tested
STARTS = [  # shares of E, A / N^alpha and B / D^beta in the loss of the middle run, alpha, beta
    (e, a, 1 - e - a, alpha, beta)
    for e, a in ((0.1, 0.45), (0.6, 0.2), (0.3, 0.6), (0.3, 0.1))
    for alpha in (0.2, 0.5, 1.0)
    for beta in (0.2, 0.5, 1.0)
]


@dataclass(frozen=True)
class Points:
    """Hold finished runs: parameters, tokens and losses, (runs,) each, and notes for a reader of the fit."""

    name: str
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    notes: tuple[str, ...] = ()
    measure: dict[str, Any] = field(default_factory=dict)
    """What the losses depend on besides, as far as known; the same in all runs."""

    def take(self, rows: np.ndarray) -> "Points":
        return Points(self.name, self.N[rows], self.D[rows], self.loss[rows])

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the lowest and the highest of C, N, D and loss."""
        seen = dict(C=6 * self.N * self.D, N=self.N, D=self.D, loss=self.loss)
        return {name: (float(values.min()), float(values.max())) for name, values in seen.items()}

    def beyond(self, **values: float) -> list[str]:
        """Return a sentence about each value of C, N or D that is far from these runs, and of loss that is outside."""
        found = []
        for name, value in values.items():
            low, high = self.ranges()[name]
            far = 1 if name == "loss" else FAR
            if not low / far <= value <= high * far:
                how = "is outside" if name == "loss" else f"is more than {FAR} times outside"
                found.append(f"{name} = {value:.4g} {how} what {self.name} saw, {low:.4g} to {high:.4g}")
        return found


@dataclass(frozen=True)
class Law:
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def outside(self) -> list[str]:
        """Return which exponents are outside their bounds."""
        return [n for n in ("alpha", "beta") if not EXPONENTS[0] < getattr(self, n) < EXPONENTS[1]]

    def loss(self, N: Any, D: Any) -> Any:
        with np.errstate(over="ignore"):
            return self.E + self.A * np.power(N, -self.alpha) + self.B * np.power(D, -self.beta)

    def optimum(self, C: float) -> tuple[float, float]:
        """Return N and D of the lowest loss at C = 6 N D FLOPs (Hoffmann et al., equation 4)."""
        total = self.alpha + self.beta
        n = self.log_balance() / total + self.beta / total * math.log(C / 6)
        return exp(n), exp(math.log(C / 6) - n)

    def size(self, D: float) -> float:
        """Return the N that is compute-optimal at D tokens."""
        return exp((self.log_balance() + self.beta * math.log(D)) / self.alpha)

    def log_balance(self) -> float:
        """Return ln(alpha A / (beta B)), which is alpha ln N - beta ln D on the frontier."""
        return math.log(self.alpha / self.beta) + math.log(self.A) - math.log(self.B)

    def gamma(self) -> tuple[float, float]:
        """Return Kausik's interval for N ~ D^gamma (arXiv 2402.14746), which depends on beta alone.

        The loss above E that a lack of data costs, B / D^beta, is set equal to the slow and to the fast rate at which
        N parameters can be learned from D samples: sqrt(N / D) gives 1 - 2 beta, N / D gives 1 - beta.
        """
        return 1 - 2 * self.beta, 1 - self.beta


@dataclass(frozen=True)
class Fit:
    points: Points
    law: Law
    resampled: tuple[Law, ...]
    """Fits to runs drawn with replacement."""
    notes: tuple[str, ...]

    def interval(self, value: Callable[[Law], float]) -> tuple[float, float, float]:
        """Return a quantity of the law: of the best fit, and the 5th and 95th percentile over the resamples."""
        return value(self.law), *percentiles([value(law) for law in self.resampled])

    def error(self, value: Callable[[Law], float]) -> float:
        """Return the standard error of a quantity: its standard deviation over the resamples."""
        return float(np.std([value(law) for law in self.resampled], ddof=1))

    def at_zero_entropy(self) -> bool:
        """Say whether E is at its bound of 0, where it has no standard error."""
        return self.law.E / self.points.loss.min() < 0.01


def percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [100 * TAIL, 100 * (1 - TAIL)], method="nearest")  # inf is a value here
    return float(low), float(high)


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def fit(points: Points, resamples: int = 200, seed: int = 1) -> Fit:
    """Return the law of these runs with its errors. Raise UserError where they do not determine one."""
    counts = len(points.loss), len(np.unique(points.N)), len(np.unique(points.D))
    if counts[0] < FEWEST_RUNS or min(counts[1:]) < FEWEST_VALUES:
        wanted = f"{FEWEST_RUNS} runs of {FEWEST_VALUES} sizes and {FEWEST_VALUES} lengths or more"
        seen = f"{counts[0]} runs of {counts[1]} sizes N and {counts[2]} lengths D"
        raise UserError("; ".join([f"{points.name} has {seen} that can be fitted, wanted {wanted}", *points.notes]))
    law = best_law(points)
    kept = []
    if not law.outside():
        kept = [other for other in bootstrap(points, law, resamples, seed) if not other.outside()]
    if law.outside() or len(kept) < (1 - TAIL) * resamples:
        where = "the best fit" if law.outside() else f"{resamples - len(kept)} of {resamples} resamples"
        raise UserError(
            f"{points.name}: {' and '.join(law.outside()) or 'alpha or beta'} is outside {EXPONENTS[0]:g} to"
            f" {EXPONENTS[1]:g} in {where}, alpha {law.alpha:.3g} and beta {law.beta:.3g} in the best fit: these runs"
            " do not determine a law"
        )
    found, notes = Fit(points, law, tuple(kept), ()), list(points.notes)
    if len(kept) < resamples:
        notes.append(f"errors leave out {resamples - len(kept)} of {resamples} resamples, without a law")
    if found.at_zero_entropy():
        notes.append(f"E is {law.E:.2g}, at its bound of 0: these runs do not determine it, nor exponents beyond them")
    if len(points.loss) < 2 * FEWEST_RUNS:
        notes.append(f"only {len(points.loss)} runs for five constants: the errors are too small rather than too large")
    return Fit(points, law, tuple(kept), tuple(notes))


def best_law(points: Points) -> Law:
    """Return the lowest minimum: a few iterations from every start, then the best few to the end."""
    x = Centred(points)
    rough = sorted((minimise(x, x.start(*start), 40) for start in STARTS), key=lambda found: found[1])
    return x.law(min((minimise(x, p, 400) for p, _ in rough[:6]), key=lambda found: found[1])[0])


def bootstrap(points: Points, law: Law, resamples: int, seed: int) -> list[Law]:
    """Fit runs drawn with replacement, each from the best fit to all of them and from an E well above 0.

    At E = 0 the gradient of ln E is 0, and no minimiser leaves it.
    """
    generator, found = np.random.default_rng(seed), []
    while len(found) < resamples:
        drawn = points.take(generator.integers(len(points.loss), size=len(points.loss)))
        if min(len(np.unique(drawn.N)), len(np.unique(drawn.D))) < FEWEST_VALUES:
            continue
        x = Centred(drawn)
        starts = x.parameters(law), x.start(0.3, 0.35, 0.35, law.alpha, law.beta)
        found.append(x.law(min((minimise(x, start, 200) for start in starts), key=lambda end: end[1])[0]))
    return found


class Centred:
    """Measure ln N and ln D from their means, so that the minimiser can change alpha without A.

    Its parameters p (5,) are ln E, ln of A / N^alpha and of B / D^beta at the means, alpha, beta.
    """

    def __init__(self, points: Points) -> None:
        n, d, self.y = (torch.from_numpy(np.log(v.astype(float))) for v in (points.N, points.D, points.loss))  # (runs,)
        self.mean_n, self.mean_d = n.mean().item(), d.mean().item()
        self.n, self.d = n - self.mean_n, d - self.mean_d

    def objective(self, p: Tensor) -> Tensor:
        terms = [p[0].expand_as(self.y), p[1] - p[3] * self.n, p[2] - p[4] * self.d]  # (runs,) each
        residual = torch.stack(terms).logsumexp(0) - self.y
        return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="sum", delta=HUBER)

    def start(self, e: float, a: float, b: float, alpha: float, beta: float) -> Tensor:
        middle = self.y.median().item()
        logs = [middle + math.log(share) for share in (e, a, b)]
        return torch.tensor([*logs, alpha, beta], dtype=torch.float64)

    def parameters(self, law: Law) -> Tensor:
        a, b = math.log(law.A) - law.alpha * self.mean_n, math.log(law.B) - law.beta * self.mean_d
        return torch.tensor([math.log(max(law.E, 1e-9)), a, b, law.alpha, law.beta], dtype=torch.float64)

    def law(self, p: Tensor) -> Law:
        e, a, b, alpha, beta = p.tolist()
        A, B = (math.exp(max(-700, min(c, 700))) for c in (a + alpha * self.mean_n, b + beta * self.mean_d))
        return Law(math.exp(e), A, alpha, B, beta)


def minimise(x: Centred, start: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Run L-BFGS. Return where it ends and the objective there, infinite where it diverged."""
    p = start.clone().requires_grad_()
    options = dict(history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=1e-16)
    lbfgs = torch.optim.LBFGS([p], max_iter=iterations, max_eval=2 * iterations, **options)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = x.objective(p) / HUBER  # so that its gradients are of order 1
        value.backward()
        return value

    lbfgs.step(closure)
    value = x.objective(p).item()
    return p.detach(), value if math.isfinite(value) else math.inf


# --- Without a law, and from two of them -------------------------------------------------------------------------


def gamma_of_runs(points: Points, tolerance: float) -> tuple[float, float, list[tuple[float, float]]]:
    """Fit gamma to the smallest model that is good enough. Return gamma, its standard error, and (D, N) per length.

    Good enough at D: a loss within `tolerance` nats of the best run of that length; between two sizes, ln N is
    interpolated. A length is left out if it has fewer than three sizes, or if even its smallest run is good enough,
    since the true N is then below all of them. gamma is nan where fewer than three lengths remain.
    """
    found = []
    for D in np.unique(points.D):
        at = points.take(points.D == D)
        sizes = np.unique(at.N)
        losses = np.array([at.loss[at.N == N].mean() for N in sizes])  # over seeds
        first = int((losses <= losses.min() + tolerance).argmax())
        if len(sizes) >= FEWEST_VALUES and first > 0:
            step = (losses[first - 1] - losses.min() - tolerance) / (losses[first - 1] - losses[first])
            low, high = np.log(sizes[first - 1 : first + 1])
            found.append((float(D), float(np.exp(low + step * (high - low)))))
    if len(found) < 3:
        return math.nan, math.nan, found
    d, n = np.log(found).T
    (gamma, _), covariance = np.polyfit(d, n, 1, cov=True)
    return float(gamma), float(covariance[0, 0] ** 0.5), found


def ratios(law: Law, reference: Law, C: float) -> dict[str, float]:
    """Return what `law` needs to reach the loss of `reference` at its optimum for C, as a share of C, of D, of N.

    compute: both at their own optimum. data: at the same N. size: at the same D. inf where the law never reaches it.
    """
    N, D = reference.optimum(C)
    loss = reference.loss(N, D)

    def share(excess: float, wanted: float, exponent: float) -> float:
        """Return by how much x grows until an excess ~ x^-exponent has fallen to the wanted one."""
        return exp((math.log(excess) - math.log(wanted)) / exponent) if wanted > 0 else math.inf

    of_size, of_data = law.A / N**law.alpha, law.B / D**law.beta
    frontier = law.loss(*law.optimum(C)) - law.E  # falls as C^-(alpha beta / (alpha + beta))
    return dict(
        compute=share(frontier, loss - law.E, law.alpha * law.beta / (law.alpha + law.beta)),
        data=share(of_data, loss - law.E - of_size, law.beta),
        size=share(of_size, loss - law.E - of_data, law.alpha),
    )


def compare(fitted: Fit, reference: Fit, C: float) -> dict[str, tuple[float, float, float]]:
    """Return each of `ratios` with its 5th and 95th percentile over the resamples of both families."""
    best = ratios(fitted.law, reference.law, C)
    draws = [ratios(a, b, C) for a, b in zip(fitted.resampled, reference.resampled)]
    return {name: (value, *percentiles([draw[name] for draw in draws])) for name, value in best.items()}
