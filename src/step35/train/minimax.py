"""The polynomials of Polar Express (arXiv:2505.16932): minimax odd quintics, computed here instead of copied.

Every step of the iteration maps the singular values x in [l, u] by an odd quintic p; the best one minimises
max |1 - p(x)| over [l, u]. Three free coefficients, so by Chebyshev's theorem the best error E alternates at four
points, and p, which starts at 0, is too small at the first: with the extrema q < r of p inside the interval,

    p(l) = p(r) = 1 - E,    p(q) = p(u) = 1 + E.

Remez' algorithm would guess q and r, solve these equations for (a, b, c, E), and move q and r to the extrema found; the
system becomes singular as l nears u. Knowing that q and r are the extrema avoids it. They fix p up to a factor k:

    p'(x) = 15 k (x^2 - q^2)(x^2 - r^2),   so   p(x) = k (15 q^2 r^2 x - 5 (q^2 + r^2) x^3 + 3 x^5).

p(x) - p(r) has a double root at r. Dividing it out leaves a cubic that must vanish at l, and likewise for q and u:

    3 l^3 + 6 r l^2 + (4 r^2 - 5 q^2) l + 2 r^3 - 10 q^2 r = 0,
    3 u^3 + 6 q u^2 + (4 q^2 - 5 r^2) u + 2 q^3 - 10 r^2 q = 0,

solved for q^2 = (3 l^3 + 6 l^2 r + 4 l r^2 + 2 r^3) / (5 l + 10 r), and r^2 by the same formula of u and q. The two
are applied in turn. Nothing is subtracted, so no digits are lost even at l = u, where q = r = u and p becomes
(15 x - 10 x^3 + 3 x^5) / 8. A sweep divides the distance to the solution by 9 or more.
"""

from __future__ import annotations

from step35.errors import ConfigError

Quintic = tuple[float, float, float]
"""(a, b, c) of a x + b x^3 + c x^5."""

CUSHION = 0.02407327424182761
"""Singular values below this share of the largest are left out of the minimax problem: they would make p so steep
that it nears 0 inside the interval."""

SWEEPS = 20
"""Enough for all digits of a double, which take at most 16."""


def value(quintic: Quintic, x: float) -> float:
    """Return a x + b x^3 + c x^5."""
    a, b, c = quintic
    return x * (a + x * x * (b + x * x * c))


def minimax_quintic(low: float, high: float) -> Quintic:
    """Return the odd quintic nearest to 1 on [low, high], 0 < low <= high, scaled so that p(low) + p(high) = 2."""
    q = r = high
    for _ in range(SWEEPS):
        q = _extremum(low, r)
        r = _extremum(high, q)
    return centred((15 * q * q * r * r, -5 * (q * q + r * r), 3.0), low, high)


def _extremum(end: float, other: float) -> float:
    """Return one extremum of p, given that p has the same value at `end` and at its other extremum."""
    cubic = 3 * end**3 + 6 * end**2 * other + 4 * end * other**2 + 2 * other**3
    return float((cubic / (5 * end + 10 * other)) ** 0.5)


def centred(quintic: Quintic, low: float, high: float) -> Quintic:
    """Return `quintic` scaled so that its values at `low` and `high` are equally far from 1."""
    scale = 2 / (value(quintic, low) + value(quintic, high))
    a, b, c = quintic
    return scale * a, scale * b, scale * c


def minimax_chain(steps: int, smallest: float = 1e-3) -> list[Quintic]:
    """Return the polynomials to apply in turn to singular values in [smallest, 1].

    Each is solved on [max(l, cushion u), u] and centred on [l, u], which it maps to [p(l), 2 - p(l)]:
    the best polynomial for each step in turn is also the best chain, as the paper proves.
    Raises `ConfigError` for settings out of range.
    """
    if steps < 1 or not 0 < smallest < 1:
        raise ConfigError(f"steps={steps}, smallest={smallest}: give at least 1 step and a value between 0 and 1.")
    chain, low, high = [], smallest, 1.0
    for _ in range(steps):
        quintic = centred(minimax_quintic(max(low, CUSHION * high), high), low, high)
        chain.append(quintic)
        low = value(quintic, low)
        high = 2 - low
    return chain
