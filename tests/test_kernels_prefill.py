"""Prefill attention of packed prompts and of chunks against the oracle; its block masks against trying every pair."""

import pytest
import torch
from torch import Tensor

from stages.kernels import prefill_attention as prefill
from stages.kernels import reference
from stages.kernels.prefill_attention import BLOCK, PackedDocs, layout_of, mask_of, prefill_attention

DOCS = (
    PackedDocs((1,)),
    PackedDocs((127, 1, 128, 129, 3)),
    PackedDocs((40,) * 9),
    PackedDocs((300,)),
    PackedDocs((200,), past=131),
    PackedDocs((1,), past=600),
    PackedDocs((256,), past=512),
)


def visible(docs: PackedDocs, window: int | None) -> Tensor:
    """Every pair of query and key, bool [T, L]."""
    owner = torch.repeat_interleave(torch.arange(len(docs.lengths)), torch.tensor(docs.lengths))
    query_at = torch.arange(docs.past, docs.num_keys)[:, None]
    key_at = torch.arange(docs.num_keys)[None, :]
    pairs = (key_at <= query_at) & ((owner[:, None] == owner[None, :]) if not docs.past else True)
    return pairs if window is None else pairs & (key_at > query_at - window)


def draw(
    docs: PackedDocs, heads: int, kv_heads: int, channels: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(docs.num_keys)
    sizes = [(docs.num_queries, heads, channels), *[(docs.num_keys, kv_heads, channels)] * 2, (heads,)]
    return tuple(torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes)


def oracle(inputs: tuple[Tensor, ...], docs: PackedDocs, window: int | None, scale: float) -> Tensor:
    query, key, value, sinks = inputs
    batched = (x.transpose(0, 1)[None] for x in (query, key, value))
    seen = visible(docs, window).to(query.device)
    return reference.sink_attention(*batched, sinks, scale=scale, visible=seen)[0].transpose(0, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 128, 5])
@pytest.mark.parametrize("docs", DOCS, ids=str)
def test_flex_and_plain_equal_one_masked_softmax(docs: PackedDocs, window: int | None) -> None:
    inputs = draw(docs, 4, 2, 16, torch.float32)
    expected = oracle(tuple(x.double() for x in inputs), docs, window, 0.25)
    for path in ("plain", "flex"):
        out = prefill_attention(*inputs[:3], sinks=inputs[3], scale=0.25, window=window, docs=docs, path=path)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 128, 200])
@pytest.mark.parametrize(
    "docs", [*DOCS, PackedDocs((4096,), past=8192 + 64), PackedDocs((500, 700, 30, 2000))], ids=str
)
def test_the_blocks_are_those_that_trying_every_pair_finds(docs: PackedDocs, window: int | None) -> None:
    mask, layout = mask_of(docs, window, torch.device("cpu")), layout_of(docs, torch.device("cpu"))
    num_queries, num_keys = len(mask.first), mask.partial.shape[3] * BLOCK
    pairs = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    real = visible(docs, window)
    begins = [sum(-(-n // BLOCK) * BLOCK for n in docs.lengths[:i]) for i in range(len(docs.lengths))]
    places = torch.cat([begin + torch.arange(n) for begin, n in zip(begins, docs.lengths, strict=True)])
    key_places = torch.arange(docs.num_keys) if docs.past else places
    for query, place in enumerate(places.tolist()):
        pairs[place, key_places] = real[query]
        if query + 1 == docs.num_queries or places[query + 1] != place + 1:
            until = num_queries if query + 1 == docs.num_queries else int(places[query + 1])
            pairs[place + 1 : until, key_places] = real[query]  # padding sees what its prompt's last query sees
    if layout is None:
        assert torch.equal(places, torch.arange(docs.num_queries))
    else:
        assert torch.equal(layout.places, places)
        assert torch.equal(layout.sources[places], torch.arange(docs.num_queries))
        assert len(layout.sources) == num_queries == num_keys
    tiles = pairs.view(num_queries // BLOCK, BLOCK, num_keys // BLOCK, BLOCK)
    every, some = tiles.all(3).all(1), tiles.any(3).any(1)
    for row in range(num_queries // BLOCK):
        full = mask.full[0, 0, row, : mask.num_full[0, 0, row]].tolist()
        partial = mask.partial[0, 0, row, : mask.num_partial[0, 0, row]].tolist()
        assert full == torch.where(every[row])[0].tolist()
        assert partial == torch.where(some[row] & ~every[row])[0].tolist()
    at = torch.arange(num_keys)
    assert torch.equal((at >= mask.first[:, None]) & (at <= mask.last[:, None]), pairs)
    for number in ("partial", "full"):  # torch 2.11 takes nothing else
        assert getattr(mask, number).stride() == mask.full.stride()
        assert getattr(mask, number).shape == mask.full.shape


def test_a_mask_is_made_once_for_all_layers() -> None:
    docs = PackedDocs((77, 78))
    assert mask_of(docs, 128, torch.device("cpu")) is mask_of(PackedDocs((77, 78)), 128, torch.device("cpu"))


def test_no_length_compiles_the_front_end_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(prefill._flex, fullgraph=True, backend="eager")
    monkeypatch.setattr(prefill, "_compiled", lambda: compiled)
    torch._dynamo.reset()
    for count, docs in enumerate(DOCS):
        for window in (None, 128):
            inputs = draw(docs, 4, 2, 16, torch.float32)
            with torch._dynamo.config.patch(error_on_recompile=bool(count or window)):
                out = prefill._attend(*inputs, scale=0.25, window=window, docs=docs, compiled=True)
            expected = oracle(tuple(x.double() for x in inputs), docs, window, 0.25)
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 128])
def test_a_prompt_s_mask_is_the_same_alone_and_packed(window: int | None) -> None:
    lengths = (127, 1, 300, 256, 129)
    packed, begin = mask_of(PackedDocs(lengths), window, torch.device("cpu")), 0
    for length in lengths:
        alone = mask_of(PackedDocs((length,)), window, torch.device("cpu"))
        for block in range(-(-length // BLOCK)):
            row = begin // BLOCK + block
            queries = slice(block * BLOCK, (block + 1) * BLOCK)
            there = slice(begin + block * BLOCK, begin + (block + 1) * BLOCK)
            assert torch.equal(packed.first[there] - begin, alone.first[queries])
            assert torch.equal(packed.last[there] - begin, alone.last[queries])
            for count, blocks in (("num_partial", "partial"), ("num_full", "full")):
                number = int(getattr(alone, count)[0, 0, block])
                assert number == int(getattr(packed, count)[0, 0, row])
                mine = getattr(packed, blocks)[0, 0, row, :number] - begin // BLOCK
                assert torch.equal(mine, getattr(alone, blocks)[0, 0, block, :number])
        begin += -(-length // BLOCK) * BLOCK


@pytest.mark.parametrize(
    ("docs", "message"),
    [
        (PackedDocs((3, 0)), "at least 1 token"),
        (PackedDocs((2, 1), past=4), "one prompt only"),
        (PackedDocs((4,)), "3 queries and 3 keys given"),
    ],
)
def test_prompts_that_do_not_fit_are_named(docs: PackedDocs, message: str) -> None:
    query, key, value, sinks = draw(PackedDocs((3,)), 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        prefill_attention(query, key, value, sinks=sinks, scale=1.0, window=None, docs=docs)


@pytest.mark.gpu
def test_on_the_card_one_compilation_serves_every_length() -> None:
    torch._dynamo.reset()
    lengths = [(700,), (1,), (64, 64, 64), (127, 128, 129, 130), (512,) * 8, (3000, 1500), (5000,)]
    cases = [PackedDocs(x) for x in lengths] + [PackedDocs((256,), past=4096), PackedDocs((1000,), past=5001)]
    for count, docs in enumerate(cases):
        for window in (None, 128):
            inputs = draw(docs, 64, 8, 64, torch.bfloat16, "cuda")
            with torch._dynamo.config.patch(error_on_recompile=bool(count or window), fail_on_recompile_limit_hit=True):
                out = prefill_attention(*inputs[:3], sinks=inputs[3], scale=0.125, window=window, docs=docs)
            expected = oracle(tuple(x.double() for x in inputs), docs, window, 0.125)
            plain = oracle(inputs, docs, window, 0.125)
            bar = float((plain.double() - expected).abs().max())
            assert float((out.double() - expected).abs().max()) <= 2 * bar, (docs, window)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 128])
def test_on_the_card_a_prompt_has_the_same_bits_alone_and_packed(window: int | None) -> None:
    docs = PackedDocs((127, 1, 700, 512, 129, 64, 2000))
    query, key, value, sinks = draw(docs, 64, 8, 64, torch.bfloat16, "cuda")
    packed = prefill_attention(query, key, value, sinks=sinks, scale=0.125, window=window, docs=docs)
    begin = 0
    for length in docs.lengths:
        own = slice(begin, begin + length)
        alone = prefill_attention(
            query[own], key[own], value[own], sinks=sinks, scale=0.125, window=window, docs=PackedDocs((length,))
        )
        assert torch.equal(packed[own], alone), length
        begin += length


@pytest.mark.gpu
def test_on_the_card_chunks_of_whole_blocks_give_the_bits_of_the_whole() -> None:
    docs = PackedDocs((2000,))
    query, key, value, sinks = draw(docs, 64, 8, 64, torch.bfloat16, "cuda")
    whole = prefill_attention(query, key, value, sinks=sinks, scale=0.125, window=None, docs=docs)
    for past in (128, 1024):
        chunk = PackedDocs((2000 - past,), past=past)
        rest = prefill_attention(query[past:], key, value, sinks=sinks, scale=0.125, window=None, docs=chunk)
        assert torch.equal(rest, whole[past:]), past
