"""What a run knows, in one SQLite file: it survives SIGKILL, and the next run goes on from it.

It holds records (see `tools.curate.header`), measures, fingerprints and pictures, and no path.
"""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS file (id TEXT PRIMARY KEY, stamp TEXT, series TEXT, record TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS series ON file (series);
CREATE TABLE IF NOT EXISTS volume (id TEXT PRIMARY KEY, stamp TEXT, result TEXT, print TEXT, picture BLOB);
"""


class State:
    """The state of a set.

    Args:
        path: the file, made if missing.
    """

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=NORMAL")
        self._base.executescript(SCHEMA)

    def close(self) -> None:
        """Fold the journal into the file and close it."""
        self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._base.close()

    def stamps(self) -> dict[str, str]:
        """Return the stamp (size and time) of each file whose record is kept."""
        return dict(self._base.execute("SELECT id, stamp FROM file"))

    def keep_records(self, rows: list[tuple[str, str, dict[str, Any]]]) -> None:
        """Keep the record of files, each with its id and stamp."""
        with self._base:
            self._base.executemany(
                "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?)",
                [(id_, stamp, record.get("series") or "", json.dumps(record)) for id_, stamp, record in rows],
            )

    def records(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield (file, series, record), the images of a series one after the other."""
        for id_, series, record in self._base.execute("SELECT id, series, record FROM file ORDER BY series, id"):
            yield id_, series, json.loads(record)

    def keep_volume(self, id_: str, stamp: str, result: dict[str, Any], print_: str, picture: bytes) -> None:
        """Keep what was found of a volume."""
        with self._base:
            row = (id_, stamp, json.dumps(result), print_, picture)
            self._base.execute("INSERT OR REPLACE INTO volume VALUES (?, ?, ?, ?, ?)", row)

    def volumes(self) -> dict[str, tuple[str, dict[str, Any], str]]:
        """Return (stamp, result, fingerprint) of each volume."""
        rows = self._base.execute("SELECT id, stamp, result, print FROM volume")
        return {id_: (stamp, json.loads(result), print_) for id_, stamp, result, print_ in rows}

    def picture(self, id_: str) -> bytes:
        """Return the picture of a volume, b"" if there is none."""
        row = self._base.execute("SELECT picture FROM volume WHERE id = ?", (id_,)).fetchone()
        return row[0] if row and row[0] else b""
