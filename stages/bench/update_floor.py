"""The arithmetic limit of an update: floating-point operations that must be done once, over what the card does in a
second. No torch.

Counted, two operations a multiplication: the projections, the router, the chosen experts, attention over the keys that
each query sees (128 at most in a sliding layer), the unembedding of the tokens that are trained on. Each of them
forward, again when a checkpointed layer (or a chunk of logits) is computed anew, and for the gradient of its input;
the frozen weights need none of their own. Attention's backward recomputes its scores: 2.5 times its forward. Not
counted: LoRA (1 % at r = 16, so every rank is held against the same floor), norms, softmax, the optimizer, and the
unpacking of MXFP4. So a trainer that recomputes nothing could go above this floor, by as much as its memory allows.
"""

from typing import NamedTuple

from stages.bench.update_cases import Layout
from stages.model.shapes import Shape

REFERENCE_TFLOPS = 790.0  # dense bf16 that an H200 reaches in large matrix products; its data sheet says 989
PASSES = 3  # forward, forward again, gradient of the input
ATTENTION_PASSES = 4.5  # the same, with five products in the backward where the forward has two


class StepFlops(NamedTuple):
    """Operations of one optimizer step, by what they are for."""

    projections: float
    router: float
    experts: float
    attention: float  # of queries with keys, and of the result with values
    head: float

    @property
    def total(self) -> float:
        return sum(self)


def step_flops(shape: Shape, layout: Layout) -> StepFlops:
    """Operations of a step over `layout`, whose prompts are computed once for their group."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    per_token = 2 * PASSES * layout.tokens * shape.num_layers
    seen = shape.num_full_layers * keys_seen(layout, None) + shape.num_sliding_layers * keys_seen(layout, shape.window)
    return StepFlops(
        projections=per_token * 2 * (queries + keys) * shape.hidden,
        router=per_token * shape.num_experts * shape.hidden,
        experts=per_token * shape.experts_per_token * 3 * shape.hidden * shape.expert_hidden,
        attention=ATTENTION_PASSES * 4 * queries * seen,
        head=2 * PASSES * layout.trained_tokens * shape.vocabulary * shape.hidden,
    )


def keys_seen(layout: Layout, window: int | None) -> int:
    """Pairs of a query and a key it sees, in one layer and head; None is no window."""
    whole = layout.prompt_tokens + layout.completion_tokens - 1
    prompt = pairs(layout.prompt_tokens, window)
    return layout.groups * (prompt + layout.group_size * (pairs(whole, window) - prompt))


def pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key in one causal sequence: the window counts the query itself."""
    near = tokens if window is None else min(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * near


def floor_tokens_per_s(shape: Shape, layout: Layout, *, tflops: float = REFERENCE_TFLOPS) -> float:
    """Computed tokens a second that no update with layer checkpoints exceeds on a card of `tflops` TFLOP/s.

    Example:
        floor_tokens_per_s(SHAPES["gpt-oss-20b"], sequence(4096))    # 33 522, of 23.57 GFLOP a token
    """
    return layout.tokens * tflops * 1e12 / step_flops(shape, layout).total
