"""What the suites of conformance share: the library's error bounds as an assertion, and rows that cover all pairs of values."""

from torch import Tensor

from kronmask.error_bounds import Expected, expect, problem

__all__ = ["all_pairs", "assert_within", "expect"]


def assert_within(actual: dict[str, Tensor], expected: Expected, context: str) -> None:
    """Each element is finite (or -inf where the LSE is), within its bound, and by rounding off by a quarter of it on average."""
    reason = problem(actual, expected)
    assert reason is None, f"{context}: {reason}"


def all_pairs(**factors: list) -> list[dict]:
    """Rows of one value for each factor, such that each pair of values of two factors stands together in some row."""
    names = list(factors)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    missing = {((a, x), (b, y)) for a, b in pairs for x in range(len(factors[a])) for y in range(len(factors[b]))}
    rows = []
    while missing:
        row: dict[str, int] = dict(min(missing))  # start from a pair still missing, then take what covers most
        for name in names:
            if name not in row:
                row[name] = max(
                    range(len(factors[name])),
                    key=lambda x: (sum(_pair(names, name, x, other, y) in missing for other, y in row.items()), -x),
                )
        missing -= {_pair(names, a, row[a], b, row[b]) for a, b in pairs}
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _pair(names: list[str], a: str, x: int, b: str, y: int) -> tuple:
    return ((a, x), (b, y)) if names.index(a) < names.index(b) else ((b, y), (a, x))
