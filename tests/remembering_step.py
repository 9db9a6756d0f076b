"""A stand-in for the model that remembers: its next token depends on every token the cache holds for a sequence.

And on where it holds them. So one page given to two, or one ring overwritten, and the completion is another than
`expected` works out without an engine. Its experts tell a token and its place. It runs on the CPU, and on a card within
a CUDA graph.
"""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from stages.engine import Completion, Request, SamplingParams
from stages.engine.cache import LayerCache
from stages.engine.device_memory import CacheMemory
from stages.engine.paged_cache import Sizes
from stages.engine.paged_engine import PagedEngine
from stages.engine.pages import PAGE
from stages.engine.sampler import uniforms

VOCABULARY, WINDOW = 50, 24
TABLE = torch.randn(997, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
CONFIG = SimpleNamespace(
    layer_types=["sliding_attention", "full_attention"],
    num_key_value_heads=1,
    head_dim=1,
    sliding_window=WINDOW,
    max_position_embeddings=131_072,
    num_experts_per_tok=3,
    num_local_experts=256,
)


def remembered(everything: Sequence[int], recent: Sequence[int]) -> Tensor:
    """Logits [V] that depend on each token and its place: of the whole sequence, and of its last WINDOW tokens."""
    digest = sum((place + 1) * (token + 3) for place, token in enumerate(everything))
    digest += sum((place + 7) * (token + 5) for place, token in enumerate(recent))
    return TABLE[digest % len(TABLE)]


def routes_of(tokens: Tensor, positions: Tensor, layer: int) -> Tensor:
    """The experts int64 [N, 3] that a layer chooses for tokens [N] at their positions [N]."""
    return torch.stack((tokens + 100 * layer, positions % 256, positions // 256), dim=-1)


class RememberingStep:
    """One sliding and one full layer, which keep the tokens themselves as keys and their negatives as values."""

    def __init__(self, policy: PagedEngine, max_rows: int, max_context: int) -> None:
        self.max_rows = max_rows
        self.table = TABLE.to(policy.device)
        self.batches: list[int] = []
        self.prefills: list[tuple[int, int, int]] = []  # tokens, documents, past
        self.num_attached = 0
        self.routes: list[Tensor] | None = None

    def attach(self, _memory: object) -> None:
        self.num_attached += 1

    def detach(self) -> None:
        pass

    def embed_and_decode(
        self, rows: Tensor, tokens: Tensor, positions: Tensor, page_table: Tensor, layers: Sequence[LayerCache]
    ) -> Tensor:
        self.batches.append(len(rows))
        slots = rows.long()
        at, fed = positions[slots].long(), tokens[slots].float()
        if self.routes is not None:
            self.routes += [routes_of(tokens[slots], at, layer) for layer in (0, 1)]
        page = page_table[slots, at // PAGE].long()
        ring, full = layers
        for cached, sign in zip(full, (1, -1), strict=True):
            cached[page, 0, at % PAGE, 0] = sign * fed
        for cached, sign in zip(ring, (1, -1), strict=True):
            cached[slots, 0, at % WINDOW, 0] = sign * fed
        place = torch.arange(page_table.shape[1] * PAGE, device=rows.device)
        whole = [sign * x[page_table[slots].long()].flatten(1) for x, sign in zip(full, (1, -1), strict=True)]
        seen = place <= at[:, None]
        digest = ((place + 1) * (whole[0].long() + 3) * seen).sum(-1)
        first = (at - WINDOW + 1).clamp(min=0)[:, None]
        place = torch.arange(WINDOW, device=rows.device)
        recent = [
            sign * x[slots].flatten(1).gather(1, (first + place) % WINDOW)
            for x, sign in zip(ring, (1, -1), strict=True)
        ]
        held = first + place <= at[:, None]
        digest += ((place + 7) * (recent[0].long() + 5) * held).sum(-1)
        torn = ((whole[0] != whole[1]) & seen).any(-1) | ((recent[0] != recent[1]) & held).any(-1)
        return self.table[digest % len(TABLE)].masked_fill(torn[:, None], torch.nan)  # which the engine reports

    def prefill(
        self,
        ids: Tensor,
        starts: Sequence[int],
        past: int,
        past_kv: Callable[[int], tuple[Tensor, Tensor]] | None,
        write_kv: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        self.prefills.append((len(ids), len(starts), past))
        if self.routes is not None:
            lengths = [stop - start for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
            at = torch.cat([torch.arange(length) for length in lengths]).to(ids.device) + past
            self.routes += [routes_of(ids, at, layer) for layer in (0, 1)]
        before: list[list[int]] = [[], []]
        for layer in (0, 1):
            if past_kv is not None:
                keys, values = past_kv(layer)
                assert torch.equal(keys, -values)
                assert keys.shape == ((past, min(past, WINDOW))[1 - layer], 1, 1)
                before[layer] = keys.flatten().int().tolist()
            stored = ids.float().view(-1, 1, 1)
            write_kv(layer, stored, -stored)
        logits = []
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            own = ids[start:stop].tolist()
            logits.append(remembered([*before[1], *own], [*before[0], *own][-WINDOW:]))
        return torch.stack(logits).to(ids.device)


def remembering_engine(
    *, device: str = "cpu", memory: CacheMemory | None = None, record_routes: bool = False, **sizes: int
) -> PagedEngine:
    policy = SimpleNamespace(device=torch.device(device), dtype=torch.float32, model=SimpleNamespace(config=CONFIG))
    sizes = {"max_slots": 6, "max_new_tokens": 300} | sizes
    return PagedEngine(policy, **sizes, step=RememberingStep, memory=memory, record_routes=record_routes)


def budget(pages: int, *, max_slots: int = 6) -> int:
    """Bytes of a cache with that many pages beside the scratch page."""
    sizes = Sizes.of(CONFIG, max_slots=max_slots, dtype=torch.float32)
    assert sizes.page == 2 * PAGE * 4
    return sizes.rings + (1 + pages) * sizes.page


def expected(request: Request) -> Completion:
    """The request's completion, worked out without an engine."""
    history, ids, logprobs = list(request.prompt_ids), [], []
    sampling = request.sampling
    for uniform in uniforms(sampling.seed, sampling.max_new_tokens):
        logits = remembered(history, history[-WINDOW:]).double().numpy()
        shares = np.exp(logits / (sampling.temperature or 1.0))
        shares /= shares.sum()
        likeliest, drawn = int(logits.argmax()), int((np.cumsum(shares) <= uniform).sum())
        token = drawn if sampling.temperature else likeliest
        ids.append(token)
        logprobs.append(float(np.log(shares[token])))
        history.append(token)
        if token in sampling.stop_token_ids:
            break
    return Completion(
        completion_id=request.completion_id,
        prompt_ids=request.prompt_ids,
        completion_ids=tuple(ids),
        engine_logprobs=tuple(logprobs),
        finish_reason="stop" if ids[-1] in sampling.stop_token_ids else "length",
        seed=sampling.seed,
    )


def assert_as_expected(completions: Sequence[Completion], requests: Sequence[Request]) -> None:
    assert [c.completion_id for c in completions] == [r.completion_id for r in requests]
    for completion, want in zip(completions, map(expected, requests), strict=True):
        assert completion.completion_ids == want.completion_ids
        assert completion.finish_reason == want.finish_reason
        np.testing.assert_allclose(completion.engine_logprobs, want.engine_logprobs, atol=1e-5)


def assert_routes_as_expected(completions: Sequence[Completion]) -> None:
    """Every computed token of prompt and completion has the experts of its own token and place, in both layers."""
    for completion in completions:
        ids = torch.tensor((completion.prompt_ids + completion.completion_ids)[:-1])
        want = torch.stack([routes_of(ids, torch.arange(len(ids)), layer) for layer in (0, 1)], dim=1)
        assert completion.routes is not None
        assert completion.routes.dtype == torch.uint8
        assert completion.routes.device.type == "cpu"
        assert torch.equal(completion.routes.long(), want), completion.completion_id


def requests_of(count: int, *, seed: int = 0, longest: int = 400, new: int = 150, group: int = 4) -> list[Request]:
    """Groups of `group` requests a prompt with random lengths; some stop early, some are greedy."""
    draw = random.Random(seed)
    requests = []
    for index in range(count):
        if index % group == 0:
            length = draw.choice((1, 127, 128, 129, 256, draw.randint(1, longest)))
            prompt = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        sampling = SamplingParams(
            max_new_tokens=draw.choice((1, 2, draw.randint(1, new))),
            temperature=draw.choice((0.0, 0.7, 1.0)),
            stop_token_ids=tuple(draw.sample(range(VOCABULARY), draw.choice((0, 1, 2, 12)))),
            seed=index,
        )
        requests.append(Request(completion_id=f"{index:03d}", prompt_ids=prompt, sampling=sampling))
    return requests


def run(engine: PagedEngine, requests: Sequence[Request]) -> list[Completion]:
    return engine.run(requests, lambda _: None, lambda _: None)
