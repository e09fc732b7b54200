"""A whole training step as one CUDA graph; without a GPU, which has graphs, the same steps run as they are written."""

import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH, SIZE, CLASSES = 6, 8, 32, 10

torch.manual_seed(0)
model = resnet18(num_classes=CLASSES).to(DEVICE, memory_format=torch.channels_last)
fusedres.fuse(model)  # the one line
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train_step(images, labels):
    """Nothing in here looks at a value: no .item(), no print."""
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


images = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).to(memory_format=torch.channels_last)
labels = torch.arange(BATCH, device=DEVICE) % CLASSES
step = train_step
if DEVICE == "cuda":
    step = fusedres.graphed(train_step, images, labels)  # three steps as written, then captured, then replayed

losses = []
for _ in range(STEPS):
    losses.append(step(images, labels).item())  # looked at outside; the next call writes to the same tensor
print("losses", [round(loss, 4) for loss in losses])
print("no GPU: plain steps, no graph" if step is train_step else f"captured {step.captures} time(s)")
print(fusedres.report(model))
