"""Logits to tokens, each row under its own parameters and its own random numbers.

A row's token is the first whose cumulative probability exceeds the row's uniform number, in float64; nothing in a row
depends on another row. The log-probability is that of the distribution after temperature and filters, so that it is the
one the token was really drawn from.
"""

import numpy as np
import torch
from torch import Tensor

from stages.engine.sequence import SamplingParams
from stages.kernels.sampling import filter_logits


def uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers float64 [count] in [0, 1) of the sequence with this seed: Philox, keyed by the seed alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


class Sampler:
    """Sampling parameters and random numbers of every slot, as tensors."""

    def __init__(self, *, max_slots: int, max_new_tokens: int, device: torch.device) -> None:
        self._temperature = torch.ones(max_slots, device=device)
        self._top_k = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._top_p = torch.ones(max_slots, device=device)
        self._min_p = torch.zeros(max_slots, device=device)
        self._uniforms = torch.zeros(max_slots, max_new_tokens, dtype=torch.float64, device=device)
        self._filtered: set[int] = set()  # slots whose parameters cut the distribution

    def assign(self, slot: int, params: SamplingParams) -> None:
        """Gives `slot` to a sequence sampled with `params`."""
        greedy = params.temperature == 0  # the likeliest token survives every filter, so none is applied
        self._temperature[slot], self._top_k[slot] = params.temperature, 0 if greedy else params.top_k
        self._top_p[slot], self._min_p[slot] = 1.0 if greedy else params.top_p, 0.0 if greedy else params.min_p
        self._uniforms[slot, : params.max_new_tokens] = torch.from_numpy(uniforms(params.seed, params.max_new_tokens))
        filters = not greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        self._filtered = self._filtered | {slot} if filters else self._filtered - {slot}

    def sample(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [S] and their log-probabilities float32 [S] from logits [S, V].

        positions int64 [S]: which token of its completion each slot samples, from 0.
        """
        greedy = self._temperature == 0
        scaled = logits.float() / torch.where(greedy, 1.0, self._temperature)[:, None]
        if self._filtered:
            scaled = filter_logits(scaled, top_k=self._top_k, top_p=self._top_p, min_p=self._min_p)
        logprobs = scaled.log_softmax(-1)
        cumulative = logprobs.double().exp_().cumsum(-1)
        total = cumulative[:, -1]
        drawn = self._uniforms.gather(1, positions[:, None]).squeeze(1) * total
        # A product that rounds up to the total would point past the last token of any probability.
        drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
        sampled = torch.searchsorted(cumulative, drawn[:, None], right=True).squeeze(1)
        tokens = torch.where(greedy, scaled.argmax(-1), sampled)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
