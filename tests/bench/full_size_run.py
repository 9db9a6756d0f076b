"""A whole run at a published model's size on one card: load, evaluate, rollout, score, update, export. Random weights.

    python -m tests.bench.full_size_run --out build/full --preset gpt_oss_20b_16gb --card-bytes 16e9 [SETTINGS]

The model folder has the exact layout of the published one (13.8 GB for 20b; its tokenizer is the bundled model's), and
the run reads, trains and exports it as any other: what is measured is that every stage fits, and what it takes. Its
completions are noise; each stands for one of the task's baseline programs, so that rewards differ. --card-bytes:
another process holds the rest of the card meanwhile. Judged by the local sandbox backend; neither Docker nor Prefect is
needed. Writes OUT/full-size-run.json beside model and run.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flows.config import overridden
from flows.presets import preset
from flows.progress import Lines
from flows.steps import local
from flows.train import loop
from stages.artifacts import RunDir, Session, StageId, history
from stages.bench import results
from stages.model.merge import copy_tokenizer, write_shards
from stages.model.synthetic import random_tensors, shape_of
from stages.tasks import registry
from stages.tasks.base import Task

TINY = Path(__file__).parents[2] / "data" / "tiny"
TOKENS = 1024  # of its tokenizer
SETTINGS = ("train.iterations=1", "rollout.prompts=1", "evaluate.programs=8", "sandbox.backend=local")
# Takes all of the card but so many bytes, says so, and holds it until its input ends.
HOLDER = """
import sys, torch
free = torch.cuda.mem_get_info()[0] - int(sys.argv[1])
held = [torch.empty(min(1 << 30, free - start), dtype=torch.uint8, device="cuda") for start in range(0, free, 1 << 30)]
print("held", flush=True)
sys.stdin.read()
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.full_size_run")
    parser.add_argument("--out", type=Path, required=True, help="folder for model, run and figures")
    parser.add_argument("--preset", default="gpt_oss_20b_16gb", help="whose settings (gpt_oss_20b_16gb)")
    parser.add_argument("--shape", default="", help="of the weights (the preset's)")
    parser.add_argument("--card-bytes", type=float, default=0.0, help="of the card, for the run (all)")
    parser.add_argument("settings", nargs="*", help=f"section.key=value, over {' '.join(SETTINGS)}")
    args = parser.parse_args()
    config = preset(args.preset)
    shape = args.shape or config.model.source.rpartition("/")[2]
    model = args.out / shape
    started = time.perf_counter()
    write_model(model, shape)
    written_s = time.perf_counter() - started
    config = overridden(config, [*SETTINGS, f"model.source={model}", *args.settings])
    run = RunDir.create(args.out / "run", config)
    stand_in_programs(registry.of(config))
    with holding_the_rest(args.card_bytes), Session() as session:
        loop(config, local(run, config, session, Lines(sys.stdout)))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    command = results.command_line(sys.argv[1:], ("python", "-m", "tests.bench.full_size_run"))
    body = results.head(
        bench="full-size-run",
        command=command,
        gpu=gpu,
        shape=shape,
        dtype=config.model.dtype,
        cuda=torch.version.cuda or "",
    )
    body |= {"card_bytes": args.card_bytes or None, "model_written_s": written_s, "settings": settings_of(config)}
    body["stages"] = [dict(row, stage=str(stage)) for stage, rows in history.timings(run) for row in rows]
    body["export"] = exported(run, config.export.format)
    results.write(args.out / "full-size-run.json", body)
    print((args.out / "full-size-run.json").read_text())
    return 0


def write_model(folder: Path, shape: str) -> None:
    """Random weights of that shape as a published checkpoint lies on the disk."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = shape_of(shape)
    config = dataclasses.replace(sizes, vocabulary=max(sizes.vocabulary, TOKENS)).config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    drawn = random_tensors(config, dtype=torch.bfloat16, generator=generator, scaled_init=True)
    write_shards(((name, stored(tensor)) for name, tensor in drawn), folder)
    copy_tokenizer(TINY, folder)
    raw = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.uint8 if tensor.dtype == torch.uint8 else torch.bfloat16)


@contextmanager
def holding_the_rest(card_bytes: float) -> Iterator[None]:
    """Within it another process holds all of the card but so many bytes; 0 leaves it alone."""
    if not card_bytes:
        yield
        return
    command = [sys.executable, "-c", HOLDER, str(int(card_bytes))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != "held\n":
                raise SystemExit("the rest of the card could not be held")
            yield
        finally:
            holder.stdin.close()


def stand_in_programs(task: Task) -> None:
    """Lets every completion name one of the task's baselines, by its checksum."""
    programs = list(task.baselines().values())
    type(task).extract = lambda _, completion: programs[zlib.crc32(completion.encode()) % len(programs)]  # type: ignore[method-assign]


def settings_of(config: Any) -> dict[str, Any]:
    told = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "rollout", "update")}
    del told["model"]["source"]  # the folder that was made for this
    return told


def exported(run: RunDir, format: str) -> dict[str, Any]:
    """export.json, without what is long."""
    body: dict[str, Any] = json.loads((run.folder(StageId("export", 1, format)) / "export.json").read_text())
    body.pop("requantized", None)
    return body


if __name__ == "__main__":
    sys.exit(main())
