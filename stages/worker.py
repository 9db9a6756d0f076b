"""What runs in a stage container: does the stages of one run that it is asked for, one after the other.

    python -m stages.worker RUN_DIR [--sandboxes FOLDER] [--image NAME]

A line of standard input asks for a stage: {"stage": ["rollout", 3, ""], "config": {...}}. What happens is told on
standard output, a line each:
    {"ready": true}                                             once, before anything is asked for
    {"progress": [stage, done, total, unit, fields]}            as stages report it
    {"log": [logger, level, text]}                              a record, its traceback in the text
    {"done": true} | {"error": [message, hint]} | {"failed": traceback}     the end of what was asked for
What a stage prints goes to standard error. The live policy is kept from one stage to the next; programs are judged
through the sockets in the folder of --sandboxes, which are let go after each stage. When standard input ends, whoever
started this is gone, and it ends at once, in the middle of a stage too: all that counts is on the disk.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from stages.artifacts import Progress, RunDir, Session, StageContext, StageId, execute
from stages.config import RunConfig, UserError

Tell = Callable[[dict[str, Any]], None]


class Records(logging.Handler):
    """Tells every record."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except (TypeError, ValueError):
            text = str(record.msg)
        self.tell({"log": [record.name, record.levelno, text]})


def teller() -> Tell:
    """Writes lines to what was standard output; what anything else writes there goes to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(message) + "\n")
            out.flush()

    return tell


def listen(asked: "SimpleQueue[dict[str, Any]]") -> None:
    """Queues what is asked for until standard input ends, and with it the process."""
    for line in sys.stdin.buffer:
        asked.put(json.loads(line))
    os._exit(0)


def work(run: RunDir, session: Session, asked: dict[str, Any], tell: Tell, *, image: str) -> None:
    """Does one stage and tells how it ended."""
    try:
        config, stage = RunConfig.from_dict(asked["config"]), StageId(*asked["stage"])
        set_level(config.logging.level)
        function: Callable[[StageContext], None] = importlib.import_module(f"stages.{stage.name}").run

        def report(progress: Progress) -> None:
            tell({"progress": [*progress[:4], dict(progress.fields)]})

        execute(run, config, stage, function, session, report, runner="docker", image=image)
        answer: dict[str, Any] = {"done": True}
    except UserError as error:
        answer = {"error": [error.message, error.hint]}
    except Exception:
        answer = {"failed": traceback.format_exc()}
    finally:
        session.drop("sandbox")  # its sandboxes are for whoever judges next
    tell(answer)


def set_level(level: str) -> None:
    for name in ("flows", "stages"):
        logging.getLogger(name).setLevel(level)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.worker")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--sandboxes", type=Path, help="a folder with the sockets of sandboxes")
    parser.add_argument("--image", default="", help="the image that this runs in, to be recorded")
    options = parser.parse_args()
    tell = teller()
    asked: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=listen, args=(asked,), name="asked", daemon=True).start()
    logging.getLogger().addHandler(Records(tell))
    logging.captureWarnings(True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    tell({"ready": True})
    with Session() as session:
        if options.sandboxes:
            session.get("sandboxes", lambda: options.sandboxes)
        while True:
            work(RunDir(options.run_dir), session, asked.get(), tell, image=options.image)


if __name__ == "__main__":
    main()
