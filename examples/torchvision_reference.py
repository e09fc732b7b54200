"""The loop of torchvision's references/classification/train.py: AMP, warm-up, moving average, one line more."""

import torch
from torch import nn
from torchvision.models import resnet18

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS, BATCH, SIZE, CLASSES = 4, 8, 32, 10


def train_one_epoch(model, criterion, optimizer, loader, scaler, model_ema):
    """As in the reference; its logging is left out."""
    model.train()
    seen = []
    for image, target in loader:
        image, target = image.to(DEVICE, memory_format=torch.channels_last), target.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = criterion(model(image), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        model_ema.update_parameters(model)
        seen.append(loss.item())
    return sum(seen) / len(seen)


torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(2 * BATCH, 3, SIZE, SIZE), torch.arange(2 * BATCH) % CLASSES)
loader = torch.utils.data.DataLoader(data, BATCH)

model = resnet18(num_classes=CLASSES).to(DEVICE, memory_format=torch.channels_last)
fusedres.fuse(model)  # the one line; the optimiser may as well have been made before
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=1)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS - 1)
scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[1])
scaler = torch.amp.GradScaler(DEVICE, enabled=False)  # bf16 needs none, fp16 does
model_ema = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
)

losses = []
for epoch in range(EPOCHS):
    losses.append(train_one_epoch(model, criterion, optimizer, loader, scaler, model_ema))
    scheduler.step()
    print(f"epoch {epoch}: loss {losses[-1]:.4f}")
print(fusedres.report(model))
