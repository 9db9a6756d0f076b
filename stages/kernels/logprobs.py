"""Log-probabilities of given tokens under a large vocabulary, without the [N, V] matrix ever existing whole.

Source of the idea: chunked cross-entropy (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models").
"""

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of float32 logits at once; 64 MB is 83 rows of gpt-oss's 201 088 tokens


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembedding, targets, temperature, chunk):
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        normalizers = torch.empty_like(logprobs)
        for rows in _chunks(hidden.shape[0], chunk):
            logits = (hidden[rows] @ unembedding.mT).float() / temperature
            lse = logits.logsumexp(-1)
            normalizers[rows] = lse
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - lse
            logits.sub_(lse[:, None])
            entropy[rows] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(hidden, unembedding, targets, normalizers)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropy):
        hidden, unembedding, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            logits = (hidden[rows] @ unembedding.mT).float() / ctx.temperature
            grad_logits = logits.sub_(normalizers[rows, None]).exp_().neg_()
            grad_logits.scatter_add_(-1, targets[rows, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits.mul_(grad_logprobs[rows, None] / ctx.temperature)
            grad_hidden[rows] = grad_logits.to(hidden.dtype) @ unembedding
        return grad_hidden, None, None, None, None


def token_logprobs(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Natural log-probability float32 [N] of each target, and the entropy float32 [N], in nats, of its distribution.

    hidden [N, D]; unembedding [V, D], frozen: no gradient reaches it; targets int64 [N]; logits are divided by
    `temperature`. Gradients flow through the log-probabilities, not through the entropy. Memory: `chunk` rows of logits
    (by default as many as fit CHUNK_BYTES), in forward and backward alike. Raises ValueError on a temperature that is
    not positive.
    """
    if not temperature > 0:
        raise ValueError(f"log-probabilities need a temperature above 0, got {temperature}")
    chunk = chunk or max(1, CHUNK_BYTES // (4 * unembedding.shape[0]))
    logprobs, entropy = _TokenLogprobs.apply(hidden, unembedding, targets, temperature, chunk)
    return logprobs, entropy


def _chunks(num_rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)]
