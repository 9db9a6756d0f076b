"""The live policy: one copy of gpt-oss's weights with its adapter, which the engine samples from and the update trains.

`live_policy` is how every stage gets it: the process's one Policy, moved to the version the stage works on.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.artifacts import StageContext, StageId, derive
from stages.config import ModelConfig, UserError
from stages.kernels.norms import embed
from stages.model import lora
from stages.model.checkpoint import TORCH_DTYPES, Checkpoint, digests, locate
from stages.model.full_weights import FullWeights
from stages.model.gpt_oss import build

if TYPE_CHECKING:
    from transformers import GptOssForCausalLM, PreTrainedTokenizerBase

# One thread, on every machine. Sums split among another number of threads differ in their last bits, and a run must
# be able to go on elsewhere with equal bytes. The tiny model's operations are so small that a second thread gains
# little on an idle machine, and on a busy one each barrier waits for a turn: updates took ten times as long. The
# other cores are the sandboxes'.
CPU_THREADS = 1

# Blocks of the card's memory that grow in place: packs of every length would leave holes in fixed ones. Read when the
# first tensor is put on a card, so it stands here; what the environment says goes first.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


class Policy:
    """gpt-oss with LoRA on attention and experts, and with what also_train names trained in full beside it.

    version counts the updates its adapter has had; 0 is untrained, and its deltas are exactly zero. Where methods say
    adapter they mean full_weights, too.
    """

    def __init__(
        self,
        model: "GptOssForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        lora_rank: int,
        lora_alpha: float,
        seed: int,
        source: str,
        checkpoint_digests: dict[str, str],
        lora_dtype: torch.dtype = torch.float32,
        also_train: str = "none",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.version = 0
        self.source, self.checkpoint_digests = source, checkpoint_digests
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self._seed = derive("lora", seed)
        sinks: Any = model.model.layers[0].self_attn.sinks
        self.device, self.dtype = sinks.device, sinks.dtype
        lora.add_lora(model, rank=lora_rank, alpha=lora_alpha, dtype=lora_dtype, seed=self._seed)
        self.full_weights = FullWeights(model, also_train)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        lora_rank: int,
        lora_alpha: float,
        seed: int,
        lora_dtype: str = "float32",
        also_train: str = "none",
    ) -> "Policy":
        """Reads and checks the checkpoint config.source names. Raises UserError naming what is wrong with it."""
        from transformers import AutoTokenizer

        folder = locate(config.source)
        checkpoint = Checkpoint(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(CPU_THREADS)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{folder} has no usable tokenizer: {reason}", "copy tokenizer.json beside the weights"
            ) from None
        model = build(
            checkpoint,
            experts=config.experts,
            dtype=TORCH_DTYPES[config.dtype],
            device=device,
            lora_rank=lora_rank,
            dense=config.dense,
            offload_embedding=config.offload_embedding,
        )
        return cls(
            model,
            tokenizer,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            seed=seed,
            source=config.source,
            checkpoint_digests=digests(folder),
            lora_dtype=TORCH_DTYPES[lora_dtype],
            also_train=also_train,
        )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: <|return|> and <|call|>; <|end|> only ends a message."""
        ids = self.tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
        assert isinstance(ids, list)
        return tuple(ids)

    def render(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of the chat up to where the assistant answers, with little reasoning asked for."""
        ids: Any = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, reasoning_effort="low", tokenize=True, return_dict=False
        )
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, harmony's markers included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [..., D] on the policy's device, wherever the embedding itself lives."""
        weight = self.embedding()
        ids = ids.to(self.device)
        return F.embedding(ids, weight) if self._near(weight) else embed(weight, ids.flatten()).view(*ids.shape, -1)

    def embedding(self) -> Tensor:
        """The embedding [V, D]: on the policy's device, or where a card's kernels read the rows they need over the bus,
        in pinned memory.
        """
        tokens = self.model.model.embed_tokens
        if not self._near(tokens.weight) and not tokens.weight.is_pinned():
            tokens.weight.data = tokens.weight.data.pin_memory()
        return tokens.weight.data

    def _near(self, weight: Tensor) -> bool:
        return weight.device.type == self.device.type

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train: the adapter's, then those of full_weights."""
        return lora.lora_parameters(self.model) + self.full_weights.parameters()

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter in PEFT's layout."""
        lora.save_adapter(self.parameters(), folder, rank=self.lora_rank, alpha=self.lora_alpha, base=self.source)

    def load_adapter(self, folder: Path, *, version: int) -> None:
        """Makes the adapter in `folder` this policy's, as `version`."""
        lora.load_adapter(self.parameters(), folder)
        self.version = version

    def reset_adapter(self) -> None:
        """Back to version 0: the adapter as it was drawn from the seed."""
        lora.reset_lora(self.model, seed=self._seed)
        self.full_weights.reset()
        self.version = 0

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within it the policy is its base model: the reference of the KL term."""
        with lora.adapter_disabled(self.model), self.full_weights.disabled():
            yield

    @contextlib.contextmanager
    def fixed_shape_experts(self) -> Iterator[None]:
        """Within it a row's bits do not depend on how many rows chose which expert (see kernels/experts.py)."""
        stacks = [layer.mlp.experts for layer in self.model.model.layers]
        for stack in stacks:
            stack.fixed_shape = True
        try:
            yield
        finally:
            for stack in stacks:
                stack.fixed_shape = False

    def weight_bytes(self) -> int:
        """Bytes of weights, packed ones as packed, without the adapter."""
        adapter = {id(parameter) for _, parameter in self.parameters()}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        frozen = sum(tensor.nbytes for tensor in tensors if id(tensor) not in adapter)
        return frozen + self.full_weights.base_bytes


def open_policy(context: StageContext) -> Policy:
    """The session's one Policy, built from the run's configuration when there is none yet; at any version."""
    config = context.config
    return context.session.get(
        "policy",
        lambda: Policy.load(
            config.model,
            lora_rank=config.update.lora_rank,
            lora_alpha=config.update.lora_alpha,
            seed=config.train.seed,
            lora_dtype=config.update.lora_dtype,
            also_train=config.update.also_train,
        ),
    )


def live_policy(context: StageContext, version: int) -> Policy:
    """The session's one Policy at `version`: its adapter is read from the update before it when it is at another.

    Raises UserError when the checkpoint is no longer the one that the run loaded.
    """
    policy = open_policy(context)
    loaded = json.loads((context.input(StageId("load")) / "model.json").read_text())["files"]
    found = policy.checkpoint_digests
    changed = sorted(name for name in loaded.keys() | found.keys() if loaded.get(name) != found.get(name))
    if changed:
        raise UserError(
            f"the checkpoint {policy.source} is not the one this run began with: {changed[0]} differs",
            "restore it, or start a new run with --run-dir",
        )
    if policy.version != version:
        if version == 0:
            policy.reset_adapter()
        else:
            policy.load_adapter(context.input(StageId("update", version - 1)), version=version)
    return policy
