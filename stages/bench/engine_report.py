"""What `flexsink bench engine` found, as lines for people and as JSON; no torch, no rich (a bare GPU machine has none).

The JSON: {"bench": "engine", "weights": "synthetic", "gpu", "date", "versions", "command", "shape", "dtype",
"read_tb_s", "reference_tb_s", "startup": [...], "rows": [...], "prefill": [...], "replay": [...]}. A row of a system
holds system, batch, context, lora, tokens_per_s, ms_per_step, floor_tokens_per_s, floor_share, distinct_experts (of a
layer, on average), peak_bytes, and what else was seen; or "error".
"""

from collections.abc import Iterator, Sequence

from stages.bench.cases import (
    BARS,
    MEMORY_BARS,
    PREFILL_FLOOR,
    PREFILL_SHARE,
    REPLAY,
    SHARE_120B,
    WITH_LORA,
    Case,
    verdict,
)
from stages.bench.results import Row, gigabytes, table_lines

COLUMNS = ("system", "case", "LoRA", "tokens/s", "ms a step", "of floor", "of own", "experts", "GB", "capture", "bar")


def lines_of(body: Row) -> Iterator[str]:
    """The table, line by line."""
    yield f"{body['shape']}, {body['dtype']}, synthetic weights, on {body['gpu']}"
    yield (
        f"it reads {body['read_tb_s']:.2f} TB/s; the floor is at {body['reference_tb_s']} TB/s with uniform routing, "
        "its own at what it reads with the experts really hit"
    )
    yield from table_lines(COLUMNS, [cells_of(row, body["shape"]) for row in body["rows"]])
    for row in body["rows"]:
        if "error" in row:
            yield f"   {row['system']}, {case_of(row)}: {row['error']}"
    for row in body["rows"]:
        for kernel in row.get("kernels", ()):
            name, count = kernel["kernel"], kernel["launches_per_step"]
            yield f"   {case_of(row)}, LoRA {rank_of(row)}: {kernel['us_per_step']:8.1f} us in {count:5.1f} x {name}"
    for row in body["startup"]:
        yield f"weights with LoRA {rank_of(row)}: made in {row['weights_s']:.1f} s, {gigabytes(row['weight_bytes'])} GB"
    for row in body["prefill"]:
        yield f"prefill, LoRA {rank_of(row)}: {prefill_words(row, body['shape'])}"
    for row in body["replay"]:
        yield f"rollout, LoRA {rank_of(row)}: {replay_words(row, body['shape'])}"


def cells_of(row: Row, shape: str) -> Sequence[str]:
    """A row's cells, in the order of COLUMNS."""
    begin = (str(row["system"]), case_of(row), rank_of(row))
    if "error" in row:
        return (*begin, "error", *[""] * (len(COLUMNS) - 4))
    experts = row.get("distinct_experts")
    return (
        *begin,
        f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] >= 1000 else f"{row['tokens_per_s']:.1f}",
        f"{row['ms_per_step']:.3f}",
        f"{row['floor_share']:.1%}",
        f"{row['read_floor_share']:.1%}" if "read_floor_share" in row else "",
        "" if experts is None else f"{experts:.1f}/{row['expected_experts']:.1f}",
        gigabytes(row["peak_bytes"]) if "peak_bytes" in row else "",
        f"{row['capture_s']:.1f} s" if "capture_s" in row else "",
        bar_words(row, shape),
    )


def bar_words(row: Row, shape: str) -> str:
    """How our row stands to the bars that there are for it."""
    if row["system"] != "flexsink" or "batch" not in row:
        return ""
    case, words = Case(row["batch"], row["context"]), []
    if shape == "gpt-oss-20b" and case in BARS:
        words.append(verdict(row["tokens_per_s"], BARS[case], lora=bool(row["lora"])))
    if shape == "gpt-oss-120b" and case.rows == 1:
        share = SHARE_120B * (WITH_LORA if row["lora"] else 1)
        words.append("must" if row["floor_share"] >= share else "missed")
    if shape == "gpt-oss-20b" and case in MEMORY_BARS:
        fits = row["peak_bytes"] < MEMORY_BARS[case]
        words.append(f"{'under' if fits else 'OVER'} {MEMORY_BARS[case] / 1e9:.0f} GB")
    return ", ".join(words)


def prefill_words(row: Row, shape: str) -> str:
    if "error" in row:
        return str(row["error"])
    words = f"{row['prompts']} x {row['tokens']} tokens at {row['tokens_per_s']:,.0f} tokens/s"
    if shape != "gpt-oss-20b":
        return words
    share = row["tokens_per_s"] / PREFILL_FLOOR
    return f"{words}, {share:.0%} of {PREFILL_FLOOR:,} ({'must' if share >= PREFILL_SHARE else 'missed'})"


def replay_words(row: Row, shape: str) -> str:
    if "error" in row:
        return str(row["error"])
    held = f" ({verdict(row['tokens_per_s'], REPLAY, lora=bool(row['lora']))})" if shape == "gpt-oss-20b" else ""
    rollout = row["rollout"]
    completions = f"{rollout['prompts']} x {rollout['group_size']} completions"
    return (
        f"{completions} of {row['lengths']['mean']:.0f} tokens on average, "
        f"{rollout['max_slots']} slots: {row['tokens_per_s']:,.0f} tokens/s end to end{held}, "
        f"{row['tokens_per_s_without_capture']:,.0f} without {row['capture_s']:.1f} s of graph capture, "
        f"{gigabytes(row['peak_bytes'])} GB"
    )


def case_of(row: Row) -> str:
    return f"{row['batch']} x {row['context']}" if "batch" in row else ""


def rank_of(row: Row) -> str:
    return f"r={row['lora']}" if row.get("lora") else "none"
