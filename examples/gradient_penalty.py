"""A penalty on the gradient of the image: gradients that are differentiated come from plain PyTorch, block by block."""

import torch
from torch.nn.functional import softplus
from torchvision.models import resnet18

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH, SIZE, WEIGHT, EVERY = 5, 8, 32, 1.0, 2

torch.manual_seed(0)
critic = resnet18(num_classes=1).to(DEVICE, memory_format=torch.channels_last)
fusedres.fuse(critic)  # the one line
optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.99))

real = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).to(memory_format=torch.channels_last)
made = torch.rand_like(real)
losses, penalties = [], []
for step in range(STEPS):
    loss = softplus(-critic(real)).mean() + softplus(critic(made)).mean()
    total = loss
    if step % EVERY == 0:  # R1, lazily: that step costs a second forward pass more than the plain model's
        image = real.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
        penalty = gradient.square().sum((1, 2, 3)).mean()
        total = loss + EVERY * WEIGHT / 2 * penalty
        penalties.append(penalty.item())
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    losses.append(loss.item())
print("losses", [round(loss, 4) for loss in losses])
print("penalties", [round(penalty, 4) for penalty in penalties])
print(fusedres.report(critic))
