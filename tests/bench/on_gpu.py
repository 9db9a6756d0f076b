"""All that wants a GPU, in one command: the tests marked gpu, and each recorded benchmark of engine and update.

    python -m tests.bench.on_gpu --out build/gpu --cards 0,1 [--only tests,update]

Each job is a command of its own, on a card that nothing else uses meanwhile; every card takes the next job of JOBS when
it is done with one. NAME.log is what a job printed, NAME.json what it measured; full-size and learn are folders of
models, runs and figures. Ends with 1 when a job failed.
"""

import argparse
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

TESTS = "-m pytest -m gpu --durations 10 tests/"
ENGINE = "-m flows.cli bench engine --shape gpt-oss-20b"
LARGE_ENGINE = "-m flows.cli bench engine --shape gpt-oss-120b"
UPDATE = "-m flows.cli bench update --shape gpt-oss-20b --offload-embedding"
LARGE_UPDATE = "-m flows.cli bench update --shape gpt-oss-120b --offload-embedding --tokens 32768 --peers none"
ITERATION = f"{UPDATE} --tokens none --peers none"
JOBS = {
    "tests": f"{TESTS} -n 4 --dist loadfile --ignore tests/test_killed_on_gpu.py",
    "killed": TESTS + "test_killed_on_gpu.py",
    "update": f"{UPDATE} --tokens 4096,32768,131072 --memory-cap 24e9 --repeats 2",
    "iteration": f"{ITERATION} --memory-cap 24e9 --iteration",
    "iteration-15gb": f"{ITERATION} --memory-cap 15e9 --iteration 1x8x128,1x8x1024 --pack-tokens 4352",
    "iteration-16gb": f"{ITERATION} --memory-cap 16e9 --iteration 1x8x4096 --pack-tokens 4608",
    "iteration-nf4": f"{ITERATION} --dense nf4 --memory-cap 13.5e9 --iteration 1x8x128,1x8x1024 --pack-tokens 4352",
    "attention": f"{UPDATE} --tokens 4096 --targets attention,attention+experts --memory-cap 24e9 --repeats 9",
    "agreement": f"{ITERATION} --agreement --scaled-init",
    "agreement-fp16": f"{ITERATION} --agreement --scaled-init --dtype fp16",
    "update-fp16": f"{UPDATE} --tokens 4096 --peers none --memory-cap 24e9 --repeats 5 --dtype fp16",
    "update-120b-attention": f"{LARGE_UPDATE} --targets attention --memory-cap 80e9 --repeats 3",
    "update-120b-experts": f"{LARGE_UPDATE} --lora 32 --memory-cap 90e9 --repeats 3",
    "full-size": "-m tests.bench.full_size_run --preset gpt_oss_20b_16gb --card-bytes 16e9",
    "learn": "-m tests.bench.learn_on_gpu --minutes 9.3 --iterations 110",
    "engine": f"{ENGINE} --cases 1x1024,16x1024,64x4096,256x1024 --lora none,16 --prefill --replay",
    "engine-131k": f"{ENGINE} --cases 1x131072 --peers none",
    "engine-120b": f"{LARGE_ENGINE} --cases 1x1024,16x1024,64x4096 --peers none",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.on_gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and figures")
    parser.add_argument("--cards", default="0", help="indices of the GPUs to use (0)")
    parser.add_argument("--only", default=",".join(JOBS), help=f"jobs, in order (all: {', '.join(JOBS)})")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        if name not in JOBS:
            parser.error(f"--only {name}: one of {', '.join(JOBS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    return run(names, cards=args.cards.split(","), out=args.out)


def run(names: list[str], *, cards: list[str], out: Path) -> int:
    """Runs these jobs, one a card at a time; returns 1 when one failed."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    codes: dict[str, int] = {}

    def work(card: str) -> None:
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.monotonic()
            with (out / f"{name}.log").open("w") as log:
                codes[name] = subprocess.run(
                    command(name, out),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": card},
                ).returncode
            print(f"{name}: exit {codes[name]} after {time.monotonic() - start:.0f} s on card {card}", flush=True)

    threads = [threading.Thread(target=work, args=(card,)) for card in cards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return int(any(codes.values()) or len(codes) < len(names))


def command(name: str, out: Path) -> list[str]:
    """The words of a job's command."""
    words = shlex.split(JOBS[name])
    if "pytest" in words:
        return [sys.executable, *words]
    return [sys.executable, *words, "--out", str(out / (f"{name}.json" if "bench" in words else name))]


if __name__ == "__main__":
    sys.exit(main())
