"""A small convolutional classifier of digits, which reads samples and gives the features they are compared in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.training.data import CLASSES, Labelled

EPOCHS, BATCH_SIZE = 30, 64


class DigitClassifier(nn.Module):
    """Classifies images [B, 1, 8, 8] with values from 0 to 1."""

    feature_dim = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, self.feature_dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.feature_dim, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, [B, 64]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        return self.head(self.features(images))


def train_classifier(data: Labelled, seed: int = 0) -> DigitClassifier:
    """A classifier trained on the CPU in a few seconds; the same for the same data and seed. Evaluation mode.

    Batches are shuffled, and images shifted by up to one pixel, so that it does not learn positions by heart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
        steps = EPOCHS * -(-len(data.images) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(data.images)).split(BATCH_SIZE):
                loss = F.cross_entropy(model(_shifted(data.images[batch])), data.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
    return model.eval()


def _shifted(images: Tensor) -> Tensor:
    """A batch moved by -1, 0 or 1 pixel along each side, with zeros moved in."""
    rows, columns = torch.randint(3, (2,)).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, (1, 1, 1, 1))[..., rows : rows + height, columns : columns + width]
