"""Transformers on tokens: encoders, decoders, and what their feed-forward layers and norms look like."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net, several, tokens
from .vision import SeparateAttention


class BertLayer(nn.Module):
    """Post-LN attention and feed-forward."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.norm1 = SeparateAttention(dim), nn.LayerNorm(dim, eps=1e-12)
        self.intermediate, self.output = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.attention(x) + x)
        return self.norm2(self.output(F.gelu(self.intermediate(x))) + x)


class Bert(nn.Module):
    """Word, position and type embeddings, post-LN layers, a pooler; the word embedding is the output head too."""

    def __init__(self, dim: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.position_embeddings, self.token_type_embeddings = nn.Embedding(16, dim), nn.Embedding(2, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(0.1)
        self.layers = nn.ModuleList([BertLayer(dim), BertLayer(dim)])
        self.pooler, self.classifier = nn.Linear(dim, dim), nn.Linear(dim, 3)
        self.decoder = nn.Linear(dim, vocabulary)
        self.decoder.weight = self.word_embeddings.weight
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        position_ids = self.position_ids[:, : input_ids.size(1)]
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        x = self.dropout(self.norm(x + self.token_type_embeddings(torch.zeros_like(input_ids))))
        for layer in self.layers:
            x = layer(x)
        return self.decoder(x), self.classifier(torch.tanh(self.pooler(x[:, 0])))


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class GPT2Block(nn.Module):
    """Fused projection split in three, causal mask in a buffer, tanh-GELU by hand."""

    def __init__(self, dim: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads, self.split_size = heads, dim
        self.register_buffer("mask", torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions))
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = Conv1D(3 * dim, dim), Conv1D(dim, dim)
        self.c_fc, self.mlp_proj = Conv1D(2 * dim, dim), Conv1D(dim, 2 * dim)

    def attend(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.split_size, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_1(x))
        h = self.c_fc(self.ln_2(x))
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return x + self.mlp_proj(h)


class GPT2(nn.Module):
    """A decoder whose output head is tied to the embedding."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, dim), nn.Embedding(16, dim)
        self.h = nn.ModuleList([GPT2Block(dim, 4, 16), GPT2Block(dim, 4, 16)])
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, 50, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RMSNorm(nn.Module):
    """Root mean square by hand, in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotary positions applied to `x`, halves rotated."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class LlamaLayer(nn.Module):
    """Grouped-query attention with rotary positions, gated SiLU feed-forward."""

    def __init__(self, dim: int, heads: int, kv_heads: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.down_proj = nn.Linear(2 * dim, dim, bias=False)
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim))

    def repeat_kv(self, x: Tensor) -> Tensor:
        b, h, t, d = x.shape
        repeats = self.heads // self.kv_heads
        return x[:, :, None, :, :].expand(b, h, repeats, t, d).reshape(b, h * repeats, t, d)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        angles = torch.outer(torch.arange(t, device=x.device).float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        q, k = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
        y = F.scaled_dot_product_attention(q, self.repeat_kv(k), self.repeat_kv(v), is_causal=True)
        return self.o_proj(y.transpose(1, 2).contiguous().view(b, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    """Embedding, layers, norm, head."""

    def __init__(self, norm: type[nn.Module], *, dim: int = 32, kv_heads: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, dim)
        self.layers = nn.ModuleList(LlamaLayer(dim, 4, kv_heads, norm) for _ in range(2))
        self.norm, self.lm_head = norm(dim), nn.Linear(dim, 50, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class GroupedQueries(nn.Module):
    """Keys and values repeated by repeat_interleave, in a parallel block (GPT-J): attention and MLP read one norm."""

    def __init__(self, dim: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.embed, self.norm = nn.Embedding(50, dim), nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.wo, self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        b, t, _ = h.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = self.wqkv(h).split(sizes, dim=-1)
        q = q.view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k, v = (u.view(b, t, self.kv_heads, self.head_dim).transpose(1, 2) for u in (k, v))
        k, v = (torch.repeat_interleave(u, self.heads // self.kv_heads, dim=1) for u in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        return self.out(x + self.wo(y) + self.fc2(F.gelu(self.fc1(h))))


class MultiQuery(nn.Module):
    """One key and one value for all query heads, by broadcasting."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.embed = nn.Embedding(50, dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * self.head_dim, bias=False)
        self.to_out, self.norm, self.head = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.Linear(dim, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, _ = x.shape
        q = self.to_q(x).reshape(b, n, self.heads, self.head_dim).permute(0, 2, 1, 3)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        sim = torch.einsum("bhid,bjd->bhij", q, k) * self.head_dim**-0.5
        out = torch.einsum("bhij,bjd->bhid", sim.softmax(dim=-1), v)
        x = x + self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))
        return self.head(self.norm(x).mean(1))


class T5Attention(nn.Module):
    """Unscaled attention with an inner width of its own; an optional bias, keys from another sequence."""

    def __init__(self, dim: int, heads: int, d_kv: int) -> None:
        super().__init__()
        self.n_heads, self.d_kv, self.inner_dim = heads, d_kv, heads * d_kv
        self.q, self.k, self.v = (nn.Linear(dim, self.inner_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(self.inner_dim, dim, bias=False)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        batch = x.shape[0]
        q = self.q(x).view(batch, -1, self.n_heads, self.d_kv).transpose(1, 2)
        k = self.k(memory).view(batch, -1, self.n_heads, self.d_kv).transpose(1, 2)
        v = self.v(memory).view(batch, -1, self.n_heads, self.d_kv).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(3, 2))
        if bias is not None:
            scores = scores + bias
        y = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        return self.o(y.transpose(1, 2).contiguous().view(batch, -1, self.inner_dim))


class T5(nn.Module):
    """Encoder and decoder, relative bias from an embedding, RMSNorm, ReLU feed-forward, tied scaled head."""

    def __init__(self, dim: int = 32, heads: int = 4, d_kv: int = 8) -> None:
        super().__init__()
        self.shared, self.bias = nn.Embedding(50, dim), nn.Embedding(31, heads)
        self.encode, self.decode = T5Attention(dim, heads, d_kv), T5Attention(dim, heads, d_kv)
        self.cross = T5Attention(dim, heads, d_kv)
        self.wi, self.wo = (
            nn.ModuleList(nn.Linear(dim, 48, bias=False) for _ in range(2)),
            nn.ModuleList(nn.Linear(48, dim, bias=False) for _ in range(2)),
        )
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(7))
        self.scale = dim**-0.5

    def relative(self, length: int, device: torch.device) -> Tensor:
        position = torch.arange(length, device=device)
        return self.bias(position[None, :] - position[:, None] + 15).permute([2, 0, 1]).unsqueeze(0)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        x, y = self.shared(input_ids), self.shared(decoder_input_ids)
        h = self.norms[0](x)
        x = x + self.encode(h, h, self.relative(x.shape[1], x.device))
        x = x + self.wo[0](F.relu(self.wi[0](self.norms[1](x))))
        x = self.norms[2](x)
        h = self.norms[3](y)
        future = torch.full((y.shape[1], y.shape[1]), -1e9, device=y.device).triu(1)
        y = y + self.decode(h, h, self.relative(y.shape[1], y.device) + future)
        y = y + self.cross(self.norms[4](y), x)
        y = y + self.wo[1](F.relu(self.wi[1](self.norms[5](y))))
        return F.linear(self.norms[6](y) * self.scale, self.shared.weight)


class EncoderLayers(nn.Module):
    """torch's own encoder layers over embedded tokens."""

    def __init__(self, *, norm_first: bool, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, dim), nn.Parameter(torch.zeros(1, 12, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 48, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.fc = nn.Linear(dim, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[:, : ids.shape[1]]
        return self.fc(self.encoder(x).mean(dim=1))


class SequenceFirst(nn.Module):
    """nn.MultiheadAttention with the sequence first, a mask, and a decoder layer of torch."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.inp = nn.Linear(12, dim)
        self.attn, self.norm = nn.MultiheadAttention(dim, 4), nn.LayerNorm(dim)
        self.decoder = nn.TransformerDecoderLayer(dim, 4, 48, dropout=0.0)
        self.out = nn.Linear(dim, 6)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src, tgt = self.inp(src).transpose(0, 1), self.inp(tgt).transpose(0, 1)
        mask = torch.triu(torch.ones(src.size(0), src.size(0), dtype=torch.bool, device=src.device), diagonal=1)
        src = self.norm(src + self.attn(src, src, src, attn_mask=mask, need_weights=False)[0])
        return self.out(self.decoder(tgt, src)).transpose(0, 1)


TOKENS = tokens(50, 8, other=11)
NETS = (
    net("bert", Bert, TOKENS, "three embeddings, post-LN, tied output head, pooler"),
    net("gpt2", GPT2, TOKENS, "transposed weights (Conv1D), causal mask in a buffer, tied embedding"),
    net("llama", lambda: Llama(RMSNorm), TOKENS, "grouped queries by expand, rotary, gated SiLU, RMSNorm by hand"),
    net("llama_rmsnorm", lambda: Llama(nn.RMSNorm, kv_heads=1), TOKENS, "nn.RMSNorm, one key-value head expanded"),
    net("grouped_queries", GroupedQueries, TOKENS, "uneven split, repeat_interleave, parallel attention and MLP"),
    net("multi_query", MultiQuery, TOKENS, "one key and value broadcast over the query heads"),
    net(
        "t5",
        T5,
        several(TOKENS, tokens(50, 6, other=7, seed=1)),
        "cross-attention, relative bias, inner width, tied head",
    ),
    net("encoder_layer", lambda: EncoderLayers(norm_first=False), TOKENS, "nn.TransformerEncoderLayer, post-LN"),
    net("encoder_layer_prenorm", lambda: EncoderLayers(norm_first=True), TOKENS, "nn.TransformerEncoderLayer, pre-LN"),
    net(
        "decoder_layer",
        SequenceFirst,
        several(images(8, 12, other=(10, 12)), images(6, 12, other=(7, 12), seed=1)),
        "nn.MultiheadAttention sequence first, nn.TransformerDecoderLayer",
    ),
)
