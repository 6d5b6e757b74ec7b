"""The transformer that is measured: plain, and with hyper-connections written by hand."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.reference import post_ref, pre_ref
from mhc_compile.kernels.spec import SiteSpec

VOCABULARY = 256
_HEAD = 64


class Attention(nn.Module):
    """Norm and causal self-attention: the first branch of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.norm = width // _HEAD, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Norm and two products with GELU between: the second branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Pre-norm blocks without ends: two sites each."""

    def __init__(self, layers: int, width: int, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.branches = nn.ModuleList(
            branch for _ in range(layers) for branch in (Attention(width), MLP(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]; with ``checkpointed`` each pair of sites is."""

        def block(x: Tensor, attention: nn.Module, mlp: nn.Module) -> Tensor:
            x = x + attention(x)
            return x + mlp(x)

        for pair in zip(self.branches[::2], self.branches[1::2], strict=True):
            x = (
                checkpoint(block, x, *pair, use_reentrant=False)
                if self.checkpointed
                else block(x, *pair)
            )
        return x


class GPT(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, layers: int, width: int, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.blocks, self.norm = (
            Blocks(layers, width, checkpointed=checkpointed),
            nn.LayerNorm(width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, vocabulary]."""
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class ByHand(nn.Module):
    """`Blocks` with hyper-connections written out in torch, from the paper's equations."""

    def __init__(self, layers: int, width: int, streams: int) -> None:
        super().__init__()
        self.spec = SiteSpec(streams=streams)
        self.branches = Blocks(layers, width).branches
        self.sites = nn.ModuleList(
            nn.ParameterDict(initial_parameters(self.spec, width, index=index))
            for index in range(2 * layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        X = torch.stack([x] * self.spec.streams, -2)
        for branch, site in zip(self.branches, self.sites, strict=True):
            u, h_post, h_res = pre_ref(X, site["phi"], site["bias"], site["alpha"], self.spec)
            X = post_ref(X, branch(u), h_post, h_res, self.spec)
        return X.mean(-2)
