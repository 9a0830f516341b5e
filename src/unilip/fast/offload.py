"""CPU offload: parts of a model are on the device only while they work; else in memory, or in their file."""

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HEAD = "mllm.language_model.lm_head"  # a part inside a part: only answers need it


class Offload:
    """Brings parts of a model to a device: from the first `using` that names one to the end of the last such block."""

    def __init__(self, model: nn.Module, parts: Sequence[str], device: torch.device, loader: Any = None) -> None:
        self.device = device
        self.loader = loader  # where weights are read from each time, if they are: `unilip.model.Loader`
        self.adapters: dict[str, tuple[Any, float]] = {}  # with strengths: added to weights whenever these are read
        self._held: Counter[str] = Counter()
        self._model = [model]  # in a list: a module that knew its owner would be a part of itself
        self._home = {part: list(own_tensors(model.get_submodule(part))) for part in parts if loader is None}

    @contextlib.contextmanager
    def using(self, *parts: str) -> Iterator[None]:
        """Have parts on the device within the block."""
        with contextlib.ExitStack() as held:
            for part in parts:
                held.enter_context(self._having(part))
            yield

    @contextlib.contextmanager
    def _having(self, part: str) -> Iterator[None]:
        self._held[part] += 1
        try:
            if self._held[part] == 1:
                if self.loader is not None:
                    self.loader.load(self._model[0], part)
                replace(self._home.get(part, ()), lambda tensor: tensor.to(self.device, non_blocking=True))
            yield
        finally:
            self._held[part] -= 1
            if not self._held[part]:
                del self._held[part]
                if self.loader is not None:
                    empty(self._model[0].get_submodule(part))
                    give_back()
                for module, name, tensor in self._home.get(part, ()):
                    setattr(module, name, tensor)  # nothing is copied back: the weights have not changed

    @property
    def present(self) -> set[str]:
        """The parts that are on the device."""
        return {part for part in self._held if "." not in part}


def give_back() -> int:
    """Return the memory of freed tensors to the system: glibc keeps the holes that weights leave in its heap. 0."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)
    return 0


class Unmade(TorchFunctionMode):
    """Modules built within it are on the meta device, and not even drawn in pretence, which loads the compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass everything on but the reservation and the initialisation of weights."""
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        name = getattr(func, "__name__", "")
        if name.endswith("_") and name in vars(nn.init):
            return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return func(*args, **kwargs)


def own_tensors(root: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Give every parameter and buffer under a module with the module that holds it and its name there."""
    for module in root.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def replace(tensors: Iterable[tuple[nn.Module, str, Tensor]], change: Callable[[Tensor], Tensor]) -> None:
    """Put what `change` makes of parameters and buffers in their places; tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module, name, tensor in tensors:
        if id(tensor) not in made:
            new = change(tensor.detach())
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        setattr(module, name, made[id(tensor)])


def empty(root: nn.Module) -> None:
    """Take the data of every parameter and buffer under a module away; shapes and types stay."""
    replace(own_tensors(root), lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
