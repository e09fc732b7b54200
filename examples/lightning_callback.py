"""Lightning: a callback that fuses the model of any LightningModule before its first step."""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import fusedres


class Fuse(lightning.Callback):
    """Give it to a Trainer: ``Trainer(callbacks=[Fuse()])``. Checkpoints are those of the plain model."""

    def setup(self, trainer, pl_module, stage):
        fusedres.fuse(pl_module)  # the one line: before the strategy wraps the model

    def on_fit_end(self, trainer, pl_module):
        print(fusedres.report(pl_module))


class Classifier(lightning.LightningModule):
    """What was there before."""

    def __init__(self):
        super().__init__()
        self.net = resnet18(num_classes=10).to(memory_format=torch.channels_last)
        self.losses = []

    def training_step(self, batch, _):
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


lightning.seed_everything(0, verbose=False)
data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
model = Classifier()
trainer = lightning.Trainer(
    max_epochs=4, callbacks=[Fuse()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, log_every_n_steps=1,
)  # fmt: skip
trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
losses = model.losses
print("losses", [round(loss, 4) for loss in losses])
