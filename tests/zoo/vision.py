"""Transformers and MLPs on images: every way to write attention over patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net


class FusedAttention(nn.Module):
    """One linear for q, k and v, unpacked by reshape and permute; softmax by hand or in one call."""

    def __init__(self, dim: int, num_heads: int = 4, *, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.scale = (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.fused else (qkv[0], qkv[1], qkv[2])
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            attn = (q @ k.transpose(-2, -1)) * self.scale
            x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class SeparateAttention(nn.Module):
    """Three linears, heads by view and permute with the numbers of the constructor."""

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_attention_heads = num_heads
        self.attention_head_size = dim // num_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query, self.key = nn.Linear(dim, self.all_head_size), nn.Linear(dim, self.all_head_size)
        self.value, self.dense = nn.Linear(dim, self.all_head_size), nn.Linear(dim, dim)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_shape).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.transpose_for_scores(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.attention_head_size**0.5
        context = torch.matmul(nn.functional.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(context.view((*context.size()[:-2], self.all_head_size)))


class EinsumAttention(nn.Module):
    """to_qkv, chunk, view into heads, einsum: the idiom of lucidrains."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.to_qkv, self.to_out = nn.Linear(dim, heads * dim_head * 3, bias=False), nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in qkv)
        attn = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    """Two linears with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-LN attention and MLP, with optional layer scale."""

    def __init__(self, dim: int, attn: nn.Module, *, scaled: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 2 * dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(2, dim)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is not None:
            x = x + self.gamma[0] * self.attn(self.norm1(x))
            return x + self.gamma[1] * self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, class token (and a distillation token), positions, blocks, head(s)."""

    def __init__(
        self, attention: type[nn.Module], *, dim: int = 32, extra: int = 1, pool: str = "token", **options: bool
    ) -> None:
        super().__init__()
        self.extra, self.pool = extra, pool
        scaled = options.pop("scaled", False)
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if extra == 2 else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 16 + extra, dim))
        self.blocks = nn.ModuleList(Block(dim, attention(dim, **options), scaled=scaled) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)
        self.head_dist = nn.Linear(dim, 10) if extra == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        B = x.shape[0]
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        added = [self.cls_token.expand(B, -1, -1)] if self.extra else []
        if self.dist_token is not None:
            added.append(self.dist_token.expand(B, -1, -1))
        x = torch.cat((*added, x), dim=1) + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        x = self.norm(x)
        if self.head_dist is not None:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0] if self.pool == "token" else x.mean(dim=1))


def window_partition(x: Tensor, window: int) -> Tensor:
    """Return (windows of all images, window, window, C)."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, C)


class WindowAttention(nn.Module):
    """Attention within windows, with a table of relative position biases."""

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (C // self.num_heads) ** -0.5, qkv[1], qkv[2]
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(N, N, -1).permute(2, 0, 1).contiguous()
        attn = F.softmax(q @ k.transpose(-2, -1) + bias.unsqueeze(0), dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B_, N, C))


class SwinBlock(nn.Module):
    """Windows, every second time shifted by a roll."""

    def __init__(self, dim: int, heads: int, *, window: int = 4, shift: int = 0) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, window, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        shortcut = x
        x = self.norm1(x)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window).view(-1, self.window * self.window, C)
        windows = self.attn(windows).view(-1, H // self.window, W // self.window, self.window, self.window, C)
        windows = windows.view(B, H // self.window, W // self.window, self.window, self.window, C)
        x = windows.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, C)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Two shifted blocks, patch merging, one block."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed, self.norm0 = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.block1, self.block2 = SwinBlock(dim, 2), SwinBlock(dim, 2, shift=2)
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)
        self.block3 = SwinBlock(2 * dim, 4)
        self.head = nn.Linear(2 * dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patch_embed(x).permute(0, 2, 3, 1))
        x = self.block2(self.block1(x))
        parts = [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]]
        x = self.reduction(self.norm(torch.cat(parts, -1)))
        return self.head(self.block3(x).mean(dim=(1, 2)))


class MixerBlock(nn.Module):
    """An MLP over the patches (transposed) and one over the channels."""

    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.token_mix = nn.LayerNorm(dim), Mlp(patches, 24)
        self.norm2, self.channel_mix = nn.LayerNorm(dim), Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))


class MlpMixer(nn.Module):
    """Patches by a convolution, mixer blocks, mean over the patches."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(16, dim), MixerBlock(16, dim))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class PoolFormer(nn.Module):
    """Pooling minus identity instead of attention, GroupNorm with one group, 1x1 convolutions, scales (C, 1, 1)."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.fc1, self.fc2 = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(dim))
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(dim))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm1(x)
        x = x + self.layer_scale_1.unsqueeze(-1).unsqueeze(-1) * (self.pool(y) - y)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        x = x + self.layer_scale_2[:, None, None] * y
        return self.head(x.mean([-2, -1]))


class CvT(nn.Module):
    """Convolutional projections to q, k and v; keys and values at half the resolution."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Conv2d(3, dim, 3, 2, 1)
        self.q = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1)
        )
        self.kv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 2, 1, groups=dim), nn.BatchNorm2d(dim), nn.Conv2d(dim, 2 * dim, 1)
        )
        self.out, self.head = nn.Conv2d(dim, dim, 1), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        q = self.q(x).view(b, self.heads, c // self.heads, h * w)
        k, v = self.kv(x).reshape(b, 2, self.heads, c // self.heads, -1).unbind(1)
        attn = torch.einsum("bhci,bhcj->bhij", q, k).mul((c // self.heads) ** -0.5).softmax(-1)
        y = torch.einsum("bhij,bhcj->bhci", attn, v).reshape(b, c, h, w)
        return self.head((x + self.out(y)).mean((2, 3)))


class NonLocal(nn.Module):
    """Self-attention over the pixels of a CNN (SAGAN): 1x1 convolutions, bmm, a learned scalar."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.query_conv, self.key_conv = nn.Conv2d(channels, 8, 1), nn.Conv2d(channels, 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.last = nn.Conv2d(channels, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        m_batchsize, C, width, height = x.size()
        query = self.query_conv(x).view(m_batchsize, -1, width * height).permute(0, 2, 1)
        key = self.key_conv(x).view(m_batchsize, -1, width * height)
        attention = torch.softmax(torch.bmm(query, key), dim=-1)
        value = self.value_conv(x).view(m_batchsize, -1, width * height)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(m_batchsize, C, width, height)
        return self.last(self.gamma * out + x).mean((2, 3))


class Detr(nn.Module):
    """A CNN's pixels, learned queries, cross-attention by nn.MultiheadAttention, two heads."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.backbone, self.input_proj = nn.Conv2d(3, 16, 4, stride=4), nn.Conv2d(16, dim, 1)
        self.query_embed = nn.Embedding(6, dim)
        self.cross, self.norm = nn.MultiheadAttention(dim, 4, batch_first=True), nn.LayerNorm(dim)
        self.class_embed, self.bbox_embed = (
            nn.Linear(dim, 5),
            nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, 4)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.input_proj(F.relu(self.backbone(x))).flatten(2).permute(0, 2, 1)
        query = self.query_embed.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        query = self.norm(query + self.cross(query, memory, memory)[0])
        return self.class_embed(query), self.bbox_embed(query).sigmoid()


PIXELS = images(3, 16, 16)
NETS = (
    net("vit", lambda: ViT(FusedAttention), PIXELS, "fused qkv by reshape and permute, class token, positions"),
    net("vit_manual", lambda: ViT(FusedAttention, fused=False, scaled=True), PIXELS, "softmax by hand, layer scale"),
    net("vit_separate", lambda: ViT(SeparateAttention), PIXELS, "separate q, k and v, heads by view"),
    net("vit_einsum", lambda: ViT(EinsumAttention, extra=0, pool="mean"), PIXELS, "chunk and einsum, mean pooling"),
    net("deit", lambda: ViT(FusedAttention, extra=2), PIXELS, "class and distillation tokens, two heads averaged"),
    net("swin", Swin, images(3, 16, 16, other=(3, 32, 32)), "shifted windows, relative position bias, patch merging"),
    net("mlp_mixer", MlpMixer, PIXELS, "an MLP over the transposed patches"),
    net(
        "poolformer",
        PoolFormer,
        images(3, 16, 16, other=(3, 24, 24)),
        "pooling as attention, GroupNorm(1), layer scale",
    ),
    net("cvt", CvT, images(3, 16, 16, other=(3, 24, 24)), "convolutional q, k and v on images"),
    net("non_local", NonLocal, images(3, 16, 16, other=(3, 12, 12)), "attention over pixels by bmm, a learned scalar"),
    net("detr", Detr, images(3, 16, 16, other=(3, 24, 24)), "learned queries, cross-attention, two heads"),
)
