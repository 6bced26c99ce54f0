"""Dynamic programming equals the comparison of all choices."""

import itertools
import random

import pytest

from pipeline.quantization.knapsack import Knapsack, Option


def make_items(seed, count=6, factor=3):
    draw = random.Random(seed)
    return [
        [Option(draw.randrange(1, 9) * factor, draw.random()) for _ in range(draw.randrange(1, 4))]
        for _ in range(count)
    ]


def total(items, chosen, what):
    return sum(getattr(options[index], what) for options, index in zip(items, chosen, strict=True))


def compare_all(items, size):
    choices = itertools.product(*(range(len(options)) for options in items))
    return min(total(items, chosen, "cost") for chosen in choices if total(items, chosen, "size") <= size)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_within_the_size_costs_less(seed):
    items = make_items(seed)
    knapsack = Knapsack(items)
    for size in range(knapsack.least, knapsack.largest + 4, 2):
        chosen = knapsack.choose(size)
        assert total(items, chosen, "size") <= size
        assert total(items, chosen, "cost") == pytest.approx(compare_all(items, size))
        assert knapsack.cost(size) == pytest.approx(total(items, chosen, "cost"))


def test_a_larger_size_never_costs_more():
    knapsack = Knapsack(make_items(7, count=12))
    costs = [knapsack.cost(size) for size in range(knapsack.least, knapsack.largest + 1)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2  # measured: a sixth


def test_a_size_below_the_least_is_refused():
    with pytest.raises(ValueError, match="the least is 6"):
        Knapsack([[Option(4, 1.0), Option(8, 0.0)], [Option(2, 1.0)]]).choose(5)


def test_equal_costs_take_the_smaller_size():
    assert Knapsack([[Option(8, 1.0), Option(4, 1.0)]]).choose(8) == [1]
    pair = [Option(4, 1.0), Option(8, 0.0)]
    assert sum(Knapsack([pair, pair]).choose(12)) == 1


def test_a_small_table_still_fits_the_size_and_costs_little_more():
    items = [[Option(40 + n, 1.0 / (n + 1)), Option(90 + 2 * n, 0.1 / (n + 1))] for n in range(10)]
    exact, coarse = Knapsack(items), Knapsack(items, cells=400)
    size = (exact.least + exact.largest) // 2
    chosen = coarse.choose(size)
    assert total(items, chosen, "size") <= size
    assert exact.cost(size) <= total(items, chosen, "cost") <= 1.3 * exact.cost(size)
