"""A journal: finished pieces of work, appended one by one and never lost or made twice.

A line is the sha256 (first 16 hex digits) of a JSON text, a space, the text. `append` returns when the line is on the
disk. `records` gives every whole line from the start; the first line that is torn or whose checksum is wrong ends the
journal and is cut off with everything behind it, in place.

A stage opens its journal with `context.journal("rollouts")`. It lives in the stage's unfinished folder, survives a
kill, is no part of what the stage wrote (its order depends on timing) and is removed once the stage is published: a
stage must not delete it, or a kill between that and the end of the stage would lose the work.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from stages.config import canonical_json

SUFFIX = ".journal"


class Journal:
    """Example: done = journal.records(); journal.append({"completion_id": "00000-000-001", ...})"""

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[dict[str, Any]]:
        """Every whole record in the order of writing; cuts a torn or corrupt tail off."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        records: list[dict[str, Any]] = []
        good = 0
        while (end := text.find(b"\n", good)) >= 0:
            line = text[good:end]
            if line[:16] != checksum(line[17:]) or line[16:17] != b" ":
                break
            records.append(json.loads(line[17:]))
            good = end + 1
        if good < len(text):
            with open(self.path, "r+b") as file:
                file.truncate(good)
                os.fsync(file.fileno())
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record and returns once it is on the disk. A write that fails leaves the journal as it was."""
        body = canonical_json(record).encode()
        line = checksum(body) + b" " + body + b"\n"
        new = not self.path.exists()
        # Opened for each record: a stage may append from several threads' callbacks, and a kill leaves nothing open.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
