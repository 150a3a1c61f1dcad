"""Answers of variants, drawn."""


def draw(rng, v, s, n, luck, worse=0.0):
    """Hits [v, s, n], about 64 % right: images differ in difficulty, variants in their view of each, runs in luck (in
    points); variant 1 is worse by `worse` on the same scale."""
    x = rng.normal(0.55, 1.5, n) + 0.25 * rng.standard_normal((v, 1, n)) + 0.35 * rng.standard_normal((v, s, n))
    x += luck / 23.5 * rng.standard_normal((v, s, 1))
    x[1] -= worse / 23.5
    return {str(i): h for i, h in enumerate(x > 0)}
