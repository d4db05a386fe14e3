"""Figures of the quality of samples, in the eyes of a classifier trained on the real digits."""

from typing import Any

import torch
from torch import Tensor

from vqkernels.training.classifier import DigitClassifier
from vqkernels.training.data import CLASSES, Labelled

FRECHET = "Fréchet distance in the features of a digits classifier"


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """The Fréchet distance of the normal distributions with the means and covariances of two sets of features.

        |mean_x - mean_y|^2 + Tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2)

    as in Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (arXiv
    1706.08500), in float64.

    Args:
        x: features [N, D], N >= 2.
        y: features [M, D], M >= 2.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x, y: expected features of shapes [N, D] and [M, D], N and M at least 2, got {list(x.shape)} and "
            f"{list(y.shape)}"
        )
    x, y = x.double(), y.double()
    covariance_x, covariance_y = torch.cov(x.T, correction=1), torch.cov(y.T, correction=1)
    covariance_x, covariance_y = (c.reshape(x.shape[1], x.shape[1]) for c in (covariance_x, covariance_y))
    root = _square_root(covariance_x)
    cross = torch.linalg.eigvalsh(root @ covariance_y @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + covariance_x.trace() + covariance_y.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _square_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric, positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of each image to the nearest of the others, [N]; images [N, C, H, W] and [M, C, H, W]."""
    return torch.cdist(images.flatten(1).double(), others.flatten(1).double()).amin(1)


@torch.no_grad()
def quality(classifier: DigitClassifier, samples: Labelled, training: Labelled, held_out: Labelled) -> dict[str, Any]:
    """How well samples pass for digits of the classes they were drawn for.

    Args:
        classifier: trained on the training digits.
        samples: images and the classes they were drawn for, best as many of each class as are held out.
        training: the digits that the classifier and the model were trained on.
        held_out: others.

    Returns:
        accuracies of the classifier on the samples, in all and by class, and on held-out digits; the Fréchet distances
        of samples and of held-out digits to the training digits; medians of the distances of samples and of held-out
        digits to the nearest training digit (samples much nearer than held-out digits are copies).
    """
    right = classifier(samples.images).argmax(1) == samples.labels
    features = {
        "training": classifier.features(training.images),
        "held_out": classifier.features(held_out.images),
        "samples": classifier.features(samples.images),
    }
    return {
        "samples": len(samples.images),
        "accuracy_of_samples": _share(right),
        "accuracy_of_samples_by_class": [
            _share(right[samples.labels == label]) if (samples.labels == label).any() else None
            for label in range(CLASSES)
        ],
        "accuracy_of_held_out_digits": _share(classifier(held_out.images).argmax(1) == held_out.labels),
        FRECHET: {
            "samples_to_training_digits": frechet_distance(features["samples"], features["training"]),
            "held_out_to_training_digits": frechet_distance(features["held_out"], features["training"]),
        },
        "median_distance_to_nearest_training_digit": {
            "samples": nearest_distances(samples.images, training.images).median().item(),
            "held_out": nearest_distances(held_out.images, training.images).median().item(),
        },
    }


def _share(right: Tensor) -> float:
    return right.double().mean().item()
