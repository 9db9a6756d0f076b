"""Sweeps the tiles of the trainer's attention on a card, flex_attention beside it on the same tokens:

    python tests/bench/tune_packed_attention.py --out FILE

gpt-oss's heads (64 of queries, 8 of keys, 64 channels) in bf16, medians in milliseconds of forward and of backward.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stages.kernels import packed_attention as own
from stages.kernels.packed_attention import Blocks, Group, Groups, packed_attention, segments
from tests.bench.tuning import write_figures

HEADS, KEY_HEADS, CHANNELS = 64, 8, 64
PACKS: dict[str, Groups] = {"4096 tokens": (Group(4096),), "2 groups of 8": (Group(128, (512,) * 8),) * 2}
WINDOWS = (None, 128)
VARIANTS = {
    "FORWARD": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    "QUERY_GRADIENT": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
    "KEY_GRADIENT": [(32, 64, 4, 3), (32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)],
}


def milliseconds(function: Callable[[], object], repeats: int = 15) -> float:
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def flex(groups: Groups, window: int | None) -> Callable[..., torch.Tensor]:
    """The same attention by compiled flex_attention: sinks from its log-sum-exp."""
    total = sum(group.num_tokens for group in groups)
    segment, position, prompt, before = (torch.empty(total, dtype=torch.int32, device="cuda") for _ in range(4))
    for number, each in enumerate(segments(groups)):
        where = slice(each.start, each.start + each.length)
        segment[where], prompt[where], before[where] = number, each.prompt_start, each.prompt_length
        position[where] = torch.arange(each.length, dtype=torch.int32, device="cuda")

    def visible(_batch, _head, query, key):
        same = (segment[query] == segment[key]) & (position[key] <= position[query])
        of_prompt = (key >= prompt[query]) & (key < prompt[query] + before[query])
        distance = torch.where(same, position[query] - position[key], position[query] + before[query] - position[key])
        return (same | of_prompt) & (distance < (window or total))

    mask = create_block_mask(visible, None, None, total, total, device="cuda")

    @torch.compile
    def compute(query, key, value, sinks):
        rows = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out, aux = flex_attention(*rows, block_mask=mask, scale=0.125, enable_gqa=True, return_aux=AuxRequest(lse=True))
        share = torch.sigmoid(aux.lse.float() - sinks.float()[:, None])
        return (out.float() * share.unsqueeze(-1)).to(out.dtype)[0].transpose(0, 1)

    return compute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    chosen = {kind: getattr(own, kind) for kind in VARIANTS}
    rows = []
    for (name, groups), window in ((pack, window) for pack in PACKS.items() for window in WINDOWS):
        total = sum(group.num_tokens for group in groups)
        sizes = ((total, HEADS, CHANNELS), (total, KEY_HEADS, CHANNELS), (total, KEY_HEADS, CHANNELS))
        leaves = [torch.randn(*size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for size in sizes]
        sinks, grad = torch.randn(HEADS, device="cuda"), torch.randn_like(leaves[0])

        def ours(query, key, value, sinks, window=window, groups=groups):
            return packed_attention(query, key, value, sinks=sinks, scale=0.125, window=window, groups=groups)

        def timed(compute, leaves=leaves, sinks=sinks, grad=grad):
            forward = milliseconds(lambda: compute(*leaves, sinks))
            both = milliseconds(lambda: torch.autograd.grad(compute(*leaves, sinks), leaves, grad))
            return {"forward_ms": forward, "backward_ms": round(both - forward, 4)}

        theirs = flex(groups, window)
        difference = float((ours(*leaves, sinks) - theirs(*leaves, sinks)).detach().abs().max())
        assert difference < 0.05, difference  # both round to bfloat16
        about = {"pack": name, "window": window}
        rows.append(about | {"system": "flex_attention"} | timed(theirs))
        rows.append(about | {"system": "flexsink"} | timed(ours))
        for kind, variants in VARIANTS.items():
            for variant in variants:
                setattr(own, kind, Blocks(*variant))
                own.tables_of.cache_clear()
                rows.append(about | {"system": "flexsink", kind: variant} | timed(ours))
            setattr(own, kind, chosen[kind])
            own.tables_of.cache_clear()
        print(*rows[-14:], sep="\n", flush=True)
    write_figures(out, "tune_packed_attention", {"rows": rows})


if __name__ == "__main__":
    main()
