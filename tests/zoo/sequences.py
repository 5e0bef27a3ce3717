"""Signals and sequences: recurrent nets, one-dimensional convolutions, gates."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net, several, tokens


class LSTMClassifier(nn.Module):
    """Embedding, LSTM, last state."""

    def __init__(self, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(48 if bidirectional else 24, 5)
        self.bidirectional = bidirectional

    def forward(self, text: Tensor) -> Tensor:
        output, (hidden, _) = self.lstm(self.embedding(text))
        if self.bidirectional:
            return self.fc(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1))
        return self.fc(output[:, -1, :])


class GRUClassifier(nn.Module):
    """Linear input, two GRU layers from an explicit zero state, maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gru, self.fc = (
            nn.Linear(12, 16),
            nn.GRU(16, 24, num_layers=2, batch_first=True),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(2, x.size(0), 24, device=x.device)
        out, _ = self.gru(F.relu(self.inp(x)), h0)
        return self.fc(out.max(dim=1).values)


class CRNN(nn.Module):
    """Text recognition: convolutions, height merged into the channels, GRU over the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.rnn = nn.GRU(16 * 4, 16, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 1))
        b, c, h, w = x.size()
        x = x.permute(0, 3, 1, 2).contiguous().view(b, w, c * h)
        return self.fc(self.rnn(x)[0]).log_softmax(-1)


class SpeechCNN(nn.Module):
    """Raw audio: long strided one-dimensional convolutions (M5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 16, kernel_size=16, stride=4), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 32, kernel_size=3), nn.BatchNorm1d(32)
        self.fc1 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)


class WaveNet(nn.Module):
    """Dilated convolutions gated by tanh times sigmoid of two chunks; skips are summed."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=d) for d in (1, 2, 4))
        self.res = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(channels, 24, 1) for _ in range(3))
        self.end1, self.end2 = nn.Conv1d(24, 24, 1), nn.Conv1d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total: Tensor | int = 0
        for i, gate in enumerate(self.gates):
            dilation = 2**i
            a, b = gate(F.pad(x, (dilation, 0))).chunk(2, dim=1)
            h = torch.tanh(a) * torch.sigmoid(b)
            total = self.skip[i](h) + total
            x = x + self.res[i](h)
        return self.end2(F.relu(self.end1(F.relu(total))))


class TemporalBlock(nn.Module):
    """Two dilated convolutions, padded on both sides and chopped by a slice."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.chomp = 2 * dilation
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=self.chomp, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=self.chomp, dilation=dilation)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x)[:, :, : -self.chomp].contiguous())
        out = F.relu(self.conv2(out)[:, :, : -self.chomp].contiguous())
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    """Temporal blocks; the last time step is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(4, 16, 1), TemporalBlock(16, 16, 2))
        self.linear = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tcn(x)[:, :, -1])


class Conformer(nn.Module):
    """Half-step feed-forwards, attention, a convolution module with GLU, all over (batch, time, features)."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.ff1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 32), nn.SiLU(), nn.Linear(32, dim))
        self.attn, self.attn_norm = nn.MultiheadAttention(dim, 4, batch_first=True), nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.pointwise1, self.pointwise2 = nn.Conv1d(dim, 2 * dim, 1), nn.Conv1d(dim, dim, 1)
        self.depthwise, self.bn = nn.Conv1d(dim, dim, 5, padding=2, groups=dim), nn.BatchNorm1d(dim)
        self.ff2 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 32), nn.SiLU(), nn.Linear(32, dim))
        self.out_norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ff1(x)
        y = self.attn_norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = F.glu(self.pointwise1(self.norm(x).transpose(1, 2)), dim=1)
        x = x + self.pointwise2(F.silu(self.bn(self.depthwise(y)))).transpose(1, 2)
        x = x + 0.5 * self.ff2(x)
        return self.out(self.out_norm(x))


class TextCNN(nn.Module):
    """Parallel convolutions over embedded words, maximum over time, concatenated (Kim)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.convs = nn.ModuleList(nn.Conv2d(1, 12, (k, 16)) for k in (2, 3, 4))
        self.fc = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        parts = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        pooled = [F.max_pool1d(p, p.size(2)).squeeze(2) for p in parts]
        return self.fc(torch.cat(pooled, 1))


class Seq2Seq(nn.Module):
    """LSTM encoder and decoder with additive attention."""

    def __init__(self) -> None:
        super().__init__()
        self.src, self.tgt = nn.Embedding(50, 16), nn.Embedding(40, 16)
        self.encoder, self.decoder = nn.LSTM(16, 16, batch_first=True), nn.LSTM(16, 16, batch_first=True)
        self.W1, self.W2, self.v = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 1)
        self.out = nn.Linear(32, 40)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        memory, state = self.encoder(self.src(src))
        hidden, _ = self.decoder(self.tgt(tgt), state)
        energy = torch.tanh(self.W1(hidden).unsqueeze(2) + self.W2(memory).unsqueeze(1))
        weights = self.v(energy).squeeze(-1).softmax(-1)
        context = torch.bmm(weights, memory)
        return self.out(torch.cat([hidden, context], dim=-1))


class ElmanCell(nn.Module):
    """A recurrence written by hand: one cell applied at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.i2h, self.h2h, self.out = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i2h(x[:, t]) + self.h2h(h))
        return self.out(h)


class GatedFeedForward(nn.Module):
    """GLU, GEGLU and SwiGLU from one fused linear each."""

    def __init__(self, dim: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.inp = nn.Linear(12, dim)
        self.fused = nn.ModuleList(nn.Linear(dim, 2 * hidden) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.head = nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.out[0](F.glu(self.fused[0](self.norms[0](x)), dim=-1))
        h, gate = self.fused[1](self.norms[1](x)).chunk(2, dim=-1)
        x = x + self.out[1](h * F.gelu(gate))
        gate, h = torch.split(self.fused[2](self.norms[2](x)), 24, dim=-1)
        x = x + self.out[2](F.silu(gate) * h)
        return self.head(x)


class MixtureOfExperts(nn.Module):
    """Two experts, weighted by a soft gate, computed for all."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(12, dim), nn.Linear(dim, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, dim)) for _ in range(2))
        self.head = nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        weights = self.gate(x).softmax(dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return self.head(x + (outputs * weights.unsqueeze(-2)).sum(-1))


class LinearAttention(nn.Module):
    """Kernelised attention: keys and values are multiplied first, softmax over features and over positions."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.inp, self.to_qkv, self.to_out = (
            nn.Linear(12, dim),
            nn.Linear(dim, 3 * dim, bias=False),
            nn.Linear(dim, dim),
        )
        self.head = nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.heads, c // self.heads) for t in self.to_qkv(x).chunk(3, -1))
        context = torch.einsum("bnhd,bnhe->bhde", k.softmax(dim=1), v)
        out = torch.einsum("bnhd,bhde->bnhe", q.softmax(dim=-1), context)
        return self.head(x + self.to_out(out.reshape(b, n, c)))


class SelectiveScan(nn.Module):
    """A gated state-space block (Mamba-like): split, causal depthwise convolution, decays, cumulative sum."""

    def __init__(self, dim: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.inp, self.in_proj, self.out_proj = nn.Linear(12, dim), nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)
        self.conv1d = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.dt, self.D = nn.Linear(inner, inner), nn.Parameter(torch.ones(inner))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        length = x.shape[1]
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., :length].transpose(1, 2))
        delta = torch.sigmoid(self.dt(u))
        y = torch.cumsum(delta * u, dim=1) / torch.arange(1, length + 1).view(1, -1, 1) + self.D * u
        return self.head(x + self.out_proj(y * F.silu(z)))


class Stepwise(nn.Module):
    """A decoder of nn.GRUCell that looks at an encoder's states, from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(50, 16), nn.GRU(16, 12, batch_first=True)
        self.cell, self.look, self.last = nn.GRUCell(28, 12), nn.Linear(12, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory, _ = self.encoder(self.embed(x))
        h, made = torch.zeros_like(memory[:, 0]), []
        for step in range(3):
            weight = (self.look(memory) @ h.unsqueeze(-1)).softmax(1)
            seen = (weight.transpose(1, 2) @ memory).squeeze(1)
            h = self.cell(torch.cat([self.embed(x[:, step]), seen], -1), h)
            made.append(self.last(torch.cat([h, seen], -1)))
        return torch.stack(made, 1)


TOKENS = tokens(50, 9, other=12)
FRAMES = images(10, 12, other=(14, 12))
NETS = (
    net("lstm", LSTMClassifier, TOKENS, "nn.LSTM over embeddings, last output"),
    net(
        "lstm_bidirectional", lambda: LSTMClassifier(bidirectional=True), TOKENS, "both directions' states concatenated"
    ),
    net("gru", GRUClassifier, FRAMES, "two-layer nn.GRU with an explicit state, maximum over time"),
    net("crnn", CRNN, images(1, 16, 24, other=(1, 16, 32)), "height merged into the channels, then a GRU"),
    net("speech_cnn", SpeechCNN, images(1, 128, other=(1, 160)), "one-dimensional convolutions on audio"),
    net("wavenet", WaveNet, images(1, 32, other=(1, 40)), "tanh times sigmoid of two chunks, summed skips"),
    net("tcn", TCN, images(4, 20, other=(4, 26)), "causal convolutions chopped by a slice"),
    net("decoder_cells", Stepwise, TOKENS, "GRU cells step by step, attention over an encoder"),
    net("conformer", Conformer, images(10, 16, other=(13, 16)), "GLU and depthwise convolution between transposes"),
    net("text_cnn", TextCNN, TOKENS, "parallel convolutions over whole embeddings, concatenated"),
    net(
        "seq2seq", Seq2Seq, several(TOKENS, tokens(40, 6, other=7, seed=1)), "LSTM states handed on, additive attention"
    ),
    net("elman", ElmanCell, images(5, 8), "a recurrence by hand: one cell at every step"),
    net("gated_feed_forward", GatedFeedForward, FRAMES, "GLU, GEGLU and SwiGLU from fused linears"),
    net("mixture_of_experts", MixtureOfExperts, FRAMES, "two experts stacked and weighted by a soft gate"),
    net("linear_attention", LinearAttention, FRAMES, "softmax over features and positions, keys times values first"),
    net("selective_scan", SelectiveScan, FRAMES, "gated state space: causal depthwise convolution, cumulative sum"),
)
