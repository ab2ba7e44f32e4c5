"""Factors of learning rates against the papers."""

import pytest

from gpbridge.dnn.schedules import triangular_factor


def test_the_rate_is_that_of_the_paper_from_its_first_iteration_on():
    cycle, high, low = 6, 0.05, 0.01

    def published(i):  # Garipov et al., eq. (3)
        t = ((i - 1) % cycle + 1) / cycle
        if t <= 0.5:
            return (1 - 2 * t) * high + 2 * t * low
        return (2 - 2 * t) * low + (2 * t - 1) * high

    factor = triangular_factor(cycle, low / high)
    found = [high * factor(step) for step in range(1, 20)]
    assert found == pytest.approx([published(i) for i in range(1, 20)])
    assert factor(0) == 1.0
