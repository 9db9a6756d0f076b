"""The command `flexsink`, killed at a chosen moment of a chosen stage.

    python -m tests.killed_flow RUN_DIR STAGE MOMENT ARGUMENTS...

STAGE is the folder's name under RUN_DIR, such as iterations/00000/rollout. MOMENT: "begun", before the unfinished
folder is made; "middle", before the third entry of a journal, or before the manifest where there is none; "published",
before the first change after the finished folder got its name.
"""

import os
import signal
import sys
from pathlib import Path

from tests.killed_run import watch

MOMENTS = ("begun", "middle", "published")


class Killer:
    def __init__(self, stage: str, moment: str) -> None:
        self.parent, self.name = str(Path(stage).parent), Path(stage).name
        self.moment = moment
        self.at_work = self.published = False
        self.entries = 0

    def __call__(self, change: str) -> None:
        event, _, name = change.partition(" ")
        path = Path(name)
        if path.name.startswith(".lock-"):
            self.at_work = str(path.parent) == self.parent and path.name == f".lock-{self.name}"
        if self.published or (self.at_work and self.is_due(event, path)):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at_work and event == "os.rename" and path.name.startswith(".tmp-"):
            self.published = self.moment == "published"
            self.at_work = False

    def is_due(self, event: str, path: Path) -> bool:
        if self.moment == "begun":
            return event == "os.mkdir" and path.name.startswith(".tmp-")
        self.entries += event == "open" and path.suffix == ".journal"
        wrote = event == "open" and path.name == "manifest.json"
        return self.moment == "middle" and (self.entries == 3 or wrote)


def main() -> None:
    folder, stage, moment, *arguments = sys.argv[1:]
    assert moment in MOMENTS, moment
    watch(Path(folder), Killer(stage, moment))
    from flows.cli import main

    main(arguments)


if __name__ == "__main__":
    main()
