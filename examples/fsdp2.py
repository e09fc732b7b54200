"""FSDP2 (fully_shard) with mixed precision: torchrun --nproc-per-node 2 examples/fsdp2.py"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, resnet18

import fusedres

STEPS, BATCH, SIZE, CLASSES = 4, 8, 32, 10

rank = int(os.environ["LOCAL_RANK"])
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
if on_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpus else "gloo")

torch.manual_seed(0)
model = resnet18(num_classes=CLASSES).to(device)
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
# fully_shard takes no parameters that are channels_last; the images are, and what the blocks put out.
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
fusedres.fuse(model)  # the one line; behind fully_shard it does as well
for module in model.modules():
    if isinstance(module, BasicBlock):  # which a fused block still is
        fully_shard(module, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

torch.manual_seed(1 + dist.get_rank())
images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
labels = torch.arange(BATCH, device=device) % CLASSES
losses = []
for step in range(STEPS):
    loss = cross_entropy(model(images).to(torch.float32), labels)
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
