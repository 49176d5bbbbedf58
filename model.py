"""The Encoder: a stack of Llama-style blocks. One flag makes its attention causal or bidirectional.

Architecture and sizes are those of EuroBERT and of arXiv 2507.00994 (Table 1): RMSNorm, rotary
positions, grouped-query attention, SwiGLU, no biases, no dropout, an untied LM head. The weights
know nothing of the objective: `causal` is an argument of the call. So a model trained with causal
language modelling continues with masked language modelling unchanged.

Nothing is padded. A batch is tokens [T] and cu_seqlens [S+1]: S sequences laid end to end, and
every function here works on [T, ...]. In comments: T tokens, S sequences, N positions whose output
is needed, C width, H query heads, Hkv KV heads, D head dim, F FFN width, V vocabulary size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels


@dataclass
class ModelConfig:
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_ffn: int
    vocab_size: int
    # Tokens of the longest sequence in training. Positions are rotary, so no weight depends on it.
    block_size: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False  # the LM head shares the embedding's weight
    # The paper's models use none of these. Imported decoders may (hf.py).
    head_dim: int = 0  # 0: n_embd / n_head
    # Llama 3.1: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    rope_scaling: dict | None = None
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of each head of q and k

    def __post_init__(self):
        if self.head_dim == 0:
            self.head_dim = self.n_embd // self.n_head


SIZES = {
    # for tests
    "tiny": dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ffn=128),
    # minutes on two CPU cores
    "demo": dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=256, n_ffn=768),
    # a study on a CPU or one GPU (experiments/scales.py); "small" is nanoGPT's size for Shakespeare
    "micro": dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=128, n_ffn=384),
    "mini": dict(n_layer=2, n_head=3, n_kv_head=3, n_embd=192, n_ffn=576),
    "small": dict(n_layer=6, n_head=6, n_kv_head=6, n_embd=384, n_ffn=1024),
    "mid": dict(n_layer=8, n_head=8, n_kv_head=8, n_embd=512, n_ffn=1408),
    # SmolLM2-135M's; its LM head is tied (--tied=true)
    "135m": dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_ffn=1536, rope_theta=1e5),
    # the paper's three
    "210m": dict(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, n_ffn=3072),
    "610m": dict(n_layer=26, n_head=18, n_kv_head=6, n_embd=1152, n_ffn=4096),
    "1b": dict(n_layer=28, n_head=18, n_kv_head=6, n_embd=1728, n_ffn=5120),
}


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):  # [..., width] -> the same shape
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary(cu_seqlens, T, c):
    """cos and sin of every token's rotation, fp32 [T, 1, D/2] each. Each sequence counts from 0."""
    token = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, token.int(), right=True) - 1  # [T]
    position = (token - cu_seqlens[sequence]).float()  # [T]
    exponent = torch.arange(0, c.head_dim, 2, device=token.device).float() / c.head_dim  # [D/2]
    frequency = c.rope_theta ** (-exponent)  # [D/2]
    if c.rope_scaling:
        # Llama 3.1: low frequencies are divided by `factor`, high ones are kept, and those between
        # are interpolated. turns: full rotations within the original context.
        scaling = c.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        ramp = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided, 1: kept
        frequency = frequency * (ramp + (1 - ramp) / scaling["factor"])
    angle = (position[:, None] * frequency)[:, None, :]  # [T, 1, D/2]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (i, i + D/2), as Llama does, in fp32. x [T, H, D] -> [T, H, D]"""
    a, b = x.chunk(2, dim=-1)  # [T, H, D/2] each
    a = a.float()
    b = b.float()
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    # Cast before joining: then only x's dtype is written to memory, not fp32.
    return torch.cat([rotated_a.to(x.dtype), rotated_b.to(x.dtype)], dim=-1)


def select_rows(x, positions):
    """Return x [T, C] itself if positions is None, else its rows at these positions, [N, C]."""
    if positions is None:
        return x
    return x.index_select(0, positions)


class Attention(nn.Module):
    def __init__(self, c, impl):
        super().__init__()
        self.impl = impl
        # q, k and v come from one matrix. How many heads each of them has:
        self.head_counts = (c.n_head, c.n_kv_head, c.n_kv_head)
        self.qkv = nn.Linear(c.n_embd, sum(self.head_counts) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, cu_seqlens, causal, positions=None):
        qkv = self.qkv(x).unflatten(-1, (sum(self.head_counts), -1))  # [T, H + 2 Hkv, D]
        q, k, v = qkv.split(self.head_counts, dim=1)  # [T, H, D], [T, Hkv, D] x 2
        # Under autocast q_norm returns fp32. The kernels need q, k and v in one dtype.
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        y = kernels.attention(q, k, v, cu_seqlens, causal, self.impl)  # [T, H, D]
        return self.out(select_rows(y.flatten(1), positions))  # [T, C] or [N, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Linear(c.n_embd, 2 * c.n_ffn, bias=False)
        self.down = nn.Linear(c.n_ffn, c.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [T, F] each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c, impl):
        super().__init__()
        self.norm_1 = RMSNorm(c.n_embd, c.norm_eps)
        self.attention = Attention(c, impl)
        self.norm_2 = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cu_seqlens, causal, positions=None):
        residual = select_rows(x, positions)
        x = residual + self.attention(self.norm_1(x), cos, sin, cu_seqlens, causal, positions)
        return x + self.mlp(self.norm_2(x))


def initialise(module):
    """Draw the weights of linear layers and embeddings with a standard deviation of 0.02; set biases to 0."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)
        if isinstance(m, nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


class Encoder(nn.Module):
    def __init__(self, config, attention="auto", checkpoint_activations=False):
        """An Encoder with random weights: normal with standard deviation 0.02, and 1 in the norms.

        config: ModelConfig
        attention: "auto" or a name in kernels.ATTENTION
        checkpoint_activations: keep only each block's input, and compute the rest again in the
            backward pass
        """
        super().__init__()
        c = config
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        impl = kernels.resolve(attention)
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, impl) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        # As in the paper's code, residual projections are not scaled down with depth.
        initialise(self)
        if c.tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens, cu_seqlens, causal, positions=None):
        """Compute the hidden states after the final norm, [T, C].

        tokens [T] int64; cu_seqlens [S+1] int32; causal: bool

        With positions [N] int64 only the hidden states there are computed, [N, C]. After the last
        attention no token looks at another, so what follows it (its output, the MLP, the norm) runs
        only where the loss is. That saves 6 % of a step at 6 layers and 40 % masking.

        There are no logits here: kernels.linear_cross_entropy(hidden, self.lm_head.weight, targets)
        makes them a chunk at a time.
        """
        cos, sin = rotary(cu_seqlens, tokens.shape[0], self.config)
        x = self.embedding(tokens)  # [T, C]
        for block in self.blocks[:-1]:
            if self.checkpoint_activations and torch.is_grad_enabled():
                options = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, cos, sin, cu_seqlens, causal, **options)
            else:
                x = block(x, cos, sin, cu_seqlens, causal)
        # The last block is never checkpointed: the backward pass begins with it, and would compute
        # its activations again right away.
        x = self.blocks[-1](x, cos, sin, cu_seqlens, causal, positions)  # [T, C] or [N, C]
        return self.norm(x)

    def logits(self, hidden):
        """hidden [N, C] -> [N, V], all at once: to look at a few positions, not for training."""
        return self.lm_head(hidden)

    def compile(self):
        """torch.compile block by block, in place.

        All layers but the last share one graph for each mask, so the compiler sees two blocks, not
        n_layer of them. And DDP gets gradients layer by layer, so it can send them while the
        backward pass goes on.
        """
        # A block has 2 masks x (all or some positions) x (training or not) graphs, and a few more
        # for other shapes.
        limit = max(32, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.recompile_limit = limit
        for block in self.blocks:
            block.compile(dynamic=False)

    def num_parameters(self):
        """Count the parameters.

        -> {"body": those of the blocks and the final norm, "encoder": with the embedding, which is
        how the paper counts its sizes, "total": with the LM head, too}
        """
        total = sum(p.numel() for p in self.parameters())
        head = 0 if self.config.tied else self.lm_head.weight.numel()
        encoder = total - head
        return {"body": encoder - self.embedding.weight.numel(), "encoder": encoder, "total": total}

    def flops(self, lengths, num_targets, causal):
        """Count the FLOPs of the matrix products of one training step.

        lengths: [S] ints, the tokens in each sequence; num_targets: the positions with a target

        The backward pass costs twice the forward pass. An embedding look-up is not a product.
        """
        lengths = [int(length) for length in lengths]

        # Weights that multiply every token, and those that multiply only positions with a target:
        # all that follows the last attention.
        last = self.blocks[-1]
        linears_at_targets = [last.attention.out, last.mlp.gate_up, last.mlp.down, self.lm_head]
        weights_at_targets = sum(m.weight.numel() for m in linears_at_targets)
        linears = [m for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        all_weights = sum(m.weight.numel() for m in [*linears, self.lm_head])
        weights_everywhere = all_weights - weights_at_targets

        # Pairs of a query and a key: all L^2 of a sequence, or the L(L+1)/2 that the causal mask
        # leaves.
        pairs = 0
        for length in lengths:
            pairs += length * (length + 1) // 2 if causal else length * length

        # A multiplication and an addition are 2 FLOPs. For each pair and head, attention does D of
        # them for q k and D for the weight times v.
        c = self.config
        attention = 4 * c.n_layer * c.n_head * c.head_dim * pairs
        forward = 2 * weights_everywhere * sum(lengths) + attention + 2 * weights_at_targets * num_targets
        return 3 * forward


# ---- heads for fine-tuning: new weights on top of an Encoder's hidden states


def segment_mean(hidden, cu_seqlens):
    """Mean over each packed sequence, in fp32; an empty sequence gives zeros.

    hidden [T, C], cu_seqlens [S+1] -> [S, C]
    """
    return torch.segment_reduce(hidden.float(), "mean", lengths=cu_seqlens.diff().long(), initial=0.0)


class SequenceHead(nn.Module):
    """One label per sequence: mean, dense, GELU, linear.

    This is the head of Hugging Face's EuroBertForSequenceClassification with
    classifier_pooling="mean", so that a fine-tuned model can be exported as one. The paper's code
    does not tell whether its head has the dense layer.
    """

    def __init__(self, width, n_labels):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.classifier = nn.Linear(width, n_labels)
        initialise(self)

    def forward(self, hidden, cu_seqlens):  # [T, C] -> [S, labels]
        mean = segment_mean(hidden, cu_seqlens)  # [S, C]
        return self.classifier(F.gelu(self.dense(mean)))


class TokenHead(nn.Module):
    """One label per token, or the start and end of an answer: one linear layer.

    This is the head of Hugging Face's EuroBertForTokenClassification.
    """

    def __init__(self, width, n_labels):
        super().__init__()
        self.classifier = nn.Linear(width, n_labels)
        initialise(self)

    def forward(self, hidden, _cu_seqlens):  # [T, C] -> [T, labels]
        return self.classifier(hidden)
