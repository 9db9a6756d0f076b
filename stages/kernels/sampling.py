"""Sampling on the device: logits to tokens, each row under its slot's parameters and its slot's random numbers.

A row's token is the first whose cumulative probability exceeds the uniform number of this step, as in
stages/engine/sampler.py, so a seed means the same completion on every device but for tokens at a boundary, where the
last bits of a sum decide. The step also notes what became of each slot: its next token, its position, whether it has
ended. Nothing here waits for the device, and nothing depends on data but the values, so it may be captured in a CUDA
graph.

Slots: S real ones and the dummy, number S, for the unused rows of a batch; the dummy has finished from the start.
Shapes: b rows, V vocabulary, R rows of the largest batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2048  # logits of one program: 99 programs for one row of gpt-oss's 201 088
STOP_IDS = 8  # stop tokens a slot can hold; the host sees to any further ones
FILTERED_ROWS = 16  # rows sorted at once: 16 x 201 088 float32 with their int64 order are 39 MB
RUNNING, STOPPED, FULL, STALE = range(4)  # flags: goes on, met a stop token, has all its tokens, had ended before


@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """What the device knows of every slot, [S + 1] unless said otherwise; written in place, never replaced."""

    tokens: Tensor  # int64, the token to feed
    logprobs: Tensor  # float32, of that token
    positions: Tensor  # int32, where it will stand: the number of tokens cached
    steps: Tensor  # int32, how many tokens of its completion are sampled
    finished: Tensor  # int32, RUNNING, STOPPED or FULL
    temperatures: Tensor  # float32, 0 is greedy
    top_k: Tensor  # int32, 0 keeps all
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    uniforms: Tensor  # float64 [S + 1, max_new_tokens]
    limits: Tensor  # int32, tokens its completion may have, 1 or more
    stop_ids: Tensor  # int32 [S + 1, STOP_IDS], -1 where unused
    results: Tensor  # int32 [R, 4], of the last step: token, bits of the logprob, flag, number in its completion

    @property
    def dummy(self) -> int:
        """The slot of unused rows."""
        return self.tokens.shape[0] - 1


def make_state(*, max_slots: int, max_new_tokens: int, device: torch.device | str) -> SamplingState:
    """The state of max_slots empty slots and the dummy. A batch may have as many rows as there are slots."""
    slots = max_slots + 1

    def filled(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full(shape or (slots,), value, dtype=dtype, device=device)

    return SamplingState(
        tokens=filled(0, torch.int64),
        logprobs=filled(0, torch.float32),
        positions=filled(0, torch.int32),
        steps=filled(0, torch.int32),
        finished=filled(FULL, torch.int32),
        temperatures=filled(1, torch.float32),
        top_k=filled(0, torch.int32),
        top_p=filled(1, torch.float32),
        min_p=filled(0, torch.float32),
        uniforms=filled(0, torch.float64, slots, max_new_tokens),
        limits=filled(1, torch.int32),
        stop_ids=filled(-1, torch.int32, slots, STOP_IDS),
        results=filled(0, torch.int32, max_slots, 4),
    )


def sample(
    logits: Tensor, *, rows: Tensor, state: SamplingState, sources: Tensor | None = None, filtered: bool = False
) -> None:
    """Samples one token for each row's slot and moves the slot on; `state.results` holds what was sampled.

    logits [n, V] of any float type; rows int32 [b], the slots, distinct but for the dummy; sources int32 [b], which row
    of the logits each takes (None: its own). filtered: whether any of the slots has a top-k, top-p or min-p; the others
    need no sort. A token of a slot that had finished is reported as STALE and changes nothing. Where logits are not
    finite the log-probability is NaN.
    """
    num_rows = rows.shape[0]
    if num_rows > state.results.shape[0] or (sources is None and logits.shape[0] != num_rows):
        shapes = f"{num_rows} rows, logits {tuple(logits.shape)}, room for {state.results.shape[0]}"
        raise ValueError(f"rows, logits and state do not fit: {shapes}")
    if filtered:
        logits, sources = _scaled_and_filtered(logits, rows, sources, state), None
    launch = sample_triton if logits.is_cuda else sample_plain
    launch(logits, rows=rows, state=state, sources=sources, scaled=filtered)


def sample_triton(logits: Tensor, *, rows: Tensor, state: SamplingState, sources: Tensor | None, scaled: bool) -> None:
    """`sample` by two Triton kernels; scaled: the logits are over their temperature already."""
    import triton

    from stages.kernels import triton_sampling

    num_rows, vocabulary = rows.shape[0], logits.shape[1]
    assert logits.stride(1) == 1
    num_chunks = triton.cdiv(vocabulary, CHUNK)
    shape = (num_rows, num_chunks)  # three tensors, each aligned: Triton compiles another kernel for other alignments
    maxima, masses = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    best = torch.empty(shape, dtype=torch.int32, device=logits.device)
    which = rows if sources is None else sources
    flags = {"CHUNK": CHUNK, "SCALED": scaled, "HAS_SOURCES": sources is not None}
    shared = (logits, rows, which, state.temperatures, maxima, masses, best)
    triton_sampling.chunk_masses[(num_chunks, num_rows)](
        *shared, vocabulary, logits.stride(0), num_chunks, **flags, num_warps=4
    )
    triton_sampling.pick[(num_rows,)](
        *shared,
        *(state.uniforms, state.limits, state.stop_ids),
        *(state.tokens, state.logprobs, state.positions, state.steps, state.finished, state.results),
        *(vocabulary, logits.stride(0), state.uniforms.stride(0), num_chunks),
        CHUNKS=triton.next_power_of_2(num_chunks),
        STOPS=STOP_IDS,
        num_warps=8,
        **flags,
    )


def sample_plain(logits: Tensor, *, rows: Tensor, state: SamplingState, sources: Tensor | None, scaled: bool) -> None:
    """`sample` in plain PyTorch: the CPU's path, and what the kernels are tested against."""
    slots = rows.long()
    own = (logits if sources is None else logits[sources.long()]).float()
    greedy = state.temperatures[slots] == 0
    if not scaled:
        own = own / torch.where(greedy, 1.0, state.temperatures[slots])[:, None]
    logprobs = own.log_softmax(-1)
    cumulative = logprobs.double().exp_().cumsum(-1)
    steps = torch.minimum(state.steps[slots], state.limits[slots] - 1)
    total = cumulative[:, -1]
    drawn = state.uniforms[slots, steps.long()] * total
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, drawn[:, None], right=True).squeeze(1).clamp(max=own.shape[1] - 1)
    tokens = torch.where(greedy, own.argmax(-1), drawn)
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)

    active = state.finished[slots] == RUNNING
    stopped = (state.stop_ids[slots] == tokens[:, None]).any(-1)
    flags = torch.where(stopped, STOPPED, torch.where(steps + 1 >= state.limits[slots], FULL, RUNNING)).int()
    state.results[: len(slots)] = torch.stack(
        (tokens.int(), chosen.view(torch.int32), torch.where(active, flags, STALE), steps), dim=-1
    )
    on = slots[active]
    state.tokens[on], state.logprobs[on], state.finished[on] = tokens[active], chosen[active], flags[active]
    state.positions[on] += 1
    state.steps[on] += 1


def _scaled_and_filtered(logits: Tensor, rows: Tensor, sources: Tensor | None, state: SamplingState) -> Tensor:
    """Logits float32 [b, V] over the temperature with -inf where a filter cuts, some rows at a time."""
    out = torch.empty((rows.shape[0], logits.shape[1]), dtype=torch.float32, device=logits.device)
    for start in range(0, rows.shape[0], FILTERED_ROWS):
        part = slice(start, start + FILTERED_ROWS)
        slots = rows[part].long()
        own = logits[part] if sources is None else logits[sources[part].long()]
        temperature = state.temperatures[slots][:, None]
        scaled = own.float() / torch.where(temperature == 0, 1.0, temperature)
        out[part] = filter_logits(scaled, top_k=state.top_k[slots], top_p=state.top_p[slots], min_p=state.min_p[slots])
    return out


def filter_logits(scaled: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits [n, V], already over their temperature, with what top-k, top-p and min-p [n] cut at -inf, in that order.

    top_k 0, top_p 1 and min_p 0 cut nothing.
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    keep = rank < torch.where(top_k > 0, top_k, scaled.shape[-1])[:, None]
    probabilities = ordered.masked_fill(~keep, -torch.inf).softmax(-1)
    # A token stays while what is likelier than it has not yet reached top_p, so the likeliest always stays.
    keep &= (probabilities.cumsum(-1) - probabilities < top_p[:, None]) | (top_p >= 1)[:, None]
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    return scaled.masked_fill(~torch.zeros_like(keep).scatter_(-1, order, keep), -torch.inf)
