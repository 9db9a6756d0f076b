"""The command `flexsink`. Heavy imports are inside the subcommands: `flexsink --help` takes a fraction of a second.

Exit codes: 0 done; 1 a self-check or a comparison failed; 2 an expected failure, told as `error: ...` and `hint: ...`;
130 interrupted; 141 nobody reads standard output any more, as behind `| head`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import stages.bench.command
import stages.bench.update_command
import stages.report
import stages.runs
from flows import prune, view
from flows.config import differences, overridden, resolved, resumed, shown
from flows.presets import PRESETS, preset
from stages.config import RunConfig, UserError, did_you_mean, pasteable

if TYPE_CHECKING:
    from stages.artifacts import RunDir, StageId

RUNS = Path("data/runs")
RUNNERS = ("process", "docker")
FORMATS = ("mxfp4", "fp16", "bf16", "adapter")
# With a default argparse does not call them required, wherever a word before them is missing.
SETTINGS: dict[str, Any] = {"nargs": "*", "default": (), "metavar": "section.key=value"}


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line the way every other error is told, with the nearest word that is right."""

    def error(self, message: str) -> NoReturn:
        meant = ""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            meant = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif option := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            meant = did_you_mean(option[1], self._option_string_actions)
        raise UserError(message, f"{meant} see {self.prog} --help".lstrip())


class Version(argparse.Action):
    """--version, without reading the installed packages for every other command."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print flexsink's version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"flexsink {version('flexsink')}")
        sys.exit(0)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one subcommand and exits."""
    from stages.exits import guarded

    sys.exit(guarded(lambda: dispatch(arguments)))


def dispatch(arguments: Sequence[str] | None) -> int:
    top = parser()
    if arguments is None and len(sys.argv) == 1:
        top.print_help()
        return 0
    args, late = top.parse_known_args(arguments)
    # argparse takes positional words of one place only: `train tiny --runner docker train.seed=1` has two.
    if late and not (hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in late)):
        args.parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        args.overrides = [*args.overrides, *late]
    code: int = args.command(args)
    return code


def parser() -> Parser:
    """Every subcommand and its arguments."""
    top = Parser(prog="flexsink", description="Teach gpt-oss a task by reinforcement learning on one GPU.")
    top.add_argument("--version", action=Version)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    presets = ", ".join(PRESETS)

    train = commands.add_parser("train", help="start a run, or go on with it, from a preset")
    train.add_argument("preset", metavar="PRESET", help=presets)
    train.add_argument("overrides", **SETTINGS, help="for example train.seed=1")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help=f"where to write ({RUNS}/<preset>-<UTC>)")
    train.add_argument("--runner", choices=RUNNERS, metavar="RUNNER", help="process, or docker: stages in containers")
    train.set_defaults(command=train_command)

    resume = commands.add_parser("resume", help="go on with a run that stopped")
    resume.add_argument("run", type=Path, metavar="RUN_DIR")
    resume.add_argument("overrides", **SETTINGS, help="for example train.iterations=48")
    resume.add_argument("--runner", choices=RUNNERS, metavar="RUNNER", help="process or docker (as before)")
    resume.set_defaults(command=resume_command)

    plan = commands.add_parser("plan", help="which stages would run, which be reused, and why")
    plan.add_argument("what", metavar="RUN_DIR|PRESET")
    plan.add_argument("overrides", **SETTINGS)
    plan.set_defaults(command=plan_command)

    inspect = commands.add_parser("inspect", help="look at groups, completions, rewards, programs, verdicts")
    stages.runs.add_inspect_arguments(inspect)
    inspect.set_defaults(command=stages.runs.inspect)

    runs = commands.add_parser("runs", help="list the runs there are")
    stages.runs.add_runs_arguments(runs)
    runs.set_defaults(command=stages.runs.list_runs)

    browse = commands.add_parser("view", help="look at a run in the terminal: groups, tokens, programs, games")
    view.add_arguments(browse)
    browse.set_defaults(command=view.view)

    clear = commands.add_parser("prune", help="say what of the runs can go, and delete it with --yes")
    prune.add_arguments(clear)
    clear.set_defaults(command=prune.prune)

    report = commands.add_parser("report", help="write a run's report as one HTML file")
    stages.report.add_arguments(report)
    report.set_defaults(command=stages.report.report)

    evaluate = commands.add_parser("evaluate", help="judge a run's policy on held-out seeds, baselines beside it")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument("--updates", type=int, metavar="N", help="after that many updates (the last finished one)")
    evaluate.set_defaults(command=evaluate_command)

    export = commands.add_parser("export", help="write a run's policy as a model folder")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--format", choices=FORMATS, metavar="FORMAT", help=f"{', '.join(FORMATS)} (the run's own)")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    export.add_argument("--strict", action="store_true", help="exit 3 when less than 90 %% of the gain is kept")
    export.set_defaults(command=export_command)

    serve = commands.add_parser("serve", help="train on a schedule")
    serve.add_argument("preset", metavar="PRESET", help=presets)
    serve.add_argument("overrides", **SETTINGS)
    serve.add_argument("--cron", required=True, metavar="CRON", help='for example "0 3 * * *"')
    serve.add_argument("--limit", type=int, default=1, metavar="N", help="runs at the same time (1)")
    serve.add_argument("--stop-after-runs", type=int, default=0, metavar="N", help="end after that many runs")
    serve.set_defaults(command=serve_command)

    check = commands.add_parser("self-check", help="attack the sandbox with every known attack; exit 1 if one succeeds")
    check.add_argument("what", choices=["sandbox"], metavar="sandbox")
    check.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="attacks whose name, kind or task holds it"
    )
    check.add_argument("--backend", default="docker", metavar="BACKEND", help="sandbox.backend to attack (docker)")
    check.add_argument("--runtime", default="", metavar="R", help="Docker runtime to attack, such as runsc")
    check.set_defaults(command=self_check_command)

    bench = commands.add_parser("bench", help="measure this machine").add_subparsers(
        title="benchmarks", metavar="WHAT", required=True, parser_class=Parser
    )
    bench_score = bench.add_parser("score", help="how fast programs are judged, and whose CPU time it takes")
    bench_score.add_argument("overrides", **SETTINGS, help="sandbox.containers=4")
    bench_score.add_argument(
        "--completions", type=int, default=64, metavar="N", help="programs of the score stage (64)"
    )
    bench_score.add_argument("--games", type=int, default=100, metavar="N", help="games each of them plays (100)")
    bench_score.add_argument(
        "--cases", type=int, default=600, metavar="N", help="trivial programs judged at once (600)"
    )
    bench_score.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    bench_score.set_defaults(command=bench_score_command)

    stages.bench.command.add_engine_arguments(
        bench.add_parser("engine", help="how fast the engine decodes, how near the memory limit, beside its peers")
    )
    stages.bench.update_command.add_update_arguments(
        bench.add_parser("update", help="how fast the update trains, in how much memory, beside its peers")
    )
    compare = commands.add_parser(
        "compare-attention", help="how far each attention path is from transformers eager, layer by layer"
    )
    compare.add_argument("model", nargs="?", default="data/tiny", metavar="MODEL", help="folder or hub id (data/tiny)")
    compare.add_argument("--shape", metavar="S", help="gpt-oss-20b or gpt-oss-120b, random weights, instead of MODEL")
    compare.add_argument("--layers", type=int, default=4, metavar="N", help="layers of --shape (4)")
    compare.add_argument("--tokens", type=int, default=640, metavar="N", help="length of the sequence (640)")
    compare.add_argument("--dtypes", default="bf16,fp32", metavar="D,...", help="of bf16, fp16, fp32 (bf16,fp32)")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    compare.set_defaults(command=compare_attention_command)

    doctor = commands.add_parser("doctor", help="check this machine")
    doctor.set_defaults(command=doctor_command)
    for each in (*commands.choices.values(), *bench.choices.values()):
        each.set_defaults(parser=each)
    return top


def train_command(args: argparse.Namespace) -> int:
    from flows import steps
    from stages.artifacts import RunDir

    config = resolved(overridden(preset(args.preset), assignments(args)))
    steps.check_sandbox(config.sandbox.backend)
    steps.check_runner(config, print)
    path = args.run_dir or steps.default_path(RUNS, args.preset)
    if not (path / "config.json").exists():
        run = RunDir.create(path, config)
        try:
            return go(run, config)
        except UserError as error:
            # Where nothing was made nothing half-written is left, so that a corrected command can start.
            hint, resume, _ = error.hint.partition("go on with: flexsink resume")
            if run.discard() and resume:
                raise UserError(error.message, f"{hint}give the same command again") from error
            raise
    run = RunDir.open(path)
    changes = differences(run.config(), config)
    if changes and not run.is_blank():
        raise UserError(
            f"{path} holds a run of another configuration: {shown(changes)}",
            f"go on with that one by: {pasteable('flexsink', 'resume', path)}; or choose another folder with --run-dir",
        )
    return go(run, config)


def resume_command(args: argparse.Namespace) -> int:
    from flows import steps
    from stages.artifacts import RunDir

    run = RunDir.open(args.run)
    config = resumed(run.config(), assignments(args))
    steps.check_sandbox(config.sandbox.backend)
    steps.check_runner(config, print)
    return go(run, config)


def assignments(args: argparse.Namespace) -> list[str]:
    """The overrides of a command, --runner among them."""
    return [*args.overrides, *([f"steps.runner={args.runner}"] if args.runner else [])]


def go(run: "RunDir", config: RunConfig) -> int:
    """Trains until the end and prints the summary; 130 after Ctrl-C, saying how to go on."""
    from flows.progress import plain, terminal
    from flows.summary import finish
    from flows.train import train
    from stages.exits import guarded

    def body() -> int:
        with terminal(config.logging.format) as view:
            view.note(f"run {run.path}")
            train(run, config, view)
        return 0

    # UserError passes through: only the interrupt is told here, where the run is known.
    code = guarded(body, resume=pasteable("flexsink", "resume", run.path), pass_errors=True)
    if code == 0:
        finish(run, plain(config.logging.format).note)
    return code


def plan_command(args: argparse.Namespace) -> int:
    from flows.plan import show_preset, show_run
    from stages.artifacts import RunDir

    if args.what in PRESETS and not Path(args.what, "config.json").exists():
        show_preset(resolved(preset(args.what)), resolved(overridden(preset(args.what), args.overrides)))
        return 0
    if not Path(args.what).exists() and "/" not in args.what:
        preset(args.what)
    run = RunDir.open(Path(args.what))
    show_run(run, resumed(run.config(), args.overrides))
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    from flows.summary import figures, policy_row
    from stages.artifacts import RunDir, StageId
    from stages.tasks import registry

    run = RunDir.open(args.run)
    updates = last_update(run) if args.updates is None else args.updates
    stage = StageId("evaluate", updates)
    make(run, run.config(), [stage])
    row = policy_row(run, updates)
    print(f"{updates} updates   {figures(row, registry.of(run.config()))}" if row else run.folder(stage))
    print(f"written to  {run.folder(stage)}")
    return 0


def export_command(args: argparse.Namespace) -> int:
    from flows.delivery import deliver, kept
    from stages.artifacts import RunDir, StageId
    from stages.config import replace

    run = RunDir.open(args.run)
    if args.out.exists():
        raise UserError(f"{args.out} is there already", "give --out a folder that does not exist yet")
    config = run.config()
    config = replace(config, "export", format=args.format or config.export.format)
    updates = last_update(run)
    stage = StageId("export", updates, config.export.format)
    evaluations = [StageId("evaluate", 0)] + ([StageId("evaluate", updates)] if updates else [])
    make(run, config, [*evaluations, stage])
    deliver(run.folder(stage), args.out)
    print(f"exported    {args.out}")
    lost = kept(run.folder(stage))
    if lost:
        print(lost)
    return 3 if lost and args.strict else 0


def last_update(run: "RunDir") -> int:
    """How many updates the run's newest checkpoint has had."""
    from flows.summary import finished

    done = finished(run, "iterations/*/update")
    return done[-1] + 1 if done else 0


def make(run: "RunDir", config: RunConfig, wanted: "list[StageId]") -> None:
    """Makes these stages outside the flow, where they are not done; everything else that they read must be."""
    from flows import steps
    from flows.progress import terminal
    from flows.train import working
    from stages.artifacts.command import require_upstream

    require_upstream(run, config, wanted[0])
    with terminal(config.logging.format) as view, working(run, config, view) as work:
        for stage in wanted:
            steps.run_stage(run, config, stage, work.session, work.view)


def serve_command(args: argparse.Namespace) -> int:
    from flows import server, steps

    config = overridden(preset(args.preset), args.overrides)
    steps.check_sandbox(config.sandbox.backend)
    steps.check_runner(config, print)
    server.connect(print)  # before Prefect is imported
    from flows.schedule import serve

    limits = {"limit": args.limit, "stop_after_runs": args.stop_after_runs}
    serve(args.preset, args.overrides, cron=args.cron, **limits, note=print)
    return 0


def self_check_command(args: argparse.Namespace) -> int:
    from stages.self_check import self_check

    return self_check(backend=args.backend, runtime=args.runtime, words=args.only)


def bench_score_command(args: argparse.Namespace) -> int:
    from stages.bench import score, show

    config = overridden(RunConfig(), args.overrides)
    sizes = {"completions": args.completions, "games": args.games, "cases": args.cases}
    for name, least in (("completions", 1), ("games", 1), ("cases", 30)):
        if sizes[name] < least:
            raise UserError(f"--{name} is {sizes[name]}", f"at least {least}")
    figures = score.measure(config, **sizes, note=lambda text: print(text, file=sys.stderr, flush=True))
    show.print_table(figures, config)
    if args.out:
        words = [*args.overrides, *(f"--{name} {value}" for name, value in sizes.items())]
        show.write(args.out, figures, config, command=" ".join(["flexsink bench score", *words]))
    return 0


def compare_attention_command(args: argparse.Namespace) -> int:
    from stages.bench import compare_attention

    result = compare_attention.run(
        args.model,
        shape=args.shape,
        num_layers=args.layers,
        num_tokens=args.tokens,
        dtypes=args.dtypes.split(","),
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    compare_attention.print_table(result)
    if args.json:
        model = ["--shape", args.shape, "--layers", str(args.layers)] if args.shape else [args.model]
        words = ["flexsink compare-attention", *model, "--tokens", str(args.tokens), "--dtypes", args.dtypes]
        compare_attention.write(args.json, result, command=" ".join(words))
    return 0 if result["right"] else 1


def doctor_command(args: argparse.Namespace) -> int:
    from flows.doctor import check

    lines = check()
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{'ok  ' if line.ok else 'FAIL'}  {line.name:<{width}}  {line.detail}")
        if line.hint:
            print(f"{'':{width + 6}}  hint: {line.hint}")
    return 0 if all(line.ok for line in lines) else 2


if __name__ == "__main__":
    main()
