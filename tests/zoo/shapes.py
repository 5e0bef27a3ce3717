"""Several inputs and outputs, bottlenecks by reshape, conditioning, points, tables: what is not one path."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net, several, tokens


class TwoInputs(nn.Module):
    """An image and a vector are joined; a class and a value come out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.vector = nn.Linear(6, 8)
        self.joint, self.classes, self.value = nn.Linear(24, 16), nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        a = F.relu(self.bn(self.conv(image))).mean((2, 3))
        x = torch.cat([a, F.relu(self.vector(vector))], dim=-1)
        x = F.relu(self.joint(x))
        return self.classes(x), self.value(x).squeeze(-1)


class Siamese(nn.Module):
    """One encoder for two images; the absolute difference is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU())
        self.embed, self.out = nn.Linear(16 * 5 * 5, 24), nn.Linear(24, 1)

    def encode(self, x: Tensor) -> Tensor:
        x = self.cnn(x)
        return torch.sigmoid(self.embed(x.view(x.size()[0], -1)))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.out(torch.abs(self.encode(x1) - self.encode(x2)))


class Cosine(nn.Module):
    """Two towers compared by the cosine of their normalised outputs, with a learned temperature (CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16))
        self.b = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.a(x), self.b(y)
        a, b = a / a.norm(dim=1, keepdim=True), F.normalize(b, dim=-1)
        return self.logit_scale.exp() * a @ b.t()


class AutoEncoder(nn.Module):
    """Convolutions, a bottleneck by reshape, and back by view and transposed convolutions."""

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.encode, self.decode = nn.Linear(16 * 4 * 4, latent), nn.Linear(latent, 16 * 4 * 4)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ConvTranspose2d(8, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.encode(x.reshape(x.shape[0], -1))
        x = F.relu(self.decode(x)).view(-1, 16, 4, 4)
        return torch.sigmoid(self.up2(F.relu(self.up1(x))))


class VAE(nn.Module):
    """Mean and log-variance are chunks of one linear; in evaluation the mean is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(32, 24), nn.Linear(24, 16)
        self.dec1, self.dec2 = nn.Linear(8, 24), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = torch.chunk(self.enc2(F.relu(self.enc1(x))), 2, dim=1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar) if self.training else mu
        return torch.sigmoid(self.dec2(F.relu(self.dec1(z)))), mu, logvar


class Generator(nn.Module):
    """DCGAN: a vector becomes an image by transposed convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=4, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 3, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class PointNet(nn.Module):
    """Shared 1x1 convolutions, maximum over the points, broadcast back and concatenated per point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32)
        self.conv3, self.conv4 = nn.Conv1d(48, 24, 1), nn.Conv1d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 1)
        n_pts = x.size()[2]
        point = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(point))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 32, 1).repeat(1, 1, n_pts)
        x = F.relu(self.conv3(torch.cat([x, point], 1)))
        return F.log_softmax(self.conv4(x).transpose(2, 1).contiguous(), dim=-1)


class FiLM(nn.Module):
    """A vector scales and shifts the channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.bn, self.film, self.fc = nn.BatchNorm2d(16, affine=False), nn.Linear(6, 32), nn.Linear(16, 5)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.film(condition).unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
        x = self.bn(self.conv2(F.relu(self.conv1(image))))
        return self.fc(F.relu((1 + gamma) * x + beta).mean((2, 3)))


class Diffusion(nn.Module):
    """A residual block of a diffusion model: time embedding added per channel, GroupNorm, attention over pixels."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32))
        self.conv_in, self.conv_out = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, 24, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, 24), nn.Conv2d(24, channels, 3, padding=1)
        self.time_proj = nn.Linear(32, 24)
        self.norm3, self.qkv, self.proj = (
            nn.GroupNorm(4, channels),
            nn.Conv1d(channels, 48, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        freqs = torch.exp(-torch.arange(0, 4, device=x.device).float())
        args = t[:, None].float() * freqs[None]
        emb = self.time(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))
        x = self.conv_in(x)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_proj(F.silu(emb))[:, :, None, None]
        x = x + self.conv2(F.silu(self.norm2(h)))
        b, c, *spatial = x.shape
        flat = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm3(flat)).chunk(3, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) * c**-0.5, dim=-1)
        flat = flat + self.proj(torch.einsum("bts,bcs->bct", weight, v))
        return self.conv_out(flat.reshape(b, c, *spatial))


class DLRM(nn.Module):
    """Recommendation: embeddings, a bottom MLP, pairwise products of them all, a top MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(20, 16) for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 24), nn.ReLU(), nn.Linear(24, 1), nn.Sigmoid())
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = [x] + [table(sparse[:, i]) for i, table in enumerate(self.embeddings)]
        T = torch.stack(rows, dim=1)
        Z = torch.bmm(T, torch.transpose(T, 1, 2))
        return self.top(torch.cat([x, Z[:, self.pairs[0], self.pairs[1]]], dim=1))


class TabularMLP(nn.Module):
    """Columns through BatchNorm, wide and deep paths added."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(12)
        self.deep = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16), nn.ReLU())
        self.out, self.wide = nn.Linear(16, 1), nn.Linear(12, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.out(self.deep(self.bn(x))) + self.wide(x)).squeeze(1)


class DeepCross(nn.Module):
    """Crosses x0 * linear(x) + x of a learned width, a residual MLP with LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 16)
        self.cross = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm, self.fc1, self.fc2, self.out = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x0 = x = self.inp(x)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return self.out(x + self.fc2(F.relu(self.fc1(self.norm(x)))))


class GraphNet(nn.Module):
    """Graph convolutions with a dense adjacency matrix that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.W1, self.W2 = nn.Linear(8, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.own, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = torch.softmax(adjacency, dim=-1)
        h = F.relu(adjacency @ self.W1(x))
        h = F.relu(torch.matmul(adjacency, self.W2(h)) + self.own(x))
        return self.out(h.mean(dim=1))


class NeRF(nn.Module):
    """Positional encoding, an MLP with its input concatenated half way, two outputs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(27, width), nn.Linear(width, width)
        self.third, self.sigma = nn.Linear(width + 27, width), nn.Linear(width, 1)
        self.colour = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        embedded = torch.cat([x] + [fn(x * 2.0**i) for i in range(4) for fn in (torch.sin, torch.cos)], -1)
        h = F.relu(self.second(F.relu(self.first(embedded))))
        h = F.relu(self.third(torch.cat([embedded, h], -1)))
        return torch.cat([self.colour(h), F.softplus(self.sigma(h))], -1)


class SoftArgmax(nn.Module):
    """Keypoints: the expected coordinate under each heat map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.heatmap = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.heatmap(self.backbone(x))
        n, k, h, w = x.shape
        p = x.view(n, k, -1).softmax(-1).view(n, k, h, w)
        ys, xs = torch.linspace(0, 1, h, device=x.device), torch.linspace(0, 1, w, device=x.device)
        return torch.stack([(p.sum(2) * xs).sum(-1), (p.sum(3) * ys).sum(-1)], dim=-1)


class Dueling(nn.Module):
    """Reinforcement learning: value and centred advantage are added."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 16, 4, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
        )
        self.value = nn.Sequential(nn.Linear(16 * 5 * 5, 24), nn.ReLU(), nn.Linear(24, 1))
        self.advantage = nn.Sequential(nn.Linear(16 * 5 * 5, 24), nn.ReLU(), nn.Linear(24, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        value, advantage = self.value(x), self.advantage(x)
        return value + advantage - advantage.mean(dim=1, keepdim=True)


class Fused(nn.Module):
    """Functional calls on bare parameters, standardised weights, `nn.ParameterList`."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Parameter(torch.zeros(16))
        self.w2 = nn.Parameter(torch.randn(24, 16, 3, 3))
        self.head = nn.ParameterList([torch.randn(24, 10), torch.zeros(10)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.w1, self.b1, padding=1))
        w = self.w2 - self.w2.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5) * 0.1
        x = F.relu(F.conv2d(x, w, stride=2))
        return x.mean((2, 3)) @ self.head[0] + self.head[1]


class Interlaced(nn.Module):
    """Channels are taken by number: reversed, every second, a list in a buffer; and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.even, self.odd = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.register_buffer("order", torch.randperm(16, generator=torch.Generator().manual_seed(0)))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x)).flip(1)
        x = torch.cat([self.even(x[:, ::2]), self.odd(x[:, 1::2])], 1)
        x = F.relu(self.conv2(x))[:, self.order]
        return self.fc(x.mean((2, 3)))


class Messages(nn.Module):
    """Messages along the edges of a graph, added up at the nodes that they reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.message = nn.Linear(5, 16), nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
        self.update, self.out = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h, (source, target) = F.relu(self.inp(x)), edges.unbind(1)
        sent = self.message(torch.cat([h[source], h[target]], -1))
        got = torch.zeros_like(h).index_add(0, target, sent)
        return self.out(h + F.relu(self.update(torch.cat([h, got], -1))))


IMAGE = images(3, 16, 16, other=(3, 20, 20))
POINTS = images(20, 3, other=(30, 3))
NETS = (
    net("two_inputs", TwoInputs, several(IMAGE, images(6, seed=1)), "two inputs concatenated, two outputs"),
    net("siamese", Siamese, several(images(1, 16, 16), images(1, 16, 16, seed=1)), "one encoder called on two inputs"),
    net("two_towers", Cosine, several(images(12), images(8, seed=1)), "normalised outputs of two towers multiplied"),
    net("autoencoder", AutoEncoder, images(1, 16, 16), "reshape to a bottleneck, view(-1, 16, 4, 4) back"),
    net("vae", VAE, images(32), "mean and log-variance chunked, three outputs"),
    net("generator", Generator, images(16), "transposed convolutions, one of them grouped"),
    net("pointnet", PointNet, POINTS, "maximum over points, repeated and concatenated"),
    net("film", FiLM, several(IMAGE, images(6, seed=1)), "channels scaled and shifted by a linear's chunks"),
    net(
        "diffusion",
        Diffusion,
        several(images(3, 8, 8, other=(3, 12, 12)), images(seed=1)),
        "time embedding per channel, GroupNorm, attention",
    ),
    net("dlrm", DLRM, several(images(6), tokens(20, 3, seed=1)), "embeddings multiplied pairwise"),
    net("tabular", TabularMLP, images(12), "BatchNorm1d on the input, wide and deep paths"),
    net("deep_cross", DeepCross, images(12), "features multiplied with a learned stream"),
    net(
        "graph_net",
        GraphNet,
        several(images(7, 8, other=(9, 8)), images(7, 7, other=(9, 9), seed=1)),
        "adjacency products",
    ),
    net(
        "messages",
        Messages,
        several(images(5, batches=(6, 7)), tokens(6, 2, batches=(9, 11))),
        "sums by numbers of nodes",
    ),
    net("nerf", NeRF, POINTS, "the input concatenated half way"),
    net("soft_argmax", SoftArgmax, IMAGE, "softmax over each output channel's pixels"),
    net("dueling_dqn", Dueling, images(4, 16, 16), "two streams, a mean over the outputs"),
    net("bare_parameters", Fused, IMAGE, "functional convolutions, standardised weights, a parameter list"),
    net("interlaced", Interlaced, IMAGE, "channels flipped, strided and reordered by number"),
)
