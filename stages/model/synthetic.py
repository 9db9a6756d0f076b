"""A random gpt-oss of a published shape as a `Policy`, made on the device it is for: for measurements and tests.

The bytes are those of a checkpoint (MXFP4 experts, the rest 16 bit), so speed and memory are a real model's; what it
writes is noise. Activations keep the size a trained model's have (every product is scaled to its inputs), so nothing
overflows in fp16, and routing is close to uniform over the experts.

Does not cover a tokenizer: `render` and `decode` of such a policy fail.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stages.config import UserError
from stages.model import lora
from stages.model.checkpoint import expected_shapes
from stages.model.gpt_oss import NORMS, assemble
from stages.model.policy import Policy
from stages.model.shapes import SHAPES, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# E8M0 bytes of the scales, the last one excluded. Random nibbles under them have a standard deviation of 0.026, which
# over 2880 inputs makes gates of size 1.4, as a trained layer's. The published checkpoints' bytes are about 118 to 124.
SCALE_BYTES = (118, 122)
LORA_ALPHA_PER_RANK = 2.0
LORA_B_STD = 0.02  # a change of about a tenth of what the frozen matrix gives


class StandInTokenizer:
    """The three token ids that the engine asks a tokenizer for."""

    def __init__(self, shape: Shape) -> None:
        self._ids = dict(zip(("<|return|>", "<|call|>"), shape.stop_token_ids, strict=True))
        self.pad_token_id = min(199_999, shape.vocabulary - 3)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [self._ids[token] for token in tokens]


def shape_of(name: str, *, num_layers: int = 0) -> Shape:
    """The shape of this name, cut or grown to `num_layers` unless that is 0; UserError when there is none."""
    if name not in SHAPES:
        raise UserError(f"no shape {name}", f"one of {', '.join(SHAPES)}")
    return SHAPES[name].with_layers(num_layers) if num_layers else SHAPES[name]


def synthetic_policy(
    shape: str | Shape,
    *,
    num_layers: int = 0,
    lora_rank: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str,
    seed: int = 0,
    dense: str = "full",
    offload_embedding: bool = False,
    lora_dtype: torch.dtype = torch.float32,
    also_train: str = "none",
    scaled_init: bool = False,
) -> Policy:
    """A random model of `shape` on `device`, the same for equal arguments on equal devices.

    Memory peaks at the weights' bytes and one tensor more. lora_rank 0: no LoRA modules at all; otherwise B is random
    and not zero, so that the adapter changes what the model says. scaled_init: see `random_tensors`.

    Example:
        policy = synthetic_policy("gpt-oss-20b", num_layers=4, lora_rank=16, device="cuda")
    """
    shape = shape_of(shape, num_layers=num_layers) if isinstance(shape, str) else shape
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    config = shape.config()
    drawn = random_tensors(config, dtype=dtype, generator=generator, scaled_init=scaled_init)
    policy = Policy(
        assemble(
            config,
            drawn,
            experts="mxfp4",
            dtype=dtype,
            device=device,
            lora_rank=lora_rank,
            dense=dense,
            offload_embedding=offload_embedding,
        ),
        cast("PreTrainedTokenizerBase", StandInTokenizer(shape)),
        lora_rank=lora_rank,
        lora_alpha=LORA_ALPHA_PER_RANK * lora_rank,
        seed=seed,
        source=f"synthetic {shape.name}",
        checkpoint_digests={},
        lora_dtype=lora_dtype,
        also_train=also_train,
    )
    randomise_lora(policy, generator=generator)
    return policy


def randomise_lora(policy: Policy, *, generator: torch.Generator, std: float = LORA_B_STD) -> None:
    """Draws the adapter's B factors, which training begins with zeros for."""
    with torch.no_grad():
        for name, parameter in lora.lora_parameters(policy.model):
            if name.endswith(".b"):
                parameter.normal_(0.0, std, generator=generator)


def random_tensors(
    config: Any, *, dtype: torch.dtype, generator: torch.Generator, mxfp4: bool = True, scaled_init: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a gpt-oss of `config` with its name in a checkpoint, drawn one at a time on the generator's
    device.

    mxfp4: False draws dense experts [E, in, out] of the same spread. scaled_init: what is added to the residual stream
    is (2 * layers)^-0.5 as large (Radford et al. 2019, GPT-2; in MXFP4 to the next power of two). Without it a random
    model of many layers is chaotic: the last bit of one token is another answer 24 layers on.
    """
    exponent = -math.log2(2 * config.num_hidden_layers) / 2 if scaled_init else 0.0
    for name, shape in expected_shapes(config, mxfp4=mxfp4).items():
        tensor = random_tensor(name, shape, dtype=dtype, generator=generator)
        if scaled_init and name.endswith(("o_proj.weight", "o_proj.bias", "down_proj", "down_proj_bias")):
            tensor *= 2**exponent
        elif scaled_init and name.endswith("down_proj_scales"):
            tensor += round(exponent)
        yield name, tensor


def random_tensor(name: str, shape: tuple[int, ...], *, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One tensor of a checkpoint."""
    device = generator.device
    if name.endswith("_blocks"):
        return torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256, generator=generator)
    if name.endswith("_scales"):
        return torch.empty(shape, dtype=torch.uint8, device=device).random_(*SCALE_BYTES, generator=generator)
    if name.endswith(NORMS):
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(1.0, 0.1, generator=generator)
    drawn = torch.empty(shape, dtype=dtype, device=device)
    if name.endswith(("embed_tokens.weight", "sinks")):
        return drawn.normal_(0.0, 1.0, generator=generator)
    if name.endswith("bias"):
        return drawn.normal_(0.0, 0.02, generator=generator)
    if name.endswith(("gate_up_proj", "down_proj")):  # dense, [E, in, out]
        return drawn.normal_(0.0, 0.026, generator=generator)
    return drawn.normal_(0.0, shape[-1] ** -0.5, generator=generator)  # 0.0186 for 2880 inputs
