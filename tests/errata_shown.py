"""Errata and the functions that reproduce them."""

import numpy as np
import torch
from autodiff import as_tensor

# The largest error of a correct formula, and the smallest of a wrong one.
RIGHT, WRONG = 1e-9, 1e-3
REPRODUCTIONS = {}


def reproduces(*ids):
    """Register a function that returns pairs (printed, corrected, truth), or None where it asserts itself."""

    def register(function):
        for id in ids:
            assert id not in REPRODUCTIONS
            REPRODUCTIONS[id] = function
        return function

    return register


def gradient(function, x):
    point = as_tensor(x).requires_grad_()
    return torch.autograd.grad(function(point), point)[0].numpy()


def hessian(function, x):
    return torch.autograd.functional.hessian(function, as_tensor(x)).numpy()


def error(found, truth):
    found, truth = np.asarray(found, float), np.asarray(truth, float)
    return np.abs(found - truth).max() / np.abs(truth).max()
