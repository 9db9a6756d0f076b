"""The engine on a GPU: what lives as long as the Engine, and what a run gets from it and gives back.

Lives on: the step (model mathematics over fused weights), the slots' state, the page tables, the captured graphs: small
things, at addresses that the graphs hold. Belongs to a run: the cache, sized from a budget, and the step's copy of the
adapter, given back when the run ends, however it ends, so that the update has the card to itself ("standby"). They lie
in virtual memory whose addresses are kept (device_memory.py); where there is none, the graphs go with the cache and are
captured again.

The same code runs on the CPU without graphs, its kernels in Triton's interpreter: for tests.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.config import UserError
from stages.engine.device_memory import CacheMemory, cache_memory
from stages.engine.graphs import Graphs
from stages.engine.paged_cache import PagedCache, Sizes
from stages.engine.paged_run import PagedRun, Stats, StepLike
from stages.engine.pages import KEPT_PROMPTS, PAGE, Pages, pages_needed
from stages.engine.routes import SlotRoutes, row_shape, taken
from stages.engine.sequence import Completion, Request
from stages.kernels.sampling import FULL, make_state, sample
from stages.model.policy import Policy

# Of the free memory, left alone when the cache's size is automatic: a prefill of 8192 tokens, the graphs' own pool, and
# what the allocator cannot use for fragmentation.
RESERVE_BYTES = 3 << 30


class PagedEngine:
    """Samples the completions of many requests with max_slots of them at a time."""

    def __init__(
        self,
        policy: Policy,
        *,
        max_slots: int,
        max_new_tokens: int,
        cache_bytes: int = 0,
        record_routes: bool = False,
        graphs: bool | None = None,
        step: Callable[[Policy, int, int], StepLike] | None = None,
        memory: CacheMemory | None = None,
    ) -> None:
        """cache_bytes: the cache's budget, 0 for what is free. record_routes: as Engine has it. graphs: None captures
        them on a card and nowhere else.

        step makes the model's mathematics for (policy, rows at most, context at most); None takes Step. memory: where
        the cache lies; None takes the best there is.
        """
        self.policy, self.max_slots, self.cache_bytes = policy, max_slots, cache_bytes
        self._make_step = step
        self._config = policy.model.config
        self._state = make_state(max_slots=max_slots, max_new_tokens=max_new_tokens, device=policy.device)
        self._max_new_tokens = max_new_tokens
        self._routes: Tensor | None = None  # uint8 [max_slots, layers, k], of the last step's rows
        if record_routes:
            shape = (max_slots, *row_shape(self._config))
            self._routes = torch.zeros(shape, dtype=torch.uint8, device=policy.device)
        self._memory = memory or cache_memory(policy.device)
        self._capture = policy.device.type == "cuda" if graphs is None else graphs
        self._max_context = 0
        self._step: StepLike | None = None
        self._page_table: Tensor | None = None
        self._graphs: Graphs | None = None
        self._cache: PagedCache | None = None
        self.stats = Stats()

    def run(
        self, requests: Sequence[Request], on_finished: Callable[[Completion], None], on_step: Callable[[int], None]
    ) -> list[Completion]:
        """One completion for each of the checked requests, in their order; see Engine.run."""
        self.stats = Stats()
        if not requests:
            return []
        started = time.perf_counter()
        try:
            with torch.no_grad():
                return self._begin(requests, on_finished, on_step).run()
        finally:
            self.release()
            self.stats.seconds = time.perf_counter() - started

    def release(self) -> None:
        """Gives the cache back. A run does it itself; what is left is the step, the slots' state and the graphs."""
        if self._step is not None:
            self._step.detach()
        if self._cache is None and not self._memory.held_bytes:
            return
        cuda = self.policy.device.type == "cuda"
        try:
            if cuda:
                torch.cuda.synchronize(self.policy.device)
                self.stats.peak_bytes = torch.cuda.max_memory_allocated() + self._memory.held_bytes
        finally:
            if self._graphs is not None:
                self.stats.graphs, self.stats.capture_s = len(self._graphs), self._graphs.capture_s
                if not self._memory.stable:
                    self._graphs.clear()
            if self._cache is not None:
                self._cache.layers.clear()  # an exception's traceback may hold on to the cache
                self._cache = None
            self._memory.give_back()
            if cuda:
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Gives everything back; the next run begins as the first did."""
        self.release()
        self._graphs = self._step = self._page_table = None
        self._memory.close()
        self._max_context = 0

    def _begin(
        self, requests: Sequence[Request], on_finished: Callable[[Completion], None], on_step: Callable[[int], None]
    ) -> PagedRun:
        self._fit_context(max(pages_needed(request) for request in requests) * PAGE)
        assert self._step is not None
        assert self._graphs is not None
        assert self._page_table is not None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()  # the run's memory is not PyTorch's: what its allocator keeps would be lacking
        self._step.attach(self._memory)
        pages = Pages(requests, num_pages=self._num_pages(requests))
        slot_routes = None
        if self._routes is not None:
            self._step.routes = []
            shape = (self._routes.shape[1], self._routes.shape[2])
            slot_routes = SlotRoutes(shape, max_slots=self.max_slots, max_new_tokens=self._max_new_tokens)
        self._graphs.capture_s = 0.0
        self._page_table.zero_()
        self._state.finished.fill_(FULL)
        sizes = {"max_slots": self.max_slots, "num_pages": pages.num_pages}
        self._cache = PagedCache(self._config, **sizes, dtype=self.policy.dtype, memory=self._memory)
        self.stats.cache_bytes = self._cache.nbytes
        return PagedRun(
            requests,
            step=self._step,
            state=self._state,
            page_table=self._page_table,
            cache=self._cache,
            pages=pages,
            graphs=self._graphs,
            stats=self.stats,
            step_routes=self._routes,
            slot_routes=slot_routes,
            on_finished=on_finished,
            on_step=on_step,
        )

    def _num_pages(self, requests: Sequence[Request]) -> int:
        """Pages of the budget, or as many as this run can use where that is less."""
        sizes = Sizes.of(self._config, max_slots=self.max_slots, dtype=self.policy.dtype)
        needs = sorted((pages_needed(request) for request in requests), reverse=True)
        useful = 1 + sum(needs[: self.max_slots])
        if len(requests) > self.max_slots:  # prompts may be kept for those that wait
            prompts = Counter(request.prompt_ids for request in requests)
            several = min(KEPT_PROMPTS, sum(count > 1 for count in prompts.values()))
            useful += several * -(-max(map(len, prompts)) // PAGE)
        budget = self.cache_bytes or self._free_bytes()
        if budget is None:
            return useful
        affordable = sizes.pages_in(budget)
        if affordable < 1 + needs[0]:
            least = sizes.rings + (1 + needs[0]) * sizes.page
            raise UserError(
                f"a cache of {budget / 2**30:.2f} GiB cannot hold the longest request, {needs[0] * PAGE} tokens beside "
                f"the windows of {self.max_slots} slots: it takes {least / 2**30:.2f} GiB",
                "resume with more rollout.cache_bytes, or start a new run with fewer rollout.max_slots or "
                "rollout.max_new_tokens",
            )
        return min(affordable, useful)

    def _free_bytes(self) -> int | None:
        """What the card has free but for the reserve; None where there is no card."""
        device = self.policy.device
        if device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] - RESERVE_BYTES

    def _fit_context(self, needed: int) -> None:
        """Makes the step and the page table for contexts of `needed` tokens, if those there are for fewer.

        Rounded up to a power of two, so that runs of similar lengths share their graphs.
        """
        if needed <= self._max_context:
            return
        self._graphs = self._step = self._page_table = None  # freed before their successors are made
        whole = -(-self._config.max_position_embeddings // PAGE) * PAGE
        self._max_context = min(max(4096, 1 << (needed - 1).bit_length()), whole)
        device, max_slots = self.policy.device, self.max_slots
        if self._make_step is None:
            from stages.engine.step import Step

            self._make_step = Step
        step = self._step = self._make_step(self.policy, max_slots, self._max_context)
        table = self._page_table = torch.zeros(
            (max_slots + 1, self._max_context // PAGE), dtype=torch.int32, device=device
        )

        def decode(rows: Tensor, filtered: bool) -> None:
            assert self._cache is not None
            state = self._state
            logits = step.embed_and_decode(rows, state.tokens, state.positions, table, self._cache.layers)
            if self._routes is not None:
                assert step.routes is not None
                self._routes[: rows.shape[0]].copy_(taken(step.routes))
            sample(logits, rows=rows, state=state, filtered=filtered)

        self._graphs = Graphs(decode, max_rows=max_slots, dummy=self._state.dummy, device=device, capture=self._capture)
