"""The command `flexsink bench update`: its arguments, and what it does with them. Imports torch when it runs."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from stages.bench.update_cases import parse_iterations, parse_targets, parse_tokens
from stages.config import UserError

TOKENS = "4096,32768,131072"


def add_update_arguments(parser: ArgumentParser) -> None:
    """Declares what `flexsink bench update` takes."""
    parser.add_argument("--shape", default="gpt-oss-20b", metavar="NAME", help="gpt-oss-20b, gpt-oss-120b or tiny")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="so many layers instead of the shape's own")
    parser.add_argument("--tokens", default=TOKENS, metavar="LIST", help=f"lengths of a step, or none ({TOKENS})")
    parser.add_argument(
        "--memory-cap",
        type=float,
        default=0.0,
        metavar="BYTES",
        help="our rows reserve no more than that, the peers may (no cap)",
    )
    parser.add_argument("--lora", type=int, default=16, metavar="R", help="LoRA rank (16)")
    parser.add_argument(
        "--targets",
        default="attention+experts",
        metavar="LIST",
        help="of LoRA: attention+experts, attention, or both with a comma (attention+experts)",
    )
    parser.add_argument("--lora-dtype", choices=("bf16", "fp32"), default="bf16", help="of adapter and gradient (bf16)")
    parser.add_argument("--dense", choices=("full", "nf4"), default="full", help="attention and unembedding (full)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of all that is not packed")
    parser.add_argument("--offload-embedding", action="store_true", help="keep the embedding in CPU memory")
    parser.add_argument(
        "--scaled-init",
        action="store_true",
        help="random weights as a model's training begins with: residual projections 1/sqrt(2 layers) as large",
    )
    parser.add_argument("--optimizer", default="adamw_8bit", metavar="NAME", help="as update.optimizer (adamw_8bit)")
    parser.add_argument("--loss", default="grpo", metavar="NAME", help="as update.loss (grpo)")
    parser.add_argument("--learning-rate", type=float, default=5e-5, metavar="RATE", help="of every update (5e-5)")
    parser.add_argument("--pack-tokens", type=int, default=0, metavar="N", help="of a micro-batch (a row's own length)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="the median of so many steps (5); 0: the first, which compiles",
    )
    parser.add_argument(
        "--peers",
        default="transformers",
        metavar="LIST",
        help="measured in the same run: transformers, package.module:function, or none (transformers)",
    )
    parser.add_argument("--longest", action="store_true", help="also find the longest sequence that fits")
    parser.add_argument(
        "--iteration",
        nargs="?",
        const="all",
        default="none",
        metavar="LIST",
        help="also time whole iterations, rollout, reward and update: all, or prompts x group x tokens as in 1x8x1024",
    )
    parser.add_argument("--agreement", action="store_true", help="also compare engine and trainer over updates")
    parser.add_argument("--updates", type=int, default=20, metavar="N", help="of --agreement (20)")
    parser.add_argument("--slots", type=int, default=256, metavar="N", help="of the iterations' engine (256)")
    parser.add_argument("--profile", action="store_true", help="also tell which kernels a step's time goes to")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, tokens and rewards (0)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the JSON goes (tests/bench/results/update-<gpu>-<date>.json, or the current folder)",
    )
    parser.set_defaults(command=bench_update)


def bench_update(args: Namespace) -> int:
    """Measures, prints the tables, writes the JSON; 1 when something of ours could not be measured."""
    tokens, targets = parse_tokens(args.tokens), parse_targets(args.targets)
    for name, least in (("repeats", 0), ("lora", 1), ("updates", 1), ("slots", 1), ("pack_tokens", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}", f"at least {least}")
    if not args.memory_cap >= 0:
        raise UserError(f"--memory-cap is {args.memory_cap:g}", "bytes, for example 24e9")
    names = () if args.peers == "none" else tuple(args.peers.split(","))
    iterations = parse_iterations(args.iteration, tiny=args.shape == "tiny")
    import torch

    from stages.bench import findings, peers, results, update, update_report
    from stages.bench.update_step import Setting
    from stages.model.synthetic import shape_of

    for name in names:
        peers.peer(name)  # a wrong name is told before minutes of measuring
    setting = Setting(
        shape=shape_of(args.shape, num_layers=args.layers),
        rank=args.lora,
        dense=args.dense,
        dtype=args.dtype,
        lora_dtype=args.lora_dtype,
        optimizer=args.optimizer,
        offload_embedding=args.offload_embedding,
        scaled_init=args.scaled_init,
        loss=args.loss,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    options = update.Options(
        setting=setting,
        targets=targets,
        tokens=tuple(tokens),
        cap_bytes=args.memory_cap,
        repeats=args.repeats,
        peers=names,
        longest=args.longest,
        iterations=iterations,
        agreement=args.agreement,
        updates=args.updates,
        slots=args.slots,
        pack_tokens=args.pack_tokens,
        profile=args.profile,
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = args.out or results.default_path("update", gpu)
    head = results.head(
        bench="update",
        command=results.command_line(sys.argv[1:]),
        gpu=gpu,
        shape=setting.shape.name,
        dtype=args.dtype,
        cuda=torch.version.cuda or "",
    )

    def measure(save: Any, note: Any) -> findings.Report:
        return update.measure(options, head=head, save=save, note=note)

    return findings.recorded(path, measure, update_report.lines_of)
