"""Choose one option of every item so that the total cost is least within a total size: a multiple-choice knapsack.

Solved exactly by dynamic programming. With C(i, s) the least cost of the first i items within the size s,

    C(i, s) = min over the options of item i of  C(i - 1, s - size of the option) + cost of the option

Sizes are counted in units of the greatest common divisor of all differences. The sizes of weights and products share
large factors, so that a model of any size has some thousand units. One table answers for every total size, which gives
the whole curve of cost against size. A larger total never costs more.

Where the table would be too large, the unit is coarser, and differences are rounded up. The total then still fits, and
at most one unit for each item is left unused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CELLS = 1 << 27  # of the table of choices, one byte each


@dataclass(frozen=True)
class Option:
    """A choice for one item: its size, a whole number >= 0, and its cost."""

    size: int
    cost: float


class Knapsack:
    """All best choices for some items, at every total size.

    Attributes:
        least, largest: total size if every item has its smallest, or its largest, option.
    """

    def __init__(self, items: Sequence[Sequence[Option]], cells: int = _CELLS) -> None:
        """Solve for `items`, each with at least one option, and at most `cells` numbers in the table."""
        # The smallest option comes first: equal costs take the smaller size.
        self._orders = [sorted(range(len(options)), key=lambda n, o=options: (o[n].size, n)) for options in items]
        self._items = [[options[n] for n in order] for options, order in zip(items, self._orders, strict=True)]
        self.least = sum(options[0].size for options in self._items)
        self.largest = sum(options[-1].size for options in self._items)
        span = self.largest - self.least
        divisor = math.gcd(*(option.size - options[0].size for options in self._items for option in options))
        longest = max(1, cells // max(1, len(items)))
        self._unit = max(1, divisor, -(-span // longest))
        units = sum(-(-(options[-1].size - options[0].size) // self._unit) for options in self._items)
        self._choices = np.zeros((len(items), units + 1), dtype=np.uint8)
        self._costs = np.zeros(units + 1)
        for number, options in enumerate(self._items):
            best = np.full(units + 1, np.inf)
            for index, option in enumerate(options):
                step = self._step(number, index)
                costs = np.full(units + 1, np.inf)
                costs[step:] = self._costs[: units + 1 - step] + option.cost
                better = costs < best
                best[better] = costs[better]
                self._choices[number, better] = index
            self._costs = best

    def _step(self, number: int, index: int) -> int:
        """Return by how many units an option of an item exceeds the item's smallest one, rounded up."""
        options = self._items[number]
        return -(-(options[index].size - options[0].size) // self._unit)

    def _find_place(self, size: int) -> int:
        if size < self.least:
            raise ValueError(f"a total size of {size} is not possible: the least is {self.least}")
        return min((size - self.least) // self._unit, len(self._costs) - 1)

    def choose(self, size: int) -> list[int]:
        """Return the option of every item that costs least in total within `size`.

        Raises:
            ValueError: `size` is less than `least`.
        """
        place, chosen = self._find_place(size), []
        for number in range(len(self._items) - 1, -1, -1):
            index = int(self._choices[number, place])
            place -= self._step(number, index)
            chosen.append(self._orders[number][index])
        return chosen[::-1]

    def cost(self, size: int) -> float:
        """Return the least total cost within `size`.

        Raises:
            ValueError: `size` is less than `least`.
        """
        return float(self._costs[self._find_place(size)])
