"""The command `flexsink bench engine`: its arguments, and what it does with them. Imports torch when it runs."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from stages.bench.cases import parse_cases, parse_ranks
from stages.config import UserError

CASES = "1x1024,16x1024,64x4096,256x1024"


def add_engine_arguments(parser: ArgumentParser) -> None:
    """Declares what `flexsink bench engine` takes."""
    parser.add_argument("--shape", default="gpt-oss-20b", metavar="NAME", help="gpt-oss-20b, gpt-oss-120b or tiny")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="so many layers instead of the shape's own")
    parser.add_argument("--cases", default=CASES, metavar="LIST", help=f"ROWSxCONTEXT, ... or none ({CASES})")
    parser.add_argument("--lora", default="none", metavar="LIST", help="LoRA ranks, for example none,16 (none)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="the median of so many counts (5)")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="decode steps of a repeat (32)")
    parser.add_argument(
        "--peers",
        default="transformers",
        metavar="LIST",
        help="measured in the same run: transformers, package.module:function, or none (transformers)",
    )
    parser.add_argument("--prefill", action="store_true", help="also measure the prefill of 64 x 512 tokens")
    parser.add_argument("--replay", action="store_true", help="also replay an RL rollout of 64 prompts x 8 completions")
    parser.add_argument("--profile", action="store_true", help="also tell which kernels a step's time goes to")
    parser.add_argument("--slots", type=int, default=256, metavar="N", help="of the replay's engine (256)")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of all that is not MXFP4 (bf16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, cache and prompts (0)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the JSON goes (tests/bench/results/engine-<gpu>-<date>.json, or the current folder)",
    )
    parser.set_defaults(command=bench_engine)


def bench_engine(args: Namespace) -> int:
    """Measures, prints the table, writes the JSON; 1 when something of ours could not be measured."""
    cases = [] if args.cases == "none" else parse_cases(args.cases)
    ranks = parse_ranks(args.lora)
    for name in ("repeats", "steps", "slots"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}", "at least 1")
    names = () if args.peers == "none" else tuple(args.peers.split(","))
    import torch

    from stages.bench import engine, engine_report, findings, peers, results
    from stages.model.synthetic import shape_of

    for name in names:
        peers.peer(name)  # a wrong name is told before minutes of measuring
    options = engine.Options(
        shape=shape_of(args.shape, num_layers=args.layers),
        cases=tuple(cases),
        ranks=tuple(ranks),
        repeats=args.repeats,
        steps=args.steps,
        peers=names,
        replay=args.replay,
        slots=args.slots,
        profile=args.profile,
        prefill=args.prefill,
        dtype=args.dtype,
        seed=args.seed,
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    path = args.out or results.default_path("engine", gpu)
    head = results.head(
        bench="engine",
        command=results.command_line(sys.argv[1:]),
        gpu=gpu,
        shape=options.shape.name,
        dtype=args.dtype,
        cuda=torch.version.cuda or "",
    )

    def measure(save: Any, note: Any) -> findings.Report:
        return engine.measure(options, head=head, save=save, note=note)

    return findings.recorded(path, measure, engine_report.lines_of)
