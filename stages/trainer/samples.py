"""Completions as the trainer takes them: packed one after the other, without padding, behind the prompt they share.

A completion's last token leads to nothing and is not computed. So a pack's tokens are those that the engine has
computed too, in prefill or decode, and its choice of experts can be replayed for each.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stages.kernels.packed_attention import Group, Groups
from stages.kernels.transfer import upload


class Sample(NamedTuple):
    """One completion as the update sees it."""

    completion_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    advantage: float
    # uint8 [prompt + completion - 1, layers, k], the experts the engine chose for each token; None if not recorded
    routes: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens behind the prompt that are computed."""
        return len(self.completion_ids) - 1


class PackTensors(NamedTuple):
    """A pack on its device; int64."""

    ids: Tensor  # [T]
    positions: Tensor  # [T]
    predicting: Tensor  # [all completion tokens], the place of the token that each one follows
    targets: Tensor  # [all completion tokens]


class Pack(NamedTuple):
    """Completions in their order, those of a prompt side by side.

    Example: Pack((a, b, c)) where a and b share a prompt holds that prompt, a, b, c's prompt, c.
    """

    samples: tuple[Sample, ...]

    def grouped(self) -> Iterator[list[Sample]]:
        """The samples, those of one prompt together."""
        start = 0
        for stop in range(1, len(self.samples) + 1):
            if stop == len(self.samples) or self.samples[stop].prompt_ids != self.samples[start].prompt_ids:
                yield list(self.samples[start:stop])
                start = stop

    def groups(self) -> Groups:
        """What attention is told; completions of one token have none that is computed."""
        return tuple(
            Group(len(group[0].prompt_ids), tuple(sample.num_tokens for sample in group if sample.num_tokens))
            for group in self.grouped()
        )

    @property
    def num_tokens(self) -> int:
        """T, tokens that are computed."""
        return sum(group.num_tokens for group in self.groups())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(sample.completion_ids) for sample in self.samples]

    def advantages(self, device: torch.device) -> Tensor:
        """Of each completion, float32 [N]."""
        return upload([sample.advantage for sample in self.samples], torch.float32, device)

    def engine_logprobs(self, device: torch.device) -> Tensor:
        """What the engine made of the completions' tokens, float32 [all completion tokens]."""
        return upload([value for sample in self.samples for value in sample.engine_logprobs], torch.float32, device)

    def tensors(self, device: torch.device) -> PackTensors:
        """What the model is given."""
        ids: list[int] = []
        positions: list[int] = []
        predicting: list[int] = []
        for group in self.grouped():
            prompt = group[0].prompt_ids
            ids += prompt
            positions += range(len(prompt))
            last = len(ids) - 1
            for sample in group:
                predicting += [last, *range(len(ids), len(ids) + sample.num_tokens)]
                ids += sample.completion_ids[:-1]
                positions += range(len(prompt), len(prompt) + sample.num_tokens)
        targets = [token for sample in self.samples for token in sample.completion_ids]
        return PackTensors(*(upload(each, torch.int64, device) for each in (ids, positions, predicting, targets)))

    def routes(self, device: torch.device) -> Tensor | None:
        """The engine's experts int64 [T, layers, k] of the pack's tokens; None when a sample has none recorded."""
        parts = []
        for group in self.grouped():
            for index, sample in enumerate(group):
                if sample.routes is None:
                    return None
                parts.append(sample.routes[0 if index == 0 else len(sample.prompt_ids) :])
        return upload(torch.cat(parts), torch.uint8, device).long()


def deal_packs(samples: Sequence[Sample], pack_tokens: int) -> list[Pack]:
    """The samples in packs of at most `pack_tokens` tokens, or of one completion where that is longer.

    Completions of a prompt stay together as far as they fit; prompts come in the order of their first sample.
    """
    by_prompt: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt_ids, []).append(sample)
    packs: list[list[Sample]] = []
    used = pack_tokens
    for prompt, group in by_prompt.items():
        fresh = True  # the prompt is not in the last pack yet
        for sample in group:
            more = sample.num_tokens + (len(prompt) if fresh else 0)
            if used + more > pack_tokens:
                packs.append([])
                used, more = 0, sample.num_tokens + len(prompt)
            packs[-1].append(sample)
            used, fresh = used + more, False
    return [Pack(tuple(pack)) for pack in packs if pack]
