"""The Flex-sink engine: requests in, completions out, sampled on the trainer's own copy of the weights.

Four parts: Sequence (what one request has come to), Scheduler (who runs in which slot; no torch), Cache (keys and
values: a prompt's once for all who share it, a completion's own per slot), Runner (tensors through the model), Sampler
(logits to tokens). Engine turns them: admit, sample, record, decode, until nothing waits.

On a GPU the same words mean more: PagedEngine and PagedRun (the loop, which never waits for the step it has launched),
Pages (who owns which page; no torch), PagedCache, Graphs (the captured steps), Step (the model), and the sampling of
stages/kernels.
"""

from stages.engine.engine import Engine, engine_of, live_engine, sampling_of
from stages.engine.sequence import Completion, Request, SamplingParams

__all__ = ["Completion", "Engine", "Request", "SamplingParams", "engine_of", "live_engine", "sampling_of"]
