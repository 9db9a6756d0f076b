"""Rows that are ready to decode: the engine's own step, cache, sampling and graphs, with the scheduler left out.

For measurements their context is random keys and values, put in the cache without a prefill; for tests it is prompts,
and the tokens fed can be chosen. Nothing here is a second engine: every part is taken from stages/engine as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stages.engine.device_memory import cache_memory
from stages.engine.graphs import Graphs
from stages.engine.paged_cache import PagedCache, Span
from stages.engine.pages import PAGE
from stages.kernels.sampling import RUNNING, make_state, sample
from stages.model.policy import Policy

LEAST_CONTEXT = 4096  # as the engine rounds it


class DecodeCase(Protocol):
    """What a measurement asks of rows that are ready to decode."""

    @property
    def capture_s(self) -> float:
        """What graphs took to capture, the compilation of their kernels included."""

    @property
    def cache_bytes(self) -> int: ...

    def run(self, steps: int) -> None:
        """Asks the device for so many steps of all rows, sampling on; returns at once."""

    def rewind(self) -> None:
        """Back to the context that it was opened with."""

    def routes(self) -> Tensor:
        """The experts int [layers, rows, k] that one more step chose."""

    def close(self) -> None:
        """Gives the cache's memory back."""


class Rows:
    """`count` slots of the paged engine and their decode step as a CUDA graph; a `DecodeCase` once it has a context.

    Example:
        rows = Rows(policy, count=2, max_tokens=300, max_new_tokens=40)
        logits = rows.prefill([ids, other_ids])         # [2, V]
        logits = rows.feed(torch.tensor([5, 7]))        # [2, V], of what follows tokens 5 and 7
    """

    def __init__(
        self,
        policy: Policy,
        *,
        count: int,
        max_tokens: int,
        max_new_tokens: int,
        seed: int = 0,
        make_step: Callable[..., Any] | None = None,
        capture: bool | None = None,
        note_routes: bool = False,
    ) -> None:
        """max_tokens: that a row's cache can hold; max_new_tokens: steps before `rewind`. make_step and capture are as
        those of the engine: Step, and graphs on a card alone. note_routes: keep the experts of each step, for
        `last_routes`.
        """
        if make_step is None:
            from stages.engine.step import Step

            make_step = Step
        self.policy, self.count, self.capture_s = policy, count, 0.0
        self._device = device = policy.device
        config = policy.model.config
        self.state = make_state(max_slots=count, max_new_tokens=max_new_tokens + 1, device=device)
        self._generator = torch.Generator(device).manual_seed(seed)
        self.state.uniforms.uniform_(0, 1, generator=self._generator)
        self.state.limits.fill_(max_new_tokens + 1)
        pages = -(-max_tokens // PAGE)
        context = max(LEAST_CONTEXT, 1 << (pages * PAGE - 1).bit_length())
        self._page_table = torch.zeros(count + 1, context // PAGE, dtype=torch.int32, device=device)
        self._pages = 1 + torch.arange(count * pages, dtype=torch.int32).view(count, pages)
        self._page_table[:count, :pages] = self._pages.to(device)
        self._memory = cache_memory(device)
        sizes = {"max_slots": count, "num_pages": 1 + count * pages}
        try:
            self.cache = PagedCache(config, **sizes, dtype=policy.dtype, memory=self._memory)
            self.cache_bytes = self.cache.nbytes
            self.step = make_step(policy, count, context)
            self.step.attach(self._memory)
        except BaseException:
            self._memory.close()  # the next case is to have the card to itself
            raise
        self._logits: Tensor | None = None
        self._noted: list[Tensor] | None = [] if note_routes else None
        on_card = device.type == "cuda" if capture is None else capture
        self._graphs = Graphs(self._decode, max_rows=count, dummy=self.state.dummy, device=device, capture=on_card)
        self._begun = self._moving()

    def fill(self, context: int) -> None:
        """Random keys and values, standard normal, for `context` tokens of every row; the next token is random too."""
        with torch.no_grad():
            for layer in self.cache.layers:
                for cached in layer:
                    cached.normal_(0, 1, generator=self._generator)
        self.state.tokens.random_(0, self.policy.model.config.vocab_size, generator=self._generator)
        self._begin([context] * self.count)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, V] of what follows each row's prompt, all of them packed into one prefill."""
        assert len(prompts) == self.count
        lengths = [len(prompt) for prompt in prompts]
        spans = [Span(slot, self._pages[slot].tolist(), 0, length) for slot, length in enumerate(lengths)]
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self._device)
        starts = [sum(lengths[:slot]) for slot in range(self.count)]
        logits: Tensor = self.step.prefill(ids, starts, 0, None, self.cache.writer(spans))
        self._begin(lengths)
        return logits

    def feed(self, tokens: Tensor) -> Tensor:
        """Logits [rows, V] after one more token int64 [rows] each; valid until the next step."""
        self.state.tokens[: self.count] = tokens.to(self._device)
        self.run(1)
        assert self._logits is not None
        return self._logits

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._graphs.run(self.count, filtered=False)

    def rewind(self) -> None:
        for tensor, value in zip(self._moving(), self._begun, strict=True):
            tensor.copy_(value)

    def routes(self) -> Tensor:
        noted, self._noted = self._noted, []
        try:
            self._decode(torch.arange(self.count, dtype=torch.int32, device=self._device), False)
            return self.last_routes()
        finally:
            self._noted = noted

    def last_routes(self) -> Tensor:
        """The experts int [layers, rows, k] of the last step; only with note_routes."""
        assert self._noted is not None
        assert len(self._noted) == len(self.cache.layers), "the step did not note its routes"
        return torch.stack(self._noted)

    def close(self) -> None:
        self._graphs.clear()
        self._logits = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        del self.cache
        self._memory.close()

    def _begin(self, lengths: Sequence[int]) -> None:
        """Every row has so many tokens cached and begins to decode."""
        state = self.state
        state.positions[: self.count] = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        state.steps.zero_()
        state.finished[: self.count] = RUNNING
        self._begun = [tensor.clone() for tensor in self._moving()]
        with torch.no_grad():
            self._graphs.prepare(self.count, filtered=False)
        self._graphs.assign(torch.arange(self.count, dtype=torch.int32, device=self._device))
        self.capture_s = self._graphs.capture_s

    def _moving(self) -> list[Tensor]:
        """What a step changes of the slots."""
        return [self.state.tokens, self.state.positions, self.state.steps, self.state.finished]

    @torch.no_grad()
    def _decode(self, rows: Tensor, filtered: bool) -> None:
        state = self.state
        if self._noted is not None:
            self._noted.clear()
        self.step.routes = self._noted
        logits = self.step.embed_and_decode(rows, state.tokens, state.positions, self._page_table, self.cache.layers)
        self.step.routes = None
        sample(logits, rows=rows, state=state, filtered=filtered)
        self._logits = logits  # of a captured step: where every replay puts them, as with the routes


def open_case(policy: Policy, *, rows: int, context: int, room: int, seed: int = 0) -> DecodeCase:
    """`rows` rows of `context` random tokens each, ready for `room` steps.

    At the model's longest context the rows begin so much earlier that the steps still fit.
    """
    context = min(context, policy.model.config.max_position_embeddings - room)
    opened = Rows(policy, count=rows, max_tokens=context + room, max_new_tokens=room, seed=seed)
    opened.fill(context)
    return opened
