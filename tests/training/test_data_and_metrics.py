"""The split of the digits, the classifier, and the Fréchet distance against scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from vqkernels.training.classifier import train_classifier
from vqkernels.training.data import Labelled, digits, one_of_each
from vqkernels.training.metrics import FRECHET, frechet_distance, nearest_distances, quality


@pytest.fixture(scope="module")
def split():
    return digits()


@pytest.fixture(scope="module")
def classifier(split):
    return train_classifier(split[0])


def test_every_digit_is_in_one_part(split):
    training, held_out = split
    assert (len(training.images), len(held_out.images)) == (1437, 360)
    rows = [
        (tuple(image.flatten().mul(16).int().tolist()), label.item())
        for part in split
        for image, label in zip(*part, strict=True)
    ]
    content = load_digits()
    expected = [
        (tuple(image.ravel().astype(int)), label) for image, label in zip(content.images, content.target, strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    assert training.images.dtype == held_out.images.dtype == torch.float32
    shares = torch.bincount(held_out.labels) / torch.bincount(torch.from_numpy(content.target))
    assert (shares - 360 / 1797).abs().max() <= 1 / 174  # of the rarest class one digit more or less
    for part, again in zip(split, digits(), strict=True):
        assert torch.equal(part.images, again.images)
        assert torch.equal(part.labels, again.labels)


def test_one_of_each(split):
    images = one_of_each(split[1])
    for label in range(10):
        match = (split[1].images == images[label]).flatten(1).all(1)
        assert split[1].labels[match].eq(label).all()
        assert match.any()


def test_the_classifier_reads_held_out_digits_as_a_support_vector_machine_does(split, classifier):
    training, held_out = split
    machine = SVC(gamma=0.001).fit(training.images.flatten(1).numpy() * 16, training.labels.numpy())
    svm = torch.from_numpy(machine.predict(held_out.images.flatten(1).numpy() * 16))
    read = classifier(held_out.images).argmax(1)
    assert (read == held_out.labels).float().mean() >= 0.97
    assert (read == svm).float().mean() >= 0.97
    assert classifier.features(held_out.images).shape == (360, classifier.feature_dim)


def test_the_classifier_depends_on_its_seed_alone(split):
    few = Labelled(split[0].images[:100], split[0].labels[:100])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = train_classifier(few, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = train_classifier(few, seed=1), train_classifier(few, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(("count", "dim"), [(50, 3), (40, 64), (7, 1)])  # more values than features, fewer, one feature
def test_frechet_distance_is_that_of_scipy(count, dim):
    generator = np.random.default_rng(dim)
    x = generator.normal(size=(count, dim)) @ generator.normal(size=(dim, dim)) + 1
    y = generator.normal(size=(count + 3, dim)) * 2
    covariances = [np.atleast_2d(np.cov(values, rowvar=False)) for values in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    actual = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    # Roots of eigenvalues that are zero but for rounding: sqrt(eps) of the largest.
    assert actual == pytest.approx(expected, abs=dim * 2**-26 * np.trace(covariances[0] + covariances[1]))
    assert frechet_distance(torch.from_numpy(y), torch.from_numpy(x)) == pytest.approx(actual, rel=1e-6)


def test_frechet_distance_of_a_shift_is_its_square():
    x = torch.randn(30, 5, dtype=torch.float64)
    shift = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(25)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5, 3), (1, 3))])
def test_frechet_distance_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="x, y: expected features"):
        frechet_distance(*map(torch.zeros, shapes))


def test_nearest_distances():
    images = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).reshape(2, 1, 1, 2)
    others = torch.tensor([[0.0, 1.0], [3.0, 4.0], [9.0, 9.0]]).reshape(3, 1, 1, 2)
    assert nearest_distances(images, others).tolist() == [1.0, 0.0]


def test_quality_of_real_digits_and_of_noise(split, classifier):
    training, held_out = split
    right = classifier(held_out.images).argmax(1) == held_out.labels
    of_real = quality(classifier, held_out, training, held_out)
    assert of_real["samples"] == 360
    assert of_real["accuracy_of_samples"] == of_real["accuracy_of_held_out_digits"] == right.double().mean().item()
    for label, accuracy in enumerate(of_real["accuracy_of_samples_by_class"]):
        assert accuracy == right[held_out.labels == label].double().mean().item()
    assert len(set(of_real[FRECHET].values())) == 1

    wrong = Labelled(held_out.images, (held_out.labels + 1) % 10)
    assert quality(classifier, wrong, training, held_out)["accuracy_of_samples"] < 0.05
    noise = quality(classifier, Labelled(torch.rand(360, 1, 8, 8), held_out.labels), training, held_out)
    distances = noise[FRECHET]
    assert distances["samples_to_training_digits"] > 20 * distances["held_out_to_training_digits"]
    copies = quality(classifier, Labelled(training.images[:50], training.labels[:50]), training, held_out)
    assert copies["median_distance_to_nearest_training_digit"]["samples"] == pytest.approx(0, abs=1e-6)
    assert copies["median_distance_to_nearest_training_digit"]["held_out"] > 0.5

    zeros = held_out.labels == 0
    some = quality(classifier, Labelled(held_out.images[zeros], held_out.labels[zeros]), training, held_out)
    assert some["accuracy_of_samples_by_class"][1:] == [None] * 9
