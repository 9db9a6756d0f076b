"""Which page of the cache belongs to whom: reservation at admission, prompts shared by reference counts. No torch.

A page holds 128 tokens of every full-attention layer. Whole pages of a prompt are shared by its completions; the page
in which the prompt ends is each completion's own, a copy. All a sequence may ever need, prompt and max_new_tokens, is
reserved when it is admitted, so a running sequence never lacks a page; what does not fit now waits.

The first sequence of a prompt to be admitted is its leader: the prompt is computed into the leader's pages, and copied
from there to the others admitted in the same round. While more of its sequences wait, the prompt is kept: a reference
to its whole pages, one page with the copy of its last, partial one, and a row for its sliding layers. Keeping is a
convenience: where there is no room for it the prompt is computed again, and kept prompts give way when nothing runs.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stages.engine.sequence import Request, Sequence

PAGE = 128  # tokens of a page: the window too, so that a page is what one program of the attention kernel reads
SCRATCH = 0  # the page of the dummy slot
KEPT_PROMPTS = 16  # prompts kept at once: a row of 3.1 MB each (gpt-oss-20b)


def pages_needed(request: Request) -> int:
    """Pages a request occupies from its first token to its last."""
    return -(-(len(request.prompt_ids) + request.sampling.max_new_tokens) // PAGE)


@dataclass(eq=False)
class Kept:
    """A computed prompt whose further sequences wait."""

    pages: list[int]  # its whole pages, then the copy of its partial one if it has one
    row: int  # which of the rows for kept prompts
    logits: Any = None  # [V], of the token that follows it
    routes: Any = None  # its PromptRoutes, where they are recorded


class Pages:
    """The pages of one run. Page 0 is never given out."""

    def __init__(self, requests: Iterable[Request], *, num_pages: int, kept_rows: int = KEPT_PROMPTS) -> None:
        """requests: all of the run's. Raises ValueError naming one that does not fit even alone."""
        self.num_pages = num_pages
        self.kept: dict[tuple[int, ...], Kept] = {}
        self.leaders: dict[tuple[int, ...], Sequence] = {}  # of this round: prompts that have to be computed
        self._free = list(range(num_pages - 1, SCRATCH, -1))
        self._references = [0] * num_pages
        self._rows = list(range(kept_rows - 1, -1, -1))
        self._waiting: Counter[tuple[int, ...]] = Counter()
        for request in requests:
            self._waiting[request.prompt_ids] += 1
            if pages_needed(request) > num_pages - 1:
                raise ValueError(
                    f"request {request.completion_id} needs {pages_needed(request)} pages of {PAGE} tokens, "
                    f"the cache has {num_pages - 1}: raise rollout.cache_bytes or lower max_new_tokens"
                )

    @property
    def num_free(self) -> int:
        return len(self._free)

    def reserve(self, sequence: Sequence, *, alone: bool) -> bool:
        """Gives `sequence` its pages if there are enough; alone: nothing runs, so kept prompts give way."""
        prompt_ids = sequence.request.prompt_ids
        missing = pages_needed(sequence.request) - len(self._shared(prompt_ids))
        while missing > len(self._free):
            if not alone or not self.kept:
                return False
            self._drop(next((ids for ids in self.kept if ids != prompt_ids), prompt_ids))
            missing = pages_needed(sequence.request) - len(self._shared(prompt_ids))
        shared = self._shared(prompt_ids)
        if prompt_ids not in self.leaders and prompt_ids not in self.kept:
            self.leaders[prompt_ids] = sequence
        sequence.pages = [*self._take(shared), *self._take(self._new(missing))]
        self._waiting[prompt_ids] -= 1
        return True

    def keep(self, prompt_ids: tuple[int, ...]) -> Kept | None:
        """Keeps a prompt that a leader has just computed, if more of its sequences wait and there is room."""
        leader = self.leaders[prompt_ids]
        partial = 1 if len(prompt_ids) % PAGE else 0
        if not self._waiting[prompt_ids] or not self._rows or partial > len(self._free):
            return None
        whole = self._take(leader.pages[: len(prompt_ids) // PAGE])
        self.kept[prompt_ids] = Kept([*whole, *self._take(self._new(partial))], self._rows.pop())
        return self.kept[prompt_ids]

    def end_round(self) -> None:
        """Forgets this round's leaders, and the kept prompts for which nobody waits any more."""
        self.leaders.clear()
        for prompt_ids in [ids for ids in self.kept if not self._waiting[ids]]:
            self._drop(prompt_ids)

    def release(self, sequence: Sequence) -> None:
        """Takes back the pages of an ended sequence."""
        self._give_back(sequence.pages)
        sequence.pages = []

    def _shared(self, prompt_ids: tuple[int, ...]) -> list[int]:
        holder = self.leaders.get(prompt_ids) or self.kept.get(prompt_ids)
        return holder.pages[: len(prompt_ids) // PAGE] if holder else []

    def _drop(self, prompt_ids: tuple[int, ...]) -> None:
        kept = self.kept.pop(prompt_ids)
        self._give_back(kept.pages)
        self._rows.append(kept.row)

    def _new(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]

    def _take(self, pages: list[int]) -> list[int]:
        for page in pages:
            self._references[page] += 1
        return pages

    def _give_back(self, pages: list[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} was given back twice"
            if not self._references[page]:
                self._free.append(page)
