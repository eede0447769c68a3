"""Triton's interpreter, with most of its time saved, and one kernel at a time: it keeps what it works on in globals.

At each call of a helper function it looks through all of triton.language for what it has to replace there, though the
kernel that calls was replaced by then. What the library's own helpers need is never put back, so once is enough. And
for each value it makes the type of a block anew, and looks at its sizes: once for each type is enough here, too.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@cache
def _prepare(function: Any) -> None:
    if not any(value is tl for value in function.__globals__.values()):  # not ours: the kernel has not replaced tl.core
        interpreter._patch_lang(function)


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    _prepare(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


_init_block_type = core.block_type.__init__
_init_tensor = core.tensor.__init__
_blocks: dict[Any, dict[str, Any]] = {}  # attributes of a block's type, and those that its values have by it
_OF_SCALARS = core.tuple([]), core.constexpr(1)


def _block_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
    if isinstance(element_ty, core.pointer_type):  # which cannot be a key
        return _init_block_type(self, element_ty, shape)
    key = element_ty, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
    if key not in _blocks:
        _init_block_type(self, element_ty, shape)
        value = core.tensor.__new__(core.tensor)
        _init_tensor(value, None, self)
        self.of_values = value.shape, value.numel
        _blocks[key] = vars(self).copy()
    vars(self).update(_blocks[key])
    return None


def _tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
    of_values = vars(type).get("of_values") if type.is_block() else _OF_SCALARS
    if of_values is None:
        _init_tensor(self, handle, type)
    else:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_values


_np_dtype = interpreter._get_np_dtype
_np_dtype_of_scalar = cache(_np_dtype)


def _get_np_dtype(type: core.dtype) -> Any:
    return (_np_dtype if isinstance(type.scalar, core.pointer_type) else _np_dtype_of_scalar)(type.scalar)


_launch = interpreter.GridExecutor.__call__
_turn = threading.RLock()


def _launch_in_turn(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> Any:
    with _turn:
        return _launch(self, *args, **kwargs)


def hasten() -> None:
    """From now on, in this process."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _get_np_dtype
    core.block_type.__init__, core.tensor.__init__ = _block_type, _tensor
    interpreter.GridExecutor.__call__ = _launch_in_turn
