"""Hugging Face's Accelerate: fuse before `prepare`. It replaces the forward of the outermost module, whose own part
(here the stem) stays plain, as the report says; all blocks are fused."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import fusedres

STEPS, BATCH, SIZE, CLASSES = 4, 8, 32, 10

torch.manual_seed(0)
model = resnet18(num_classes=CLASSES).to(memory_format=torch.channels_last)
fusedres.fuse(model)  # the one line
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
data = torch.utils.data.TensorDataset(torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % CLASSES)
loader = torch.utils.data.DataLoader(data, BATCH)

accelerator = Accelerator(mixed_precision="bf16")
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for _ in range(STEPS):
    for images, labels in loader:
        with accelerator.autocast():
            loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

accelerator.print("losses", [round(loss, 4) for loss in losses])
accelerator.print(fusedres.report(accelerator.unwrap_model(model)))
