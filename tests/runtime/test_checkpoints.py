"""Checkpoint files: what is read, what is refused, and that nothing in them runs."""

import collections
import io
import os
import pickle
import random
import struct
import sys
import zipfile

import numpy
import pytest
import safetensors.torch
import torch

from tokenmix.runtime.checkpoints import CheckpointError, read_checkpoint
from tokenmix.runtime.pickles import UnsafePickle, read_pickle

ARRAYS = {
    "matrix": numpy.arange(6, dtype="f4").reshape(2, 3),
    "by_columns": numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
    "empty": numpy.zeros((0, 3)),
    "swapped": numpy.arange(3, dtype=">i4"),
    "flags": numpy.array([True, False]),
    "number": numpy.float32(2),
    "point": numpy.array(3, dtype="u1"),
    "half": numpy.ones(2, dtype="f2"),
    "StructuredToParameterName@@": {"matrix": "linear_0.w_0"},
}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_are_read_whatever_their_protocol(protocol, tmp_path):
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps(ARRAYS, protocol))
    found = read_pickle(path)
    for name, array in ARRAYS.items():
        if name.endswith("@@"):
            assert found[name] == array
        else:
            made = found[name].numpy()
            assert made.dtype == array.dtype.newbyteorder("=") and made.shape == array.shape
            assert numpy.array_equal(made, array)
    if protocol >= 2:
        tensors, others = read_checkpoint(path).state(None)
        assert len(tensors) == len(ARRAYS) - 1 and others == {"StructuredToParameterName@@": "dict"}


def test_big_arrays_that_paddle_cut_up_are_whole_again(tmp_path):
    whole = numpy.arange(12.0).reshape(3, 4)
    pieces = {f"big@@.{i}": whole.reshape(-1)[5 * i : 5 * i + 5] for i in range(3)}
    cut = {"big": {"OriginShape": (3, 4), "slices": list(pieces)}}
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps({**pieces, "UnpackBigParamInfor@@": cut}, 2))
    (tensor,) = read_checkpoint(path).state(None)[0].values()
    assert numpy.array_equal(tensor.numpy(), whole)
    for wrong in ({"big": {"OriginShape": (3, 5), "slices": list(pieces)}}, {"big": {}}, [1]):
        path.write_bytes(pickle.dumps({**pieces, "UnpackBigParamInfor@@": wrong}, 2))
        with pytest.raises(CheckpointError, match="make no whole array"):
            read_checkpoint(path)


def test_paddles_pairs_of_name_and_array_are_arrays(tmp_path):
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps({"a": ("linear_0.w_0", numpy.ones(3))}, 4))
    assert read_checkpoint(path).state(None)[0]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("legacy", [False, True])
def test_the_kind_is_told_by_the_first_bytes_whatever_the_name(legacy, tmp_path):
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "torch.safetensors", _use_new_zipfile_serialization=not legacy)
    safetensors.torch.save_file(state, tmp_path / "safe.pth")
    for name, kind in (("torch.safetensors", "torch"), ("safe.pth", "safetensors")):
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint.kind == kind and torch.equal(checkpoint.state(None)[0]["a"], state["a"])


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    pass


def raw(*parts):
    return b"\x80\x04" + b"".join(p if isinstance(p, bytes) else pickle.dumps(p, 4)[2:-1] for p in parts) + b"."


def named(module, name):
    return f"c{module}\n{name}\n".encode()


BUFFER = named("numpy._core.numeric", "_frombuffer")
RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
HOSTILE = {
    "os.system": (pickle.dumps(Calls(os.system, "touch PWNED")), "posix.system"),
    "eval": (pickle.dumps({"a": Calls(eval, "open('PWNED', 'w')")}, 2), "__builtin__.eval"),
    "exec": (pickle.dumps([Calls(exec, "open('PWNED', 'w')")]), "builtins.exec"),
    "getattr": (raw(named("builtins", "getattr"), named("os", "system"), b"\x86R"), "builtins.getattr"),
    "nested name": (raw(named("numpy", "ndarray.__class__")), "numpy.ndarray.__class__"),
    "numpy.load": (raw(named("numpy", "load"), b"\x8c\x05PWNED\x85R"), "numpy.load"),
    "runstring": (raw(named("numpy.testing._private.utils", "runstring"), b"(tR"), "runstring"),
    "numpy.core": (raw(named("numpy._core.multiarray", "fromfile")), "fromfile"),
    "import": (raw(named("builtins", "__import__"), b"\x8c\x02os\x85R"), "builtins.__import__"),
    "persistent id": (b"\x80\x04\x8c\x01aQ.", "BINPERSID"),
    "persistent text": (b"Pname\n.", "PERSID"),
    "instance": (b"(ios\nsystem\n.", "INST"),
    "new object": (pickle.dumps(State(), 2), "copy_reg._reconstructor|test_checkpoints.State|NEWOBJ"),
    "NEWOBJ": (raw(named("numpy", "ndarray"), b")\x81"), "NEWOBJ"),
    "NEWOBJ_EX": (raw(named("numpy", "ndarray"), b")}\x92"), "NEWOBJ_EX"),
    "OBJ": (raw(b"(", named("collections", "OrderedDict"), b"o"), "OBJ"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "out of band": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "call of a number": (raw(1, b")R"), "calls a int"),
    "call of an array": (raw(numpy.ones(3), b")R"), "calls a PickledArray"),
    "call of ndarray": (raw(named("numpy", "ndarray"), b"K\x7f\x85\x85R"), "`ndarray`"),
    "subclass": (raw(RECONSTRUCT, named("builtins", "tuple"), b"K\x00\x85C\x01b\x87R"), "`array`"),
    "dtype of objects": (pickle.dumps(numpy.array([1, "a"], dtype=object)), "Python objects"),
    "dtype of records": (pickle.dumps(numpy.zeros(2, dtype=[("a", "f4")])), "dtype V4"),
    "dtype of texts": (pickle.dumps(numpy.array(["a"])), "dtype U1"),
    "wild dtype": (raw(named("numpy", "dtype"), b"\x8c\x0b(2,2)f4,O,O\x85R"), "dtype (2,2)"),
    "state of a dict": (raw({}, {"a": 1}, b"b"), "state of a dict"),
    "state of an OrderedDict": (raw(named("collections", "OrderedDict"), b")R", {"items": 1}, b"b"), "state of a dict"),
    "state of ndarray itself": (raw(named("numpy", "ndarray"), {"__setstate__": 1}, b"b"), "state of a _Global"),
    "second state": (raw(numpy.ones(3), (1, (3,), 1, False, b""), b"b"), "state of a PickledArray"),
    "list for a dict": (raw([], b"K\x01K\x01s"), "fills a list"),
    "key of tuples": (raw(b"}", b")\x940", b"h\x00h\x00\x86", b"K\x01s"), "a key is a tuple"),
    "key of many digits": (pickle.dumps({10**5000: 1}, 4), "a number of 16610 bits"),
    "many arguments": (raw(named("numpy", "dtype"), tuple(range(100)), b"R"), "`dtype`"),
    "long dtype": (raw(named("numpy", "dtype"), b"X\xff\x00\x00\x00" + b"<" * 253 + b"f4", b"\x85R"), "dtype <<<"),
    "codec": (raw(named("_codecs", "encode"), b"\x8c\x01a\x8c\x03zip\x86R"), "`encode`"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_run_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, named_ = HOSTILE[case]
    path = tmp_path / "weights.pdparams"
    path.write_bytes(data)
    with pytest.raises(UnsafePickle) as caught:
        read_pickle(path)
    assert any(part in str(caught.value) for part in named_.split("|")), str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["weights.pdparams"]
    if data[:1] == b"\x80":
        with pytest.raises(CheckpointError, match=r"weights\.pdparams was refused"):
            read_checkpoint(path)


def test_collections_of_the_standard_library_are_read_as_plain_ones(tmp_path):
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps(collections.OrderedDict(a=numpy.ones(2), b=1), 4))
    found = read_pickle(path)
    assert type(found) is dict and list(found) == ["a", "b"]


BOMBS = {
    "a text longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "a byte array longer than the file": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"abc.",
    "a number longer than the file": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
    "a negative length": b"\x80\x04\x8b" + struct.pack("<i", -5) + b"abc.",
    "a shape larger than its bytes": raw(
        RECONSTRUCT, named("numpy", "ndarray"), b"K\x00\x85C\x01b\x87R",
        b"(K\x01\x8a\x05\x00\x00\x00\x00\x10\x85", named("numpy", "dtype"), b"\x8c\x02f8\x89\x88\x87R",
        b"\x89C\x01at", b"b",
    ),
    "nothing on the stack": b"\x80\x04R.",
    "a mark where a value is due": b"\x80\x04(K\x01(R.",
    "no end": b"\x80\x04N",
    "two objects": b"\x80\x04NN.",
    "no such instruction": b"\x80\x04\xff.",
    "an unknown place in the memo": b"\x80\x04h\x05.",
    "an array that is never filled": raw(RECONSTRUCT, named("numpy", "ndarray"), b"K\x00\x85C\x01b\x87R"),
    "an empty array with sides that nothing can address": raw(
        BUFFER, b"(C\x00", named("numpy", "dtype"), b"\x8c\x02f8\x85R", (0, 2**47, 2**47), b"\x8c\x01Ct", b"R",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_lies_about_sizes_are_found_before_memory_is_taken(case, tmp_path):
    import tracemalloc

    path = tmp_path / "weights.pdparams"
    path.write_bytes(BOMBS[case])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="cut off or no pickle"):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


# Objects of the memo that are converted, copied or put into arrays again and again.
MEBI = 2**20
COUNT = 1500
UNFOLDING = {
    "one text encoded": (b"X", b"h\x00X\x06\x00\x00\x00latin1\x86R", named("_codecs", "encode")),
    "one byte array in arrays": (b"\x96", b"(h\x00h\x02(J\x00\x00\x10\x00tX\x01\x00\x00\x00CtR", BUFFER),
    "bytes in arrays": (b"B", b"(h\x00h\x02(J\x00\x00\x10\x00tX\x01\x00\x00\x00CtR", BUFFER),
    "one list made a tuple": (b"(", b"h\x00\x85R", named("builtins", "tuple")),
}


@pytest.mark.parametrize("case", UNFOLDING)
def test_a_small_file_does_not_fill_the_memory(case, tmp_path):
    import tracemalloc

    kind, call, function = UNFOLDING[case]
    length = struct.pack("<Q", MEBI) if kind == b"\x96" else struct.pack("<I", MEBI)
    seed = b"(" + b"N" * (MEBI // 8) + b"l" if kind == b"(" else kind + length + b"x" * MEBI
    path = tmp_path / "weights.pdparams"
    start = (
        b"\x80\x05" + seed + b"\x940" + function + b"\x940" + named("numpy", "dtype") + b"X\x02\x00\x00\x00u1\x85R\x940"
    )
    path.write_bytes(
        start + b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"h\x01" + call for i in range(COUNT)) + b"u."
    )
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="unfolds to more than 2 times its size"):
            read_checkpoint(path).state(None)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_one_array_under_many_names_is_one_tensor(tmp_path):
    array = numpy.ones(1000)
    path = tmp_path / "weights.pdparams"
    path.write_bytes(pickle.dumps({f"w{i}": array for i in range(50)}, 4))
    tensors, _ = read_checkpoint(path).state(None)
    assert len(tensors) == 50 and len({tensor.data_ptr() for tensor in tensors.values()}) == 1
    cut = {"big": {"OriginShape": (50_000,), "slices": [f"w{i}" for i in range(50)]}}
    path.write_bytes(pickle.dumps({**{f"w{i}": array for i in range(50)}, "UnpackBigParamInfor@@": cut}, 4))
    with pytest.raises(CheckpointError, match="make no whole array"):
        read_checkpoint(path)


def test_a_high_place_in_the_memo_takes_no_room(tmp_path):
    # The memo of the standard library's unpickler is a list: this takes 16 GB there.
    path = tmp_path / "weights.pdparams"
    path.write_bytes(b"\x80\x04}r\xff\xff\xff\x3f.")
    assert read_pickle(path) == {}


def test_endless_pickles_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenmix.runtime.pickles.MAX_INSTRUCTIONS", 1000)
    path = tmp_path / "weights.pdparams"
    path.write_bytes(b"\x80\x04" + b"]" * 2000 + b".")
    with pytest.raises(CheckpointError, match="more than 1,000 instructions"):
        read_checkpoint(path)


def test_a_truncated_pickle_is_told_as_such(tmp_path):
    data = pickle.dumps({"a": numpy.ones((50, 50))}, 4)
    path = tmp_path / "weights.pdparams"
    for length in (2, 20, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut off or no pickle"):
            read_checkpoint(path)


# Torch files


def test_torch_files_of_both_formats_are_read(tmp_path):
    for zipped in (True, False):
        path = tmp_path / "weights.pth"
        torch.save({"a": torch.ones(3), "n": {"b": torch.zeros(2)}}, path, _use_new_zipfile_serialization=zipped)
        checkpoint = read_checkpoint(path)
        assert checkpoint.kind == "torch" and checkpoint.entries == {"n": 1}
        assert checkpoint.state(None)[0]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_that_calls_something_is_refused(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Calls(os.system, "touch PWNED")}, "weights.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"asks for the global (posix|nt)\.system"):
        read_checkpoint("weights.pth")
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_whole_torch_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*save the state dict"):
        read_checkpoint(tmp_path / "module.pth")


def test_a_torch_file_cannot_unfold_to_more_than_itself(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    with pytest.raises(CheckpointError, match="unfolds to more"):
        read_checkpoint(tmp_path / "small.pth")
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(CheckpointError, match="larger than its bytes"):
        read_checkpoint(path)


# Any file


def contents():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(100)}, buffer)
    yield "empty", b"", "is empty"
    yield "page", b"<!DOCTYPE html><html>", "the download led to a web page"
    yield "text", b"hello there", "no checkpoint that is known"
    yield "cut.pth", buffer.getvalue()[:300], "cut off or no torch checkpoint"
    yield "zip.pth", b"PK\x03\x04" + bytes(40), "cut off or no torch checkpoint"
    yield "header.safetensors", struct.pack("<Q", 10**6) + b'{"a":', "cut off or no safetensors file"
    yield "short.safetensors", b"abc", "cut off or no safetensors file"
    yield "list.pdparams", pickle.dumps([1, 2]), "holds a list"
    yield "numbers.pdparams", pickle.dumps({1: 2}), "names of weights are texts"
    cut = {"big": {"OriginShape": (float("inf"),), "slices": ["a"]}}
    yield "cut.pdparams", pickle.dumps({"a": numpy.ones(2), "UnpackBigParamInfor@@": cut}, 4), "make no whole array"
    archive = io.BytesIO()
    numpy.savez(archive, a=numpy.ones(2))
    yield "a.npz", archive.getvalue(), "archive of numpy"


@pytest.mark.parametrize(("name", "data", "message"), contents(), ids=lambda v: v if isinstance(v, str) else "")
def test_files_that_are_no_checkpoints_get_one_clear_error(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_cannot_be_shown_are_refused_wherever_they_stand():
    with pytest.raises(CheckpointError, match="entry model has a key of type int"):
        read_checkpoint({"model": {10**5000: torch.ones(2)}}).state("model")
    with pytest.raises(CheckpointError, match="the state dict has a key of type int"):
        read_checkpoint({10**5000: torch.ones(2)})


def files_to_damage():
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(20), "n": {"b": torch.zeros(2)}}, buffer, _use_new_zipfile_serialization=zipped)
        yield "torch" if zipped else "torch legacy", buffer.getvalue()
    yield "safetensors", safetensors.torch.save({"a": torch.ones(20)})
    cut = {"d": numpy.ones(2), "UnpackBigParamInfor@@": {"c": {"OriginShape": (2,), "slices": ["d"]}}}
    for protocol in (2, 4):
        yield (
            f"pickle {protocol}",
            pickle.dumps({"a": numpy.ones((3, 4)), "b": ("x", numpy.arange(3)), **cut}, protocol),
        )


@pytest.mark.parametrize(("kind", "whole"), files_to_damage(), ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_files_are_read_or_refused_and_nothing_else(kind, whole, tmp_path):
    draw = random.Random(0)
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 5])):
            if draw.random() < 0.8:
                data[draw.randrange(len(data))] = draw.randrange(256)
            else:
                del data[draw.randrange(1, len(data) + 1) :]
        path.write_bytes(data)
        try:
            read_checkpoint(path).state(None)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"did you mean `.*weights\.pth`"):
        read_checkpoint(tmp_path / "weigths.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    if sys.platform != "win32" and os.getuid() != 0:
        (tmp_path / "weights.pth").chmod(0)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(tmp_path / "weights.pth")
