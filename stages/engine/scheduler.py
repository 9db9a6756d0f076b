"""Who runs in which slot: first come, first served, a freed slot is refilled before the next token. No torch."""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from stages.engine.sequence import Request, Sequence


class Release(NamedTuple):
    """What became free when a sequence ended."""

    slot: int
    prompt_ids: tuple[int, ...] | None  # the prompt nobody needs any more, if so


class Scheduler:
    """Keeps the waiting line, the slots, and how many sequences still need each prompt."""

    def __init__(self, requests: Iterable[Request], *, max_slots: int) -> None:
        self.waiting = deque(Sequence(request) for request in requests)
        self.running: dict[int, Sequence] = {}
        self._free = list(range(max_slots - 1, -1, -1))  # the lowest slot is taken first
        self._needed = Counter(sequence.request.prompt_ids for sequence in self.waiting)

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def admit(self, reserve: Callable[[Sequence], bool] = lambda _: True) -> list[Sequence]:
        """Moves waiting sequences into free slots and returns them.

        reserve says whether there is memory for a sequence, and takes it; the first for which there is none waits, and
        everyone behind it.
        """
        admitted = []
        while self.waiting and self._free and reserve(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.slot = self._free.pop()
            self.running[sequence.slot] = sequence
            admitted.append(sequence)
        return admitted

    def finish(self, sequence: Sequence) -> Release:
        """Takes an ended sequence out of its slot."""
        slot = sequence.slot
        del self.running[slot]
        self._free.append(slot)
        sequence.slot = -1
        prompt = sequence.request.prompt_ids
        self._needed[prompt] -= 1
        return Release(slot, prompt if self._needed[prompt] == 0 else None)
