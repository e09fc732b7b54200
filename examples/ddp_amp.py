"""DistributedDataParallel with AMP: torchrun --nproc-per-node 2 examples/ddp_amp.py"""

import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

import fusedres

STEPS, BATCH, SIZE, CLASSES = 4, 8, 32, 10

rank = int(os.environ["LOCAL_RANK"])
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
if on_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpus else "gloo")

torch.manual_seed(0)
model = resnet18(num_classes=CLASSES).to(device, memory_format=torch.channels_last)
fusedres.fuse(model)  # the one line; each rank has batch statistics of its own, as without it
ddp = DistributedDataParallel(model, device_ids=[rank] if on_gpus else None)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02, momentum=0.9)

torch.manual_seed(1 + dist.get_rank())  # each rank sees images of its own
images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
labels = torch.arange(BATCH, device=device) % CLASSES
losses = []
for step in range(STEPS):
    with torch.autocast(device.type, torch.bfloat16):
        loss = cross_entropy(ddp(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    losses.append(mean.item())
    if dist.get_rank() == 0:
        print(f"step {step}: loss {losses[-1]:.4f}")
if dist.get_rank() == 0:
    print(fusedres.report(model))
dist.destroy_process_group()
