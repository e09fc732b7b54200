"""MoCo: an encoder that is trained, its momentum average that is not, and a queue of keys.

In the first steps the loss rises: the queue fills with keys of an encoder that moves.
"""

import copy

import torch
from torch.nn.functional import cross_entropy, normalize
from torchvision.models import resnet18

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, BATCH, SIZE, WIDTH, QUEUE, MOMENTUM, TEMPERATURE = 5, 8, 32, 32, 16, 0.99, 0.2


@torch.no_grad()
def follow(momentum_encoder, encoder):
    """Parameters move towards the encoder's; a fused pass reads them as they are when it runs."""
    for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
        slow.lerp_(fast, 1 - MOMENTUM)


def made(images):
    return torch.randn(images, 3, SIZE, SIZE, device=DEVICE).to(memory_format=torch.channels_last)


torch.manual_seed(0)
encoder = resnet18(num_classes=WIDTH).to(DEVICE, memory_format=torch.channels_last)
fusedres.fuse(encoder)  # the one line; the copy is fused, too
momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9)
queue = normalize(momentum_encoder(made(QUEUE)).detach(), dim=1)

losses = []
for step in range(STEPS):
    images = made(BATCH)
    views = [images + 0.1 * torch.randn_like(images) for _ in range(2)]
    queries = normalize(encoder(views[0]), dim=1)
    with torch.no_grad():
        follow(momentum_encoder, encoder)
        keys = normalize(momentum_encoder(views[1]), dim=1)
    alike = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([alike, queries @ queue.T], dim=1) / TEMPERATURE
    loss = cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long, device=DEVICE))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    queue = torch.cat([keys, queue])[:QUEUE]
    losses.append(loss.item())
    print(f"step {step}: loss {losses[-1]:.4f}")
print(fusedres.report(encoder))
print(fusedres.report(momentum_encoder))
