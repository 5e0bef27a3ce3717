"""Branches that are concatenated: dense, multi-scale, skip connections, detection, dense prediction."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net


class DenseLayer(nn.Module):
    """Normalises everything so far, adds a few channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return torch.cat([x, out], 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = nn.Sequential(DenseLayer(16, growth), DenseLayer(24, growth))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = nn.Sequential(DenseLayer(16, growth), DenseLayer(24, growth))
        self.norm5 = nn.BatchNorm2d(32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.transition(self.block1(self.conv0(x))))
        out = F.adaptive_avg_pool2d(F.relu(self.norm5(x)), (1, 1))
        return self.classifier(torch.flatten(out, 1))


class Inception(nn.Module):
    """Four branches of different widths, one after a pooling."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(inputs, 8, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(inputs, 8, 1), nn.ReLU(True), nn.Conv2d(8, 12, 3, padding=1))
        self.branch3 = nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.ReLU(True), nn.Conv2d(4, 8, 5, padding=2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(inputs, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return F.relu(torch.cat(outputs, 1))


class GoogLeNet(nn.Module):
    """Two inception blocks and an auxiliary classifier: two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inception1, self.inception2 = Inception(16), Inception(32)
        self.auxiliary, self.fc = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.inception1(F.relu(self.stem(x))), 2)
        aux = self.auxiliary(x.mean((2, 3)))
        x = self.inception2(x)
        return self.fc(x.mean((2, 3))), aux


class Fire(nn.Module):
    """Squeeze, then two expansions side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Fire modules and a convolutional classifier, with one bypass."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(inplace=True), Fire(16, 8, 12))
        self.fire = Fire(24, 8, 12)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(24, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x + self.fire(x)
        return torch.flatten(self.classifier(x), 1)


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Return U-Net's two convolutions with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Skip connections by concatenation; transposed convolutions or bilinear upsampling, padded to the skip's size."""

    def __init__(self, *, bilinear: bool = False) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = double_conv(3, 8), double_conv(8, 16), double_conv(16, 32)
        if bilinear:
            up1, up2 = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 8, 1)
            self.up1 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), up1)
            self.up2 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), up2)
        else:
            self.up1 = nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2)
            self.up2 = nn.ConvTranspose2d(16, 8, kernel_size=2, stride=2)
        self.conv1, self.conv2 = double_conv(32, 16), double_conv(16, 8)
        self.outc = nn.Conv2d(8, 2, kernel_size=1)

    @staticmethod
    def join(x1: Tensor, x2: Tensor) -> Tensor:
        dy, dx = x2.size()[2] - x1.size()[2], x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return torch.cat([x2, x1], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(self.join(self.up1(x3), x2))
        return self.outc(self.conv2(self.join(self.up2(x), x1)))


class ESPCN(nn.Module):
    """Super-resolution by PixelShuffle, with a bilinear shortcut."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(16, 16 * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.PReLU())
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        base = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        x = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(x))
        return base + self.tail(self.up(x))


class Conv(nn.Module):
    """YOLO's convolution: BatchNorm and SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(c1, c2, k, s, k // 2, bias=False), nn.BatchNorm2d(c2), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    """Chunks in two; the second half goes through residual blocks, and all intermediate results are concatenated."""

    def __init__(self, c1: int, c2: int, n: int = 1, *, shortcut: bool = True) -> None:
        super().__init__()
        self.c, self.shortcut = c2 // 2, shortcut
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(nn.Sequential(Conv(self.c, self.c, 3), Conv(self.c, self.c, 3)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]) if self.shortcut else m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """One pooling applied three times, all results concatenated."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(c1 * 2, c2)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class YOLO(nn.Module):
    """A C2f backbone, an upsampling neck, heads whose grid is flattened and joined."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.c2f1 = Conv(3, 8, 3, 2), C2f(8, 16)
        self.down, self.sppf = Conv(16, 24, 3, 2), SPPF(24, 24)
        self.up, self.c2f2 = nn.Upsample(None, 2, "nearest"), C2f(40, 16, shortcut=False)
        self.box = nn.ModuleList(nn.Sequential(Conv(c, 8, 3), nn.Conv2d(8, 4, 1)) for c in (16, 24))
        self.cls = nn.ModuleList(nn.Sequential(Conv(c, 12, 3), nn.Conv2d(12, classes, 1)) for c in (16, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p1 = self.c2f1(self.stem(x))
        p2 = self.sppf(self.down(p1))
        p1 = self.c2f2(torch.cat([self.up(p2), p1], 1))
        outs = [torch.cat((b(p), c(p)), 1) for b, c, p in zip(self.box, self.cls, (p1, p2), strict=True)]
        joined = torch.cat([o.view(o.shape[0], 8, -1) for o in outs], 2)
        box, scores = joined.split((4, 4), 1)
        return box, scores.sigmoid()


class DeepLab(nn.Module):
    """Atrous pyramid with image pooling, interpolated to the size of the features and of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        dilations = ((1, 0, 1), (3, 2, 2), (3, 4, 4))
        self.aspp = nn.ModuleList(nn.Conv2d(16, 8, k, padding=p, dilation=d) for k, p, d in dilations)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        input_shape = x.shape[-2:]
        x = self.backbone(x)
        branches = [F.relu(conv(x)) for conv in self.aspp]
        size = x.shape[2:]
        branches.append(F.interpolate(self.pool(x), size=size, mode="bilinear", align_corners=False))
        x = self.classifier(self.project(torch.cat(branches, dim=1)))
        return {"out": F.interpolate(x, size=input_shape, mode="bilinear", align_corners=False)}


class FPN(nn.Module):
    """Lateral convolutions, a top-down path, and one head shared by all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (8, 16, 32))
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.cls_logits, self.bbox_reg = nn.Conv2d(16, 3 * 4, 3, padding=1), nn.Conv2d(16, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f1 = F.relu(self.c1(x))
        f2 = F.relu(self.c2(f1))
        f3 = F.relu(self.c3(f2))
        levels = [self.lateral[2](f3)]
        for lateral, f in ((self.lateral[1], f2), (self.lateral[0], f1)):
            levels.insert(0, lateral(f) + F.interpolate(levels[0], size=f.shape[-2:], mode="nearest"))
        classes, boxes = [], []
        for level in levels:
            t = self.head(level)
            n, _, h, w = t.shape
            classes.append(self.cls_logits(t).view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4))
            boxes.append(self.bbox_reg(t).permute(0, 2, 3, 1).reshape(n, -1, 4))
        return torch.cat(classes, 1), torch.cat(boxes, 1)


class HRNet(nn.Module):
    """Two resolutions in parallel that exchange sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, 2, 1)
        self.high, self.low = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.to_high, self.to_low = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.out = nn.Conv2d(40, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.stem(x))
        b = F.relu(self.down(a))
        a, b = F.relu(self.high(a)), F.relu(self.low(b))
        a, b = a + F.interpolate(self.to_high(b), a.shape[2:]), b + self.to_low(a)
        a, b = F.relu(a), F.relu(b)
        return self.out(torch.cat([a, F.interpolate(b, size=a.shape[2:], mode="bilinear")], 1))


PIXELS = images(3, 16, 16, other=(3, 24, 24))
NETS = (
    net("densenet", DenseNet, PIXELS, "every layer reads the concatenation of all before"),
    net("googlenet", GoogLeNet, PIXELS, "four-branch concatenations, an auxiliary output"),
    net("squeezenet", SqueezeNet, PIXELS, "concatenation of two expansions, added to another"),
    net("unet", UNet, images(3, 16, 16, other=(3, 20, 20)), "skip concatenation, transposed convolutions"),
    net(
        "unet_bilinear",
        lambda: UNet(bilinear=True),
        images(3, 16, 16, other=(3, 18, 18)),
        "upsampling, padding to the skip",
    ),
    net("espcn", ESPCN, images(3, 12, 12, other=(3, 16, 16)), "PixelShuffle: four channels become one"),
    net(
        "yolo",
        YOLO,
        images(3, 32, 32, other=(3, 48, 48)),
        "C2f: chunk, residual, concatenation; heads joined over levels",
    ),
    net("deeplab", DeepLab, PIXELS, "dilated branches, image pooling interpolated, dictionary output"),
    net(
        "fpn", FPN, images(3, 32, 32, other=(3, 40, 40)), "one head shared by three levels, anchors by view and permute"
    ),
    net("hrnet", HRNet, PIXELS, "two resolutions that exchange sums"),
)
