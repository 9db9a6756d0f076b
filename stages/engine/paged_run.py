"""One run of the GPU engine: admit, prefill, launch decode steps, read their results a little later.

The host never waits for the step it has just launched: it reads what steps before it sampled, while the device works.
So it learns that a sequence has ended a step or two late. Until then the sequence is decoded on, into its own pages at
a position that no longer moves, and what that samples is thrown away. Its pages and slot may be given to others at
once: everything is ordered on one stream, and the newcomer's prefill comes after the last step that knew the old one.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.config import NOT_FINITE_HINT, UserError
from stages.engine.cache import LayerCache
from stages.engine.device_memory import CacheMemory
from stages.engine.graphs import Graphs, bucket_of
from stages.engine.paged_cache import Copy, PagedCache, Span
from stages.engine.pages import PAGE, Kept, Pages
from stages.engine.routes import PromptRoutes, SlotRoutes, taken
from stages.engine.sampler import uniforms
from stages.engine.scheduler import Scheduler
from stages.engine.sequence import Completion, Request, SamplingParams, Sequence
from stages.kernels.sampling import RUNNING, STOP_IDS, SamplingState, sample
from stages.kernels.transfer import Readback, upload

PREFILL_TOKENS = 8192  # of one prefill: several prompts together, or a chunk of a longer one
LAG = 2  # steps launched and not yet read; one would do if the host were never late


class StepLike(Protocol):
    """The model's mathematics, see stages/engine/step.py."""

    routes: list[Tensor] | None

    def attach(self, memory: CacheMemory) -> None: ...

    def detach(self) -> None: ...

    def embed_and_decode(
        self, rows: Tensor, tokens: Tensor, positions: Tensor, page_table: Tensor, layers: SequenceOf[LayerCache]
    ) -> Tensor: ...

    def prefill(
        self,
        ids: Tensor,
        starts: SequenceOf[int],
        past: int,
        past_kv: Callable[[int], tuple[Tensor, Tensor]] | None,
        write_kv: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor: ...


@dataclass
class Stats:
    """What the last run did."""

    seconds: float = 0.0
    prefill_tokens: int = 0  # computed; shared prompts count once
    prefill_s: float = 0.0  # of the device
    decode_steps: int = 0
    decode_tokens: int = 0  # sampled by decode steps, those thrown away not counted
    waiting_s: float = 0.0  # of the host, for the device
    capture_s: float = 0.0  # within the run, the compilation of kernels included
    graphs: int = 0  # held at its end
    cache_bytes: int = 0
    peak_bytes: int = 0  # of PyTorch's allocator since its statistics were last reset, and the cache

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0


class _InFlight(NamedTuple):
    """Results the device owes: row i is the next token of sequences[i]."""

    sequences: list[Sequence]
    results: Readback
    decoded: bool  # by a decode step, not after a prefill


class PagedRun:
    """The state of one run; `run` may be called once."""

    def __init__(
        self,
        requests: SequenceOf[Request],
        *,
        step: StepLike,
        state: SamplingState,
        page_table: Tensor,
        cache: PagedCache,
        pages: Pages,
        graphs: Graphs,
        stats: Stats,
        step_routes: Tensor | None = None,
        slot_routes: SlotRoutes | None = None,
        on_finished: Callable[[Completion], None],
        on_step: Callable[[int], None],
    ) -> None:
        """step_routes: where a decode step puts its rows' routes, uint8 [max_slots, layers, k], if they are recorded;
        slot_routes: where they are kept.
        """
        self.requests, self.step, self.state, self.cache = requests, step, state, cache
        self.pages, self.graphs, self.stats = pages, graphs, stats
        self.on_finished, self.on_step = on_finished, on_step
        self.step_routes, self.slot_routes = step_routes, slot_routes
        self.page_table, self.device = page_table, page_table.device
        self.max_slots = state.dummy
        self.scheduler = Scheduler(requests, max_slots=self.max_slots)
        self.finished: dict[str, Completion] = {}
        self._in_flight: list[_InFlight] = []
        self._blocked = False  # whoever waits first did not fit, and nothing has ended since
        self._active: list[int] = []  # the slots that the graphs' rows name
        self._filtered = False  # whether any of them has a filter
        self._prefills: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self) -> list[Completion]:
        """The completions in the order of the requests."""
        while not self.scheduler.done:
            self._admit()
            launched = self._launch()
            while len(self._in_flight) > LAG:
                self._collect()
            if not launched:
                assert self._in_flight, "nothing runs and nothing can be admitted"
                self._collect()
        self.stats.prefill_s += sum(begin.elapsed_time(end) / 1e3 for begin, end in self._prefills)
        return [self.finished[request.completion_id] for request in self.requests]

    def _admit(self) -> None:
        if not self.scheduler.waiting or self._blocked:
            return
        scheduler, pages = self.scheduler, self.pages
        admitted = scheduler.admit(lambda sequence: pages.reserve(sequence, alone=not scheduler.running))
        self._blocked = len(scheduler.running) < self.max_slots
        if not admitted:
            return
        self._assign(admitted)
        self._active = []  # the rows are named again
        leaders = list(pages.leaders.values())
        followers: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in admitted:
            followers.setdefault(sequence.request.prompt_ids, []).append(sequence)
        kept = {ids: pages.kept[ids] for ids in followers if ids in pages.kept}
        packs = [(pack, self._prefill(pack)) for pack in packed(leaders)]
        copies = [self._copy(ids, kept[ids], to) for ids in kept for to in followers[ids]]
        for ids, prompt in kept.items():
            for to in followers[ids]:
                to.prompt_routes = prompt.routes
        for leader in leaders:
            ids = leader.request.prompt_ids
            copies += [self._copy(ids, leader, to) for to in followers[ids] if to is not leader]
            for to in followers[ids]:
                to.prompt_routes = leader.prompt_routes
        for pack, logits in packs:
            for document, leader in enumerate(pack):
                ids = leader.request.prompt_ids
                keeping = pages.keep(ids)
                if keeping:
                    keeping.logits, keeping.routes = logits[document].clone(), leader.prompt_routes
                    copies.append(self._copy(ids, leader, keeping))
        self.cache.copy(copies)
        for pack, logits in packs:
            self._sample_first(logits, [followers[leader.request.prompt_ids] for leader in pack])
        for ids, prompt in kept.items():
            self._sample_first(prompt.logits[None], [followers[ids]])
        pages.end_round()

    def _assign(self, admitted: SequenceOf[Sequence]) -> None:
        """Writes the slots of sequences that begin: their page tables, and how they are sampled."""
        state, device = self.state, self.device
        params = [sequence.request.sampling for sequence in admitted]
        table = np.zeros((len(admitted), self.page_table.shape[1]), dtype=np.int32)
        numbers = np.zeros((len(admitted), state.uniforms.shape[1]))
        stops = np.full((len(admitted), STOP_IDS), -1)
        for row, (sequence, sampling) in enumerate(zip(admitted, params, strict=True)):
            table[row, : len(sequence.pages)] = sequence.pages
            numbers[row, : sampling.max_new_tokens] = uniforms(sampling.seed, sampling.max_new_tokens)
            stop_ids = sampling.stop_token_ids[:STOP_IDS]
            stops[row, : len(stop_ids)] = stop_ids
        slots = upload([sequence.slot for sequence in admitted], torch.int64, device)
        # The position of the prompt's last token: sampling what follows it moves on to the first of the completion.
        last = [len(sequence.request.prompt_ids) - 1 for sequence in admitted]
        values: list[tuple[Tensor, Any]] = [
            (self.page_table, table),
            (state.uniforms, numbers),
            (state.stop_ids, stops),
            (state.positions, last),
            (state.steps, [0] * len(admitted)),
            (state.finished, [RUNNING] * len(admitted)),
            (state.limits, [sampling.max_new_tokens for sampling in params]),
            (state.temperatures, [sampling.temperature for sampling in params]),
            (state.top_k, [0 if greedy(sampling) else sampling.top_k for sampling in params]),
            (state.top_p, [1.0 if greedy(sampling) else sampling.top_p for sampling in params]),
            (state.min_p, [0.0 if greedy(sampling) else sampling.min_p for sampling in params]),
        ]
        for tensor, rows in values:
            tensor.index_copy_(0, slots, upload(rows, tensor.dtype, device))

    def _prefill(self, pack: SequenceOf[Sequence]) -> Tensor:
        """Logits [documents, V] of what follows each leader's prompt, whose keys and values are in its slot then."""
        with self._timed_prefill():
            prompts = [leader.request.prompt_ids for leader in pack]
            self.stats.prefill_tokens += sum(map(len, prompts))
            if len(pack) > 1 or len(prompts[0]) <= PREFILL_TOKENS:
                ids = upload(np.concatenate(prompts), torch.int64, self.device)
                starts = [0, *np.cumsum([len(prompt) for prompt in prompts])[:-1].tolist()]
                spans = [
                    Span(leader.slot, leader.pages, 0, len(prompt))
                    for leader, prompt in zip(pack, prompts, strict=True)
                ]
                logits = self.step.prefill(ids, starts, 0, None, self.cache.writer(spans))
                self._note_prompts(pack, [len(prompt) for prompt in prompts])
                return logits
            (leader,), (prompt,) = pack, prompts
            for begin in range(0, len(prompt), PREFILL_TOKENS):
                chunk = prompt[begin : begin + PREFILL_TOKENS]
                span = Span(leader.slot, leader.pages, begin, len(chunk))
                past = self.cache.reader(span) if begin else None
                ids = upload(chunk, torch.int64, self.device)
                logits = self.step.prefill(ids, [0], begin, past, self.cache.writer([span]))
                self._note_prompts(pack, [len(chunk)])
            return logits

    def _note_prompts(self, pack: SequenceOf[Sequence], lengths: list[int]) -> None:
        """Of the prefill just launched, adds lengths[i] tokens' routes to what leader i's prompt has."""
        if self.slot_routes is None:
            return
        assert self.step.routes is not None
        for leader, rows in zip(pack, taken(self.step.routes).split(lengths), strict=True):
            leader.prompt_routes = leader.prompt_routes or PromptRoutes()
            leader.prompt_routes.add(rows)

    def _copy(self, prompt_ids: tuple[int, ...], source: Sequence | Kept, target: Sequence | Kept) -> Copy:
        whole, partial = divmod(len(prompt_ids), PAGE)
        rows = [x.slot if isinstance(x, Sequence) else self.state.dummy + 1 + x.row for x in (source, target)]
        return Copy(*rows, *((source.pages[whole], target.pages[whole]) if partial else (None, None)))

    def _sample_first(self, logits: Tensor, groups: SequenceOf[SequenceOf[Sequence]]) -> None:
        """Samples the first token of groups[i]'s sequences from row i of the logits."""
        sequences = [sequence for group in groups for sequence in group]
        sources = [row for row, group in enumerate(groups) for _ in group]
        rows = upload([sequence.slot for sequence in sequences], torch.int32, self.device)
        filtered = any(filters(sequence.request.sampling) for sequence in sequences)
        sources_ = upload(sources, torch.int32, self.device)
        sample(logits, rows=rows, sources=sources_, state=self.state, filtered=filtered)
        self._owe(sequences, decoded=False)

    def _launch(self) -> bool:
        """Launches a decode step of every sequence that may need another token; False if there is none."""
        running = self.scheduler.running
        active = [s for s in sorted(running) if running[s].num_launched < running[s].request.sampling.max_new_tokens]
        if not active:
            return False
        sequences = [running[slot] for slot in active]
        bucket = bucket_of(len(active), self.max_slots)
        changed = active != self._active
        if changed:
            self._filtered = any(filters(sequence.request.sampling) for sequence in sequences)
        if self.graphs.prepare(bucket, filtered=self._filtered) or changed:
            self.graphs.assign(upload(active, torch.int32, self.device))
            self._active = active
        self.graphs.run(bucket, filtered=self._filtered)
        self.stats.decode_steps += 1
        self._owe(sequences, decoded=True)
        return True

    def _owe(self, sequences: list[Sequence], *, decoded: bool) -> None:
        for sequence in sequences:
            sequence.num_launched += 1
        sources = [self.state.results[: len(sequences)]]
        if decoded and self.step_routes is not None:
            sources.append(self.step_routes[: len(sequences)])
        self._in_flight.append(_InFlight(sequences, Readback(*sources), decoded))

    def _collect(self) -> None:
        """Reads the oldest results."""
        owed = self._in_flight.pop(0)
        started = time.perf_counter()
        results, *routes = owed.results.wait()
        self.stats.waiting_s += time.perf_counter() - started
        if routes and self.slot_routes is not None:
            live = [row for row, sequence in enumerate(owed.sequences) if sequence.slot >= 0]
            fed = [owed.sequences[row] for row in live]
            places = [len(sequence.token_ids) - 1 for sequence in fed]
            self.slot_routes.note([sequence.slot for sequence in fed], places, routes[0][live])
        tokens = results[:, 0].tolist()
        logprobs = results[:, 1].copy().view(np.float32).tolist()
        num_sampled = 0
        for sequence, token, logprob in zip(owed.sequences, tokens, logprobs, strict=True):
            if sequence.slot < 0:  # it had ended before
                continue
            if logprob != logprob:
                name, place = sequence.request.completion_id, len(sequence.token_ids)
                raise UserError(f"the logits of token {place} of completion {name} are not finite", NOT_FINITE_HINT)
            num_sampled += 1
            reason = sequence.append(token, logprob)
            if reason is not None:
                completion = sequence.completion(reason, self._routes_of(sequence))
                self.finished[completion.completion_id] = completion
                self.scheduler.finish(sequence)
                self.pages.release(sequence)
                self._blocked = False
                self.on_finished(completion)
        if owed.decoded:
            self.stats.decode_tokens += num_sampled
        if num_sampled:
            self.on_step(num_sampled)

    def _routes_of(self, sequence: Sequence) -> Tensor | None:
        """Of a sequence that ends and is still in its slot."""
        if self.slot_routes is None:
            return None
        return self.slot_routes.completion(sequence.slot, sequence.prompt_routes.rows(), len(sequence.token_ids))

    @contextlib.contextmanager
    def _timed_prefill(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._prefills.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self.stats.prefill_s += time.perf_counter() - started


def packed(leaders: SequenceOf[Sequence]) -> list[list[Sequence]]:
    """The leaders in order, in packs of at most PREFILL_TOKENS; a longer prompt is a pack of its own."""
    packs: list[list[Sequence]] = []
    room = 0
    for leader in leaders:
        length = len(leader.request.prompt_ids)
        if length > room:
            packs.append([])
            room = PREFILL_TOKENS
        packs[-1].append(leader)
        room -= length
    return packs


def greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature == 0


def filters(sampling: SamplingParams) -> bool:
    """Whether the distribution is cut; the likeliest token survives every filter, so greedy sampling applies none."""
    return not greedy(sampling) and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
