"""The trainer: completions in, log-probabilities with gradients out, on the engine's own copy of the weights.

Three parts: samples (completions dealt into packs, a group's prompt once in each), forward (a pack through the policy,
layer by layer, each computed again in backward), offload (what a layer was given, kept in the host's memory meanwhile).
"""

from stages.trainer.forward import TokenLogprobs, completion_distributions, completion_logprobs
from stages.trainer.offload import LayerStore
from stages.trainer.samples import Pack, Sample, deal_packs

__all__ = [
    "LayerStore",
    "Pack",
    "Sample",
    "TokenLogprobs",
    "completion_distributions",
    "completion_logprobs",
    "deal_packs",
]
