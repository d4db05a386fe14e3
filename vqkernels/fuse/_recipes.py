"""What is known of the modules that are fused, and how an instance of one is told apart, changed and restored."""

import functools
import hashlib
import inspect
import io
import sys
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

NUMERICS = ("fp32", "eager")

_INDENTATION = (tokenize.tok_name[tokenize.INDENT], tokenize.tok_name[tokenize.DEDENT])
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
_FSTRING_START = getattr(tokenize, "FSTRING_START", None)  # Python 3.12 and later
_FSTRING_END = getattr(tokenize, "FSTRING_END", None)


def _always(module: nn.Module) -> bool:
    return True


def _fuse_always(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Recipe:
    """How to fuse the instances of one class.

    Attributes:
        library: the distribution that the class comes from.
        class_path: "package.module.Class"; or "Class" alone for classes of that name wherever they are defined, which
            are then judged by `refuse` alone.
        methods: by name, the function (self, ...) that takes the place of the method; it is told the numerics where it
            has a keyword-only argument of that name.
        sources: what `source_hash` gives for the versions that this was written for; empty for classes by name and for
            those of this package, whose source is not in question.
        versions: these versions, for the reader of a report.
        uses: functions and classes of the class's module whose source counts as part of it.
        has_work: whether there is something to fuse in an instance; others are not even reported.
        refuse: why an instance cannot be fused, or None.
        numerics: which of "fp32" and "eager" it serves; the second promises the bits of the original.
    """

    library: str
    class_path: str
    methods: Mapping[str, Callable[..., Any]]
    sources: frozenset[str] = frozenset()
    versions: str = ""
    uses: tuple[str, ...] = ()
    has_work: Callable[[Any], bool] = field(default=_always)
    refuse: Callable[[Any], str | None] = field(default=_fuse_always)
    numerics: tuple[str, ...] = NUMERICS

    @property
    def by_shape(self) -> bool:
        return "." not in self.class_path

    def concerns(self, cls: type) -> bool:
        return (cls.__name__ if self.by_shape else class_path(cls)) == self.class_path


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _module(cls: type) -> Any:
    return sys.modules.get(cls.__module__)


def neighbour(module: nn.Module, name: str) -> Any:
    """What has this name in the file of a module's class, also where FSDP or a parametrization has subclassed it."""
    return next(getattr(_module(cls), name) for cls in type(module).__mro__ if hasattr(_module(cls), name))


def _logical_lines(source: str) -> Iterator[list[str]]:
    """The tokens of every logical line: no comments or line breaks, an f-string as one token in every Python."""
    lines = source.splitlines(keepends=True)
    line: list[str] = []
    start, depth = (0, 0), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if _FSTRING_START is not None and token.type == _FSTRING_START:
            start = start if depth else token.start
            depth += 1
        elif _FSTRING_END is not None and token.type == _FSTRING_END:
            depth -= 1
            if not depth:
                (first, begin), (last, end) = start, token.end
                text = "".join(lines[first - 1 : last])
                line.append(text[begin : len(text) - len(lines[last - 1]) + end])
        elif depth or token.type in _LAYOUT:
            continue
        elif token.type == tokenize.NEWLINE:
            yield line
            line = []
        else:
            name = tokenize.tok_name[token.type]
            line.append(name if name in _INDENTATION else token.string)
    yield line


def _is_docstring(line: list[str]) -> bool:
    return bool(line) and all(token.lstrip("rRuU")[:1] in ("'", '"') for token in line)


@functools.cache
def source_hash(cls: type, uses: tuple[str, ...] = ()) -> str:
    """A hash of the source of a class and of what it uses of its module; comments, docstrings and layout do not count.

    Raises:
        OSError: the source is not there.
    """
    members = vars(_module(cls))
    digest = hashlib.sha256()
    for definition in (cls, *[members.get(name) for name in uses]):
        if definition is None:
            continue
        for line in _logical_lines(textwrap.dedent(inspect.getsource(definition))):
            words = [token for token in line if token not in _INDENTATION]
            if _is_docstring(words):
                line = [token for token in line if token in _INDENTATION]
            else:
                line.append("\n")
            digest.update("\0".join([*line, ""]).encode())
    return digest.hexdigest()[:16]


@functools.cache
def _place(cls: type) -> tuple[str | None, range]:
    """The file and the lines of a class."""
    lines, first = inspect.getsourcelines(cls)
    return inspect.getsourcefile(cls), range(first, first + len(lines))


def _replaced_method(cls: type) -> str | None:
    """The name of a function of a class that does not stand where the class's source does."""
    file, lines = _place(cls)
    for name, member in vars(cls).items():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        function = inspect.unwrap(member) if callable(member) else None
        if isinstance(function, types.FunctionType):
            code = function.__code__
            if code.co_filename != file or code.co_firstlineno not in lines:
                return name
    return None


def why_not_class(recipe: Recipe, cls: type) -> str | None:
    """Why a recipe, which concerns a class, does not know it; None where it does."""
    if not recipe.sources:
        return None
    if functools.reduce(lambda x, name: getattr(x, name, None), cls.__qualname__.split("."), _module(cls)) is not cls:
        return f"it is not what {class_path(cls)} stands for"
    try:
        known = source_hash(cls, recipe.uses) in recipe.sources
        replaced = _replaced_method(cls)
    except (OSError, TypeError):
        return "its source cannot be read"
    if not known:
        return f"its source differs from {recipe.library} {recipe.versions}, which this was written for"
    return None if replaced is None else f"{replaced}() of its class has been replaced"


def why_not(recipe: Recipe, module: nn.Module, numerics: str = "fp32") -> str | None:
    """Why a module, whose class a recipe concerns, cannot be fused with it; None where it can."""
    reason = why_not_class(recipe, type(module))
    if reason is not None:
        return reason
    if numerics not in recipe.numerics:
        return f'fused, it rounds otherwise than the original, which numerics="{numerics}" rules out'
    replaced = [name for name in recipe.methods if name in module.__dict__]
    if replaced:
        return f"{replaced[0]}() of this module has been replaced"
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} - {"cpu", "cuda", "meta"}
    if devices:
        return f"there are no kernels for {min(devices)}"
    return recipe.refuse(module)


def takes_numerics(function: Callable[..., Any]) -> bool:
    """Whether a function of a recipe is told the numerics."""
    return "numerics" in inspect.signature(function).parameters


def bind(recipe: Recipe, module: nn.Module, numerics: str = "fp32") -> None:
    # partial, not MethodType: it can be pickled under any name, and torch.compile traces and guards it alike.
    for name, function in recipe.methods.items():
        arguments = {"numerics": numerics} if takes_numerics(function) else {}
        module.__dict__[name] = functools.partial(function, module, **arguments)


def _is_ours(value: Any) -> bool:
    if not isinstance(value, functools.partial):
        return False
    return str(getattr(value.func, "__module__", "")).startswith(f"{__package__}.")


def bound_names(module: nn.Module) -> list[str]:
    """The methods of a module that `bind` replaced."""
    return [name for name, value in module.__dict__.items() if _is_ours(value) and value.args == (module,)]


def is_untouched(module: nn.Module, *methods: str) -> bool:
    """Whether nobody but `bind` has replaced one of these methods of a module."""
    return all(_is_ours(module.__dict__[name]) for name in methods if name in module.__dict__)


def is_transparent(*modules: nn.Module) -> bool:
    """Whether nobody listens to or changes the calls of these modules, so that a parent may do their work."""
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or not is_untouched(m, "forward")
        for m in modules
    )
