"""What the bundled model must be, measured: samples at temperature 1, their families and games, its routers and sinks.

Contract: `measure(folder)` returns the figures, `verdicts(figures)` one row per requirement. Samples come from
transformers' own `generate` on the checkpoint as anybody would load it, the family of a program from its syntax tree,
its score from games played here.

Programs run in a child process of their own with a CPU limit, no files and no further processes. That keeps an endless
loop from hanging the check; it is no sandbox, and nothing but this project's own warm start should be checked with it.
"""

import contextlib
import resource
import statistics
import struct
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, PreTrainedTokenizerBase

from stages.tasks.game2048 import harness
from stages.tasks.programs import extract
from stages.tasks.registry import get
from stages.tiny import corpus, families, strategies

MAX_NEW_TOKENS = 320
CPU_S = 20
MEMORY_BYTES = 1 << 29
MAX_MOVES = 5000
SEED = 0

CHILD = """
import struct, sys
pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
harness = {{"__name__": "harness"}}
exec({harness!r}, harness)
program = {{"__name__": "program"}}
exec({program!r}, program)
def receive():
    size = pipe_in.read(4)
    return pipe_in.read(struct.unpack("<I", size)[0]) if size else b""
def send(answer):
    pipe_out.write(struct.pack("<I", len(answer)) + answer)
    pipe_out.flush()
harness["serve"](program["strategy"], receive, send)
"""


class Figures(NamedTuple):
    """What was measured.

    Example: Figures(samples=256, parsed=0.97, matmul_parsed=0.99, shares={"snake": 0.2, ...},
    scores={"snake": 5100.0, ...}, mean_score=2700.0, trees=240, experts=(8, 8, 8, 7), sinks_matter=True,
    experts_matter=True, bytes=2100000)
    """

    samples: int
    parsed: float  # share of 2048 samples that parse as strategy(board)
    matmul_parsed: float  # share of matmul samples that parse as matmul(A, B)
    shares: dict[str, float]  # of 2048 samples, by family
    scores: dict[str, float]  # mean score of a family's samples; one that fails scores 0
    mean_score: float  # over all 2048 samples, failures 0
    trees: int  # distinct syntax trees
    experts: tuple[int, ...]  # per layer: experts that at least 1 % of the samples' tokens are sent to
    sinks_matter: bool  # zeroing the sinks changes greedy output
    experts_matter: bool  # shuffling the experts changes greedy output
    bytes: int


class Verdict(NamedTuple):
    """One requirement. Example: Verdict("2048 samples that parse", "97.3 %", ">= 90 %", True)"""

    name: str
    measured: str
    bar: str
    met: bool


def load(folder: Path) -> tuple[GptOssForCausalLM, PreTrainedTokenizerBase]:
    """Returns model (fp32, experts dequantised) and tokenizer as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    # Some versions leave dequantised experts in bfloat16.
    return model.float().eval(), AutoTokenizer.from_pretrained(folder)


def sample(
    model: GptOssForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    count: int,
    seed: int = SEED,
    greedy: bool = False,
) -> list[str]:
    """Returns completions with harmony's markers, drawn from the whole distribution at temperature 1, or greedily."""
    torch.manual_seed(seed)
    ids = torch.tensor([corpus.render(tokenizer, prompt)])
    generate = cast(Any, model).generate  # transformers annotates its self as another class
    texts: list[str] = []
    while len(texts) < count:
        batch = ids.expand(min(64, count - len(texts)), -1)
        how: dict[str, Any] = (
            {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
        output = generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=MAX_NEW_TOKENS, **how)
        for row in output[:, ids.shape[1] :]:
            texts.append(str(tokenizer.decode(row)).replace(str(tokenizer.pad_token), ""))
    return texts


def play(program: str, *, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns the records of the program's games on the standard board, in lockstep as the sandbox plays them.

    A program that fails leaves its games where they stand, as illegal.
    """
    task = get("game2048", {})
    cases = [
        {"seed": seed, "size": 4, "target": 2048, "max_moves": MAX_MOVES, "program_seed": index}
        for index, seed in enumerate(seeds)
    ]
    text = CHILD.format(harness=task.harness_source(), program=program)
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        preexec_fn=confine,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    class Ended(Exception):
        outcome = "crash"

    def ask(question: bytes) -> bytes:
        try:
            stdin.write(struct.pack("<I", len(question)) + question)
            stdin.flush()
        except BrokenPipeError:
            raise Ended from None
        size = stdout.read(4)
        if len(size) < 4:
            raise Ended
        return stdout.read(struct.unpack("<I", size)[0])

    try:
        return list(harness.judge(cases, ask))
    finally:
        child.kill()
        child.wait()
        stdout.close()
        with contextlib.suppress(BrokenPipeError):
            stdin.close()


def confine() -> None:
    """Limits the child before it starts: CPU seconds, memory, no file written, no process of its own."""
    for kind, limit in (
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def mean_score(program: str | None, *, seeds: tuple[int, ...]) -> float:
    """Returns the mean score of the program's games, 0 without a program that parses."""
    if program is None or not families.parses(program, "strategy", 1):
        return 0.0
    return statistics.mean(game["score"] for game in play(program, seeds=seeds))


@torch.no_grad()
def experts_used(
    model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str], prompt: str
) -> tuple[int, ...]:
    """Returns per layer how many experts get at least 1 % of the tokens of the texts behind the prompt."""
    start = corpus.render(tokenizer, prompt)
    counts: list[Tensor] = [torch.zeros(model.config.num_local_experts) for _ in range(model.config.num_hidden_layers)]
    tokens = 0
    for text in texts:
        ids = start + tokenizer(text).input_ids
        tokens += len(ids)
        logits = model(torch.tensor([ids]), output_router_logits=True, use_cache=False).router_logits
        for count, layer in zip(counts, logits, strict=True):
            chosen = layer.topk(model.config.num_experts_per_tok).indices.flatten()
            count += torch.bincount(chosen, minlength=len(count))
    return tuple(int((count >= tokens / 100).sum()) for count in counts)


def greedy_after(folder: Path, prompt: str, change: str) -> str:
    """Returns the greedy completion after a change: "sinks" zeroed, "experts" moved round by one, or none ("")."""
    model, tokenizer = load(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            if change == "sinks":
                layer.self_attn.sinks.zero_()
            elif change == "experts":
                for parameter in layer.mlp.experts.parameters():
                    parameter.copy_(parameter.roll(1, 0))
    return sample(model, tokenizer, prompt, count=1, greedy=True)[0]


def measure(folder: Path, *, samples: int = 256, games: int = 4) -> Figures:
    """Returns the figures of the checkpoint in folder."""
    model, tokenizer = load(folder)
    texts = sample(model, tokenizer, corpus.GAME_PROMPT, count=samples)
    programs = [extract(text, entry="strategy") for text in texts]
    matmuls = [extract(text, entry="matmul") for text in sample(model, tokenizer, corpus.MATMUL_PROMPT, count=samples)]
    kinds = [None if program is None else families.family(program) for program in programs]
    # Odd seeds: those that training never uses.
    seeds = tuple(get("game2048", {}).held_out_seeds(games))
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda program: mean_score(program, seeds=seeds), programs))
    count = Counter(kinds)
    of_family = {
        name: [score for score, kind in zip(scores, kinds, strict=True) if kind == name] for name in strategies.FAMILIES
    }
    as_they_are = greedy_after(folder, corpus.GAME_PROMPT, "")
    return Figures(
        samples=samples,
        parsed=sum(program is not None and families.parses(program, "strategy", 1) for program in programs) / samples,
        matmul_parsed=sum(program is not None and families.parses(program, "matmul", 2) for program in matmuls)
        / samples,
        shares={name: count[name] / samples for name in strategies.FAMILIES},
        scores={name: statistics.mean(values) if values else 0.0 for name, values in of_family.items()},
        mean_score=statistics.mean(scores),
        trees=len({tree for program in programs if (tree := families.syntax_tree(program)) is not None}),
        experts=experts_used(model, tokenizer, texts[:32], corpus.GAME_PROMPT),
        sinks_matter=greedy_after(folder, corpus.GAME_PROMPT, "sinks") != as_they_are,
        experts_matter=greedy_after(folder, corpus.GAME_PROMPT, "experts") != as_they_are,
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
    )


def verdicts(figures: Figures) -> list[Verdict]:
    """Returns one row per requirement."""
    best = max(figures.scores.values())
    rows = [
        Verdict(
            "2048: samples that parse as strategy(board)", f"{figures.parsed:.1%}", ">= 90 %", figures.parsed >= 0.9
        ),
        Verdict(
            "matmul: samples that parse as matmul(A, B)",
            f"{figures.matmul_parsed:.1%}",
            ">= 90 %",
            figures.matmul_parsed >= 0.9,
        ),
    ]
    for name, share in figures.shares.items():
        shown = f"{share:.1%}, mean score {figures.scores[name]:.0f}"
        rows.append(Verdict(f"family {name}", shown, "5-30 %", 0.05 <= share <= 0.3))
    ratio = figures.mean_score / best if best else 1.0
    return [
        *rows,
        Verdict("distinct syntax trees", str(figures.trees), ">= 60", figures.trees >= 60),
        Verdict(
            "mean score, of the best family's",
            f"{figures.mean_score:.0f} of {best:.0f}, {ratio:.0%}",
            "<= 60 %",
            ratio <= 0.6,
        ),
        Verdict("experts used by each router", " ".join(map(str, figures.experts)), ">= 6", min(figures.experts) >= 6),
        Verdict("zeroed sinks change greedy output", str(figures.sinks_matter), "True", figures.sinks_matter),
        Verdict("shuffled experts change greedy output", str(figures.experts_matter), "True", figures.experts_matter),
        Verdict("size in MB", f"{figures.bytes / 1e6:.1f}", "<= 12", figures.bytes <= 12e6),
    ]


def table(rows: list[Verdict]) -> str:
    """Returns the rows as a table in Markdown."""
    lines = ["| requirement | measured | bar | met |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.measured} | {row.bar} | {'yes' if row.met else 'NO'} |" for row in rows]
    return "\n".join(lines)
