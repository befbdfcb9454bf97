"""Containers of weights: what each framework writes is read equal; nothing in a file is executed."""

import builtins
import codecs
import collections
import datetime
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpn_det.structures import InputError
from fpn_det.weights import read
from fpn_det.weights.read import read_weights


def state_dict() -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2))
    state = model.state_dict()
    state["half"] = torch.randn(3, 2).half()
    state["bfloat16"] = torch.randn(3).bfloat16()
    state["flags"] = torch.tensor([True, False, True])
    state["transposed"] = torch.randn(4, 3).t()
    state["slice"] = torch.arange(10)[3:7]
    state["scalar"] = torch.tensor(7.5, dtype=torch.float64)
    state["empty"] = torch.zeros(0, 4)
    return state


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name
        assert got[name].is_contiguous(), name


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_pytorch_files(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=new)
    file = read_weights(path)
    assert_same(file.tensors, state_dict())
    assert file.meta == {"state_dict_key": None}
    assert file.path == path


@pytest.mark.parametrize("protocol", [2, 4])
def test_pytorch_file_of_another_pickle_protocol_and_of_parameters(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": nn.Parameter(torch.ones(2, 3))}, path, pickle_protocol=protocol)
    assert_same(read_weights(path).tensors, {"w": torch.ones(2, 3)})


def test_storage_of_new_dtype(tmp_path: Path) -> None:
    """Since 2.1 some dtypes are an untyped storage with a dtype beside it (_rebuild_tensor_v3)."""
    path = tmp_path / "weights.pth"
    value = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    call = (value.untyped_storage(), 0, (2, 3), (3, 1), False, OrderedDict(), torch.int32)

    class Stored:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v3, call  # type: ignore[attr-defined]

    torch.save({"w": Stored()}, path)
    assert_same(read_weights(path).tensors, {"w": value})


def write_tar(path: Path, state: dict[str, Tensor]) -> None:
    """The format of PyTorch 0.1 (torch/serialization.py, `legacy_load`): three members that refer to each other."""
    storages, tensors = io.BytesIO(), io.BytesIO()
    pickle.dump(len(state), storages, 2)
    pickle.dump(len(state), tensors, 2)
    for i, value in enumerate(state.values()):
        kind = {torch.float32: "Float", torch.int64: "Long"}[value.dtype]
        flat = value.contiguous().flatten()
        pickle.dump((1000 + i, "cpu", getattr(torch, f"{kind}Storage")), storages, 2)
        storages.write(struct.pack("<q", flat.numel()) + flat.numpy().tobytes())
        pickle.dump((2000 + i, 5000 if i == 0 else 1000 + i, getattr(torch, f"{kind}Tensor")), tensors, 2)
        strides = value.contiguous().stride()
        tensors.write(struct.pack("<ii", value.ndim, 0))
        tensors.write(struct.pack(f"<{value.ndim}q", *value.shape) + struct.pack(f"<{value.ndim}q", *strides))
        tensors.write(struct.pack("<q", 0))
    # Views: (key, root, offset, number of elements); the first tensor is of a view of its whole storage.
    pickle.dump([(5000, 1000, 0, next(iter(state.values())).numel())], storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            return next((str(2000 + i) for i, value in enumerate(state.values()) if value is obj), None)

    pickled = io.BytesIO()
    Pickler(pickled, 2).dump(OrderedDict(state))
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("storages", storages), ("tensors", tensors), ("pickle", pickled)):
            info = tarfile.TarInfo(name)
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)


def test_tar_of_2017(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    state = {"conv.weight": torch.randn(4, 3, 2, 2), "conv.bias": torch.randn(4), "steps": torch.tensor([3])}
    write_tar(path, state)
    assert_same(dict(torch.load(path, weights_only=False)), state)  # the writer writes what PyTorch reads
    assert_same(read_weights(path).tensors, state)


ARRAYS = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">f4"),
    "permuted": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 2, 0),
    "scalar": np.int64(3),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_numpy_arrays(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "Caffe2"}, protocol))
    file = read_weights(path)
    assert file.meta == {"__author__": "Caffe2", "state_dict_key": "model"}
    for name, array in ARRAYS.items():
        assert file.tensors[name].shape == array.shape
        assert file.tensors[name].dtype == torch.from_numpy(np.array(array, array.dtype.newbyteorder("="))).dtype
        assert np.array_equal(file.tensors[name].numpy(), array), name


def test_pickle_of_python_2(tmp_path: Path) -> None:
    """Python 2 wrote names and the bytes of arrays as strings, numpy 1 lived in numpy.core."""
    values = np.array([1.5, -2, 1e-30], np.float32)

    def string(value: bytes) -> bytes:
        return pickle.BINSTRING + struct.pack("<i", len(value)) + value

    dtype = b"cnumpy\ndtype\n(" + string(b"f4") + b"K\x00K\x01tR(K\x03" + string(b"<") + b"NNNJ\xff\xff\xff\xff" * 1
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
    array += b"(K\x01(K\x03t" + dtype + b"\x89" + string(values.tobytes()) + b"tb"
    path = tmp_path / "detectron1.pkl"
    path.write_bytes(b"\x80\x02}" + string(b"blobs") + b"}" + string(b"conv1_w") + array + b"ss.")
    file = read_weights(path)
    assert file.meta["state_dict_key"] == "blobs"
    assert torch.equal(file.tensors["conv1_w"], torch.from_numpy(values))


def test_where_the_state_dict_lies(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    one = {"w": torch.ones(1)}
    for content, key in (
        ({"state_dict": one, "model": {"w": torch.zeros(1)}, "epoch": 3}, "state_dict"),
        ({"model": one, "epoch": 3, "optimizer": {"state": {0: torch.zeros(5)}}}, "model"),
    ):
        torch.save(content, path)
        file = read_weights(path)
        assert_same(file.tensors, one)
        assert file.meta["state_dict_key"] == key
        assert file.meta["epoch"] == 3


def test_prefix_of_data_parallel(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"module.a": torch.ones(1), "module.b": torch.ones(1)}, path)
    assert list(read_weights(path).tensors) == ["a", "b"]
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert list(read_weights(path).tensors) == ["module.a", "b"]


class HistoryBuffer:
    """As mmengine's: a class that the reader does not know, with state."""

    def __init__(self) -> None:
        self.history = np.ones(3)


class Settings(collections.UserDict[str, Any]):
    pass


def test_unknown_classes_beside_the_state_dict_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "epoch_12.pth"
    hub = {"loss": HistoryBuffer(), "at": datetime.datetime(2024, 1, 2), "out": Path("work_dirs"), "s": Settings(a=1)}
    hub |= {"deque": collections.deque([1, 2]), "counts": collections.Counter("aab"), "partial": functools.partial(int)}
    for new in (True, False):
        torch.save({"state_dict": {"w": torch.ones(2)}, "hub": hub}, path, _use_new_zipfile_serialization=new)
        file = read_weights(path)
        assert_same(file.tensors, {"w": torch.ones(2)})
        names = {key: repr(value) for key, value in file.meta["hub"].items()}
        assert names["loss"] == f"<{__name__}.HistoryBuffer>"
        assert names["at"] == "<datetime.datetime>"


def test_unknown_classes_in_the_state_dict_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"w": torch.ones(2), "buffer": HistoryBuffer()}}, path)
    with pytest.raises(InputError, match=rf"its buffer is an object of the class {__name__}.HistoryBuffer"):
        read_weights(path)
    torch.save({"w": torch.ones(2), "epoch": 12}, path)
    with pytest.raises(InputError, match=r"its epoch is 12, not a tensor"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"model": {"names": np.array([None, "a"], object)}}))
    with pytest.raises(InputError, match=r"its names is an array of numpy's type 'O8'"):
        read_weights(path)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model}], ids=["bare", "wrapped"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_whole_modules_are_refused(tmp_path: Path, new: bool, wrap: Callable[[nn.Module], Any]) -> None:
    path = tmp_path / "model.pth"
    torch.save(wrap(nn.Linear(2, 2)), path, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match=r"model.pth: holds a pickled object of the class torch\.nn.*state_dict"):
        read_weights(path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_of_other_kinds_are_named(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "weights.pth"
    for value, name in (
        (torch.zeros(3, dtype=torch.complex64), r"type torch\.ComplexFloatStorage"),
        (torch.ones(2).to(torch.float8_e4m3fn), r"type torch\.float8_e4m3fn"),
        (torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), r"type torch\.QInt8Storage"),
        (torch.eye(3).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
    ):
        torch.save({"w": value}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(InputError, match=rf"weights\.pth: (?!damaged).*{name}"):
            read_weights(path)


def test_messages_do_not_spell_out_what_a_container_holds(tmp_path: Path) -> None:
    """Lists that hold the previous one ten times, sixty times over: their repr would never end."""
    nested: Any = 0
    for _ in range(60):
        nested = [nested] * 10
    key: frozenset[Any] = frozenset()
    for _ in range(60):
        key = frozenset([(key, key)])  # sets keep their hash, so that this one may be a key

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            state = (1, (1,), Calls(np.dtype, nested), False, b"")
            return np.ones(1).__reduce__()[0], (np.ndarray, (0,), b"b"), state  # type: ignore[index]

    storage = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(1).untyped_storage(), dtype=torch.float32, _internal=True
    )
    place = storage, 0, (nested,), (1,), False, OrderedDict()
    tensor = io.BytesIO()
    torch.save({"w": Calls(torch._utils._rebuild_tensor_v2, *place)}, tensor)
    contents = [
        (pickle.dumps(nested), "holds an object of the type list"),
        (pickle.dumps({key: 1}), "the keys an object of the type frozenset"),
        (pickle.dumps({"model": {key: 1}}), "its an object of the type frozenset is 1"),
        (pickle.dumps({"model": {"w": nested}}), "its w is an object of the type list"),
        (pickle.dumps({"model": {"w": Array()}}), "numpy's type an object of the type list"),
        (pickle.dumps(Calls(codecs.encode, "", nested)), "the encoding an object of the type list"),
        (pickle.dumps(nested, 2)[:-1] + b"Q.", "unknown reference: an object of the type list"),
        (pickle.dumps(torch.serialization.MAGIC_NUMBER) + pickle.dumps(nested) + pickle.dumps(0), "protocol an object"),
        (tensor.getvalue(), "not made of numbers"),
    ]
    path = tmp_path / "weights.pth"
    for content, message in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_weights(path)
    path.write_bytes(pickle.dumps({"model": {"w": np.ones(1)}, key: 1}))  # beside the state dict
    assert list(read_weights(path).tensors) == ["w"]


# --- Nothing is executed ---


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def exploits(target: Path) -> dict[str, Any]:
    """Objects whose unpickling creates `target`."""
    touch = f"open({str(target)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {target}"),
        "eval": Calls(builtins.eval, touch),
        "exec": Calls(builtins.exec, touch),
        "open": Calls(builtins.open, str(target), "w"),
        "process": Calls(subprocess.check_call, ["touch", str(target)]),
    }


@pytest.mark.parametrize("name", list(exploits(Path())))
@pytest.mark.parametrize("container", ["pkl", "zip", "stream"])
def test_exploits_execute_nothing(tmp_path: Path, name: str, container: str) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.pth"
    evil = exploits(target)[name]
    if container == "pkl":
        path.write_bytes(pickle.dumps({"model": {"w": np.ones(1)}, "evil": evil}))
    else:
        content = {"model": {"w": torch.ones(1)}, "evil": evil}
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    file = read_weights(path)
    assert list(file.tensors) == ["w"]
    assert isinstance(file.meta["evil"], read._StandIn)
    assert not target.exists()
    if container == "pkl":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()  # the exploit is a real one


HAND_MADE = {
    "getattr": "c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(V{command}\ntR.",
    "inst": "(V{command}\nios\nsystem\n.",
    "obj": "(cos\nsystem\nV{command}\no.",
    "partial": "cfunctools\npartial\n(cos\nsystem\nV{command}\ntR(tR.",
    "map": "c__builtin__\nlist\n(c__builtin__\nmap\n(cos\nsystem\n(V{command}\nltRtR.",
    "setstate": "c__builtin__\neval\n(Vtype('S', (), {{'__setstate__': lambda s, c: __import__('os').system(c)}})()\n"
    "tRV{command}\nb.",
}


@pytest.mark.parametrize("name", list(HAND_MADE))
def test_hand_made_exploits_execute_nothing(tmp_path: Path, name: str) -> None:
    """What Python's pickler does not write: results that are called, old opcodes."""
    target, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_text(HAND_MADE[name].format(command=f"touch {target}"))
    with pytest.raises(InputError, match=r"evil\.pkl: "):
        read_weights(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # the exploit is a real one


def test_a_pickle_cannot_alter_the_functions_that_it_may_call(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    for name in ("ccollections\nOrderedDict\n", "c_codecs\nencode\n", "ctorch._utils\n_rebuild_tensor_v2\n"):
        path.write_bytes(name.encode() + b"(N}Vfunction\ncos\nsystem\nstb.")
        before = dict(read._ADMITTED), {key: value.function for key, value in read._ADMITTED.items()}
        with pytest.raises(InputError, match="alters a function"):
            read_weights(path)
        assert before == (dict(read._ADMITTED), {key: value.function for key, value in read._ADMITTED.items()})


def test_unpickling_never_imports(tmp_path: Path) -> None:
    """A module is not imported for its name: importing runs its code."""
    (tmp_path / "surprise_module.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x02csurprise_module\nthing\n.")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(InputError):
            read_weights(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "executed").exists()
    assert "surprise_module" not in sys.modules


def test_numpy_cannot_be_told_that_bytes_are_pointers(tmp_path: Path) -> None:
    """A dtype of objects whose state drops its flags makes numpy's own unpickling take the bytes for addresses."""
    path = tmp_path / "evil.pkl"
    dtype = b"cnumpy\ndtype\n(VO8\nK\x00K\x01tR(K\x03V|\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01(K\x01t" + dtype
    array += b"\x89C\x08AAAAAAAAtb"
    path.write_bytes(b"\x80\x03}Vmodel\n}Vw\n" + array + b"ss.")
    with pytest.raises(InputError, match=r"its w is an array of numpy's type 'O8'"):
        read_weights(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (100,), (1,)), (0, (2,), (50,)), (8, (2,), (1,)), (-1, (1,), (1,)), (0, (2**40,), (0,)), (0, (2,), (-1,))],
)
def test_tensors_stay_within_their_storage(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = tmp_path / "evil.pth"
    untyped = torch.arange(9.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)

    class Outside:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())

    torch.save({"w": Outside()}, path)
    with pytest.raises(InputError, match=r"evil\.pth: damaged"):
        read_weights(path)


# --- What is not a file of weights ---


def other_files(folder: Path) -> dict[str, tuple[Path, str]]:
    cases: dict[str, tuple[str, bytes | None, str]] = {
        "missing": ("none.pth", None, "no such file"),
        "empty": ("empty.pth", b"", "is empty"),
        "html": ("page.pth", b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        "lfs": ("lfs.pkl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        "safetensors": ("w.bin", struct.pack("<Q", 20) + b'{"a": {}}' + b" " * 11, "safetensors"),
        "onnx": ("model.pb", b"\x08\x07\x12\x07pytorch" + b"\0" * 20, "ONNX"),
        "gzip": ("w.pth.tar", b"\x1f\x8b\x08\0\0\0", "compressed"),
        "text": ("notes.pth", b"these are not weights", "damaged"),
        "jpeg": ("image.pth", b"\xff\xd8\xff\xe0" + b"\0" * 600, "damaged"),
        "number": ("number.pkl", pickle.dumps(7), "no state dict .* holds 7"),
        "dict": ("dict.pkl", pickle.dumps({"net": {"w": np.ones(1)}, "epoch": 1}), "no state dict .* keys net, epoch"),
        "nothing": ("nothing.pkl", pickle.dumps({"model": {}}), "empty"),
    }
    for name, content, _ in cases.values():
        if content is not None:
            (folder / name).write_bytes(content)
    (folder / "folder.pth").mkdir()
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    with tarfile.open(folder / "tar.pth", "w:") as tar:
        tar.add(folder / "lfs.pkl", "readme.txt")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), folder / "script.pth")
    paths = {key: (folder / name, message) for key, (name, _, message) in cases.items()}
    paths |= {"folder": (folder / "folder.pth", "is a folder"), "zip": (folder / "zip.pth", "none of PyTorch")}
    paths |= {"tar": (folder / "tar.pth", "none of PyTorch"), "script": (folder / "script.pth", "TorchScript")}
    return paths


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    for path, message in other_files(tmp_path).values():
        with pytest.raises(InputError, match=rf"(?s)^{path}: .*{message}"):
            read_weights(path)


@pytest.mark.parametrize("kind", ["zip", "stream", "tar", "pkl"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    state = {"a": torch.randn(50), "b": torch.randn(50)}
    if kind == "tar":
        write_tar(path, state)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({name: value.numpy() for name, value in state.items()}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) if kind == "tar" else len(content)  # a tar is padded
    for cut in [end * i // 20 for i in range(1, 20)] + [end - 3]:
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"weights\.pth: "):
            read_weights(path)


def test_changed_bytes_in_a_zip_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged"):
        read_weights(path)
