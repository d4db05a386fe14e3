"""Other people's quantizers and denoising blocks on the fused operations: `vqkernels.fuse(model)`.

One file a library says what is replaced. The package is also the function: `vqkernels.fuse(model)` calls `fuse` below.
"""

import functools
import re
import sys
from types import MethodType, ModuleType

from torch import nn

from vqkernels.fuse import (
    _recipes,
    descript_audio_codec,
    diffusers,
    diffusers_attention,
    diffusers_autoencoders,
    diffusers_transformers,
    encodec,
    left_alone,
    llamagen,
    moshi,
    rosinality,
    simvq,
    taming,
    titok,
    transformers,
    vector_quantize_pytorch,
    vqkernels,
    zalandoresearch,
)
from vqkernels.fuse._recipes import Recipe
from vqkernels.fuse._report import FusedModule, FusionReport, LeftModule

__all__ = ["FusedModule", "FusionReport", "LeftModule", "fuse", "unfuse"]

RECIPES: tuple[Recipe, ...] = (
    *vector_quantize_pytorch.RECIPES,
    *diffusers.RECIPES,
    *diffusers_transformers.RECIPES,
    *diffusers_attention.RECIPES,
    *diffusers_autoencoders.RECIPES,
    *transformers.RECIPES,
    *encodec.RECIPES,
    *descript_audio_codec.RECIPES,
    *moshi.RECIPES,
    *taming.RECIPES,
    *zalandoresearch.RECIPES,
    *rosinality.RECIPES,
    *llamagen.RECIPES,
    *titok.RECIPES,
    *simvq.RECIPES,
    *vqkernels.RECIPES,
    *left_alone.RECIPES,
)

_QUANTIZER_NAME = re.compile(r"quantiz|codebook|vq", re.IGNORECASE)
_CODEBOOK_NAME = re.compile(r"embed|codebook", re.IGNORECASE)


def fuse(model: nn.Module, *, numerics: str = "fp32", verbose: bool = True) -> FusionReport:
    """Puts the quantizers and denoising blocks of a model on the fused operations, in place, instance by instance.

    Search, gather and statistics of every quantizer that is known change, and norms, modulations, gates, activations
    and rotations of blocks; parameters, buffers, hooks, the state_dict and the training behaviour stay. Codes are equal
    except where two are nearer to each other than the original's own rounding. A class is known by a hash of its
    source: another version, a subclass, and what was patched before are left alone, with the reason in the report. A
    fused model can be deep-copied, pickled and compiled; a shallow copy, such as nn.DataParallel makes for each device,
    runs on the tensors of the module that it is a copy of. In evaluation a row of NaN comes out of several levels as
    NaN, where originals add up codes. Gradients of gradients and the transforms of torch.func raise an error.

    What is known by its shape is tried on a copy, and may call collectives: in a distributed run call this everywhere.

    Args:
        model: any module; a shared submodule counts once.
        numerics: how denoising blocks round. "fp32": once, at the end of every fused operation. "eager": where the
            original rounds, so that outputs and gradients equal the original's bit for bit on the same device; what
            cannot be is left as it was.
        verbose: print the report.

    Returns:
        what was fused and what was left and why. `with fuse(model): ...` restores at the end what this call replaced.

    Raises:
        TypeError: model is not a module.
        ValueError: numerics is neither.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if numerics not in _recipes.NUMERICS:
        raise ValueError(f'numerics: expected "fp32" or "eager", got {numerics!r}')
    chosen: list[tuple[nn.Module, Recipe]] = []
    fused: list[FusedModule] = []
    left: list[LeftModule] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        outcome = _choose(module, numerics)
        if isinstance(outcome, Recipe):
            chosen.append((module, outcome))
            fused.append(FusedModule(name, kind, outcome.library))
        elif outcome is not None:
            left.append(LeftModule(name, kind, outcome))
    known = [m.name for m in fused] + [m.name for m in left]
    left += [
        LeftModule(name, type(module).__name__, f"{_recipes.class_path(type(module))} is not known")
        for name, module in model.named_modules()
        if _looks_like_quantizer(module)
        and not any(_is_within(other, name) or _is_within(name, other) for other in known)
    ]
    for module, recipe in chosen:
        _recipes.bind(recipe, module, numerics)
    report = FusionReport(tuple(fused), tuple(left), functools.partial(_restore, [module for module, _ in chosen]))
    if verbose:
        print(report)
    return report


def unfuse(model: nn.Module) -> None:
    """Restores every module of a model that `fuse` changed, exactly.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _restore(list(model.modules()))


def _restore(modules: list[nn.Module]) -> None:
    for module in modules:
        for name in _recipes.bound_names(module):
            function = module.__dict__.pop(name).func
            if not hasattr(type(module), name):  # kept by what has wrapped the method since, to be called by it
                method = next(n for r in RECIPES for n, f in r.methods.items() if f is function)
                module.__dict__[name] = MethodType(getattr(type(module), method), module)


def _choose(module: nn.Module, numerics: str) -> Recipe | str | None:
    """The recipe for a module, why it is left alone, or None where it is nothing that is known."""
    if _recipes.bound_names(module):
        return "it is fused already"
    cls = type(module)
    candidates = [r for r in RECIPES if not r.by_shape and r.concerns(cls)]
    if not candidates:
        bases = [r for r in RECIPES if not r.by_shape and any(r.concerns(base) for base in cls.__mro__[1:])]
        if bases:
            return f"it is a subclass of {bases[0].class_path}"
        candidates = [r for r in RECIPES if r.by_shape and r.concerns(cls)]
    reasons = []
    for recipe in candidates:
        if not recipe.has_work(module):
            continue
        reason = _recipes.why_not(recipe, module, numerics)
        if reason is None:
            return recipe
        if reason not in reasons:
            reasons.append(reason)
    return "; ".join(reasons) or None


def _looks_like_quantizer(module: nn.Module) -> bool:
    cls = type(module)
    if not _QUANTIZER_NAME.search(cls.__name__) or cls.__module__.split(".")[0] in ("vqkernels", "torch"):
        return False
    tensors = [n for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None and t.ndim > 1]
    tables = [n for n, child in module.named_children() if isinstance(child, nn.Embedding)]
    return any(_CODEBOOK_NAME.search(n) for n in tensors + tables)


def _is_within(name: str, other: str) -> bool:
    """Whether a path is another one or lies below it."""
    return not other or name == other or name.startswith(f"{other}.")


class _CallableModule(ModuleType):
    """So that `vqkernels.fuse` is the function, whichever of package and attribute an import binds last."""

    def __call__(self, model: nn.Module, *, numerics: str = "fp32", verbose: bool = True) -> FusionReport:
        return fuse(model, numerics=numerics, verbose=verbose)


_CallableModule.__call__.__doc__ = fuse.__doc__
sys.modules[__name__].__class__ = _CallableModule
