"""Triton kernels of attention over packed groups, forward and backward, with sinks and windows.

A program has a tile of one segment's queries (or keys) and goes over what they see (or what sees them): the segment's
own tokens and, across the border, its prompt (or its prompt's completions). Positions are counted in the segment, a
prompt's keys from -length to -1 for a completion. Only tiles that the diagonal or the window's edge crosses are masked.
Scores are in units of log2 e. Algorithm: Dao 2023, "FlashAttention-2"; the sink is one more term of the normalizer.

Tables are int32. segments [S, 6]: first token, length, its prompt's first token and length (0 for a prompt), and the
first and last + 1 of the segments that are its completions. tiles [n, 2]: segment, offset in it.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NOTHING: tl.constexpr = tl.constexpr(-1.0e38)  # below every score, and finite: differences of it are no NaN


@triton.jit
def _visible(query_at, key_at, WINDOW: tl.constexpr):
    """Whether a query at position query_at sees the key at key_at."""
    seen = key_at <= query_at
    if WINDOW > 0:
        seen = seen & (query_at - key_at < WINDOW)
    return seen


@triton.jit
def _rows(base, first, at, length, STRIDE: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr):
    """Rows first + at of [tokens, STRIDE], of which C channels; zeros where `at` is not below `length`."""
    pointers = base + first.to(tl.int64) * STRIDE + at[:, None] * STRIDE + tl.arange(0, C)[None, :]
    if MASKED:
        return tl.load(pointers, mask=(at < length)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _forward_scan(
    sums, largest, total, query, query_at, key, value, first, length, shift, begin, stop, scale,
    KC: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys begin ... stop - 1 of a segment of `length` from token `first`, `shift` before the query's, added."""
    for start in range(begin, stop, KEYS):
        at = start + tl.arange(0, KEYS)
        keys = _rows(key, first + start, at - start, length - start, KC, C, MASKED)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if MASKED:
            seen = _visible(query_at[:, None], (at - shift)[None, :], WINDOW) & (at < length)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        values = _rows(value, first + start, at - start, length - start, KC, C, MASKED)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        largest = higher
    return sums, largest, total


@triton.jit
def _key_range(offset, last, length, shift, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Of the keys of a segment of `length`, `shift` before the queries offset ... last: where those begin that one of
    them sees, up to where each sees all (whole tiles of them), and where they end.
    """
    stop = tl.minimum(last + shift + 1, length)
    if WINDOW > 0:
        begin = tl.maximum(offset + shift - WINDOW + 1, 0)
        return begin, begin, stop
    whole = tl.minimum(offset + shift + 1, length) // KEYS * KEYS
    return 0, whole, stop


@triton.jit
def _forward_segment(
    sums, largest, total, query, query_at, key, value, first, length, shift, offset, last, scale,
    KC: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """All keys of a segment that the queries offset ... last see, added."""
    begin, whole, stop = _key_range(offset, last, length, shift, KEYS, WINDOW)
    if WINDOW == 0:
        sums, largest, total = _forward_scan(
            sums, largest, total, query, query_at, key, value, first, length, shift, begin, whole, scale,
            KC=KC, C=C, KEYS=KEYS, WINDOW=WINDOW, MASKED=False,
        )  # fmt: skip
    return _forward_scan(
        sums, largest, total, query, query_at, key, value, first, length, shift, whole, stop, scale,
        KC=KC, C=C, KEYS=KEYS, WINDOW=WINDOW, MASKED=True,
    )  # fmt: skip


@triton.jit
def forward_kernel(
    query, key, value, sinks, segments, tiles, out, normalizers, num_tokens, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """out [T, H, C], and normalizers float32 [H, T]: log2 of each query's sum of exponentials, its sink's included.

    scale: of the scores, times log2 e. WINDOW: 0 for none. Grid (H, tiles of QUERIES).
    """
    head = tl.program_id(0)
    segment = segments + tl.load(tiles + 2 * tl.program_id(1)) * 6
    offset = tl.load(tiles + 2 * tl.program_id(1) + 1)
    first, length = tl.load(segment), tl.load(segment + 1)
    prompt, before = tl.load(segment + 2), tl.load(segment + 3)
    rows = tl.arange(0, QUERIES)
    query_at = offset + rows
    queries = _rows(query + head * C, first + offset, rows, length - offset, H * C, C, True)
    key += head // (H // K) * C
    value += head // (H // K) * C
    sums = tl.zeros((QUERIES, C), tl.float32)
    largest = tl.full((QUERIES,), NOTHING, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    last = tl.minimum(offset + QUERIES, length) - 1
    sums, largest, total = _forward_segment(
        sums, largest, total, queries, query_at, key, value, prompt, before, before, offset, last, scale,
        KC=K * C, C=C, KEYS=KEYS, WINDOW=WINDOW,
    )  # fmt: skip
    sums, largest, total = _forward_segment(
        sums, largest, total, queries, query_at, key, value, first, length, 0, offset, last, scale,
        KC=K * C, C=C, KEYS=KEYS, WINDOW=WINDOW,
    )  # fmt: skip
    sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    higher = tl.maximum(largest, sink)
    shrink = tl.exp2(largest - higher)
    total = total * shrink + tl.exp2(sink - higher)
    sums = sums * (shrink / total)[:, None]
    inside = query_at < length
    place = (first + offset).to(tl.int64)
    tl.store(normalizers + head.to(tl.int64) * num_tokens + place + rows, higher + tl.log2(total), mask=inside)
    out += place * (H * C) + head * C
    tl.store(
        out + rows[:, None] * (H * C) + tl.arange(0, C)[None, :], sums.to(out.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def share_kernel(out, grad, shares, num_tokens, H: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr):
    """shares float32 [H, T]: each output's product with its gradient, both [T, H, C]. Grid (H, T / TOKENS)."""
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    at = token[:, None] * (H * C) + head * C + tl.arange(0, C)[None, :]
    products = tl.load(out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    products *= tl.load(grad + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(shares + head * num_tokens + token, tl.sum(products, axis=1), mask=inside)


@triton.jit
def _query_scan(
    sums, query, grad, normalizer, share, query_at, key, value, first, length, shift, begin, stop, scale,
    KC: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As _forward_scan: what those keys add to the gradient [QUERIES, C] of the queries, not scaled yet."""
    for start in range(begin, stop, KEYS):
        at = start + tl.arange(0, KEYS)
        keys = _rows(key, first + start, at - start, length - start, KC, C, MASKED)
        values = _rows(value, first + start, at - start, length - start, KC, C, MASKED)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        weights = tl.exp2(scores - normalizer[:, None])
        if MASKED:
            seen = _visible(query_at[:, None], (at - shift)[None, :], WINDOW) & (at < length)[None, :]
            weights = tl.where(seen, weights, 0.0)
        of_weights = tl.dot(grad, tl.trans(values), input_precision="ieee")
        of_scores = weights * (of_weights - share[:, None])
        sums = tl.dot(of_scores.to(keys.dtype), keys, sums, input_precision="ieee")
    return sums


@triton.jit
def _query_segment(
    sums, query, grad, normalizer, share, query_at, key, value, first, length, shift, offset, last, scale,
    KC: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """As _forward_segment, of _query_scan."""
    begin, whole, stop = _key_range(offset, last, length, shift, KEYS, WINDOW)
    if WINDOW == 0:
        sums = _query_scan(
            sums, query, grad, normalizer, share, query_at, key, value, first, length, shift, begin, whole, scale,
            KC=KC, C=C, KEYS=KEYS, WINDOW=WINDOW, MASKED=False,
        )  # fmt: skip
    return _query_scan(
        sums, query, grad, normalizer, share, query_at, key, value, first, length, shift, whole, stop, scale,
        KC=KC, C=C, KEYS=KEYS, WINDOW=WINDOW, MASKED=True,
    )  # fmt: skip


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, normalizers, shares, segments, tiles, out, num_tokens, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """out [T, H, C], the gradient of the queries; grad is that of attention's output. Grid as forward_kernel's."""
    head = tl.program_id(0)
    segment = segments + tl.load(tiles + 2 * tl.program_id(1)) * 6
    offset = tl.load(tiles + 2 * tl.program_id(1) + 1)
    first, length = tl.load(segment), tl.load(segment + 1)
    prompt, before = tl.load(segment + 2), tl.load(segment + 3)
    rows = tl.arange(0, QUERIES)
    query_at = offset + rows
    inside = query_at < length
    place = (first + offset).to(tl.int64)
    queries = _rows(query + head * C, first + offset, rows, length - offset, H * C, C, True)
    grads = _rows(grad + head * C, first + offset, rows, length - offset, H * C, C, True)
    figures = head.to(tl.int64) * num_tokens + place + rows
    normalizer = tl.load(normalizers + figures, mask=inside, other=0.0)
    share = tl.load(shares + figures, mask=inside, other=0.0)
    key += head // (H // K) * C
    value += head // (H // K) * C
    sums = tl.zeros((QUERIES, C), tl.float32)
    last = tl.minimum(offset + QUERIES, length) - 1
    sums = _query_segment(
        sums, queries, grads, normalizer, share, query_at, key, value, prompt, before, before, offset, last, scale,
        KC=K * C, C=C, KEYS=KEYS, WINDOW=WINDOW,
    )  # fmt: skip
    sums = _query_segment(
        sums, queries, grads, normalizer, share, query_at, key, value, first, length, 0, offset, last, scale,
        KC=K * C, C=C, KEYS=KEYS, WINDOW=WINDOW,
    )  # fmt: skip
    out += place * (H * C) + head * C
    sums *= scale / LOG2_E
    tl.store(
        out + rows[:, None] * (H * C) + tl.arange(0, C)[None, :], sums.to(out.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def _key_scan(
    of_keys, of_values, keys, values, key_at, query, grad, normalizers, shares, first, length, begin, stop, scale,
    HC: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the queries begin ... stop - 1 of a segment of `length` from token `first` add to the gradients of the keys
    (not scaled yet) and values [KEYS, C]; key_at [KEYS], the keys' positions among the queries'.
    """
    for start in range(begin, stop, QUERIES):
        rows = tl.arange(0, QUERIES)
        inside = start + rows < length
        queries = _rows(query, first + start, rows, length - start, HC, C, True)
        figures = (first + start).to(tl.int64) + rows
        normalizer = tl.load(normalizers + figures, mask=inside, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        weights = tl.exp2(scores - normalizer[None, :])
        if MASKED:
            seen = _visible((start + rows)[None, :], key_at[:, None], WINDOW)
            weights = tl.where(seen, weights, 0.0)
        grads = _rows(grad, first + start, rows, length - start, HC, C, True)
        of_values = tl.dot(weights.to(grads.dtype), grads, of_values, input_precision="ieee")
        share = tl.load(shares + figures, mask=inside, other=0.0)
        of_weights = tl.dot(values, tl.trans(grads), input_precision="ieee")
        of_scores = weights * (of_weights - share[None, :])
        of_keys = tl.dot(of_scores.to(queries.dtype), queries, of_keys, input_precision="ieee")
    return of_keys, of_values


@triton.jit
def key_gradient_kernel(
    query, key, value, grad, normalizers, shares, segments, tiles, out_key, out_value, num_tokens, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """out_key and out_value [T, K, C], the gradients of keys and values. Grid (K, tiles of KEYS)."""
    kv_head = tl.program_id(0)
    segment = segments + tl.load(tiles + 2 * tl.program_id(1)) * 6
    offset = tl.load(tiles + 2 * tl.program_id(1) + 1)
    first, length = tl.load(segment), tl.load(segment + 1)
    first_completion, last_completion = tl.load(segment + 4), tl.load(segment + 5)
    rows = tl.arange(0, KEYS)
    keys = _rows(key + kv_head * C, first + offset, rows, length - offset, K * C, C, True)
    values = _rows(value + kv_head * C, first + offset, rows, length - offset, K * C, C, True)
    of_keys = tl.zeros((KEYS, C), tl.float32)
    of_values = tl.zeros((KEYS, C), tl.float32)
    last = tl.minimum(offset + KEYS, length) - 1
    stop = length
    diagonal = tl.minimum(offset + tl.cdiv(KEYS, QUERIES) * QUERIES, length)
    if WINDOW > 0:
        stop = tl.minimum(last + WINDOW, length)
        diagonal = stop
    for member in range(H // K):
        head = kv_head * (H // K) + member
        figures = head.to(tl.int64) * num_tokens
        of_keys, of_values = _key_scan(
            of_keys, of_values, keys, values, offset + rows, query + head * C, grad + head * C, normalizers + figures,
            shares + figures, first, length, offset, diagonal, scale,
            HC=H * C, C=C, QUERIES=QUERIES, WINDOW=WINDOW, MASKED=True,
        )  # fmt: skip
        if WINDOW == 0:
            of_keys, of_values = _key_scan(
                of_keys, of_values, keys, values, offset + rows, query + head * C, grad + head * C,
                normalizers + figures, shares + figures, first, length, diagonal, stop, scale,
                HC=H * C, C=C, QUERIES=QUERIES, WINDOW=WINDOW, MASKED=False,
            )  # fmt: skip
    for completion in range(first_completion, last_completion):
        behind = tl.load(segments + completion * 6)
        num_queries = tl.load(segments + completion * 6 + 1)
        if WINDOW > 0:
            num_queries = tl.minimum(num_queries, last - length + WINDOW)
        for member in range(H // K):
            head = kv_head * (H // K) + member
            figures = head.to(tl.int64) * num_tokens
            of_keys, of_values = _key_scan(
                of_keys, of_values, keys, values, offset + rows - length, query + head * C, grad + head * C,
                normalizers + figures, shares + figures, behind, num_queries, 0, num_queries, scale,
                HC=H * C, C=C, QUERIES=QUERIES, WINDOW=WINDOW, MASKED=WINDOW > 0,
            )  # fmt: skip
    inside = (offset + rows < length)[:, None]
    at = (first + offset).to(tl.int64) * (K * C) + kv_head * C
    at = at + rows[:, None] * (K * C) + tl.arange(0, C)[None, :]
    of_keys *= scale / LOG2_E
    tl.store(out_key + at, of_keys.to(out_key.dtype.element_ty), mask=inside)
    tl.store(out_value + at, of_values.to(out_value.dtype.element_ty), mask=inside)
