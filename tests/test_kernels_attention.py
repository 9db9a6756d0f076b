"""Decode attention against its oracle in float64: the Triton kernel, in Triton's interpreter where there is no GPU."""

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stages.kernels import reference
from stages.kernels.decode_attention import (
    LoraB,
    Workspace,
    decode_attention,
    interpreted,
    make_workspace,
    max_chunks,
    max_split_rows,
    splits_for,
)

if TYPE_CHECKING:
    from stages.kernels.decode_attention_triton import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOUBLE = torch.float64

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="needs Triton: its interpreter, or a CUDA card"
)


class Shape(NamedTuple):
    heads: int = 8
    kv_heads: int = 2
    channels: int = 32
    page: int = 128
    rank: int = 0


TINY = Shape()
SMALL_PAGES = Shape(heads=4, kv_heads=1, page=16)  # many page edges at short lengths


class Case(NamedTuple):
    """One decode step's inputs; the last slot is the dummy, page 0 its scratch page."""

    qkv: Tensor
    arguments: dict[str, Any]


def make_case(
    positions: list[int], *, shape: Shape, ring: bool, dtype: torch.dtype, spare_rows: int = 0, device: str = DEVICE
) -> Case:
    """Random caches and projections for slots with that many cached tokens, and `spare_rows` rows of the dummy slot."""
    generator = torch.Generator().manual_seed(sum(positions) + 7 * shape.rank)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float32).to(dtype).to(device)

    heads, kv_heads, channels, page, rank = shape
    slots = len(positions)
    width = (heads + 2 * kv_heads) * channels
    per_slot = max(positions) // page + 1
    shuffled = torch.randperm(slots * per_slot, generator=generator).to(torch.int32) + 1
    table = torch.zeros(slots + 1, per_slot, dtype=torch.int32)
    table[:slots] = shuffled.view(slots, per_slot)
    num_places = slots + 1 if ring else slots * per_slot + 1
    angles = torch.rand(max(positions) + 1, channels // 2, generator=generator) * 6
    lora = None
    if rank:
        lora = LoraB(*(draw(n * channels, rank) for n in (heads, kv_heads, kv_heads)), 0.5)
    order = [slots - 1 - i for i in range(slots)] + [slots] * spare_rows
    return Case(
        draw(len(order), width + 3 * rank),
        {
            "sinks": draw(heads),
            "cos": (angles.cos() * 1.3).to(device),
            "sin": (angles.sin() * 1.3).to(device),
            "keys": draw(num_places, kv_heads, page, channels),
            "values": draw(num_places, kv_heads, page, channels),
            "rows": torch.tensor(order, dtype=torch.int32, device=device),
            "positions": torch.tensor([*positions, 0], dtype=torch.int32, device=device),
            "page_table": None if ring else table.to(device),
            "scale": channels**-0.5,
            "bias": draw(width),
            "lora": lora,
        },
    )


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """A copy of the case, its floating-point tensors in `dtype`."""

    def convert(value: Any) -> Any:
        if isinstance(value, LoraB):
            return LoraB(*(convert(x) for x in value[:3]), value.scale)
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

    return Case(convert(case.qkv), {name: convert(value) for name, value in case.arguments.items()})


def workspace_of(case: Case) -> Workspace:
    """Room for all rows of the case in splits."""
    pages, (_, _, page, channels) = case.arguments["page_table"], case.arguments["keys"].shape
    heads, context = case.arguments["sinks"].shape[0], page if pages is None else pages.shape[1] * page
    return make_workspace(len(case.arguments["rows"]), heads, channels, context, case.qkv.device)


def errors(case: Case, splits: int = 1, plan: "Plan | None" = None) -> tuple[float, float, float]:
    """The kernel's largest error against float64, the plain path's in the same dtype, and the cache's; checks that
    nothing in the cache but the new tokens' places changed.
    """
    truth, plain, mine = in_dtype(case, DOUBLE), in_dtype(case, case.qkv.dtype), in_dtype(case, case.qkv.dtype)
    mine.arguments["cos"], mine.arguments["sin"] = case.arguments["cos"], case.arguments["sin"]  # float32 in any dtype
    real = case.arguments["rows"] != len(case.arguments["positions"]) - 1
    expected = reference.decode_attention(truth.qkv, **truth.arguments)[real]
    low = reference.decode_attention(plain.qkv, **plain.arguments)[real]
    workspace = workspace_of(case)
    if plan is None:
        out = decode_attention(mine.qkv, **mine.arguments, splits=splits, workspace=workspace)[real]
    else:
        from stages.kernels.decode_attention_triton import launch

        out = torch.full_like(low.new_empty(len(real), low.shape[1]), torch.nan)
        launch(out, mine.qkv, **mine.arguments, splits=splits, workspace=workspace, plan=plan)
        out = out[real]
    assert torch.isfinite(out).all()
    assert workspace.tickets.abs().sum() == 0, "the tickets are not as the next launch needs them"
    cache_error = 0.0
    for name in ("keys", "values"):
        before, after, right = (x.arguments[name] for x in (case, mine, truth))
        kept = right == before.to(DOUBLE)
        if case.arguments["page_table"] is not None:
            kept[0] = False  # the scratch page holds whatever row came last
        else:
            kept[-1] = False
        assert torch.equal(after[kept], before[kept])
        written = ~kept
        written[0 if case.arguments["page_table"] is not None else -1] = False
        cache_error = max(cache_error, float((after.to(DOUBLE) - right)[written].abs().max()))
    return float((out.to(DOUBLE) - expected).abs().max()), float((low.to(DOUBLE) - expected).abs().max()), cache_error


@pytest.mark.parametrize("rank", [0, 3])
def test_the_ring_sees_the_last_128_tokens_wherever_it_wraps(rank: int) -> None:
    positions = [0, 1, 126, 127, 128, 129, 130, 300]
    case = make_case(positions, shape=TINY._replace(rank=rank), ring=True, dtype=torch.float32)
    error, _, cache_error = errors(case)
    assert error < 5e-6
    assert cache_error < 5e-6


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_any_split_of_the_pages_gives_the_whole(splits: int) -> None:
    positions = [0, 15, 16, 17, 32, 33, 140]  # around the page edges; most have fewer pages than splits
    case = make_case(positions, shape=SMALL_PAGES._replace(rank=2), ring=False, dtype=torch.float32, spare_rows=2)
    error, _, cache_error = errors(case, splits)
    assert error < 5e-6
    assert cache_error < 5e-6


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(("block", "flight"), [(16, 2), (32, 3), (64, 1)])
def test_no_cut_of_the_work_changes_the_result(ring: bool, block: int, flight: int) -> None:
    from stages.kernels.decode_attention_triton import Plan

    shape = Shape(heads=4, kv_heads=1, page=64, rank=2)
    case = make_case([0, 63, 64, 65, 150], shape=shape, ring=ring, dtype=torch.float32)
    assert errors(case, 1 if ring else 3, Plan(block=block, flight=flight))[0] < 5e-6


def rows_alone(case: Case, rows: list[int], splits: int) -> Tensor:
    """The outputs of these rows of the case, decoded as a batch of their own."""
    own = in_dtype(case, case.qkv.dtype)
    for name in ("cos", "sin"):
        own.arguments[name] = case.arguments[name]
    own.arguments["rows"] = own.arguments["rows"][rows].contiguous()
    company = Case(own.qkv[rows].contiguous(), own.arguments)
    return decode_attention(
        company.qkv, **company.arguments, splits=splits, workspace=workspace_of(company) if splits > 1 else None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company_and_any_splits(dtype: torch.dtype) -> None:
    positions = [400, 0, 128, 129, 256, 257]  # around the edges of chunks
    case = make_case(positions, shape=TINY._replace(heads=4, kv_heads=1, rank=2), ring=False, dtype=dtype)
    together = rows_alone(case, list(range(6)), 1)
    for rows, splits in ((range(6), 2), ([5], 3), ([5, 0], 8), ([1, 3], 1)):
        assert torch.equal(rows_alone(case, list(rows), splits), together[list(rows)])


def test_the_bits_are_the_same_where_chunks_begin_to_grow() -> None:
    shape = Shape(heads=2, kv_heads=1, channels=16, page=128)
    case = make_case([8193], shape=shape, ring=False, dtype=torch.float32)
    truth = in_dtype(case, DOUBLE)
    expected = reference.decode_attention(truth.qkv, **truth.arguments)
    whole = rows_alone(case, [0], 1)
    torch.testing.assert_close(whole.to(DOUBLE), expected, atol=5e-6, rtol=0)
    assert torch.equal(rows_alone(case, [0], 7), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ring_s_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    case = make_case([0, 1, 127, 128, 129, 300], shape=TINY._replace(rank=2), ring=True, dtype=dtype)
    together = rows_alone(case, list(range(6)), 1)
    for rows in ([0], [3, 2]):
        assert torch.equal(rows_alone(case, rows, 1), together[rows])


def test_pages_of_128_around_their_edges() -> None:
    case = make_case([127, 128, 129, 520], shape=TINY._replace(kv_heads=1), ring=False, dtype=torch.float32)
    assert errors(case, 5)[0] < 5e-6


@pytest.mark.parametrize(
    "shape", [Shape(6, 2, 16, 16, 4), Shape(5, 5, 64, 32, 0), Shape(16, 1, 32, 32, 16), Shape(16, 2, 64, 64, 16)]
)
def test_groups_of_any_size(shape: Shape) -> None:
    case = make_case([5, 70], shape=shape, ring=False, dtype=torch.float32, spare_rows=1)
    assert errors(case, 2)[0] < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ring", [False, True])
def test_16_bit_errors_are_at_most_twice_the_plain_path_s(dtype: torch.dtype, ring: bool) -> None:
    case = make_case([3, 127, 300], shape=TINY._replace(rank=4), ring=ring, dtype=dtype)
    error, plain, cache_error = errors(case, 1 if ring else 3)
    assert error <= 2 * plain
    assert cache_error <= 16 * torch.finfo(dtype).eps  # of keys up to 16, twice rounded


def test_a_group_reads_one_copy_of_its_prompt_s_pages() -> None:
    case = make_case([40, 41, 35], shape=SMALL_PAGES, ring=False, dtype=torch.float32)
    table = case.arguments["page_table"]
    table[1, :2], table[2, :2] = table[0, :2], table[0, :2]  # 32 tokens of prompt; the third page is each one's own
    assert errors(case, 2)[0] < 5e-6


def test_nothing_past_a_row_s_position_is_read() -> None:
    case = make_case([20, 33], shape=SMALL_PAGES, ring=False, dtype=torch.float32)
    clean, poisoned = in_dtype(case, torch.float32), in_dtype(case, torch.float32)
    table = poisoned.arguments["page_table"]
    for slot, position in enumerate((20, 33)):
        at = torch.arange(position, table.shape[1] * 16, device=DEVICE)
        for cache in ("keys", "values"):
            poisoned.arguments[cache][table[slot, at // 16].long(), :, at % 16] = torch.nan
    expected = decode_attention(clean.qkv, **clean.arguments)
    assert torch.equal(decode_attention(poisoned.qkv, **poisoned.arguments), expected)


def test_steps_in_a_row_are_one_causal_attention() -> None:
    shape, steps = Shape(4, 1, 16, 16), 24
    case = make_case([0], shape=shape, ring=False, dtype=torch.float32)
    case.arguments.update(cos=torch.ones(steps, 8, device=DEVICE), sin=torch.zeros(steps, 8, device=DEVICE), bias=None)
    for ring in (True, False):
        if not ring:
            case.arguments["page_table"] = torch.tensor([[2, 1], [0, 0]], dtype=torch.int32, device=DEVICE)
        else:
            case.arguments["page_table"] = None
        for name in ("keys", "values"):
            case.arguments[name] = torch.full((4, 1, 16, 16), torch.nan, device=DEVICE)  # nothing is there to be read
        qkv = torch.randn(steps, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        outs = []
        for step in range(steps):
            case.arguments["positions"][0] = step
            outs.append(decode_attention(qkv[step : step + 1], **case.arguments))
        query, key, value = (x.unflatten(1, (-1, 16)).transpose(0, 1)[None] for x in qkv.split((64, 16, 16), dim=1))
        visible = reference.causal_window(steps, steps, 16 if ring else None, DEVICE)
        expected = reference.sink_attention(query, key, value, case.arguments["sinks"], scale=0.25, visible=visible)
        out = torch.cat(outs).view(steps, 4, 16).transpose(0, 1)[None]
        torch.testing.assert_close(out, expected, atol=5e-6, rtol=0)


def test_the_plain_path_writes_into_out_and_equals_the_kernel() -> None:
    case = make_case([17, 3], shape=SMALL_PAGES._replace(rank=2), ring=False, dtype=torch.float32)
    one, two = in_dtype(case, torch.float32), in_dtype(case, torch.float32)
    out = torch.empty(2, 4 * 32, device=DEVICE)
    assert decode_attention(one.qkv, **one.arguments, out=out, path="plain") is out
    torch.testing.assert_close(decode_attention(two.qkv, **two.arguments), out, atol=5e-6, rtol=0)


def test_small_batches_are_split_and_large_ones_are_not() -> None:
    assert splits_for(1, 131072) == 16
    assert splits_for(1, 1024) == 8  # a program for each chunk of 128
    assert splits_for(1, 128) == splits_for(1, 1) == 1
    assert splits_for(16, 8192) == splits_for(64, 4096) == splits_for(256, 1024) == 1
    for kv_heads in (1, 2, 8):
        most = max_split_rows(kv_heads=kv_heads)
        assert splits_for(most, 8192, kv_heads=kv_heads) > 1
        assert splits_for(most + 1, 8192, kv_heads=kv_heads) == 1
    assert [max_chunks(n) for n in (1, 128, 129, 8192, 8193, 131072)] == [1, 1, 2, 64, 64, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(1, 1, 16, 32)}, "values is"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"splits": 2}, "needs a workspace"),
        ({"splits": 2, "page_table": None}, "never split"),
        ({"splits": 2, "workspace": make_workspace(1, 4, 32, 80, "cpu")}, "the workspace holds 1:"),
        ({"sinks": torch.zeros(3)}, "qkv is"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    case = make_case([70, 3], shape=SMALL_PAGES, ring=False, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=message):
        decode_attention(case.qkv, **(case.arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("positions", "ring", "splits"),
    [
        ([1023], False, 16),
        ([4095, 4096, 4097, 5000, 0, 127, 128, 129], False, 4),
        ([600 + 37 * i for i in range(64)], False, 1),
        ([126, 127, 128, 129, 130, 4100, 0, 1], True, 1),
    ],
)
def test_true_shapes_on_the_card(positions: list[int], ring: bool, splits: int, dtype: torch.dtype) -> None:
    shape = Shape(64, 8, 64, 128, 16)
    case = make_case(positions, shape=shape, ring=ring, dtype=dtype, spare_rows=3, device="cuda")
    error, plain, _ = errors(case, splits)
    # In float32 the card's exp2, 2 units in the last place, is more than the sums' own rounding.
    assert error <= (4 if dtype == torch.float32 else 2) * plain + 1e-6


@pytest.mark.gpu
def test_a_captured_step_follows_the_positions() -> None:
    case = make_case([300, 40, 2000], shape=Shape(64, 8, 64, 128, 16), ring=False, dtype=torch.bfloat16, device="cuda")
    workspace = workspace_of(case)
    step, eager = in_dtype(case, torch.bfloat16), in_dtype(case, torch.bfloat16)
    for copy in (step, eager):
        copy.arguments["cos"], copy.arguments["sin"] = case.arguments["cos"], case.arguments["sin"]
    out = decode_attention(step.qkv, **step.arguments, splits=8, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(step.qkv, **step.arguments, splits=8, workspace=workspace, out=out)
    for positions in ([300, 40, 2000], [5, 1999, 7], [128, 0, 1024]):
        for copy in (step, eager):
            copy.arguments["positions"][:3] = torch.tensor(positions, dtype=torch.int32, device="cuda")
        graph.replay()
        expected = decode_attention(eager.qkv, **eager.arguments, splits=8, workspace=workspace)
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_card_a_row_has_the_same_bits_in_any_company(ring: bool, dtype: torch.dtype) -> None:
    positions = [(1 + 131 * i) % 1500 for i in range(256)]
    positions[-2:] = [8700, 1023]  # rows come in the opposite order of slots
    case = make_case(positions, shape=Shape(64, 8, 64, 128, 16), ring=ring, dtype=dtype, device="cuda")
    together = rows_alone(case, list(range(256)), 1)
    for num_rows in (1, 7, 16, 64, 256):
        for splits in (1,) if ring else (1, 2, 3, 8, 16):
            rows = list(range(num_rows))
            assert torch.equal(rows_alone(case, rows, splits), together[rows]), (num_rows, splits)
