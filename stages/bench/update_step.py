"""One optimizer step of the project's own trainer, on a synthetic policy, and how long its parts take on the device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.bench.rollouts import draw_prompts
from stages.bench.update_cases import Layout
from stages.config import RunConfig, replace
from stages.engine import Completion, Request, SamplingParams
from stages.grpo import LossInputs, StepTotals, advantages, policy_loss
from stages.kernels.transfer import upload
from stages.model.policy import Policy
from stages.model.shapes import Shape
from stages.model.synthetic import LORA_ALPHA_PER_RANK, synthetic_policy
from stages.trainer import LayerStore, Pack, Sample, completion_logprobs
from stages.trainer.optimizer import make_optimizer
from stages.trainer.plan import Plan, plan_update

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the policy is held and trained."""

    shape: Shape
    rank: int = 16
    targets: str = "attention+experts"
    dense: str = "full"
    dtype: str = "bf16"
    lora_dtype: str = "bf16"
    optimizer: str = "adamw_8bit"
    offload_embedding: bool = False
    scaled_init: bool = False
    loss: str = "grpo"
    learning_rate: float = 5e-5
    seed: int = 0

    def about(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "system": "flexsink",
            "lora": self.rank,
            "targets": self.targets,
            "dense": self.dense,
            "lora_dtype": self.lora_dtype,
            "optimizer": self.optimizer,
            "offload_embedding": self.offload_embedding,
            "scaled_init": self.scaled_init,
        }


def open_policy(setting: Setting, *, device: torch.device) -> Policy:
    """The synthetic policy, with LoRA where the setting wants it."""
    kept: dict[str, Any] = {
        "dense": setting.dense,
        "offload_embedding": setting.offload_embedding,
        "scaled_init": setting.scaled_init,
    }
    policy = synthetic_policy(
        setting.shape,
        lora_rank=setting.rank,
        dtype=DTYPES[setting.dtype],
        device=device,
        seed=setting.seed,
        **{name: value for name, value in kept.items() if value not in ("full", False)},
    )
    if setting.targets == "attention":
        for layer in policy.model.model.layers:
            layer.mlp.experts.gate_up_lora = layer.mlp.experts.down_lora = None
    for _, parameter in policy.parameters():
        parameter.data = parameter.data.to(DTYPES[setting.lora_dtype])
    return policy


class Training:
    """A policy, its optimizer, and the steps they take together."""

    def __init__(self, policy: Policy, setting: Setting, *, memory_bytes: int = 0) -> None:
        """memory_bytes: that an update may take of the card; 0 is all. Raises UserError for a loss or an optimizer that
        the config does not know.
        """
        self.policy = policy
        self.update = replace(
            RunConfig(),
            "update",
            loss=setting.loss,
            learning_rate=setting.learning_rate,
            lora_rank=setting.rank,
            lora_alpha=LORA_ALPHA_PER_RANK * setting.rank,
            optimizer=setting.optimizer,
            memory_bytes=memory_bytes,
        ).update
        self.optimizer = make_optimizer(policy, self.update)
        self._parameters = [parameter for _, parameter in policy.parameters()]
        self._store = LayerStore(policy.device)
        self._plans: dict[int, Plan] = {}

    def logprobs(
        self, pack: Pack, *, grad: bool, replay_routes: bool = False, routes: list[Tensor] | None = None
    ) -> Tensor:
        """float32 [T] of all completion tokens of the pack. replay_routes: by the experts that the samples hold; routes
        takes each layer's choices int64 [T, k].
        """
        plan = self.plan(pack.num_tokens)
        with torch.set_grad_enabled(grad):
            return completion_logprobs(
                self.policy,
                pack,
                temperature=1.0,
                store=self._store,
                replay_routes=replay_routes,
                routes=routes,
                plan=plan,
            ).logprobs

    def plan(self, tokens: int) -> Plan:
        """How packs of so many tokens keep within the budget."""
        if tokens not in self._plans:
            self._plans[tokens] = plan_update(self.policy, tokens, update=self.update, optimizer=self.optimizer)
        return self._plans[tokens]

    def close(self) -> None:
        """Gives back what is kept from one step to the next, but for the optimizer's state."""
        self.optimizer.zero_grad(set_to_none=True)
        self._store.close()
        self._store = LayerStore(self.policy.device)

    def step(self, packs: Sequence[Pack], watch: "Stopwatch", *, on_policy: bool) -> None:
        """One optimizer step over all packs; `watch` hears of forward, backward and optimizer.

        on_policy: the engine's log-probabilities are taken to be the trainer's own, as random tokens have none.
        """
        samples = [sample for pack in packs for sample in pack.samples]
        lengths = [len(sample.completion_ids) for sample in samples]
        totals = StepTotals(num_completions=len(samples), num_tokens=sum(lengths), max_new_tokens=max(lengths))
        watch.start()
        try:
            for pack in packs:
                self._accumulate(pack, totals, watch, on_policy)
        except BaseException:
            self.close()  # a length that does not fit must not leave its halves behind
            raise
        torch.nn.utils.clip_grad_norm_(self._parameters, self.update.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    def _accumulate(self, pack: Pack, totals: StepTotals, watch: "Stopwatch", on_policy: bool) -> None:
        """Adds a pack's gradients."""
        device = self.policy.device
        now = self.logprobs(pack, grad=True)
        watch.lap("forward")
        old = now.detach()
        inputs = LossInputs(
            old_logprobs=old,
            engine_logprobs=old if on_policy else pack.engine_logprobs(device),
            reference_logprobs=None,
            advantages=pack.advantages(device),
            lengths=upload(pack.lengths, torch.int64, device),
        )
        loss, _ = policy_loss(now, inputs, totals, self.update)
        loss.backward()
        watch.lap("backward")


class Stopwatch:
    """Milliseconds that the device spent on each part of what was asked of it, without waiting in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.lap("")

    def lap(self, name: str) -> None:
        """What was asked since the last mark is of part `name`."""
        mark: Any = time.perf_counter()
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((name, mark))

    def milliseconds(self) -> dict[str, float]:
        """The sum of each part; waits for the device, and begins anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                spent = before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
                found[name] = found.get(name, 0.0) + spent
        self._marks = []
        return found


def requests(
    training: Training,
    *,
    prompts: int,
    group_size: int,
    prompt_tokens: tuple[int, int],
    new_tokens: int,
    seed: int,
) -> list[Request]:
    """Requests for completions of exactly new_tokens: random weights do not stop, and no token is told to end them.

    prompt_tokens: the shortest and the longest prompt.
    """
    drawn = draw_prompts(prompts, prompt_tokens, vocabulary=training.policy.model.config.vocab_size, seed=seed)
    return [
        Request(
            completion_id=f"{group:03d}-{place:03d}",
            prompt_ids=prompt,
            sampling=SamplingParams(max_new_tokens=new_tokens, seed=seed * 1_000_003 + group * group_size + place),
        )
        for group, prompt in enumerate(drawn)
        for place in range(group_size)
    ]


def rewarded(
    completions: Sequence[Completion],
    rewards: Sequence[float],
    *,
    group_size: int,
    replay: bool = False,
) -> list[Sample]:
    """The completions as the trainer takes them; replay: with the engine's routes, for it to use again."""
    grouped = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    return [
        Sample(
            completion_id=completion.completion_id,
            prompt_ids=completion.prompt_ids,
            completion_ids=completion.completion_ids,
            engine_logprobs=completion.engine_logprobs,
            advantage=advantage,
            routes=completion.routes if replay else None,
        )
        for completion, advantage in zip(completions, advantages(grouped).flatten().tolist(), strict=True)
    ]


def random_samples(layout: Layout, *, vocabulary: int, seed: int) -> list[Sample]:
    """The layout's completions of random tokens, with random advantages whose sum in a group is 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (count,), generator=generator).tolist())

    samples = []
    for group in range(layout.groups):
        prompt = draw(layout.prompt_tokens)
        drawn = torch.randn(layout.group_size, generator=generator)
        advantages = drawn - drawn.mean() if layout.group_size > 1 else drawn
        for place, advantage in enumerate(advantages.tolist()):
            samples.append(
                Sample(
                    completion_id=f"{group:03d}-{place:03d}",
                    prompt_ids=prompt,
                    completion_ids=draw(layout.completion_tokens),
                    engine_logprobs=(),
                    advantage=advantage,
                )
            )
    return samples
