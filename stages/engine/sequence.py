"""What goes into the engine, what comes out, and what it keeps of a request in between. No torch."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one completion is sampled. Filters apply in the order temperature, top-k, top-p, min-p."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this mass
    min_p: float = 0.0  # keep tokens at least this share as likely as the likeliest
    stop_token_ids: tuple[int, ...] = ()  # the completion ends with the first of them, included
    seed: int = 0  # the completion's own: its tokens depend on nothing else in the batch

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, it must be 1 or more")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}, it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion asked for.

    Example:
        Request(completion_id="00003-002-005", prompt_ids=(200006, ...), sampling=SamplingParams(max_new_tokens=256,
        seed=7))
    """

    completion_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished completion. engine_logprobs are natural logs under the distribution that was sampled from, filters
    and all; for greedy sampling, those of temperature 1. routes: uint8 [P + C - 1, layers, k] on the CPU, the experts
    chosen for each token of prompt and completion but the last, which is not computed; None if they were not recorded.
    """

    completion_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    seed: int
    routes: "Tensor | None" = field(default=None, compare=False, repr=False)


@dataclass(eq=False)
class Sequence:
    """A request on its way: waiting, then in a slot, then finished."""

    request: Request
    slot: int = -1  # -1 while it waits
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # of the paged cache, in the order of its tokens
    num_launched: int = 0  # tokens asked of the device, of which it may still owe the last few
    prompt_routes: Any = None  # PromptRoutes of the prefill that computed its prompt, where routes are recorded

    def append(self, token: int, logprob: float) -> Literal["stop", "length"] | None:
        """Records a sampled token; says why the sequence has ended, if it has."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.request.sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) == self.request.sampling.max_new_tokens else None

    def completion(self, finish_reason: Literal["stop", "length"], routes: "Tensor | None" = None) -> Completion:
        return Completion(
            completion_id=self.request.completion_id,
            prompt_ids=self.request.prompt_ids,
            completion_ids=tuple(self.token_ids),
            engine_logprobs=tuple(self.logprobs),
            finish_reason=finish_reason,
            seed=self.request.sampling.seed,
            routes=routes,
        )


def check_unique(requests: SequenceOf[Request]) -> None:
    """Raises ValueError when two requests share a completion_id."""
    seen: set[str] = set()
    for request in requests:
        if request.completion_id in seen:
            raise ValueError(f"two requests have the completion_id {request.completion_id}")
        seen.add(request.completion_id)
