"""What a forward pass gives the layer store comes back in backward, whatever passes came before."""

import pytest
import torch

from stages.trainer import LayerStore


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_was_put_comes_back_in_passes_of_any_size(device: str) -> None:
    store = LayerStore(torch.device(device))
    busy = torch.randn(4096 if device == "cuda" else 1, 4096, device=device)
    for tokens, count in ((3000, 12), (5000, 12), (10, 3), (5000, 1)):
        like = torch.empty(tokens, 288, device=device)
        given = [torch.randn(tokens, 288, device=device).half() for _ in range(count)]
        for unfinished in (True, False):
            store.begin(count, like=like, dtype=torch.float16)
            for index, tensor in enumerate(given[: count // 2 if unfinished else count]):
                store.place(index).copy_(tensor)
                store.put(index)
        taken: list[torch.Tensor] = []
        for index in reversed(range(count)):
            tensor = store.take(index)
            torch.mm(busy, busy.mT)  # the device comes to it later than the host asks for the next one
            taken.append(tensor.clone())
        for index, tensor in enumerate(reversed(taken)):
            assert torch.equal(tensor, given[index]), (tokens, index)
    store.close()
