"""The memory limit of a decode step: bytes that must be read once, over what the card reads in a second. No torch.

Counted: every weight a step needs (of the experts only those that are hit, as MXFP4; the rest 16 bit, norms float32),
one embedding row a sequence, and the keys and values of the context (128 tokens in a sliding layer). Not counted: what
is written, activations, logits, and LoRA's factors, so a row with LoRA is held against the bare model's floor.
"""

from typing import NamedTuple

from stages.model.shapes import Shape

REFERENCE_TB_S = 4.3  # TB/s, of which the bars are shares: an H200's copy bandwidth as measured
MXFP4_BYTES = 17 / 32  # of a value: half a byte, and a scale byte for 32 values


class StepBytes(NamedTuple):
    """Bytes a decode step reads, by what they are."""

    attention: float  # projections, biases, sinks
    experts: float
    rest: float  # norms, routers, embedding rows
    head: float
    cache: float

    @property
    def total(self) -> float:
        return sum(self)


def expected_experts(shape: Shape, rows: int) -> float:
    """Distinct experts that `rows` tokens hit in a layer, on average, when every one is as likely as another."""
    return shape.num_experts * (1 - (1 - shape.experts_per_token / shape.num_experts) ** rows)


def step_bytes(
    shape: Shape, rows: int, context: int, *, experts_hit: float | None = None, element_bytes: int = 2
) -> StepBytes:
    """Bytes of one step of `rows` sequences with `context` cached tokens each.

    experts_hit: distinct experts, the mean over layers; None is the expectation of uniform routing.
    """
    hit = expected_experts(shape, rows) if experts_hit is None else experts_hit
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    projections = 2 * (queries + keys) * shape.hidden
    biases = queries + 2 * keys + shape.hidden + shape.num_heads
    expert = 3 * shape.hidden * shape.expert_hidden * MXFP4_BYTES
    expert_biases = (2 * shape.expert_hidden + shape.hidden) * element_bytes
    router = shape.num_experts * (shape.hidden + 1)
    seen = shape.num_full_layers * context + shape.num_sliding_layers * min(context, shape.window)
    return StepBytes(
        attention=shape.num_layers * (projections + biases) * element_bytes,
        experts=shape.num_layers * hit * (expert + expert_biases),
        rest=shape.num_layers * (router * element_bytes + 2 * shape.hidden * 4)
        + shape.hidden * (4 + rows * element_bytes),
        head=shape.vocabulary * shape.hidden * element_bytes,
        cache=rows * seen * 2 * keys * element_bytes,
    )


def floor_tokens_per_s(
    shape: Shape, rows: int, context: int, *, read_tb_s: float = REFERENCE_TB_S, experts_hit: float | None = None
) -> float:
    """Tokens a second that no engine exceeds on a card that reads `read_tb_s` TB/s."""
    return rows * read_tb_s * 1e12 / step_bytes(shape, rows, context, experts_hit=experts_hit).total
