"""The Engine: checks requests and completes them, on the CPU by the loop below, on a GPU by paged_engine.py.

The CPU's loop: admit, sample, record, decode, until nothing waits. It always computes the same shape, so that what it
samples is the same bits in any company; the GPU's works on as many rows as run, and makes no such promise.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.artifacts import StageContext
from stages.config import RunConfig, UserError
from stages.engine.cache import Cache
from stages.engine.paged_engine import PagedEngine, Stats
from stages.engine.routes import SlotRoutes, row_shape, taken
from stages.engine.runner import Runner
from stages.engine.sampler import Sampler
from stages.engine.scheduler import Scheduler
from stages.engine.sequence import Completion, Request, SamplingParams, check_unique
from stages.model.policy import Policy

# Slots are rounded up to this: a matrix product's last, partial tile of rows may take another code path, with other
# last bits.
ROW_TILE = 16


class Engine:
    """Samples completions of many prompts at once on the policy's own weights; holds no memory between runs.

    The cache is given back after each run. On a GPU the engine keeps small things from one run to the next, captured
    graphs above all, so one Engine should serve many runs; `close` frees those too.

    On the CPU a completion's tokens and log-probabilities are the same bits whoever shares the batch: they depend on
    its prompt, its sampling parameters, max_slots, max_new_tokens and the policy.

    Example:
        engine = Engine(policy, max_slots=64, max_new_tokens=320)
        completions = engine.run(requests, on_finished=journal)
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_slots: int,
        max_new_tokens: int,
        cache_bytes: int = 0,
        record_routes: bool = False,
    ) -> None:
        """max_slots: sequences that run at once; max_new_tokens: the most any request may ask for.

        cache_bytes: what keys and values may take on a GPU, 0 for what is free there; on the CPU max_slots and
        max_new_tokens say it. record_routes: completions carry the experts that were chosen. A token's take a byte for
        each layer and choice, 96 of gpt-oss-20b's and 144 of gpt-oss-120b's: in the CPU's memory for each token of
        prompt and completion of what a run returns, and for max_slots x max_new_tokens of them while it runs; on a GPU
        for max_slots tokens, and for those of a prefill while it is computed.
        """
        if max_slots < 1 or max_new_tokens < 1:
            raise ValueError(f"max_slots and max_new_tokens must be 1 or more, got {max_slots} and {max_new_tokens}")
        self.policy = policy
        self.max_new_tokens, self.record_routes = max_new_tokens, record_routes
        self._paged: PagedEngine | None = None
        if policy.device.type == "cuda":
            self._paged = PagedEngine(
                policy,
                max_slots=max_slots,
                max_new_tokens=max_new_tokens,
                cache_bytes=cache_bytes,
                record_routes=record_routes,
            )
            self.max_slots = max_slots
        else:
            self.max_slots = -(-max_slots // ROW_TILE) * ROW_TILE
            self.runner = Runner(policy)

    @property
    def stats(self) -> Stats | None:
        """What the last run on a GPU did; None on the CPU."""
        return self._paged.stats if self._paged else None

    def release(self) -> None:
        """Gives the cache back, as every run does when it ends."""
        if self._paged:
            self._paged.release()

    def close(self) -> None:
        """Gives back everything but the policy; another run begins from nothing."""
        if self._paged:
            self._paged.close()

    @torch.no_grad()
    def run(
        self,
        requests: Sequence[Request],
        *,
        on_finished: Callable[[Completion], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion for each request, in their order.

        on_finished is called with each completion as soon as it ends; on_step after each step with the number of tokens
        it sampled. Requests of one prompt should stand together: the prompt is computed once and freed after the last
        of them. Raises, before anything is sampled, ValueError on a request that makes no sense, UserError on one too
        long for the model or the cache.
        """
        check_unique(requests)
        for request in requests:
            self._check(request)
        run = self._paged.run if self._paged else self._run
        return run(requests, on_finished or (lambda _: None), on_step or (lambda _: None))

    def _run(
        self, requests: Sequence[Request], on_finished: Callable[[Completion], None], on_step: Callable[[int], None]
    ) -> list[Completion]:
        device, vocabulary = self.policy.device, self.policy.model.config.vocab_size
        scheduler = Scheduler(requests, max_slots=self.max_slots)
        sizes = {"max_slots": self.max_slots, "max_new_tokens": self.max_new_tokens}
        cache = Cache(self.policy.model.config, **sizes, dtype=self.policy.dtype, device=device)
        sampler = Sampler(**sizes, device=device)
        routes = SlotRoutes(row_shape(self.policy.model.config), **sizes) if self.record_routes else None
        noted: list[Tensor] | None = None if routes is None else []
        self.runner.routes = noted
        logits = torch.zeros(self.max_slots, vocabulary, dtype=self.policy.dtype, device=device)
        finished: dict[str, Completion] = {}
        while not scheduler.done:
            for sequence in scheduler.admit():
                prompt_ids = sequence.request.prompt_ids
                if prompt_ids not in cache.prompts:
                    cache.prompts[prompt_ids] = self.runner.prefill(prompt_ids)
                cache.assign(sequence.slot, prompt_ids)
                sampler.assign(sequence.slot, sequence.request.sampling)
                logits[sequence.slot] = cache.prompts[prompt_ids].logits
            steps = torch.zeros(self.max_slots, dtype=torch.int64)
            for slot, sequence in scheduler.running.items():
                steps[slot] = len(sequence.token_ids)
            steps = steps.to(device)
            tokens, logprobs = sampler.sample(logits, steps)
            num_sampled = len(scheduler.running)
            sampled_tokens, sampled_logprobs = tokens.tolist(), logprobs.tolist()
            for slot, sequence in list(scheduler.running.items()):
                reason = sequence.append(sampled_tokens[slot], sampled_logprobs[slot])
                if reason is not None:
                    recorded = None
                    if routes is not None:
                        prompt = cache.prompts[sequence.request.prompt_ids].routes
                        assert prompt is not None
                        recorded = routes.completion(slot, prompt.numpy(), len(sequence.token_ids))
                    completion = sequence.completion(reason, recorded)
                    finished[completion.completion_id] = completion
                    cache.release(*scheduler.finish(sequence))
                    on_finished(completion)
            on_step(num_sampled)
            if scheduler.running:
                logits = self.runner.decode(cache, tokens, steps)
                if routes is not None and noted is not None:
                    slots = list(scheduler.running)
                    routes.note(slots, steps[slots].tolist(), taken(noted)[slots].numpy())
        return [finished[request.completion_id] for request in requests]

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        sampling: SamplingParams | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Prompts and what follows them, int64 [B, T + new], as transformers' `generate` returns it.

        input_ids int64 [B, T], padded on the left where attention_mask [B, T] is 0; greedy unless `sampling` says
        otherwise (row b then samples with seed sampling.seed + b). Rows that end early are padded on the right.
        """
        sampling = sampling or SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=0.0, stop_token_ids=self.policy.stop_token_ids
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape or bool((mask.long().diff(dim=-1) < 0).any()):
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape)} and pad on the left only")
        requests = []
        for row, (ids, row_mask) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            params = SamplingParams(**{**vars(sampling), "seed": sampling.seed + row})
            requests.append(Request(completion_id=str(row), prompt_ids=tuple(ids[row_mask].tolist()), sampling=params))
        completions = self.run(requests)
        pad = pad_token_id if pad_token_id is not None else self.policy.tokenizer.pad_token_id
        width = max(len(completion.completion_ids) for completion in completions)
        new = torch.full((len(completions), width), 0 if pad is None else pad, dtype=input_ids.dtype)
        for row, completion in enumerate(completions):
            new[row, : len(completion.completion_ids)] = torch.tensor(completion.completion_ids, dtype=input_ids.dtype)
        return torch.cat((input_ids, new.to(input_ids.device)), dim=1)

    def _check(self, request: Request) -> None:
        name, length, wanted = request.completion_id, len(request.prompt_ids), request.sampling.max_new_tokens
        context = self.policy.model.config.max_position_embeddings
        if not length:
            raise ValueError(f"request {name} has an empty prompt")
        if wanted > self.max_new_tokens:
            raise ValueError(f"request {name} asks for {wanted} new tokens, this engine allows {self.max_new_tokens}")
        if length + wanted > context:
            raise UserError(
                f"request {name} needs {length} + {wanted} tokens, the model's context is {context}",
                f"start a new run with rollout.max_new_tokens={context - length} or less",
            )
        largest = self.policy.model.config.vocab_size
        if not all(0 <= token < largest for token in request.prompt_ids):
            raise ValueError(f"request {name} has a token id outside the vocabulary of {largest}")


def live_engine(context: StageContext, policy: Policy) -> Engine:
    """The session's one engine for its policy, as the configuration's rollout section has it."""
    return context.session.get("engine", lambda: engine_of(context.config, policy))


def engine_of(config: RunConfig, policy: Policy) -> Engine:
    """An engine for that policy, as the configuration's rollout section has it."""
    return Engine(
        policy,
        max_slots=config.rollout.max_slots,
        max_new_tokens=config.rollout.max_new_tokens,
        cache_bytes=config.rollout.cache_bytes,
        record_routes=config.update.replay_routes,
    )


def sampling_of(config: RunConfig, policy: Policy, *, seed: int) -> SamplingParams:
    """How that policy's completions are sampled, as the configuration's rollout section has it."""
    return SamplingParams(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        stop_token_ids=policy.stop_token_ids,
        seed=seed,
    )
