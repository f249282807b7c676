"""How far two orders of the same float32 sums may lie apart.

Rounding shifts a sum of n float32 terms by about sqrt(n) * 2^-24 of its size, and by n * 2^-24 of
the sum of sizes in the worst order (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
Two orders differ by at most twice that. This bounds the norm of a gradient. It bounds neither
single elements, whose terms may cancel, nor weights behind an optimizer that divides by the
gradient's size: an element that is all rounding moves its weight by the whole learning rate.
"""

import numpy as np


def sum_tolerance(n: int) -> float:
    """Largest relative difference of two sums of the same `n` float32 terms."""
    return n * 2.0**-23


def distances(found, expected):
    """Norm of found - expected relative to the norm of expected, for each name of two dicts."""
    assert found.keys() == expected.keys()
    norm = np.linalg.norm
    return {name: norm(found[name] - array) / norm(array) for name, array in expected.items()}
