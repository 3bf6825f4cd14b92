"""Figures of what was measured."""


def percentile(values, share):
    """The smallest of the values that at least this share of them, from 0 to 1, is not above."""
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))]
