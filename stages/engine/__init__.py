"""The Flex-sink engine: requests in, completions out, sampled on the trainer's own copy of the weights.

Four parts: Sequence (what one request has come to), Scheduler (who runs in which slot; no torch), Cache (keys and
values: a prompt's once for all who share it, a completion's own per slot), Runner (tensors through the model), Sampler
(logits to tokens). Engine turns them: admit, sample, record, decode, until nothing waits.
"""

from stages.engine.engine import Engine
from stages.engine.sequence import Completion, Request, SamplingParams

__all__ = ["Completion", "Engine", "Request", "SamplingParams"]
