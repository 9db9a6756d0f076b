"""The two Triton kernels of sampling: masses of chunks of the vocabulary, then the choice of a chunk and a token in it.

The first reads every logit once, b x V / CHUNK programs; the second, one program a row, reads the chunk statistics and
one chunk, and does what a step must do about its slot, so that no token needs the host. Sums of a chunk are float32
(2048 terms of at most 1, added as a tree: relative error below 1e-6), everything across chunks is float64.
"""

import triton
import triton.language as tl


@triton.jit
def _scaled(logits, offset, mask, temperature, SCALED: tl.constexpr):
    """Logits at `offset` over the temperature, float32, -inf outside the mask."""
    x = tl.load(logits + offset, mask=mask, other=-float("inf")).to(tl.float32)
    if not SCALED:
        x = tl.div_rn(x, tl.zeros_like(x) + tl.where(temperature == 0.0, 1.0, temperature))
    return x


@triton.jit
def chunk_masses(
    logits,
    rows,
    sources,
    temperatures,
    maxima,
    masses,
    best,
    vocabulary,
    row_stride,
    num_chunks,
    CHUNK: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
):
    """maxima, masses (sum of exp(x - maximum)) and best (lowest index of the maximum), each [b, num_chunks]."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    source = tl.load(sources + row) if HAS_SOURCES else row
    temperature = tl.load(temperatures + tl.load(rows + row))
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _scaled(logits, source.to(tl.int64) * row_stride + place, place < vocabulary, temperature, SCALED)
    largest = tl.max(x, axis=0)
    first = tl.min(tl.where(x == largest, place, vocabulary), axis=0)
    mass = tl.sum(tl.exp(x - tl.maximum(largest, -3.4e38)), axis=0)
    at = row * num_chunks + chunk
    tl.store(maxima + at, largest)
    tl.store(masses + at, mass)
    tl.store(best + at, tl.minimum(first, vocabulary - 1))


@triton.jit
def pick(
    logits,
    rows,
    sources,
    temperatures,
    maxima,
    masses,
    best,
    uniforms,
    limits,
    stop_ids,
    tokens,
    logprobs,
    positions,
    steps,
    finished,
    results,
    vocabulary,
    row_stride,
    uniform_stride,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STOPS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
):
    """One row: its token, the log-probability, and its slot moved on by one token unless it had finished before.

    CHUNKS: num_chunks rounded up to a power of two. results int32 [b, 4]: token, bits of the log-probability, flag (0
    running, 1 stop, 2 length, 3 had finished before), the token's number in its completion.
    """
    row = tl.program_id(0)
    slot = tl.load(rows + row)
    source = tl.load(sources + row) if HAS_SOURCES else row
    temperature = tl.load(temperatures + slot)
    limit = tl.load(limits + slot)
    step = tl.minimum(tl.load(steps + slot), limit - 1)
    uniform = tl.load(uniforms + slot.to(tl.int64) * uniform_stride + step)

    n = tl.arange(0, CHUNKS)
    inside = n < num_chunks
    maximum = tl.load(maxima + row * num_chunks + n, mask=inside, other=-float("inf"))
    mass = tl.load(masses + row * num_chunks + n, mask=inside, other=0.0)
    highest = tl.max(maximum, axis=0)
    largest = tl.maximum(highest, -3.4e38)
    weight = mass.to(tl.float64) * tl.exp(maximum - largest).to(tl.float64)
    cumulative = tl.cumsum(weight, axis=0)
    total = tl.sum(weight, axis=0)
    target = uniform * total
    # Only what has mass may be chosen: a parallel scan need not be monotone in its last bit, and u * total may round up
    # to the total, where the last token of any probability is meant.
    crossing = tl.min(tl.where((cumulative > target) & (weight > 0), n, CHUNKS), axis=0)
    last = tl.maximum(tl.max(tl.where(weight > 0, n, -1), axis=0), 0)
    chunk = tl.where(crossing < CHUNKS, crossing, last)
    before = tl.sum(tl.where(n == chunk - 1, cumulative, 0.0), axis=0)
    likeliest = tl.minimum(tl.min(tl.where(maximum == highest, n, CHUNKS), axis=0), num_chunks - 1)
    greedy = temperature == 0.0
    chunk = tl.where(greedy, likeliest, chunk)

    i = tl.arange(0, CHUNK)
    place = chunk * CHUNK + i
    x = _scaled(logits, source.to(tl.int64) * row_stride + place, place < vocabulary, temperature, SCALED)
    share = tl.exp(x - largest).to(tl.float64)
    reached = tl.cumsum(share, axis=0) + before
    crossing = tl.min(tl.where((reached > target) & (share > 0), i, CHUNK), axis=0)
    last = tl.maximum(tl.max(tl.where(share > 0, i, -1), axis=0), 0)
    sampled = chunk * CHUNK + tl.where(crossing < CHUNK, crossing, last)
    token = tl.where(greedy, tl.load(best + row * num_chunks + chunk), sampled)
    chosen = tl.sum(tl.where(place == token, x, 0.0), axis=0)
    logprob = (chosen - largest) - tl.log(total.to(tl.float32))

    active = tl.load(finished + slot) == 0
    stop = tl.load(stop_ids + slot * STOPS + tl.arange(0, STOPS))
    stopped = tl.max((stop == token).to(tl.int32), axis=0)
    flag = tl.where(stopped > 0, 1, tl.where(step + 1 >= limit, 2, 0))
    position = tl.load(positions + slot)
    tl.store(tokens + slot, token.to(tl.int64), mask=active)
    tl.store(logprobs + slot, logprob, mask=active)
    tl.store(positions + slot, position + 1, mask=active)
    tl.store(steps + slot, step + 1, mask=active)
    tl.store(finished + slot, flag, mask=active)
    tl.store(results + row * 4, token)
    tl.store(results + row * 4 + 1, logprob.to(tl.int32, bitcast=True))
    tl.store(results + row * 4 + 2, tl.where(active, flag, 3))
    tl.store(results + row * 4 + 3, step)
