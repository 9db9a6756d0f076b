"""What `flexsink bench update` found, as lines for people.

The JSON: {"bench": "update", "weights": "synthetic", "gpu", "date", "versions", "command", "shape", "dtype",
"reference_tflops", "startup": [...], "rows": [...], "longest": [...], "iteration": [...], "agreement": [...]}. A row
holds system, mode, tokens, lora, tokens_per_s, floor_share, peak_bytes, cap_bytes, and what else was seen (targets,
dense, optimizer, forward_ms, reserved_bytes, ...); or "error". peak_bytes is the larger of what PyTorch reserved and
what the driver saw in use beyond what was in use before.
"""

import itertools
from collections.abc import Iterator, Sequence

from stages.bench.cases import verdict
from stages.bench.results import Row, gigabytes, table_lines
from stages.bench.update_cases import (
    ATTENTION_BYTES,
    CAPPED_SPEED,
    ITERATION_BYTES,
    ITERATION_S,
    K3,
    K3_REPLAY,
    LENGTH_BYTES,
    NF4_BYTES,
    PEER_TIMES,
    RATIO,
    SETS,
    SETS_TIMES,
    SPEED,
    SPEED_BYTES,
)

MODEL = "gpt-oss-20b"  # most bars are of
ROW_COLUMNS = (
    "system", "mode", "tokens", "LoRA", "tokens/s", "forward", "backward", "optimizer",
    "of floor", "GB", "allocated", "driver", "cap", "bar",
)  # fmt: skip
ITERATION_COLUMNS = (
    "iteration", "LoRA", "s", "rollout", "reward", "update", "strict", "tokens/s", "GB", "driver", "cap", "bar",
)  # fmt: skip


def lines_of(body: Row) -> Iterator[str]:
    """The tables, line by line."""
    shape, rows = body["shape"], body["rows"]
    yield f"{shape}, {body['dtype']}, synthetic weights, on {body['gpu']}"
    yield (
        f"the floor is at {body['reference_tflops']:.0f} TFLOP/s with every layer computed forward twice and backward "
        "once; forward, backward and optimizer are milliseconds of a step; GB is what PyTorch reserved at most, as a "
        "cap caps it, driver all that was in use"
    )
    if rows:
        yield from table_lines(ROW_COLUMNS, [cells_of(row, shape) for row in rows], words=2)
    for row in rows:
        if "error" in row:
            about = ", ".join(words for words in (row["system"], case_of(row)) if words)
            yield f"   {about}: {row['error']}"
    for row in rows:
        for name in ("forward", "backward"):
            for kernel in row.get(f"{name}_kernels", ()):
                launches = f"{kernel['launches_per_step']:6.0f} x {kernel['kernel']}"
                yield f"   {case_of(row)}, {name}: {kernel['us_per_step'] / 1e3:9.3f} ms in {launches}"
    yield from slopes(rows)
    yield from peer_words(rows)
    for row in body["startup"]:
        sizes = f"{gigabytes(row['weight_bytes'])} GB of weights and {row['adapter_bytes'] / 1e9:.2f} GB of adapter"
        yield f"LoRA {lora_of(row)}: {sizes}, made in {row['weights_s']:.1f} s"
    for row in body["longest"]:
        yield f"longest, LoRA {lora_of(row)}: {longest_words(row)}"
    if body["iteration"]:
        yield from table_lines(ITERATION_COLUMNS, [iteration_cells(row, shape) for row in body["iteration"]])
    for row in body["iteration"]:
        if "error" in row:
            yield f"   {iteration_of(row)}: {row['error']}"
    yield from agreement_lines(body["agreement"])


def cells_of(row: Row, shape: str) -> Sequence[str]:
    """A row's cells, in the order of ROW_COLUMNS."""
    begin = (str(row["system"]), str(row.get("mode", "")), f"{row['tokens']}" if "tokens" in row else "", lora_of(row))
    if "error" in row:
        return (*begin, "error", *[""] * (len(ROW_COLUMNS) - 5))
    return (
        *begin,
        f"{row['tokens_per_s']:,.0f}",
        *(f"{row[name]:.1f}" if name in row else "" for name in ("forward_ms", "backward_ms", "optimizer_ms")),
        f"{row['floor_share']:.1%}",
        gigabytes(reserved(row)) if reserved(row) else "",
        *(gigabytes(row[name]) if row.get(name) else "" for name in ("allocated_bytes", "driver_bytes")),
        gigabytes(row["cap_bytes"]) if row.get("cap_bytes") else "none",
        bar_words(row, shape),
    )


def bar_words(row: Row, shape: str) -> str:
    """How our row stands to the bars that there are for it."""
    if row["system"] != "flexsink" or row["mode"] != "sequence":
        return ""
    words, tokens, both = [], row["tokens"], row["targets"] != "attention"
    if shape == MODEL and tokens in SPEED and both:
        words.append(verdict(row["tokens_per_s"], SPEED[tokens], lora=False))
        words.append(under(reserved(row), SPEED_BYTES))
        if row.get("cap_bytes"):
            words.append(f"{'reaches' if row['tokens_per_s'] >= CAPPED_SPEED else 'BELOW'} {CAPPED_SPEED:,} capped")
    limit = (LENGTH_BYTES if both else ATTENTION_BYTES).get(shape, {}).get(tokens)
    if limit:
        words.append(under(reserved(row), limit))
    return ", ".join(words)


def reserved(row: Row) -> int:
    """What PyTorch's allocator reserved at most, which the bars are about; peak_bytes where a row has only that."""
    return int(row.get("reserved_bytes") or row.get("peak_bytes") or 0)


def under(count: float, limit: float) -> str:
    return f"{'under' if count < limit else 'OVER'} {limit / 1e9:g} GB"


def slopes(rows: Sequence[Row]) -> Iterator[str]:
    """How our peak grows from one length to the next: linear memory shows as equal slopes."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["system"] == "flexsink" and reserved(row):
            curves.setdefault((row["mode"], lora_of(row)), []).append(row)
    for (mode, lora), found in curves.items():
        steps = []
        for before, after in itertools.pairwise(found):
            bytes_more, tokens_more = reserved(after) - reserved(before), after["tokens"] - before["tokens"]
            if tokens_more > 0:
                words = f"from {before['tokens']} to {after['tokens']}"
                steps.append(f"{bytes_more / tokens_more / 1e3:.1f} kB a token {words}")
        if steps:
            yield f"peak memory, {mode}, LoRA {lora}: {'; '.join(steps)}"


def peer_words(rows: Sequence[Row]) -> Iterator[str]:
    """How many times a peer's speed ours is, on the same targets and length."""
    ours = {
        (row["targets"], row["tokens"]): row["tokens_per_s"]
        for row in rows
        if row["system"] == "flexsink" and row["mode"] == "sequence" and "tokens_per_s" in row
    }
    for row in rows:
        key = (row.get("targets"), row.get("tokens"))
        if row["system"] != "flexsink" and "tokens_per_s" in row and key in ours:
            times = ours[key] / row["tokens_per_s"]
            held = "must" if times >= PEER_TIMES else "missed"
            about = f"{row['tokens']} tokens, LoRA {lora_of(row)}"
            yield f"{times:.1f} times the speed of {row['system']}: {about} (bar {PEER_TIMES}: {held})"


def longest_words(row: Row) -> str:
    if "error" in row:
        return str(row["error"])
    cap = f"under {gigabytes(row['cap_bytes'])} GB" if row.get("cap_bytes") else "uncapped"
    figures = f"{row['tokens_per_s']:,.0f} tokens/s, {gigabytes(reserved(row))} GB"
    return f"{row['tokens']} tokens {cap}, {figures}; {row['reason']}"


def iteration_cells(row: Row, shape: str) -> Sequence[str]:
    """A row's cells, in the order of ITERATION_COLUMNS."""
    begin = (iteration_of(row), lora_of(row))
    if "error" in row:
        return (*begin, "error", *[""] * (len(ITERATION_COLUMNS) - 3))
    seconds = ("iteration_s", "rollout_s", "reward_s", "update_s", "strict_s")
    return (
        *begin,
        *(f"{row[name]:.2f}" for name in seconds),
        f"{row['rollout_tokens_per_s']:,.0f}",
        *(gigabytes(count) if count else "" for count in (reserved(row), row.get("driver_bytes", 0))),
        gigabytes(row["cap_bytes"]) if row.get("cap_bytes") else "none",
        ", ".join([*([] if row["warm"] else ["first run"]), *iteration_bars(row, shape)]),
    )


def iteration_bars(row: Row, shape: str) -> Iterator[str]:
    """How an iteration of one group of 8 stands to its bars."""
    if shape != MODEL or (row["prompts"], row["group_size"]) != (1, 8):
        return
    tokens = row["new_tokens"]
    if tokens in ITERATION_S:
        yield f"{'under' if row['iteration_s'] < ITERATION_S[tokens] else 'OVER'} {ITERATION_S[tokens]:g} s"
    if tokens in ITERATION_BYTES and reserved(row):
        yield under(reserved(row), NF4_BYTES if row["dense"] == "nf4" else ITERATION_BYTES[tokens])


def agreement_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Engine against trainer, and transformers against itself."""
    own = next((row for row in rows if row["system"] != "flexsink" and "error" not in row), None)
    for row in rows:
        about = f"{row['system']}, {row['mode']}"
        if "error" in row:
            yield f"{about}: {row['error']}"
            continue
        yield f"{about}, {row['tokens']} tokens: {agreement_words(row)}"
        if row["system"] != "flexsink":
            continue
        yield f"   {', '.join(agreement_bars(row, own))}"
        if "replay_k3" in row:
            replay = {name.removeprefix("replay_"): value for name, value in row.items() if name.startswith("replay_")}
            held = "held" if replay["k3"] < K3_REPLAY and not replay.get("sets_differ") else "MISSED"
            would = (
                f"; its routers would send {replay['own_sets_differ']:.2%} elsewhere"
                if "own_sets_differ" in replay
                else ""
            )
            yield f"   with the engine's routes: {agreement_words(replay)} ({held}){would}"


def agreement_words(row: Row) -> str:
    sets = f", {row['sets_differ']:.2%} of top-4 sets differ" if "sets_differ" in row else ", routes not known"
    difference = f"difference {row['difference_mean']:.2e}, at most {row['difference_max']:.2e}"
    return f"k3 {row['k3']:.2e}, ratio {row['ratio_mean']:.5f}, {difference}{sets}"


def agreement_bars(row: Row, own: Row | None) -> Iterator[str]:
    """The bars of true shapes in 16 bits."""
    yield f"k3 {'under' if row['k3'] < K3 else 'OVER'} {K3:g}"
    yield f"ratio {'within' if abs(row['ratio_mean'] - 1) <= RATIO else 'OFF'} 1 +- {RATIO:g}"
    if "sets_differ" in row:
        yield f"sets {'under' if row['sets_differ'] < SETS else 'OVER'} {SETS:.0%}"
        if own and own.get("sets_differ"):
            times = row["sets_differ"] / own["sets_differ"]
            held = "within" if times <= SETS_TIMES else "OVER"
            yield f"{times:.2f} times transformers' own ({held} {SETS_TIMES})"


def case_of(row: Row) -> str:
    return f"{row['mode']} of {row['tokens']}, LoRA {lora_of(row)}" if "tokens" in row else ""


def iteration_of(row: Row) -> str:
    return f"{row['prompts']} x {row['group_size']} x ({row['prompt_tokens']} + {row['new_tokens']})"


def lora_of(row: Row) -> str:
    """The rank, and what it is on: a for attention, e for experts."""
    if "lora" not in row:
        return ""
    on = {"attention": "a", "attention+experts": "a+e"}.get(row.get("targets", ""), "")
    return f"r={row['lora']} {on}".strip()
