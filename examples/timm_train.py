"""timm's train.py in small, made by timm's own factories; in train.py the one line goes behind create_model(...)."""

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, random_seed

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS, BATCH, SIZE, CLASSES = 5, 8, 32, 10

random_seed(0)
model = timm.create_model("resnet18d", num_classes=CLASSES)
fusedres.fuse(model)  # the one line
model.to(DEVICE, memory_format=torch.channels_last)

optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=2e-5)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=0.01)
model_ema = ModelEmaV3(model, decay=0.9)  # a copy of a fused model is fused, too
loss_scaler = NativeScaler(device=DEVICE)
mixup = Mixup(mixup_alpha=0.1, label_smoothing=0.1, num_classes=CLASSES)
loss_fn = SoftTargetCrossEntropy()

images = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).to(memory_format=torch.channels_last)
labels = torch.arange(BATCH, device=DEVICE) % CLASSES
losses = []
for epoch in range(EPOCHS):
    model.train()
    input, target = mixup(images.clone(), labels)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = loss_fn(model(input), target)
    optimizer.zero_grad()
    loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    model_ema.update(model, step=epoch)
    scheduler.step(epoch + 1)
    losses.append(loss.item())
    print(f"epoch {epoch}: loss {losses[-1]:.4f}")

model_ema.eval()
with torch.no_grad():
    print("the moving average says", model_ema.module(images).argmax(1).tolist())
print(fusedres.report(model))
