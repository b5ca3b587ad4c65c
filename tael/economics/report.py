"""What the ledger adds up to."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

from tael.economics.journal import APPLICATION_ID, COUNTS
from tael.economics.rate_card import NO_CURRENCY
from tael.errors import TaelError

GROUPS = {
    "key": "key_id",
    "model": "model",
    "day": "strftime('%Y-%m-%d', charges.created_ms / 1000, 'unixepoch')",
}


def usage_report(
    path: Path | str,
    by: Sequence[str],
    since: datetime | None = None,
    until: datetime | None = None,
) -> tuple[str, list[dict[str, str | int]]]:
    """The currency, and a row for each combination of ``by``, which are keys of GROUPS: requests,
    every count of the journal, and nano-currency. Days are those of UTC; ``until`` is excluded.

    A correction belongs to the day on which it was made, so what was reported of earlier days
    stays true. May be called while a server writes.
    """
    keys = ", ".join(f"{GROUPS[name]} AS {name}_" for name in by)
    sums = ", ".join(f"sum(charges.{name})" for name in (*COUNTS, "amount_nano"))
    query = (
        f"SELECT {keys}, sum(kind = 'settlement'), {sums} "
        "FROM charges JOIN reservations USING (request_id) "
        "WHERE charges.created_ms >= ? AND charges.created_ms < ? "
        f"GROUP BY {', '.join(f'{name}_' for name in by)} "
        f"ORDER BY {', '.join(f'{name}_' for name in by)}"
    )
    names = (*by, "requests", *COUNTS, "amount_nano")
    times = (_milliseconds(since, 0), _milliseconds(until, 1 << 62))
    with closing(_open(Path(path))) as connection:
        currency = _currency(connection)
        rows = connection.execute(query, times).fetchall()
    return currency, [dict(zip(names, row, strict=True)) for row in rows]


class Spending:
    """What each key was charged, corrections included, up to now. Any thread may ask.

    Rows of the ledger are only ever added, so each is read once: all at the start, later the new
    ones.
    """

    def __init__(self, path: Path | str) -> None:
        self._connection = _open(Path(path))
        self._lock = threading.Lock()
        self._last_charge_id = 0
        self._amounts_nano: dict[str, int] = {}
        self._read()

    def of(self, key_id: str) -> tuple[str, int]:
        """The currency, and nano."""
        with self._lock:
            self._read()
            return _currency(self._connection), self._amounts_nano.get(key_id, 0)

    def close(self) -> None:
        self._connection.close()

    def _read(self) -> None:
        rows = self._connection.execute(
            "SELECT key_id, sum(charges.amount_nano), max(charge_id) "
            "FROM charges JOIN reservations USING (request_id) WHERE charge_id > ? GROUP BY key_id",
            (self._last_charge_id,),
        )
        for key_id, amount_nano, charge_id in rows.fetchall():
            self._amounts_nano[key_id] = self._amounts_nano.get(key_id, 0) + amount_nano
            self._last_charge_id = max(self._last_charge_id, charge_id)


def format_nano(amount_nano: int) -> str:
    """Units of the currency, with all nine digits: exact."""
    sign = "-" if amount_nano < 0 else ""
    units, nano = divmod(abs(amount_nano), 10**9)
    return f"{sign}{units}.{nano:09}"


def _milliseconds(moment: datetime | None, otherwise: int) -> int:
    return otherwise if moment is None else round(moment.timestamp() * 1000)


def _currency(connection: sqlite3.Connection) -> str:
    row = connection.execute(
        "SELECT currency FROM rate_cards WHERE currency <> ?", (NO_CURRENCY,)
    ).fetchone()
    return row[0] if row else NO_CURRENCY


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise TaelError(f"there is no ledger {path}; name the one that the server writes.")
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        # Not mode=ro: SQLite must be able to make the index of the log of a server that died.
        connection.execute("PRAGMA query_only = ON")
        if connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,):
            return connection
        problem = "it is another kind of file"
    except sqlite3.Error as error:
        problem = str(error)
    connection.close()
    raise TaelError(f"{path} is not a ledger: {problem}; name the one that the server writes.")
