"""Read a set of words with multi-head attention and a CLS word, and tell which words it looked at.

A plain pre-norm transformer (Vaswani et al., arXiv 1706.03762; CLS as in Dosovitskiy et al., arXiv
2010.11929). The last block computes the CLS word alone, for nothing else is read from it. No statistic of
the batch: rows do not know of each other.

What CLS looked at is the mean over blocks, not the last block's alone: there every word has read every
other, and CLS finds what it needs wherever it was put down, on empty background too. In the first block
it still looks at pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each beside a shortcut.

    Args:
        width: D, a multiple of ``heads``.
        heads: of the attention.
        ratio: hidden width of the perceptron, over D.
    """

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Let all words read all: [B, N, D], and the first word's attention, mean of heads, [B, N]."""
        q, k, v = self._split(self.qkv(self.norm1(x)), 3)
        with torch.no_grad():  # it is only ever a target
            attention = _attention(q[:, :, :1], k).mean(dim=1)[:, 0]
        return self._finish(x, F.scaled_dot_product_attention(q, k, v)), attention

    def read_first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Let the first word alone read all: it [B, 1, D], its attention [B, N]; as ``forward`` has them."""
        width = x.shape[-1]
        normed = self.norm1(x)
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._split(F.linear(normed[:, :1], weight[:width], bias[:width]), 1)
        k, v = self._split(F.linear(normed, weight[width:], bias[width:]), 2)
        attention = _attention(q, k)
        return self._finish(x[:, :1], attention @ v), attention.detach().mean(dim=1)[:, 0]

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        return x.reshape(b, n, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _finish(self, x: Tensor, read: Tensor) -> Tensor:
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class WordReader(nn.Module):
    """Words -> class logits.

    Args:
        word_size: values of a word, its place included.
        classes: C.
        width: D.
        depth: blocks, at least 1.
        heads: of each block.
        ratio: of each block's perceptron.
    """

    def __init__(self, word_size: int, classes: int, width: int, depth: int, heads: int, ratio: int):
        super().__init__()
        self.embed = nn.Linear(word_size, width)
        self.cls = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.cls, std=0.02)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, C] and CLS's attention to words [B, K, word_size]: [B, K], rows sum to 1.

        The attention is the mean of blocks and heads, without what CLS gave itself, and without gradient.
        """
        x = self.embed(words)
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        looks = []
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            x, attention = block(x) if number < len(self.blocks) else block.read_first(x)
            looks.append(attention[:, 1:].float())
        seen = torch.stack(looks).mean(dim=0)
        return self.head(self.norm(x[:, 0])), seen / seen.sum(dim=1, keepdim=True).clamp_min(1e-12)
