"""Fit the law L(N, D) = E + A / N^alpha + B / D^beta to finished runs, with errors, and compare two laws.

N is a number of parameters, D of training tokens, L a validation loss in nats per token, C = 6 N D the FLOPs
of training. The fit is the third of Hoffmann et al. (arXiv 2203.15556), as Besiroglu et al. corrected it
(arXiv 2404.10102): minimise the sum over runs of the Huber loss of ln L - ln L(N, D) from a grid of starts.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import UserError
from experiments.logs import Run

HUBER = 1e-3  # where the loss of a residual of ln L turns from square to linear
FEWEST_RUNS, FEWEST_VALUES = 6, 3  # of runs, and of different N and of different D among them
EXPONENTS = (0.01, 3.0)  # bounds of alpha and beta: below, the term is a constant; above, it is a step
TAIL = 0.05  # share of the resamples beyond either end of an interval, and that may be outside the bounds
FAR = 10  # a C, N or D this many times outside those of the runs is not tested
TOLERANCE = 0.02  # nats above the best run of the same D that are still good enough


@dataclass(frozen=True)
class Points:
    """Hold finished runs: parameters, tokens and losses, (runs,) each, and notes for a reader of the fit."""

    name: str
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    notes: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    """Those that were read from a log."""

    def take(self, rows: np.ndarray) -> "Points":
        return Points(self.name, self.N[rows], self.D[rows], self.loss[rows])

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the lowest and the highest of C, N, D and loss."""
        values = dict(C=6 * self.N * self.D, N=self.N, D=self.D, loss=self.loss)
        return {name: (float(of_runs.min()), float(of_runs.max())) for name, of_runs in values.items()}

    def beyond(self, **values: float) -> list[str]:
        """Return a sentence for each C, N or D far from these runs, and for a loss outside their losses."""
        found = []
        for name, value in values.items():
            low, high = self.ranges()[name]
            far, how = (1, "outside") if name == "loss" else (FAR, f"more than {FAR} times outside")
            if not low / far <= value <= high * far:
                span = f"{low:.4g} to {high:.4g}"
                found.append(f"{name} = {value:.4g} is {how} the runs of {self.name}, {span}")
        return found


@dataclass(frozen=True)
class Law:
    """Hold the constants of one law, or those of several in arrays (laws,)."""

    E: Any
    A: Any
    alpha: Any
    B: Any
    beta: Any

    @np.errstate(over="ignore")
    def loss(self, N: Any, D: Any) -> Any:
        return self.E + self.A * np.power(N, -self.alpha) + self.B * np.power(D, -self.beta)

    @np.errstate(over="ignore")
    def optimum(self, C: float) -> tuple[Any, Any]:
        """Return N and D of the lowest loss at C = 6 N D FLOPs (Hoffmann et al., equation 4)."""
        n = (self.log_balance() + self.beta * math.log(C / 6)) / (self.alpha + self.beta)
        return np.exp(n), np.exp(math.log(C / 6) - n)

    @np.errstate(over="ignore")
    def size(self, D: Any) -> Any:
        """Return the N that is compute-optimal at D tokens."""
        return np.exp((self.log_balance() + self.beta * np.log(D)) / self.alpha)

    def log_balance(self) -> Any:
        """Return ln(alpha A / (beta B)), which is alpha ln N - beta ln D on the frontier."""
        return np.log(self.alpha / self.beta) + np.log(self.A) - np.log(self.B)

    def gamma(self) -> tuple[Any, Any]:
        """Return Kausik's interval for N ~ D^gamma (arXiv 2402.14746), which depends on beta alone.

        B / D^beta, the loss that a lack of data costs, is set equal to the slow and to the fast rate at which
        N parameters can be learned from D samples: sqrt(N / D) gives 1 - 2 beta, N / D gives 1 - beta.
        """
        return 1 - 2 * self.beta, 1 - self.beta


@dataclass(frozen=True)
class Fit:
    points: Points
    law: Law
    laws: Law
    """The same law, and those of runs drawn with replacement, (1 + resamples,); nan where they have none."""
    notes: list[str]


def interval(values: np.ndarray) -> tuple[Any, Any, Any]:
    """Return the first of values (..., 1 + resamples), of the best fit, and the 5th and 95th percentile."""
    # "nearest" does not interpolate, since a value may be inf.
    shares = [100 * TAIL, 100 * (1 - TAIL)]
    return values[..., 0], *np.nanpercentile(values[..., 1:], shares, axis=-1, method="nearest")


def fit(points: Points, resamples: int = 200) -> Fit:
    """Return the law of these runs with its errors. Raise UserError where they do not determine one."""
    runs, sizes, lengths = len(points.loss), len(np.unique(points.N)), len(np.unique(points.D))
    if runs < FEWEST_RUNS or min(sizes, lengths) < FEWEST_VALUES:
        wanted = f"{FEWEST_RUNS} runs of {FEWEST_VALUES} sizes and {FEWEST_VALUES} lengths or more"
        seen = f"{runs} runs of {sizes} sizes N and {lengths} lengths D that can be fitted"
        raise UserError("; ".join([f"{points.name} has {seen}, wanted {wanted}", *points.notes]))
    law = best_law(points, starts(points))
    laws = [law, *bootstrap(points, law, resamples)] if in_bounds(law) else [law]
    table = np.array([dataclasses.astuple(one) for one in laws])
    outside = np.array([not in_bounds(one) for one in laws])
    lost = f"{outside.sum()} of {resamples} resamples"
    if outside[0] or outside.sum() > TAIL * resamples:
        raise UserError(
            f"{points.name}: alpha or beta is outside {EXPONENTS[0]:g} to {EXPONENTS[1]:g} in"
            f" {'the best fit' if outside[0] else lost}: these runs do not determine a law (in the best fit"
            f" alpha is {law.alpha:.3g} and beta {law.beta:.3g})"
        )
    table[outside] = math.nan
    notes = list(points.notes)
    if outside.any():
        notes.append(f"errors leave out {lost}, without a law")
    if runs < 2 * FEWEST_RUNS:
        notes.append(f"only {runs} runs for five constants: the errors are too small, not too large")
    return Fit(points, law, Law(*table.T), notes)


def in_bounds(law: Law) -> bool:
    return all(EXPONENTS[0] < exponent < EXPONENTS[1] for exponent in (law.alpha, law.beta))


def starts(points: Points) -> list[Law]:
    """Return laws with the median loss at the median N and D, and different shares of its three terms."""
    N, D, loss = (float(np.median(values)) for values in (points.N, points.D, points.loss))
    return [
        Law(e * loss, a * loss * N**alpha, alpha, (1 - e - a) * loss * D**beta, beta)
        for e, a in ((0.1, 0.45), (0.6, 0.2), (0.3, 0.6), (0.3, 0.1))
        for alpha in (0.2, 0.5, 1.0)
        for beta in (0.2, 0.5, 1.0)
    ]


@np.errstate(all="ignore")  # the line search also tries steps that overflow, and rejects them
def best_law(points: Points, starts: list[Law]) -> Law:
    """Return the lowest of the minima that BFGS finds from these starts."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError("the fit needs a package: pip install 'scipy>=1.11,<2'") from None
    n, d, y = np.log(points.N), np.log(points.D), np.log(points.loss)  # (runs,) each

    def objective(p: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum of the Huber losses over HUBER and its gradient, p: ln E, A, B; alpha, beta."""
        terms = np.stack([np.full_like(n, p[0]), p[1] - p[3] * n, p[2] - p[4] * d])  # (3, runs)
        predicted = np.logaddexp.reduce(terms)
        residual = (predicted - y) / HUBER
        huber = np.where(np.abs(residual) < 1, residual**2 / 2, np.abs(residual) - 0.5)
        e, a, b = np.exp(terms - predicted)  # the share of each term in the loss
        return HUBER * huber.sum(), np.stack([e, a, b, -a * n, -b * d]) @ residual.clip(-1, 1)

    ends = []
    for law in starts:
        start = [*np.log([max(law.E, 1e-9), law.A, law.B]), law.alpha, law.beta]
        ends.append(minimize(objective, start, jac=True, method="BFGS", options=dict(gtol=1e-9)))
    e, a, b, alpha, beta = min(ends, key=lambda end: end.fun).x.clip(-700, 700).tolist()
    return Law(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


def bootstrap(points: Points, law: Law, resamples: int) -> list[Law]:
    """Fit runs drawn with replacement, each from the best fit to all of them and from an E well above 0.

    At E = 0 the gradient of ln E is 0, and no minimiser leaves it.
    """
    generator, found = np.random.default_rng(1), []
    begin = [law, dataclasses.replace(law, E=0.3 * float(np.median(points.loss)))]
    while len(found) < resamples:
        drawn = points.take(generator.integers(len(points.loss), size=len(points.loss)))
        if min(len(np.unique(drawn.N)), len(np.unique(drawn.D))) >= FEWEST_VALUES:
            found.append(best_law(drawn, begin))
    return found


def gamma_of_runs(points: Points) -> tuple[float, float, list[tuple[float, float]]]:
    """Fit gamma to the smallest N that is good enough. Return gamma, its standard error, and each (D, N).

    Good enough at D: a loss within TOLERANCE of the best run of that length; ln N is interpolated between two
    sizes. A length is left out if it has fewer than three sizes, or if even its smallest run is good enough,
    since the true N is then below all of them. gamma is nan where fewer than three lengths remain.
    """
    found = []
    for D in np.unique(points.D):
        at = points.take(points.D == D)
        sizes = np.unique(at.N)
        losses = np.array([at.loss[at.N == N].mean() for N in sizes])  # over seeds
        wanted = losses.min() + TOLERANCE
        first = int((losses <= wanted).argmax())
        if len(sizes) >= FEWEST_VALUES and first > 0:
            pair = [first, first - 1]  # in the order of rising losses, as np.interp wants
            found.append((float(D), float(np.exp(np.interp(wanted, losses[pair], np.log(sizes[pair]))))))
    if len(found) < 3:
        return math.nan, math.nan, found
    d, n = np.log(found).T
    (gamma, _), covariance = np.polyfit(d, n, 1, cov=True)
    return float(gamma), float(covariance[0, 0] ** 0.5), found


@np.errstate(all="ignore")  # a share may be inf, and a law of a resample nan
def ratios(law: Law, reference: Law, C: float) -> dict[str, Any]:
    """Return the shares of C, D and N that `law` needs for the loss of `reference` at its optimum for C.

    compute: both at their own optimum. data: at the same N. size: at the same D. inf: never reached.
    """
    N, D = reference.optimum(C)
    loss = reference.loss(N, D)
    of_size, of_data = law.A / N**law.alpha, law.B / D**law.beta
    frontier = law.loss(*law.optimum(C)) - law.E  # falls as C^-(alpha beta / (alpha + beta))

    def share(excess: Any, wanted: Any, exponent: Any) -> Any:
        """Return by how much x grows until an excess ~ x^-exponent has fallen to the wanted one."""
        return np.where(wanted <= 0, math.inf, (excess / wanted) ** (1 / exponent))

    return dict(
        compute=share(frontier, loss - law.E, law.alpha * law.beta / (law.alpha + law.beta)),
        data=share(of_data, loss - law.E - of_size, law.beta),
        size=share(of_size, loss - law.E - of_data, law.alpha),
    )
