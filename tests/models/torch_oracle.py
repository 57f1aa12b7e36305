"""ResNets in plain torch under torchvision's names, and transformers', their batch norm drawn at random."""

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

DEPTHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
    "shallow_basic": ("basic", (2, 1, 1, 1)),
    "shallow_bottleneck": ("bottleneck", (2, 1, 1, 1)),
}


class Block(nn.Module):
    """A residual block; `sizes` holds (kernel size, output channels, stride) of its convolutions."""

    def __init__(self, inputs, sizes, shortcut_stride):
        super().__init__()
        self.num_convs = len(sizes)
        channels = inputs
        for number, (kernel, outputs, stride) in enumerate(sizes, start=1):
            conv = nn.Conv2d(channels, outputs, kernel, stride, padding=kernel // 2, bias=False)
            setattr(self, f"conv{number}", conv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(outputs))
            channels = outputs
        self.downsample = nn.Identity()
        if shortcut_stride != 1 or inputs != channels:
            projection = nn.Conv2d(inputs, channels, 1, shortcut_stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x):
        y = x
        for number in range(1, self.num_convs + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = torch.relu(y) if number < self.num_convs else y
        return torch.relu(y + self.downsample(x))


class TorchvisionResNet(nn.Module):
    def __init__(self, architecture, num_classes):
        super().__init__()
        kind, depths = DEPTHS[architecture]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                width = 64 * 2**stage
                sizes = [(3, width, stride), (3, width, 1)]
                if kind == "bottleneck":
                    sizes = [(1, width, 1), (3, width, stride), (1, 4 * width, 1)]
                blocks.append(Block(channels, sizes, stride))
                channels = sizes[-1][1]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, pixels):
        x = torch.relu(self.bn1(self.conv1(pixels)))
        x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def make_torchvision(architecture, num_classes=10):
    return randomise(TorchvisionResNet(architecture, num_classes))


def make_transformers(architecture, num_classes=10):
    kind, depths = DEPTHS[architecture]
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    config = ResNetConfig(
        layer_type=kind, depths=list(depths), hidden_sizes=widths, embedding_size=64, num_labels=num_classes
    )
    return randomise(ResNetForImageClassification(config))


def randomise(network, seed=0):
    """Draw every scale, shift and statistic of batch norm; keep the convolutions' own random start."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return network.eval()


def state_of(network):
    """{name: NumPy array}, as a weights file has them."""
    return {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}
