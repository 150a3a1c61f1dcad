"""Reads the tensors of what torch saves, zip format, without torch and without unpickling anything.

A state dict is a pickle beside raw arrays. The pickle's few opcodes are followed here by hand: they may build dicts,
lists, tuples, numbers, text and tensors. Whatever else it asks for, as any function or class, is refused by its name.

Source of the format: torch/serialization.py and torch/_utils.py (`_rebuild_tensor_v2`) of PyTorch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bmjax.files import printable, reading

log = logging.getLogger(__name__)
PICKLE = 8_000_000
"""Bytes of names, types and places; DenseNet201's take 110,000."""
REMEDY = 'expected a state dict alone, as torch.save(model.state_dict(), "weights.pth") writes it'
OLD_FORMAT = (
    "a pickle, as torch wrote weights before version 1.6; it is never unpickled. Rewrite it with torch: "
    'torch.save(torch.load(OLD, map_location="cpu", weights_only=True), NEW)'
)
WITHIN = ("state_dict", "model_state_dict", "model", "model_state", "net", "weights")
"""Where training programs put the state dict in their checkpoints, the likeliest first."""

_TYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_CONSTANTS: dict[str, Any] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_MARK = object()


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    kind: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor's values lie: `storage`'s from `offset` on, by `strides` in values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(ValueError):
    pass


class _Machine:
    """Follows a pickle's opcodes. Nothing is called: what a pickle would call is looked up by name in `_reduce`."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                if len(self._stack) != 1:
                    raise _Refused("the pickle ends with values left over")
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[int(argument)] = self._stack[-1]  # pyright: ignore[reportArgumentType]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[int(argument)])  # pyright: ignore[reportArgumentType]
            elif name == "MARK":
                self._stack.append(_MARK)
            elif name == "GLOBAL":
                self._stack.append(_Global(str(argument).replace(" ", ".")))
            elif handler := getattr(self, f"_{name.lower()}", None):
                handler()
            elif name not in ("PROTO", "FRAME"):
                raise _Refused(f"the pickle has the opcode {name}, which no state dict needs; {REMEDY}")
        raise _Refused("the pickle has no end")

    def _to_mark(self) -> list[Any]:
        place = next(i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK)
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _tuple(self) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _tuple1(self) -> None:
        self._stack[-1:] = [tuple(self._stack[-1:])]

    def _tuple2(self) -> None:
        self._stack[-2:] = [tuple(self._stack[-2:])]

    def _tuple3(self) -> None:
        self._stack[-3:] = [tuple(self._stack[-3:])]

    def _append(self) -> None:
        item = self._stack.pop()
        _of(list, self._stack[-1]).append(item)

    def _appends(self) -> None:
        items = self._to_mark()
        _of(list, self._stack[-1]).extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _put(self._stack[-1], key, value)

    def _setitems(self) -> None:
        items = self._to_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self._stack[-1], key, value)

    def _build(self) -> None:
        """The attributes of an OrderedDict, as `_metadata` with the versions of modules, are left out."""
        self._stack.pop()
        _of(dict, self._stack[-1])

    def _newobj(self) -> None:
        raise _Refused(f"it asks for an object of {_shown(_of(_Global, self._stack[-2]).name)}; {REMEDY}")

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_Global(f"{_of(str, module)}.{_of(str, name)}"))

    def _binpersid(self) -> None:
        """("storage", type, key, device, number of values)."""
        word, kind, key, _, count = _of(tuple, self._stack.pop())
        name = _of(_Global, kind).name
        kind = name.removeprefix("torch.")
        if word != "storage" or kind not in _TYPES or name != f"torch.{kind}":
            raise _Refused(f"a storage of {_shown(name)}; expected one of torch's {', '.join(sorted(_TYPES))}")
        self._stack.append(_Storage(_of(str, key), kind, _of(int, count)))

    def _reduce(self) -> None:
        arguments, function = _of(tuple, self._stack.pop()), _of(_Global, self._stack.pop()).name
        if function == "collections.OrderedDict":
            if len(arguments) > 1 or any(arguments):
                raise _Refused("an OrderedDict of arguments; expected an empty one, to be filled")
            self._stack.append({})
        elif function == "torch._utils._rebuild_tensor_v2":
            self._stack.append(_tensor(*arguments[:4]))
        elif function in ("torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"):
            self._stack.append(_of(Tensor, arguments[0]))
        else:
            raise _Refused(f"it asks for {_shown(function)}, which is not run; {REMEDY}")


def _shown(text: str) -> str:
    return printable(text[:100])


def _of(kind: type, value: Any) -> Any:
    if isinstance(value, _Global) and kind is not _Global:
        raise _Refused(f"it asks for {_shown(value.name)}; {REMEDY}")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Refused(f"a {type(value).__name__} where the format has a {kind.__name__}; {REMEDY}")
    return value


def _put(target: Any, key: Any, value: Any) -> None:
    if not isinstance(key, (str, int)):
        raise _Refused(f"a dict's key is a {type(key).__name__}; expected text")
    _of(dict, target)[key] = value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    _of(_Storage, storage)
    shape, strides = (tuple(_of(int, n) for n in _of(tuple, part)) for part in (shape, strides))
    last = _of(int, offset) + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (
        min((offset, *shape, *strides)) < 0
        or math.prod(shape) > storage.count
        or (math.prod(shape) and last >= storage.count)
    ):
        raise _Refused(f"a tensor of shape {shape} and strides {strides} in a storage of {storage.count} values")
    return Tensor(storage, offset, shape, strides)


def read(path: Path) -> dict[str, np.ndarray]:
    """The state dict's tensors by name, read-only; bfloat16 becomes float32, which holds every one of its values.

    Of a training program's checkpoint the state dict within is taken (`WITHIN`), and that is said.

    Raises:
      ValueError: no whole file of torch's zip format, or with more in it than tensors and plain values; names the file.
    """
    with reading(path, "file of torch's zip format"), zipfile.ZipFile(path) as archive:
        try:
            return _read(path, archive)
        except _Refused as e:
            raise ValueError(f"{path}: {e}") from e


def _read(path: Path, archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    infos = {info.filename: info for info in archive.infolist()}
    place = next(name for name in infos if is_pickle(name))
    if len(infos) < len(archive.infolist()) or sum(info.file_size for info in infos.values()) > path.stat().st_size:
        raise _Refused("its parts overlap, or take more than the file holds; expected them one after another")
    if infos[place].file_size > PICKLE:
        raise _Refused(f"{place} has {infos[place].file_size} bytes; expected at most {PICKLE}")
    found = _Machine().run(_stored(archive, infos[place]))
    root = place.removesuffix("data.pkl")
    big = f"{root}byteorder" in infos and _stored(archive, infos[f"{root}byteorder"]).strip() == b"big"
    arrays: dict[_Storage, np.ndarray] = {}

    def array(tensor: Tensor) -> np.ndarray:
        storage = tensor.storage
        if storage not in arrays:
            name = f"{root}data/{storage.key}"
            if name not in infos:
                raise _Refused(f"no part {_shown(name)}")
            arrays[storage] = _values(_stored(archive, infos[name]), storage, ">" if big else "<")
        values = arrays[storage]
        strides = tuple(stride * values.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)

    return {name: array(tensor) for name, tensor in _state_dict(path, found).items()}


def is_zip_format(path: Path) -> bool:
    """Whether a file is a zip archive as torch writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(map(is_pickle, archive.namelist()))
    # Over damaged bytes zipfile raises nearly anything; the reader of Keras's archives then says what is wrong.
    except Exception:
        return False


def is_pickle(name: str) -> bool:
    """Whether a member's name is that of the pickle in torch's zip format, `<anything>/data.pkl`."""
    return name.count("/") <= 1 and name.rsplit("/", 1)[-1] == "data.pkl"


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise _Refused(f"{printable(info.filename)} is compressed or encrypted; expected it as torch stores it")
    return archive.read(info)


def _values(data: bytes, storage: _Storage, order: Literal["<", ">"]) -> np.ndarray:
    dtype = np.dtype(_TYPES[storage.kind]).newbyteorder(order)
    if len(data) != storage.count * dtype.itemsize:
        raise _Refused(
            f"data/{printable(storage.key)} has {len(data)} bytes; expected {storage.count * dtype.itemsize} for "
            f"{storage.count} values of {storage.kind}"
        )
    values = np.frombuffer(data, dtype)
    if storage.kind == "BFloat16Storage":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """The tensors by name: all of the pickle, or those of the dict within it that a checkpoint keeps them in."""
    values = _of(dict, found)
    for name in WITHIN:
        if isinstance(values.get(name), dict):
            rest = ", ".join(_shown(str(key)) for key in list(values)[:10] if key != name)
            log.info("%s: taken is %r of a checkpoint; left out: %s", path, name, rest or "nothing")
            values = values[name]
            break
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _Refused(f"{_shown(str(name))!r} is a {type(value).__name__}; expected tensors by name: {REMEDY}")
    return values
