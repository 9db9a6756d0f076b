"""AdamW over all that trains, in 32 bits or, on a card, with bitsandbytes' 8-bit moments; and what an update leaves of
it for the next.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stages.config import UpdateConfig, UserError
from stages.model.files import save_tensors
from stages.model.nf4 import bitsandbytes
from stages.model.policy import Policy

# Sources: Loshchilov and Hutter 2019 (AdamW); Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".
EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def moments_to_come(policy: Policy, update: UpdateConfig, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments that the optimizer's next step will make; it makes a parameter's with its first."""
    of_number = 2 if update.optimizer in EIGHT_BIT else 8
    return sum(of_number * each.numel() for _, each in policy.parameters() if not optimizer.state.get(each))


def make_optimizer(policy: Policy, update: UpdateConfig) -> torch.optim.Optimizer:
    """The optimizer update.optimizer names over the policy's parameters, which get gradients from now on.

    Weights trained in full do not decay: that would draw them to zero, not to the checkpoint's values. Raises
    UserError for 8 bits without a card, or without bitsandbytes.
    """
    parameters = [parameter for _, parameter in policy.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    full = [parameter for _, parameter in policy.full_weights.parameters()]
    groups: list[dict[str, Any]] = [{"params": parameters[: len(parameters) - len(full)]}]
    if full:
        groups.append({"params": full, "weight_decay": 0.0})
    settings: dict[str, Any] = {"lr": update.learning_rate, "weight_decay": update.weight_decay}
    if update.optimizer == "adamw":
        fused = policy.device.type == "cuda"
        return torch.optim.AdamW(groups, **settings, foreach=False, fused=fused)
    if policy.device.type != "cuda":
        raise UserError(f"update.optimizer={update.optimizer} needs a CUDA card", "use update.optimizer=adamw here")
    try:
        bnb = bitsandbytes()
    except ImportError:
        raise UserError(
            f"update.optimizer={update.optimizer} needs bitsandbytes", "pip install bitsandbytes, or use adamw"
        ) from None
    kind = getattr(bnb.optim, EIGHT_BIT[update.optimizer])
    if not update.optimizer.startswith("paged"):
        kind = unwaiting(kind)
    made: torch.optim.Optimizer = kind(groups, **settings)
    return made


def unwaiting(kind: Any) -> Any:
    """bitsandbytes' optimizer without its wait for the card after each of the adapter's hundreds of tensors, which only
    paged moments need.
    """

    class Unwaiting(kind):
        initialized: bool

        @torch.no_grad()
        def step(self) -> None:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
                    self.update_step(group, parameter, group_index, index)

    return Unwaiting


def make_scaler(policy: Policy) -> torch.amp.GradScaler:
    """Loss scaling (Micikevicius et al. 2018) for float16, where small gradients vanish; off in other types."""
    return torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)


def save_optimizer(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    step: int,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Writes the optimizer's tensors beside the adapter, and in state.json what they belong to.

    There is no generator state to keep: what is random in an update is derived from the seed and the iteration.
    """
    tensors = {
        f"{name}.{key}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for name, parameter in policy.parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor | int | float)
    }
    save_tensors(tensors, folder / "optimizer.safetensors")
    state: dict[str, Any] = {"policy_version": policy.version, "optimizer_steps": step}
    if scaler is not None and scaler.is_enabled():
        state["loss_scale"] = scaler.state_dict()
    (folder / "state.json").write_text(json.dumps(state, sort_keys=True) + "\n")


def restore_optimizer(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> int:
    """Puts back what `save_optimizer` wrote; returns how many optimizer steps there have been."""
    tensors = load_file(folder / "optimizer.safetensors")
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    for name, parameter in policy.parameters():
        found = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if not found:
            continue
        # AdamW counts its steps in a tensor (on the card where it is fused), bitsandbytes in a number.
        counted = found.pop("step")
        fused = bool(optimizer.param_groups[0].get("fused"))
        step: Any = int(counted) if eight_bit else counted.to(parameter.device if fused else "cpu")
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in found.items()} | {"step": step}
    state = json.loads((folder / "state.json").read_text())
    if scaler is not None and "loss_scale" in state:
        scaler.load_state_dict(state["loss_scale"])
    return int(state["optimizer_steps"])
