"""Fit the law L(N, D) = E + A / N^alpha + B / D^beta to finished runs, with errors, and compute what follows from it.

N is a number of parameters, D of training tokens, L a validation loss in nats per token, C = 6 N D the FLOPs of
training. The fit is Chinchilla's third (Hoffmann et al., arXiv 2203.15556) as corrected by Besiroglu et al.
(arXiv 2404.10102): minimise the sum over runs of the Huber loss of ln L - ln L(N, D) from a grid of starts.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from config import UserError

HUBER = 1e-3  # where the loss of a residual of ln L turns from square to linear
FEWEST_RUNS, FEWEST_VALUES = 6, 3  # of runs, and of different N and of different D among them
EXPONENTS = (0.01, 3.0)  # bounds of alpha and beta: below, the term is a constant; above, it is a step
TAIL = 0.05  # share of the resamples beyond either end of an interval, and that may be outside the bounds
FAR = 10  # a C, N or D this many times outside those of the runs is not tested
PRECISION = dict(ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=300)
TOLERANCE = 0.02  # nats above the best run of the same D that are still good enough


@dataclass(frozen=True)
class Points:
    """Hold finished runs: parameters, tokens and losses, (runs,) each, and notes for a reader of the fit."""

    name: str
    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    notes: tuple[str, ...] = ()
    measure: dict[str, Any] = field(default_factory=dict)
    """What else the losses depend on, where it is known; the same in all runs."""

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
                found.append(f"{name} = {value:.4g} is {how} the runs of {self.name}, {low:.4g} to {high:.4g}")
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

    @np.errstate(over="ignore")
    def loss(self, N: Any, D: Any) -> Any:
        return self.E + self.A * np.power(N, -self.alpha) + self.B * np.power(D, -self.beta)

    @np.errstate(over="ignore")
    def optimum(self, C: float) -> tuple[float, float]:
        """Return N and D of the lowest loss at C = 6 N D FLOPs (Hoffmann et al., equation 4)."""
        n = (self.log_balance() + self.beta * math.log(C / 6)) / (self.alpha + self.beta)
        return float(np.exp(n)), float(np.exp(math.log(C / 6) - n))

    @np.errstate(over="ignore")
    def size(self, D: Any) -> Any:
        """Return the N that is compute-optimal at D tokens."""
        return np.exp((self.log_balance() + self.beta * np.log(D)) / self.alpha)

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

    def interval(self, value: Callable[[Law], Any]) -> tuple[Any, Any, Any]:
        """Return a quantity of the best fit, and its 5th and 95th percentile over the resamples."""
        return value(self.law), *percentiles([value(law) for law in self.resampled])

    def error(self, value: Callable[[Law], float]) -> float:
        """Return the standard error of a quantity: its standard deviation over the resamples."""
        return float(np.std([value(law) for law in self.resampled], ddof=1))

    def at_zero_entropy(self) -> bool:
        """Return whether E is at its bound of 0, where it has no standard error."""
        return self.law.E / self.points.loss.min() < 0.01


def percentiles(values: list[Any]) -> Any:
    return np.percentile(values, [100 * TAIL, 100 * (1 - TAIL)], axis=0, method="nearest")  # inf is a value here


def fit(points: Points, resamples: int = 200) -> Fit:
    """Return the law of these runs with its errors. Raise UserError where they do not determine one."""
    runs, sizes, lengths = len(points.loss), len(np.unique(points.N)), len(np.unique(points.D))
    if runs < FEWEST_RUNS or min(sizes, lengths) < FEWEST_VALUES:
        wanted = f"{FEWEST_RUNS} runs of {FEWEST_VALUES} sizes and {FEWEST_VALUES} lengths or more"
        seen = f"{runs} runs of {sizes} sizes N and {lengths} lengths D that can be fitted"
        raise UserError("; ".join([f"{points.name} has {seen}, wanted {wanted}", *points.notes]))
    law = best_law(points, starts(points))
    resampled = [] if law.outside() else bootstrap(points, law, resamples)
    kept = tuple(other for other in resampled if not other.outside())
    lost = f"{resamples - len(kept)} of {resamples} resamples"
    if len(kept) < (1 - TAIL) * resamples:
        which, where = (" and ".join(law.outside()), "the best fit") if law.outside() else ("alpha or beta", lost)
        raise UserError(
            f"{points.name}: {which} is outside {EXPONENTS[0]:g} to {EXPONENTS[1]:g} in {where}; the best fit has"
            f" alpha {law.alpha:.3g} and beta {law.beta:.3g}: these runs do not determine a law"
        )
    notes = list(points.notes)
    if len(kept) < resamples:
        notes.append(f"errors leave out {lost}, without a law")
    if Fit(points, law, kept, ()).at_zero_entropy():
        notes.append(f"E is {law.E:.2g}, at its bound of 0: these runs determine neither E nor exact exponents")
    if runs < 2 * FEWEST_RUNS:
        notes.append(f"only {runs} runs for five constants: the errors are too small rather than too large")
    return Fit(points, law, kept, tuple(notes))


def starts(points: Points) -> list[Law]:
    """Return laws with the median loss at the median N and D, which divide it differently into their three terms."""
    N, D, loss = (float(np.median(values)) for values in (points.N, points.D, points.loss))
    return [
        Law(e * loss, a * loss * N**alpha, alpha, (1 - e - a) * loss * D**beta, beta)
        for e, a in ((0.1, 0.45), (0.6, 0.2), (0.3, 0.6), (0.3, 0.1))
        for alpha in (0.2, 0.5, 1.0)
        for beta in (0.2, 0.5, 1.0)
    ]


def best_law(points: Points, starts: list[Law]) -> Law:
    """Return the lowest of the minima that least_squares finds from these starts."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise UserError("the fit needs a package: pip install 'scipy>=1.11,<2'") from None
    n, d, y = np.log(points.N), np.log(points.D), np.log(points.loss)  # (runs,) each

    def residuals(p: np.ndarray) -> np.ndarray:
        """Return ln L(N, D) - ln L for p = ln E, ln A, ln B, alpha, beta."""
        return np.logaddexp.reduce([np.full_like(n, p[0]), p[1] - p[3] * n, p[2] - p[4] * d]) - y

    ends = []
    for law in starts:
        p = [*np.log([max(law.E, 1e-9), law.A, law.B]), law.alpha, law.beta]
        ends.append(least_squares(residuals, p, loss="huber", f_scale=HUBER, x_scale="jac", **PRECISION))
    e, a, b, alpha, beta = min(ends, key=lambda end: end.cost).x.clip(-700, 700).tolist()
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


# --- Without a law, and from two of them -------------------------------------------------------------------------


def gamma_of_runs(points: Points) -> tuple[float, float, list[tuple[float, float]]]:
    """Fit gamma to the smallest model that is good enough. Return gamma, its standard error, and (D, N) per length.

    Good enough at D: a loss within TOLERANCE of the best run of that length; between two sizes, ln N is interpolated.
    A length is left out if it has fewer than three sizes, or if even its smallest run is good enough, since the true N
    is then below all of them. gamma is nan where fewer than three lengths remain.
    """
    found = []
    for D in np.unique(points.D):
        at = points.take(points.D == D)
        sizes = np.unique(at.N)
        losses = np.array([at.loss[at.N == N].mean() for N in sizes])  # over seeds
        wanted = losses.min() + TOLERANCE
        first = int((losses <= wanted).argmax())
        if len(sizes) >= FEWEST_VALUES and first > 0:
            pair = slice(first, first - 2 if first > 1 else None, -1)  # np.interp wants the losses to rise
            found.append((float(D), float(np.exp(np.interp(wanted, losses[pair], np.log(sizes[pair]))))))
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

    @np.errstate(over="ignore")
    def share(excess: float, wanted: float, exponent: float) -> float:
        """Return by how much x grows until an excess ~ x^-exponent has fallen to the wanted one."""
        return float(np.exp(np.log(excess / wanted) / exponent)) if wanted > 0 else math.inf

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
