"""Makes the README's pictures, data/pictures, of a finished run: `python -m tests.bench.pictures data/runs/demo`.

They are the head of its report, light and dark, and its best completion's tokens in `flexsink view`. Needs Chromium.
"""

import subprocess
import sys
from pathlib import Path

from stages.artifacts import RunDir, StageId
from stages.artifacts.parquet import read_table
from tests.chromium import Chromium

PICTURES = Path(__file__).parents[2] / "data" / "pictures"
WIDTH, HEIGHT = 1080, 950  # of the report's head: the figures and the curve of the reward


def make(run: RunDir) -> None:
    """Overwrites the pictures."""
    PICTURES.mkdir(exist_ok=True)
    for scheme in ("light", "dark"):
        with Chromium(width=WIDTH, height=HEIGHT, dark=scheme == "dark") as page:
            page.open(run.path / "report.html")
            page.screenshot(PICTURES / f"report-{scheme}.png", whole=False)
    last = StageId("score", run.config().train.iterations - 1)
    best = max(read_table(run.folder(last), "scores").to_pylist(), key=lambda row: row["reward"])
    words = ["view", str(run.path), "--completion", best["completion_id"], "--tab", "tokens"]
    flexsink = Path(sys.executable).with_name("flexsink")
    subprocess.run([flexsink, *words, "--snapshot", str(PICTURES / "tokens.svg")], check=True)


if __name__ == "__main__":
    make(RunDir(Path(sys.argv[1])))
