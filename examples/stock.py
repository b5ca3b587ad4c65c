"""Stock of a warehouse: what lies where, what is reserved, and what must be ordered."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path


class StockError(Exception):
    """Something was asked of the stock that it cannot give."""


@dataclass
class Item:
    """One kind of thing that the warehouse keeps."""

    sku: str
    name: str
    price: float
    minimum: int = 0


@dataclass
class Shelf:
    """A place with a limit on how many things it holds."""

    label: str
    capacity: int
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def num_things(self) -> int:
        return sum(self.counts.values())

    @property
    def room(self) -> int:
        return self.capacity - self.num_things

    def put(self, sku: str, count: int) -> None:
        if count < 1:
            raise StockError(f"cannot put {count} of {sku} on a shelf")
        if count > self.room:
            raise StockError(f"shelf {self.label} has room for {self.room}, not for {count}")
        self.counts[sku] = self.counts.get(sku, 0) + count

    def take(self, sku: str, count: int) -> None:
        if count < 1:
            raise StockError(f"cannot take {count} of {sku} from a shelf")
        if count > self.counts.get(sku, 0):
            raise StockError(f"shelf {self.label} does not have {count} of {sku}")
        self.counts[sku] -= count
        if self.counts[sku] == 0:
            del self.counts[sku]


class Warehouse:
    """All shelves, the items they may hold, and the reservations of customers."""

    def __init__(self, items: list[Item], shelves: list[Shelf]) -> None:
        self.items = {item.sku: item for item in items}
        self.shelves = {shelf.label: shelf for shelf in shelves}
        self.reserved: dict[str, int] = {}

    def total(self, sku: str) -> int:
        return sum(shelf.counts.get(sku, 0) for shelf in self.shelves.values())

    def available(self, sku: str) -> int:
        return self.total(sku) - self.reserved.get(sku, 0)

    def receive(self, sku: str, count: int) -> list[str]:
        if sku not in self.items:
            raise StockError(f"no item has the number {sku}")
        if count > sum(shelf.room for shelf in self.shelves.values()):
            raise StockError(f"there is no room for {count} of {sku}")
        labels = []
        for shelf in sorted(self.shelves.values(), key=lambda shelf: -shelf.room):
            part = min(count, shelf.room)
            if part > 0:
                shelf.put(sku, part)
                labels.append(shelf.label)
                count -= part
        return labels

    def reserve(self, sku: str, count: int) -> None:
        if count > self.available(sku):
            raise StockError(f"only {self.available(sku)} of {sku} are available")
        self.reserved[sku] = self.reserved.get(sku, 0) + count

    def ship(self, sku: str, count: int) -> float:
        if count > self.reserved.get(sku, 0):
            raise StockError(f"{count} of {sku} were not reserved")
        self.reserved[sku] -= count
        left = count
        for shelf in self.shelves.values():
            part = min(left, shelf.counts.get(sku, 0))
            if part > 0:
                shelf.take(sku, part)
                left -= part
        return count * self.items[sku].price

    def value(self) -> float:
        return sum(self.total(sku) * item.price for sku, item in self.items.items())

    def to_order(self) -> dict[str, int]:
        missing = {}
        for sku, item in self.items.items():
            if self.available(sku) < item.minimum:
                missing[sku] = item.minimum - self.available(sku)
        return missing


def read_items(path: Path) -> list[Item]:
    with path.open(newline="") as file:
        return [
            Item(row["sku"], row["name"], float(row["price"]), int(row["minimum"]))
            for row in csv.DictReader(file)
        ]
