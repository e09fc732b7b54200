"""A detector on a backbone whose batch norms, stem and first stages are frozen: they are fused all the same."""

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fusedres

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, SIZE, CLASSES = 4, 96, 3

torch.manual_seed(0)
# Its batch norms are FrozenBatchNorm2d; weights of ImageNet go in by weights="DEFAULT".
backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=2)
few = {"rpn_post_nms_top_n_train": 32, "box_batch_size_per_image": 16, "rpn_batch_size_per_image": 32}
model = FasterRCNN(backbone, CLASSES, min_size=SIZE, max_size=SIZE, **few)
model.to(DEVICE, memory_format=torch.channels_last)
fusedres.fuse(model)  # the one line
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

images = [torch.rand(3, SIZE, SIZE, device=DEVICE) for _ in range(2)]
targets = [
    {
        "boxes": torch.tensor([[8.0, 8, 48, 56], [40, 30, 90, 88]], device=DEVICE),
        "labels": torch.tensor([1, 2], device=DEVICE),
    }
    for _ in images
]
losses = []
model.train()
for step in range(STEPS):
    torch.manual_seed(0)  # the same boxes are drawn for the loss
    loss = sum(model(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    print(f"step {step}: loss {losses[-1]:.4f}")

frozen = [name for name, parameter in model.backbone.body.named_parameters() if not parameter.requires_grad]
print(f"{len(frozen)} frozen parameters, from {frozen[0]} to {frozen[-1]}")
print(fusedres.report(model))
