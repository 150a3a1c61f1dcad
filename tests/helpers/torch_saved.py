"""Writes what `torch.save` writes, without torch: a pickle put together opcode by opcode, and raw arrays beside it."""

import struct
import zipfile

import numpy as np

STORAGES = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "i4": "Int", "u1": "Byte", "b1": "Bool"}


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def tensor(key, array, *, shape=None, strides=None, offset=0, count=None, storage=None):
    """The opcodes of a tensor whose values are the part `data/<key>`."""
    shape = array.shape if shape is None else shape
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    kind = storage or f"{STORAGES[array.dtype.str[1:]]}Storage"
    persistent = b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu")
    persistent += number(array.size if count is None else count) + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = b"(" + persistent + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + b"t"
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def dictionary(items):
    """The opcodes of an OrderedDict of (name, opcodes)."""
    inner = b"".join(text(name) + value for name, value in items)
    return named("collections", "OrderedDict") + b")R(" + inner + b"u"


def write(path, content, parts, packing=zipfile.ZIP_STORED):
    """A file of torch's zip format: the opcodes of its pickle, and bytes by the names of the parts."""
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/byteorder", b"little")
        for name, data in parts.items():
            archive.writestr(f"archive/data/{name}", data)
        archive.writestr("archive/version", b"3\n")


def save(path, tensors, *, within=None, prefix=""):
    """As torch.save(tensors), or torch.save({within: tensors, "epoch": 3}), each name behind a prefix."""
    arrays = {str(i): np.ascontiguousarray(array).reshape(array.shape) for i, array in enumerate(tensors.values())}
    items = [(prefix + name, tensor(key, arrays[key])) for name, key in zip(tensors, arrays, strict=True)]
    content = dictionary(items)
    if within:
        content = dictionary([("epoch", number(3)), (within, content)])
    write(path, content, {key: array.tobytes() for key, array in arrays.items()})
