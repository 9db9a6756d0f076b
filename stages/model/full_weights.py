"""Small weights trained in full beside the adapter: attention sinks [H], routers' weights [E, D] and biases [E].

They are float32 while they train, whatever the model's dtype: between 2 and 4 bfloat16 has steps of 0.016, and an
optimizer's are far smaller. Whoever reads them computes with them in float32 in any case. Their memory never moves,
so that CUDA graphs captured before an update read the values after it; the checkpoint's values are kept as the base.

Does not cover norms, biases, and the embedding.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

PARTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "sinks": ("self_attn.sinks",),
    "router": ("mlp.router.weight", "mlp.router.bias"),
    "sinks+router": ("self_attn.sinks", "mlp.router.weight", "mlp.router.bias"),
}


class FullWeights:
    """The chosen weights of every layer as float32 parameters that ask for gradients, and what they were."""

    def __init__(self, model: nn.Module, which: str) -> None:
        """Replaces the parameters that update.also_train=`which` names; their values stay the same."""
        self._found: list[tuple[str, nn.Parameter]] = []
        self._base: list[Tensor] = []
        for index in range(len(model.model.layers)):  # type: ignore[union-attr, arg-type]
            for part in PARTS[which]:
                name = f"model.layers.{index}.{part}"
                owner, _, attribute = name.rpartition(".")
                module = model.get_submodule(owner)
                base: Tensor = getattr(module, attribute).detach()
                parameter = nn.Parameter(base.to(torch.float32, copy=True))
                setattr(module, attribute, parameter)
                self._found.append((name, parameter))
                self._base.append(base)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names, which are those of a checkpoint, and parameters in the model's order."""
        return list(self._found)

    @property
    def base_bytes(self) -> int:
        """What the base takes: the weights' own bytes where they do not train."""
        return sum(base.nbytes for base in self._base)

    @torch.no_grad()
    def reset(self) -> None:
        """The checkpoint's values again."""
        for (_, parameter), base in zip(self._found, self._base, strict=True):
            parameter.copy_(base)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model has the checkpoint's values."""
        trained = [parameter.detach().clone() for _, parameter in self._found]
        self.reset()
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), values in zip(self._found, trained, strict=True):
                    parameter.copy_(values)
