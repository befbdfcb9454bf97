"""Files of weights as other frameworks write them, read without executing anything that they contain.

A pickle is a program: it names functions and calls them. `_Unpickler` answers every name itself and imports none. A few
names (arrays, tensors, plain containers) become functions of this file that return records; any other becomes an inert
stand-in. Tensors are made from the records afterwards, within the bytes that the file has. `torch.load` is not used:
outside of `weights_only=True`, which refuses the tar files of 2017, it runs TorchScript and writes patch files, and
numpy's own unpickling can be told to take bytes for pointers.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from fpn_det.structures import InputError

STATE_DICT_KEYS = ("state_dict", "model", "blobs")  # where training checkpoints keep the weights, in this order


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file.

    Attributes:
        tensors: by name, on the CPU, in the file's dtypes; a prefix `module.` common to all names is stripped.
        meta: what lies beside the state dict in the file (`__author__`, `meta`, `epoch` ..), objects of unknown
            classes as stand-ins; `state_dict_key` says under which key the state dict was, None is the top level.
        path: the file.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path


def read_weights(path: Path) -> WeightFile:
    """Read a state dict: a PyTorch file (zip, stream before 1.6, tar of 2017) or a `.pkl` of numpy arrays.

    Args:
        path: the file. The state dict is at its top level or under one of `STATE_DICT_KEYS`.

    Raises:
        InputError: the file is missing, damaged, of another kind, or holds no state dict.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; give the path of a file of weights")
    with path.open("rb") as file:
        head = file.read(512)
        try:
            _refuse_other_kinds(head, path.suffix)
            with _open_container(file, head) as (root, storage_bytes):
                key, state_dict = _find_state_dict(root)
                tensors = _Tensors(storage_bytes).make(state_dict)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # a damaged file meets its parsers with nearly any exception
            raise InputError(
                f"{path}: damaged, cut short or not a file of weights ({type(error).__name__}: {error}). Download it "
                "again and compare its size with the source's"
            ) from error
    meta = {} if key is None else {_name(k): v for k, v in root.items() if k != key}
    if all(name.startswith("module.") for name in tensors):  # the wrapper DistributedDataParallel
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return WeightFile(tensors, {**meta, "state_dict_key": key}, path)


def _refuse_other_kinds(head: bytes, suffix: str) -> None:
    start = head.lstrip()[:9].lower()
    if not head:
        raise InputError("is empty. Download it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise InputError("is a web page: the download got an error or a log-in page in place of the file. Try again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError("is a pointer of Git LFS, not the file itself. Fetch that with `git lfs pull`")
    if suffix == ".safetensors" or (head[8:10] == b'{"' and head[4:8] == bytes(4)):
        raise InputError("is a safetensors file. Convert it: torch.save(safetensors.torch.load_file(SRC), DST)")
    if suffix == ".onnx" or (head[0] == 0x08 and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a")):
        raise InputError("is an ONNX model, a graph without a state dict. Import the checkpoint it was exported from")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")):
        raise InputError("is compressed. Unpack it first")


# --- Containers: each gives the unpickled object and the way to the bytes of a storage ---

StorageBytes = Callable[[Any], bytearray]  # of the storage with a key


@contextmanager
def _open_container(file: IO[bytes], head: bytes) -> Iterator[tuple[Any, StorageBytes]]:
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:
            yield _read_zip(archive)
    elif head[257:262] == b"ustar":
        with tarfile.open(fileobj=file, mode="r:") as members:
            yield _read_tar(members)
    else:
        yield _read_stream(file)


def _read_zip(archive: zipfile.ZipFile) -> tuple[Any, StorageBytes]:
    """PyTorch since 1.6: a pickle, and one entry per storage."""
    prefix = archive.namelist()[0].split("/")[0]
    names = {name.removeprefix(f"{prefix}/") for name in archive.namelist()}
    if "constants.pkl" in names:
        raise InputError("is a TorchScript program. Import the state dict of the model that it was made from")
    if "data.pkl" not in names:
        raise InputError("is a zip archive, but none of PyTorch. Unpack it first, or give the checkpoint itself")
    if "byteorder" in names and archive.read(f"{prefix}/byteorder") != b"little":
        raise InputError("was written on a big-endian machine. Save it again on a common one")

    def storage_bytes(key: Any) -> bytearray:
        return bytearray(archive.read(f"{prefix}/data/{key}"))

    return _Unpickler(io.BytesIO(archive.read(f"{prefix}/data.pkl"))).load(), storage_bytes


def _read_stream(file: IO[bytes]) -> tuple[Any, StorageBytes]:
    """A lone pickle (numpy arrays), or PyTorch before 1.6: header, pickle, keys, then the storages in their order."""
    root = _Unpickler(file).load()
    if root != torch.serialization.MAGIC_NUMBER:
        return root, _bytes_at(file, {})
    protocol, system = _Unpickler(file).load(), _Unpickler(file).load()
    if protocol != torch.serialization.PROTOCOL_VERSION or system["little_endian"] is not True:
        raise ValueError(f"protocol {_shown(protocol)}, {_shown(system)}")
    unpickler = _Unpickler(file)
    root, places = unpickler.load(), {}
    for key in _Unpickler(file).load():
        places[key] = _skip_storage(file, unpickler.storages[key])
    return root, _bytes_at(file, places)


def _read_tar(archive: tarfile.TarFile) -> tuple[Any, StorageBytes]:
    """PyTorch of early 2017: members `storages`, `tensors` and `pickle`, which refer to each other by numbers."""
    if not {"storages", "tensors", "pickle"} <= set(archive.getnames()):
        raise InputError("is a tar archive, but none of PyTorch. Unpack it first, or give the checkpoint itself")
    storages, tensors, pickled = (archive.extractfile(name) for name in ("storages", "tensors", "pickle"))
    if storages is None or tensors is None or pickled is None:
        raise ValueError("a folder in the place of a file")
    objects: dict[int, Any] = {}
    places = {}
    for _ in range(_Unpickler(storages).load()):
        key, _location, dtype = _Unpickler(storages).load()
        places[key] = _skip_storage(storages, dtype)
        objects[key] = _Storage(key, dtype, places[key][1] // dtype.itemsize)
    for key, storage, first, numel in _Unpickler(storages).load():
        objects[key] = objects[storage]._replace(first=first, numel=numel)
    for _ in range(_Unpickler(tensors).load()):
        key, storage, _tensor_type = _Unpickler(tensors).load()
        [ndim, _padding] = struct.unpack("<ii", tensors.read(8))
        size = struct.unpack(f"<{ndim}q", tensors.read(8 * ndim))
        stride = struct.unpack(f"<{ndim}q", tensors.read(8 * ndim))
        [offset] = struct.unpack("<q", tensors.read(8))
        objects[key] = _rebuild_tensor(objects[storage], offset, size, stride)
    return _Unpickler(pickled, objects=objects).load(), _bytes_at(storages, places)


def _skip_storage(file: IO[bytes], dtype: torch.dtype) -> tuple[int, int]:
    """Position and length in bytes of the storage that begins here: its number of elements as int64, then the data."""
    [numel] = struct.unpack("<q", file.read(8))
    if numel < 0:
        raise ValueError(f"a storage of {numel} elements")
    position, length = file.tell(), numel * dtype.itemsize
    file.seek(length, io.SEEK_CUR)
    return position, length


def _bytes_at(file: IO[bytes], places: dict[Any, tuple[int, int]]) -> StorageBytes:
    def storage_bytes(key: Any) -> bytearray:
        position, length = places[key]
        file.seek(position)
        return bytearray(file.read(length))

    return storage_bytes


# --- The state dict ---


def _find_state_dict(root: Any) -> tuple[str | None, dict[Any, Any]]:
    """The key of the state dict in the file's object (None: the object itself), and the state dict."""
    wrapped = {key: root[key] for key in STATE_DICT_KEYS if key in root} if isinstance(root, dict) else {}
    for key, value in wrapped.items():
        if isinstance(value, dict):
            return key, value
    for value in (root, *wrapped.values()):
        if isinstance(value, _StandIn):
            raise InputError(
                f"holds a pickled object of the class {value.name}, which only its own code can read. In its "
                "framework, save the state dict alone: torch.save(model.state_dict(), DST)"
            )
    if isinstance(root, dict) and any(isinstance(value, _Tensor | _Array) for value in root.values()):
        return None, root
    found = _shown(root)
    if isinstance(root, dict):
        keys = [f"{_name(k)} ({v.name})" if isinstance(v, _StandIn) else _name(k) for k, v in root.items()]
        found = f"the keys {', '.join(keys[:20]) or '(none)'}"
    raise InputError(
        f"no state dict at the top level or under {', '.join(STATE_DICT_KEYS)}; the file holds {found}. Save the dict "
        "of tensors alone"
    )


class _Tensors:
    """Makes tensors from records, reading each storage once.

    Args:
        storage_bytes: of the container.
    """

    def __init__(self, storage_bytes: StorageBytes) -> None:
        self.storage_bytes = storage_bytes
        self.read: dict[Any, bytearray] = {}

    def make(self, state_dict: dict[Any, Any]) -> dict[str, Tensor]:
        """The tensors of a state dict.

        Raises:
            InputError: naming the first value that is not a tensor.
        """
        if not state_dict:
            raise InputError("its state dict is empty. Use another file")
        tensors = {}
        for key, value in state_dict.items():
            name = _name(key)
            match value:
                case _Tensor():
                    tensors[name] = self._tensor(value)
                case _Array():
                    tensors[name] = value.tensor(name)
                case _:
                    raise InputError(f"its {name} is {_shown(value)}, not a tensor. Save the dict of tensors alone")
        return tensors

    def _tensor(self, record: _Tensor) -> Tensor:
        storage, dtype = record.storage, record.dtype or record.storage.dtype
        if not all(type(i) is int for i in (storage.first, storage.numel, record.offset, *record.size, *record.stride)):
            raise ValueError("a tensor whose place in its storage is not made of numbers")
        if 0 in record.size:
            return torch.empty(record.size, dtype=dtype)
        numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
        if math.prod(record.size) > numel:
            raise ValueError(f"a tensor of {record.size} in a storage of {numel} elements")
        if storage.key not in self.read:
            self.read[storage.key] = self.storage_bytes(storage.key)
        # Both calls refuse what lies outside: of the bytes that there are, of the elements that the storage has.
        begin = storage.first * storage.dtype.itemsize
        flat = torch.frombuffer(self.read[storage.key], dtype=dtype, count=numel, offset=begin)
        return flat.as_strided(record.size, record.stride, record.offset).clone(memory_format=torch.contiguous_format)


# --- The unpickler: what its functions return are records, checked when tensors are made of them ---


class _Storage(NamedTuple):
    key: Any
    dtype: torch.dtype
    numel: int
    first: int = 0  # of a view: where it begins in the storage `key`


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None  # None: the storage's


class _Dtype:
    """numpy's dtype; the opcode BUILD gives it the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """A numpy array or scalar; the opcode BUILD gives an array its content."""

    __slots__ = ("axes", "data", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.__setstate__((1, (), None, False, b""))

    def __setstate__(self, state: Any) -> None:
        _version, self.shape, self.dtype, fortran, self.data = state
        self.order: Literal["C", "F"] = "F" if fortran else "C"
        self.axes: Any = None

    def tensor(self, name: str) -> Tensor:
        code = self.dtype.code if isinstance(self.dtype, _Dtype) else None
        if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"):
            raise InputError(f"its {name} is an array of numpy's type {_shown(code)}. Save arrays of numbers alone")
        dtype = np.dtype(code)
        array = np.frombuffer(_bytes(self.data), dtype.newbyteorder(self.dtype.order))
        array = array.reshape(self.shape, order=self.order)
        if self.axes is not None:
            array = array.transpose(self.axes)
        return torch.from_numpy(np.array(array, dtype, order="C"))


class _StandIn:
    """An object (its type: a class) that is not admitted: keeps its name, swallows what the pickle gives it."""

    name = ""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _name(key: Any) -> str:
    """A key of a dict as a string."""
    return key.decode("latin1") if isinstance(key, bytes) else key if isinstance(key, str) else _shown(key)


def _shown(value: Any) -> str:
    """For messages. The repr of a container is 2**n long if it holds twice what holds twice what .. n times."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return f"{value!r:.80}"
    if isinstance(value, _StandIn):
        return f"an object of the class {value.name}"
    return f"an object of the type {type(value).__name__.strip('_').lower()}"


def _refuse_dtype(name: str) -> NoReturn:
    raise InputError(f"holds tensors of the type {name}, which cannot be read. Save them as torch.float32")


class _Dict(dict[Any, Any]):
    """An OrderedDict; its attributes (PyTorch's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Admitted:
    """A function that a pickle may call, but not alter: the opcode BUILD would set attributes of a bare function."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle alters a function")


class _Unpickler(pickle.Unpickler):
    """Unpickles to plain containers, records and stand-ins.

    Args:
        file: at the start of a pickle; left behind its end.
        objects: what the numbers of a tar file stand for.

    Attributes:
        storages: dtype of each storage that the pickle referred to.
    """

    def __init__(self, file: IO[bytes], *, objects: dict[int, Any] | None = None) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2, which may be bytes
        self.objects = objects
        self.storages: dict[Any, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return _ADMITTED.get((module, name)) or type("_StandIn", (_StandIn,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", torch.dtype() as dtype, str() | int() as key, _location, int() as numel, *view):
                self.storages.setdefault(key, dtype)
                match view:
                    case [] | [None]:
                        return _Storage(key, dtype, numel)
                    case [(_view_key, int() as first, int() as view_numel)]:
                        return _Storage(key, dtype, view_numel, first)
            case ("storage", type() as kind, *_) if issubclass(kind, _StandIn):
                _refuse_dtype(kind.name)
            case ("module", module_class, _, _) | (module_class, str() | None, str() | None):
                return module_class  # of a pickled module; the source of its code is ignored
            case str() | int() if self.objects is not None:
                return self.objects[int(pid)]
        raise pickle.UnpicklingError(f"unknown reference: {_shown(pid)}")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _requires_grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    if not isinstance(dtype, torch.dtype):
        _refuse_dtype(getattr(dtype, "name", "(none)"))
    return _rebuild_tensor(storage, offset, size, stride)._replace(dtype=dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: Any, data: Any) -> _Array:
    return _frombuffer(data, dtype, (), "C")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    array.axes = axes if order == "K" else None
    return array


def _bytes(data: Any = b"", encoding: str = "latin1") -> bytes:
    """Bytes, also as Python 2 wrote them and as Python 3 writes them in the protocols of Python 2: as strings."""
    if not isinstance(data, str | bytes | bytearray) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes made of {_shown(data)} in the encoding {_shown(encoding)}")
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _Dict,
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _Dtype,
}
for _numpy in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _FUNCTIONS |= {
        (f"{_numpy}.multiarray", "_reconstruct"): _reconstruct,
        (f"{_numpy}.multiarray", "scalar"): _scalar,
        (f"{_numpy}.numeric", "_frombuffer"): _frombuffer,
    }
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    _FUNCTIONS |= {(_builtins, kind.__name__): kind for kind in (list, dict, tuple, set, frozenset, complex)}
    _FUNCTIONS |= {(_builtins, "bytes"): _bytes, (_builtins, "bytearray"): _bytes}
_ADMITTED = {name: _Admitted(function) for name, function in _FUNCTIONS.items()}
