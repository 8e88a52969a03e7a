"""The law L(N, D) = E + A / N^alpha + B / D^beta: its fit to finished runs, the errors of it, and what follows from it.

The fit is Chinchilla's third (Hoffmann et al., arXiv 2203.15556) as Besiroglu et al. repaired it (arXiv 2404.10102):
the sum over runs of the Huber loss of ln L - ln L(N, D), minimised with L-BFGS from a grid of starts. N is a number of
parameters, D of training tokens, L a validation loss in nats per token, C = 6 N D the FLOPs of training.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError

HUBER = 1e-3  # where the loss of a residual of ln L turns from square to linear
FEWEST_RUNS, FEWEST_VALUES = 6, 3  # of runs, and of different N and of different D among them
EXPONENTS = (0.01, 3.0)  # what alpha and beta may be: below, the term is a constant; above, it is a step
LOST = 0.1  # the share of resamples whose exponents may be outside
TAIL = 0.05  # what an interval leaves out at either end
FAR = 10  # times outside the C, N or D of the runs: no law is tested there
STARTS = [  # shares of E, A / N^alpha and B / D^beta in the loss of the middle run, alpha, beta
    (e, a, 1 - e - a, alpha, beta)
    for e, a in ((0.1, 0.45), (0.6, 0.2), (0.3, 0.6), (0.3, 0.1))
    for alpha in (0.2, 0.5, 1.0)
    for beta in (0.2, 0.5, 1.0)
]


@dataclass(frozen=True)
class Points:
    """Finished runs: parameters, tokens and losses, (runs,) each. notes: what a reader of the fit has to know.

    measure: what else their losses and FLOPs depend on, where it is known; the same in all of them.
    """

    name: str
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    notes: tuple[str, ...] = ()
    measure: dict[str, Any] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> "Points":
        return Points(self.name, self.N[rows], self.D[rows], self.loss[rows])

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest of C, N, D and loss."""
        seen = dict(C=6 * self.N * self.D, N=self.N, D=self.D, loss=self.loss)
        return {name: (float(values.min()), float(values.max())) for name, values in seen.items()}

    def beyond(self, **values: float) -> list[str]:
        """Of values named C, N, D or loss: what to say of each that is far from these runs; of a loss, outside."""
        said = []
        for name, value in values.items():
            low, high = self.ranges()[name]
            far = 1 if name == "loss" else FAR
            if not low / far <= value <= high * far:
                how = "is outside" if name == "loss" else f"is more than {FAR} times outside"
                said.append(f"{name} = {value:.4g} {how} what {self.name} saw, {low:.4g} to {high:.4g}")
        return said


@dataclass(frozen=True)
class Law:
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    @property
    def holds(self) -> bool:
        """Whether both exponents are within their bounds: what follows from others means nothing."""
        return inside(self, "alpha") and inside(self, "beta")

    def loss(self, N: float | np.ndarray, D: float | np.ndarray) -> float | np.ndarray:
        with np.errstate(all="ignore"):  # of no parameters it is inf
            return self.E + self.A * np.power(N, -self.alpha) + self.B * np.power(D, -self.beta)

    def optimum(self, C: float) -> tuple[float, float]:
        """N and D of the lowest loss at C = 6 N D FLOPs (Hoffmann et al., equation 4); nan where the law does not hold.

        In logarithms: near the bounds of the exponents N and D may be beyond any float, and are inf or 0.
        """
        if not self.holds:
            return math.nan, math.nan
        total = self.alpha + self.beta
        n = self.log_balance() / total + self.beta / total * math.log(C / 6)
        return exp(n), exp(math.log(C / 6) - n)

    def size(self, D: float) -> float:
        """The N that is compute-optimal at D tokens: where a percent of either lowers the loss by as much."""
        return exp((self.log_balance() + self.beta * math.log(D)) / self.alpha) if self.holds else math.nan

    def log_balance(self) -> float:
        """ln(alpha A / (beta B)), which is alpha ln N - beta ln D on the frontier."""
        return math.log(self.alpha / self.beta) + math.log(self.A) - math.log(self.B)

    def gamma(self) -> tuple[float, float]:
        """Kausik's interval for N ~ D^gamma (arXiv 2402.14746), which depends on beta alone.

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
        """A quantity of the law: at the best fit, and the 5th and 95th percentile over the resamples."""
        return value(self.law), *tails([value(law) if law.holds else math.nan for law in self.resampled])

    def error(self, value: Callable[[Law], float]) -> float:
        """The standard error of a quantity: its standard deviation over the resamples that hold, nan where too few."""
        values = [value(law) for law in self.resampled if law.holds]
        return float(np.std(values, ddof=1)) if len(values) > max(1, (1 - TAIL) * len(self.resampled)) else math.nan


def tails(values: list[float]) -> tuple[float, float]:
    """The 5th and 95th percentile. nan stands for any value at all: the lowest for the one, the highest for the other.

    nan where the percentile itself is such a one.
    """
    lost = np.isnan(values)
    if lost.sum() > TAIL * len(values) or not values:
        return math.nan, math.nan
    at = 100 * TAIL, 100 * (1 - TAIL)  # "nearest", as inf is a value among the others
    low, high = (
        np.percentile(np.where(lost, end, values), q, method="nearest") for q, end in zip(at, (-math.inf, math.inf))
    )
    return float(low), float(high)


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def fit(points: Points, resamples: int = 200, seed: int = 1) -> Fit:
    """The law of these runs with its errors. Raises UserError where they do not determine one."""
    require_enough(points)
    law = best_law(points)
    for name in ("alpha", "beta"):
        if not inside(law, name):
            raise UserError(
                f"{points.name}: {name} is {getattr(law, name):.3g} in the best fit, wanted {EXPONENTS[0]:g} to"
                f" {EXPONENTS[1]:g}: these runs follow no such law in {'N' if name == 'alpha' else 'D'}"
            )
    resampled = bootstrap(points, law, resamples, seed)
    for name in ("alpha", "beta"):
        lost = sum(not inside(other, name) for other in resampled)
        if lost > LOST * len(resampled):
            raise UserError(
                f"{points.name}: {name} is {getattr(law, name):.3g} in the best fit, but outside {EXPONENTS[0]:g} to"
                f" {EXPONENTS[1]:g} in {lost} of {len(resampled)} resamples: these runs do not determine it"
            )
    notes = list(points.notes)
    if lost := sum(not other.holds for other in resampled):
        outside = f"in {lost} of {len(resampled)} resamples alpha or beta is outside its bounds"
        notes.append(f"{outside}: in an interval they may be anything, and standard errors are without them")
    if without_entropy(law, points):
        notes.append(f"E is {law.E:.2g}, at its bound of 0: these runs do not determine it, nor exponents beyond them")
    if len(points.loss) < 2 * FEWEST_RUNS:
        notes.append(f"only {len(points.loss)} runs for five constants: the errors are too small rather than too large")
    return Fit(points, law, tuple(resampled), tuple(notes))


def require_enough(points: Points) -> None:
    counts = len(points.loss), len(np.unique(points.N)), len(np.unique(points.D))
    if counts[0] < FEWEST_RUNS or min(counts[1:]) < FEWEST_VALUES:
        wanted = f"{FEWEST_RUNS} runs of {FEWEST_VALUES} sizes and {FEWEST_VALUES} lengths or more"
        seen = f"{counts[0]} runs of {counts[1]} sizes N and {counts[2]} lengths D"
        raise UserError("; ".join([f"{points.name} has {seen} that can be fitted, wanted {wanted}", *points.notes]))


def inside(law: Law, name: str) -> bool:
    return EXPONENTS[0] < getattr(law, name) < EXPONENTS[1]


def without_entropy(law: Law, points: Points) -> bool:
    """Whether E is at its bound of 0, where it has no standard error."""
    return law.E / points.loss.min() < 0.01


def best_law(points: Points) -> Law:
    """The lowest minimum: every start runs a little, the best few to the end."""
    x = Centred(points)
    rough = sorted((minimise(x, x.start(*start), 40) for start in STARTS), key=lambda found: found[1])
    return x.law(min((minimise(x, p, 400) for p, _ in rough[:6]), key=lambda found: found[1])[0])


def bootstrap(points: Points, law: Law, resamples: int, seed: int) -> list[Law]:
    """The law of runs drawn with replacement, each minimised from the best fit to all of them and from E well above 0.

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
    """The runs as the minimiser sees them. ln N and ln D are counted from their means, so that A and alpha part.

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
    """L-BFGS from a start -> where it ends, and the objective there; a step into the void ends at infinity."""
    p = start.clone().requires_grad_()
    options = dict(history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=1e-16)
    lbfgs = torch.optim.LBFGS([p], max_iter=iterations, max_eval=2 * iterations, **options)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = x.objective(p) / HUBER  # its gradients are of order 1
        value.backward()
        return value

    lbfgs.step(closure)
    value = x.objective(p).item()
    return p.detach(), value if math.isfinite(value) else math.inf


# What follows without the law, and from two of them


def gamma_of_runs(points: Points, tolerance: float) -> tuple[float, float, list[tuple[float, float]], list[str]]:
    """The growth of the smallest model that is good enough: gamma, its standard error, (D, N) of each length, notes.

    Good enough at D: a loss within `tolerance` nats of the best run of that length; between two sizes, ln N is
    interpolated. Where even the smallest run is good enough, the true N is below all of them, and the length is left
    out. gamma is nan where fewer than three lengths remain.
    """
    found, left_out = [], {}
    for D in np.unique(points.D):
        at = points.take(points.D == D)
        sizes = np.unique(at.N)
        losses = np.array([at.loss[at.N == N].mean() for N in sizes])  # over seeds
        good = losses <= losses.min() + tolerance
        first = int(good.argmax())
        if len(sizes) < FEWEST_VALUES or first == 0:
            few = f"fewer than {FEWEST_VALUES} sizes"
            why = few if len(sizes) < FEWEST_VALUES else "the smallest run is good enough already"
            left_out.setdefault(why, []).append(float(D))
            continue
        step = (losses[first - 1] - losses.min() - tolerance) / (losses[first - 1] - losses[first])
        ends = np.log(sizes[first - 1 : first + 1])
        found.append((float(D), float(np.exp(ends[0] + step * (ends[1] - ends[0])))))
    notes = [f"D = {listed(lengths)} left out of it: {why}" for why, lengths in left_out.items()]
    if len(found) < 3:
        notes.append(f"{len(found)} lengths remain, wanted 3 or more")
        return math.nan, math.nan, found, notes
    d, n = np.log(found).T
    centred = d - d.mean()
    slope = (centred @ n) / (centred @ centred)
    residual = n - n.mean() - slope * centred
    return float(slope), float(np.sqrt(residual @ residual / (len(d) - 2) / (centred @ centred))), found, notes


def listed(lengths: list[float]) -> str:
    """'1e6, 2e6 are', and of more than a few '1e6 to 1e9, 64 lengths, are'."""
    if len(lengths) > 4:
        return f"{lengths[0]:.3g} to {lengths[-1]:.3g}, {len(lengths)} lengths, are"
    return ", ".join(f"{D:.3g}" for D in lengths) + (" are" if len(lengths) > 1 else " is")


@dataclass(frozen=True)
class Ratios:
    """What a law needs to reach another one's loss, as a share of what that one needs.

    inf where it never does; nan where one of the two does not hold.
    """

    compute: float
    """Of C, both at their optimum."""
    data: float
    """Of D, at the same N."""
    size: float
    """Of N, at the same D."""


def ratios(law: Law, reference: Law, C: float) -> Ratios:
    """`law` against `reference` at C FLOPs, and at the N and D that are the optimum of the reference there."""
    N, D = reference.optimum(C)
    loss = reference.loss(N, D)
    if not (law.holds and math.isfinite(loss)):
        return Ratios(math.nan, math.nan, math.nan)
    need = solve(lambda c: law.loss(*law.optimum(c)) - loss, C)
    data = power(law.B, loss - law.E - law.A / N**law.alpha, law.beta)
    size = power(law.A, loss - law.E - law.B / D**law.beta, law.alpha)
    return Ratios(need / C, data / D, size / N)


def power(constant: float, excess: float, exponent: float) -> float:
    """x where constant / x^exponent = excess."""
    return exp((math.log(constant) - math.log(excess)) / exponent) if excess > 0 else math.inf


def solve(falling: Callable[[float], float], near: float) -> float:
    """Where a falling function of a positive number is 0, by halving ln x; inf where it is not within e^40 of near."""
    low, high = -40.0, 40.0
    if falling(near * math.exp(high)) > 0:
        return math.inf
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(near * math.exp(middle)) > 0 else (low, middle)
    return near * math.exp(high)


def compare(fitted: Fit, reference: Fit, C: float) -> list[tuple[str, float, float, float]]:
    """Each of Ratios: its name, its value, and the 5th and 95th percentile over the resamples of both families."""
    best = astuple(ratios(fitted.law, reference.law, C))
    draws = [astuple(ratios(a, b, C)) for a, b in zip(fitted.resampled, reference.resampled)]
    ends = [tails([draw[i] for draw in draws]) for i in range(len(best))]
    return [(name, value, *pair) for name, value, pair in zip(("compute", "data", "size"), best, ends)]
