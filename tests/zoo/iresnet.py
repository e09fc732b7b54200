"""An improved ResNet (Duta et al., 2020): where a block has its batch norms and ReLUs depends on its place in a stage.

The first block of a stage normalises before the addition, the ones between are pre-activated, and the last one
normalises and rectifies what was added. The shortcut of a strided stage pools before it projects.
"""

from torch import nn


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, start=False, end=False, without_bn0=False):
        super().__init__()
        wide = planes * self.expansion
        if not start and not without_bn0:
            self.bn0 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=False)
        if start or end:
            self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.start, self.end, self.without_bn0 = start, end, without_bn0

    def forward(self, x):
        identity = x
        if self.start:
            out = self.conv1(x)
        elif self.without_bn0:
            out = x.relu()
            out = self.conv1(out)
        else:
            out = self.bn0(x)
            out = self.relu(out)
            out = self.conv1(out)

        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        if self.start:
            out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        if self.end:
            out = self.bn3(out)
            out = self.relu(out)
        return out


class IResNet(nn.Module):
    def __init__(self, layers=(3, 4), width=8, num_classes=10):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(width, layers[0], stride=2)
        self.layer2 = self._make_layer(2 * width, layers[1], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width * Bottleneck.expansion, num_classes)

    def _make_layer(self, planes, blocks, stride):
        wide = planes * Bottleneck.expansion
        downsample = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=stride, padding=1),
            nn.Conv2d(self.inplanes, wide, kernel_size=1, bias=False),
            nn.BatchNorm2d(wide),
        )
        layers = [Bottleneck(self.inplanes, planes, stride, downsample, start=True)]
        self.inplanes = wide
        layers += [Bottleneck(wide, planes, without_bn0=i == 1) for i in range(1, blocks - 1)]
        layers += [Bottleneck(wide, planes, end=True, without_bn0=blocks == 2)]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.avgpool(x).flatten(1)
        return self.fc(x)
