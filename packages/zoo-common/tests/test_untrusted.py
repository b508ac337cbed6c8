import argparse
import bz2
import gzip
import io
import lzma
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from zoo_common import load_untrusted

CODECS = {
    "plain": bytes,
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
}


class NumpyArrayWrapper:
    """What joblib pickles in the place of an array; the array's bytes follow the instruction that gives its state."""

    def __init__(self, array, alignment):
        self.subclass, self.shape, self.dtype = np.ndarray, array.shape, array.dtype
        self.order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        self.allow_mmap = not array.dtype.hasobject
        if alignment is not None:
            self.numpy_array_alignment_bytes = alignment


NumpyArrayWrapper.__module__ = "joblib.numpy_pickle"


class JoblibPickler(pickle._Pickler):
    """Writes joblib's stream (of version 1.1 and below without alignment)."""

    def __init__(self, file, protocol, alignment):
        super().__init__(file, protocol)
        self.file, self.alignment = file, alignment

    def save_global(self, obj, name=None):
        if obj is not NumpyArrayWrapper:
            return super().save_global(obj, name)
        if self.proto >= 4:
            self.save("joblib.numpy_pickle")
            self.save("NumpyArrayWrapper")
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n")
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, type: save_global}  # noqa: RUF012

    def save(self, obj, save_persistent_id=True):
        if type(obj) is not np.ndarray:
            return super().save(obj, save_persistent_id)
        super().save(NumpyArrayWrapper(obj, self.alignment))
        self.framer.commit_frame(force=True)
        if obj.dtype.hasobject:
            pickle.dump(obj, self.file, protocol=2)
            return
        if self.alignment is not None:
            padding = self.alignment - (self.file.tell() + 1) % self.alignment
            self.file.write(bytes([padding]) + b"\xff" * padding)
        self.file.write(obj.tobytes("F" if obj.flags.f_contiguous and not obj.flags.c_contiguous else "C"))


def joblib_bytes(content, protocol=4, alignment=16):
    file = io.BytesIO()
    JoblibPickler(file, protocol, alignment).dump(content)
    return file.getvalue()


def torch_bytes(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def make_content():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    marked = torch.ones(2)
    marked.note = "an attribute"
    return {
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], name=None, device=torch.device("cpu")),
        "strided": torch.arange(20.0).reshape(4, 5).t()[1:],
        "bfloat16": torch.tensor([1.5, -2]).bfloat16(),
        "bool": torch.tensor([True, False]),
        "counter": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "uint16": torch.arange(3).to(torch.uint16),
        "parameter": nn.Parameter(torch.ones(2)),
        "marked": marked,
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strings": np.array(["ab", "c"]),
        "objects": np.array(["a", None, 1], dtype=object),
        "scalar": np.float32(2.5),
        "plain": [1, -5, 10**20, 2.5, "ü", b"abc", b"", True, None, 1 + 2j, (1, 2), {3}, frozenset("a"), {(1, "x"): 2}],
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
    }


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    match expected:
        case torch.Tensor():
            assert actual.stride() == expected.stride() and actual.requires_grad == expected.requires_grad
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        case np.ndarray():
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)
        case dict():
            assert list(actual) == list(expected)
            for key, value in expected.items():
                assert_same(actual[key], value)
        case argparse.Namespace():
            assert_same(vars(actual), vars(expected))
        case list() | tuple():
            assert len(actual) == len(expected)
            for pair in zip(actual, expected, strict=True):
                assert_same(*pair)
        case _:
            assert actual == expected


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_torch_come_back_bitwise(tmp_path, as_zip, protocol):
    content = make_content()
    path = tmp_path / "a.pt"
    path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=as_zip, pickle_protocol=protocol))
    assert_same(load_untrusted(path), content)
    assert load_untrusted(path)["state_dict"]._metadata == content["state_dict"]._metadata


@pytest.mark.parametrize("as_zip", [True, False])
def test_tied_tensors_stay_tied_and_can_be_written(tmp_path, as_zip):
    w = torch.zeros(4, 5)
    path = tmp_path / "a.pth"
    path.write_bytes(torch_bytes({"w": w, "row": w[1]}, _use_new_zipfile_serialization=as_zip))
    loaded = load_untrusted(path)
    loaded["w"][1, 2] = 3
    assert loaded["row"].tolist() == [0, 0, 3, 0, 0]


@pytest.mark.parametrize("alignment", [None, 16])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("codec", CODECS)
def test_files_of_joblib_come_back_bitwise(tmp_path, codec, protocol, alignment):
    content = make_content()
    path = tmp_path / "a.joblib"
    path.write_bytes(CODECS[codec](joblib_bytes(content, protocol, alignment)))
    assert_same(load_untrusted(path), content)


def test_text_and_bytes_of_python_2_come_back(tmp_path):
    """There both are written by the instructions for byte strings."""
    head = b"\x80\x02}(U\x04dataq\x00cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    path = tmp_path / "a.pt"
    path.write_bytes(head + dtype + b"\x89T\x02\x00\x00\x00\x07\xfftbU\x06labels]q\x01(K\x06K\x09eu.")
    loaded = load_untrusted(path)
    assert_same(loaded, {"data": np.array([7, 255], np.uint8), "labels": [6, 9]})


class Child(nn.Module):
    """Stands for a class of someone else's, which the reader does not have."""

    def __init__(self):
        super().__init__()
        self.linear, self.activation, self.width = nn.Linear(2, 3), torch.nn.functional.relu, 3


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("as_zip", [True, False])
def test_objects_of_named_classes_come_as_records(tmp_path, monkeypatch, as_zip):
    monkeypatch.setattr(Child, "__module__", "absent_networks")
    monkeypatch.setitem(sys.modules, "absent_networks", sys.modules[__name__])
    module, path = Child(), tmp_path / "epoch1.th"
    torch.save({"model": module}, path, _use_new_zipfile_serialization=as_zip)
    monkeypatch.delitem(sys.modules, "absent_networks")
    with pytest.raises(ValueError, match=r"epoch1\.th: asks for absent_networks\.Child"):
        load_untrusted(path)
    loaded = load_untrusted(path, stubs=["absent_*", "torch.nn.modules.linear.Linear", "torch.nn.functional.relu"])
    record = loaded["model"]
    assert (record.name, record.state["width"]) == ("absent_networks.Child", 3)
    assert record.state["activation"].name == "torch.nn.functional.relu"
    assert_same(record.state["_modules"]["linear"].state["_parameters"]["weight"], module.linear.weight)


@pytest.mark.parametrize("body", ["os.system", "NEWOBJ", "getattr", "map", "BUILD of a class"])
def test_no_record_runs_code(tmp_path, monkeypatch, body):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(program(CALLS[body][0]))
    with suppress(ValueError):
        load_untrusted("a.pt", stubs=["*"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.pt"):
        load_untrusted(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", *CODECS])
def test_a_truncated_file_is_named(tmp_path, kind):
    content = {"w": torch.randn(300), "a": np.random.default_rng(0).normal(size=300)}
    if kind in CODECS:
        whole = CODECS[kind](joblib_bytes(content))
    else:
        whole = torch_bytes(content, _use_new_zipfile_serialization=kind == "zip")
    path = tmp_path / "a.pt"
    for keep in (0, 1, 20, len(whole) // 4, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"a\.pt is damaged.*: fetch it again"):
            load_untrusted(path)


def test_a_flipped_byte_is_an_error_in_one_line_or_another_value(tmp_path):
    whole = torch_bytes({"w": torch.zeros(2), "n": [1, "x"]}, _use_new_zipfile_serialization=False)
    path = tmp_path / "a.pt"
    refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x51]) + whole[position + 1 :])
        try:
            load_untrusted(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(whole) // 3


# ---- hostile files ---------------------------------------------------------------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module, name, *arguments):
    """Protocol 2: call a global with texts, or with what given instructions leave on the stack."""
    parts = [part if isinstance(part, bytes) else text(part) for part in arguments]
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(parts) + b"tR"


def program(body):
    return b"\x80\x02" + body + b"."


COMMAND = "touch CANARY"
CODE = "open('CANARY', 'w')"
CALLS = {  # instructions that would leave a file CANARY behind, and the name that must be refused
    "os.system": (call("os", "system", COMMAND), "os.system"),
    "posix.system": (call("posix", "system", COMMAND), "posix.system"),
    "subprocess": (call("subprocess", "check_output", b"(" + text("touch") + text("CANARY") + b"l"), "subprocess"),
    "popen": (call("os", "popen", COMMAND), "os.popen"),
    "eval": (call("builtins", "eval", CODE), "builtins.eval"),
    "eval2": (call("__builtin__", "eval", CODE), "__builtin__.eval"),
    "exec": (call("builtins", "exec", CODE), "builtins.exec"),
    "open": (call("builtins", "open", "CANARY", "w"), "builtins.open"),
    "io.open": (call("io", "open", "CANARY", "w"), "io.open"),
    "path": (call("pathlib", "Path.touch", "CANARY"), "pathlib.Path.touch"),
    "getattr": (call("builtins", "getattr", b"cos\n_wrap_close\n", "system"), "builtins.getattr"),
    "getattr first": (call("builtins", "getattr", b"]", "append"), "builtins.getattr"),
    "import": (call("builtins", "__import__", "os"), "builtins.__import__"),
    "importlib": (call("importlib", "import_module", "antigravity"), "importlib.import_module"),
    "runpy": (call("runpy", "run_path", "CANARY"), "runpy.run_path"),
    "timeit": (call("timeit", "timeit", CODE), "timeit.timeit"),
    "pickle": (call("pickle", "loads", b"U\x04abcd"), "pickle.loads"),
    "joblib.load": (call("joblib", "load", "CANARY"), "joblib.load"),
    "torch.load": (call("torch", "load", "CANARY"), "torch.load"),
    "torch.hub": (call("torch.hub", "load", "CANARY"), "torch.hub.load"),
    "torch module": (call("torch._inductor.codecache", "compile_file", "CANARY"), "codecache.compile_file"),
    "torch dotted": (call("torch", "os.system", COMMAND), "torch.os.system"),
    "numpy": (call("numpy.testing._private.utils", "runstring", CODE, b"}"), "runstring"),
    "numpy.load": (call("numpy", "load", "CANARY"), "numpy.load"),
    "partial": (call("functools", "partial", b"cos\nsystem\n", COMMAND), "functools.partial"),
    "map": (call("builtins", "map", b"cbuiltins\neval\n"), "builtins.map"),
    "copyreg": (call("copyreg", "_reconstructor", b"cbuiltins\nlist\n"), "copyreg._reconstructor"),
    "methodcaller": (call("operator", "methodcaller", "system", COMMAND), "operator.methodcaller"),
    "types": (call("types", "CodeType", b"K\x00"), "types.CodeType"),
    "shutil": (call("shutil", "rmtree", "CANARY"), "shutil.rmtree"),
    "socket": (call("socket", "create_connection", "CANARY"), "socket.create_connection"),
    "ctypes": (call("ctypes", "CDLL", "CANARY"), "ctypes.CDLL"),
    "allowed first": (call("collections", "OrderedDict") + call("os", "system", COMMAND) + b"\x86", "os.system"),
    "NEWOBJ": (b"csubprocess\nPopen\n(" + text(COMMAND) + b"t\x81", "subprocess.Popen"),
    "INST": (b"(" + text(COMMAND) + b"ios\nsystem\n", "os.system"),
    "INST allowed": (b"(icollections\nOrderedDict\n", "instruction INST"),
    "OBJ": (b"(cos\nsystem\n" + text(COMMAND) + b"o", "os.system"),
    "OBJ allowed": (b"(ccollections\nOrderedDict\no", "instruction OBJ"),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93(" + text(COMMAND) + b"tR", "os.system"),
    "STACK_GLOBAL of a list": (b"]]\x93)R", "requires str"),
    "NEWOBJ_EX": (b"cargparse\nNamespace\n)}\x92", "instruction NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "instruction EXT1"),
    "EXT2": (b"\x83\x01\x00", "instruction EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "instruction EXT4"),
    "PERSID": (b"Pos.system\n", "instruction PERSID"),
    "BUILD of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + text("x") + b"sb", "a state"),
    "BUILD of a class": (b"cargparse\nNamespace\n}" + text("__init__") + text("x") + b"sb", "a state"),
    "BUILD of a list": (b"]}b", "a list with a state"),
    "class of a namespace": (b"cargparse\nNamespace\n)R}" + text("__class__") + text("x") + b"sb", "a state"),
    "__setstate__": (b"cargparse\nNamespace\n)R}" + text("__setstate__") + b"cos\nsystem\nsb", "os.system"),
    "a result that is a function": (b"ctorch._utils\n_rebuild_tensor_v2\n", "as a value"),
    "hooks": (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNN)tR", "os.system"),
    "rebuild by another function": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cargparse\nNamespace\nN)NtR",
        "Namespace builds no tensor",
    ),
    "structured array": (
        call("numpy", "dtype", "V8", b"\x89", b"\x88"),
        "type V8",
    ),
    "a long name": (call("x" * 5000, "y"), "asks for xxxx"),
    "lines in a name": (text("os\nall is well\n") + text("system") + b"\x93", r"os\nall is well\n.system"),
}


def in_zip(body, name="archive/data.pkl", **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", program(body))
        archive.writestr("archive/data/0", bytes(8))
        if name != "archive/data.pkl":
            archive.writestr(name, b"CANARY")
    return file.getvalue()


def legacy(body, keys=b"]"):
    start = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return start + program(body) + program(keys)


def binary(content):
    return b"B" + struct.pack("<I", len(content)) + content


def wrapper(state):
    return b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b"


OBJECTS = wrapper({"shape": (1,), "order": "C", "dtype": np.dtype("O")})
CARRIERS = {
    "pickle": program,
    "zip": in_zip,
    "legacy": legacy,
    "storage of legacy": lambda body: legacy(b"(" + text("storage") + body + text("0") + text("cpu") + b"K\x01tQ"),
    "storage of zip": lambda body: in_zip(b"(" + text("storage") + body + text("0") + text("cpu") + b"K\x01tQ"),
    "keys of legacy": lambda body: legacy(b"N", keys=body),
    "tensor in joblib": lambda body: program(b"ctorch.storage\n_load_from_bytes\n(" + binary(legacy(body)) + b"tR"),
    "object array in joblib": lambda body: program(OBJECTS + program(body)),
    "zlib": lambda body: zlib.compress(program(body)),
    "gzip": lambda body: gzip.compress(program(body)),
    "bz2": lambda body: bz2.compress(program(body)),
    "xz": lambda body: lzma.compress(program(body)),
}


def refuse(folder, monkeypatch, content, **options):
    """The message of the refusal, after which there is the file and nothing else."""
    monkeypatch.chdir(folder)
    (folder / "hostile.pt").write_bytes(content)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"hostile\.pt") as caught:
        load_untrusted("hostile.pt", **options)
    assert [path.name for path in folder.iterdir()] == ["hostile.pt"]
    assert not {"antigravity", "ctypes.wintypes", "joblib"} & (set(sys.modules) - before)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("name", CALLS)
def test_no_file_runs_code(tmp_path, monkeypatch, name):
    body, refused = CALLS[name]
    assert refused in refuse(tmp_path, monkeypatch, program(body))


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", ["os.system", "eval", "NEWOBJ", "INST", "EXT1"])
def test_no_file_runs_code_wherever_it_hides(tmp_path, monkeypatch, carrier, name):
    body, refused = CALLS[name]
    assert refused in refuse(tmp_path, monkeypatch, CARRIERS[carrier](body))


@pytest.mark.parametrize("name", ["os.system", "eval", "popen"])
def test_the_hostile_files_work_where_pickles_are_run(tmp_path, monkeypatch, name):
    """Otherwise the tests above prove nothing."""
    monkeypatch.chdir(tmp_path)
    result = pickle.loads(program(CALLS[name][0]))
    if hasattr(result, "close"):
        result.close()
    assert (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("member", ["../CANARY", "/tmp/CANARY", "archive/../../CANARY", "archive\\..\\CANARY"])
def test_members_that_point_out_of_a_zip_file_are_refused(tmp_path, monkeypatch, member):
    content = in_zip(b"N", name=member)
    assert "points out of it" in refuse(tmp_path, monkeypatch, content)


def tensor(offset, shape, stride, key="0", numel=2, kind=b"ctorch\nFloatStorage\n"):
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + b"J" + struct.pack("<i", numel) + b"tQ"
    rest = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, shape, stride, False, {}))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


TYPED = {
    "outside of its storage": (in_zip(tensor(1, (2,), (1,))), "does not fit"),
    "a stride that overflows": (in_zip(tensor(0, (2,), (2**62,))), "does not fit"),
    "an offset that overflows": (in_zip(tensor(2**62, (2,), (2**62,))), "does not fit"),
    "a negative stride": (in_zip(tensor(1, (2,), (-1,))), "no natural number"),
    "an expanded tensor": (in_zip(tensor(0, (10**12,), (0,))), "does not fit"),
    "too many elements": (in_zip(tensor(0, (2,), (1,), numel=2**30)), "declared"),
    "too many elements, legacy": (legacy(tensor(0, (2,), (1,), numel=2**30)), "declares"),
    "a storage elsewhere": (in_zip(tensor(0, (2,), (1,), key="../../etc/passwd")), "damaged"),
    "a storage of no type": (in_zip(tensor(0, (2,), (1,), kind=b"N")), "no storage"),
    "a container with source": (legacy(b"(" + text("module") + b"NNNNtQ"), "no storage"),
    "persistent objects of joblib": (program(b"(" + text("storage") + b"tQ"), "persistent"),
    "compressed members": (in_zip(b"N", compression=zipfile.ZIP_DEFLATED), "compressed member"),
    "torchscript": (in_zip(b"N", name="archive/constants.pkl"), "TorchScript"),
    "two programs": (in_zip(b"N", name="other/data.pkl"), "not of tensors"),
    "big endian": (in_zip(b"N", name="archive/byteorder"), "big-endian"),
    "tar": (bytes(257) + b"ustar" + bytes(300), "tar file"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(20), "lz4"),
    "old joblib": (b"ZF0x00" + bytes(20), "below 0.10"),
    "objects that are objects": (program(OBJECTS + pickle.dumps(np.array([[], None], dtype=object), 2)), "objects"),
    "an array beyond the file": (
        program(wrapper({"shape": (2**40,), "order": "C", "dtype": np.dtype("f8")})),
        "declares",
    ),
    "an array of nothing": (program(wrapper({"shape": (2**40,), "order": "C", "dtype": np.dtype("S0")})), "type S0"),
    "an array without content": (program(b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81"), "without content"),
    "a tensor as a list": (in_zip(b"c__builtin__\nset\n(" + tensor(0, (2,), (1,)) + b"tR"), "a Tensor where a list"),
    "a huge text": (program(b"\x8d" + struct.pack("<Q", 2**40) + b"x"), "declares"),
    "huge bytes": (program(b"\x8e" + struct.pack("<Q", 2**62) + b"x"), "declares"),
    "a huge integer": (program(b"\x8b" + struct.pack("<i", 2000) + b"\x7f" * 2000), "LONG4"),
    "an endless decimal": (program(b"I" + b"9" * 50000 + b"\n"), "damaged"),
    "deep lists": (program(b"]" * 5000 + b"a" * 4999), "levels deep"),
    "deep tuples": (program(b")" + b"\x85" * 200000), "levels deep"),
    "deep tuples as a key": (program(b"})" + b"\x85" * 20000 + b"Ns"), "a key of type tuple"),
    "a list in itself": (program(b"]q\x00h\x00a"), "contains itself"),
    "billions of laughs": (
        program(
            b"]q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
        ),
        "levels deep",
    ),
    "an empty stack": (program(b"0"), "instruction POP"),
    "nothing to take": (program(b"\x87"), "damaged"),
    "no mark": (program(b"]e"), "damaged"),
    "an unknown instruction": (program(b"\xff"), "damaged"),
    "no end": (b"\x80\x02N", "damaged"),
    "text": (b"<html>404: not found</html>", "no torch or joblib file"),
    "nothing": (b"", "damaged"),
}


@pytest.mark.parametrize("name", TYPED)
def test_no_file_breaks_the_reader(tmp_path, monkeypatch, name):
    content, reason = TYPED[name]
    assert reason in refuse(tmp_path, monkeypatch, content)


def test_a_larger_file_needs_more_bytes(tmp_path):
    path = tmp_path / "a.joblib"
    path.write_bytes(zlib.compress(joblib_bytes({"zeros": np.zeros(10**6)})))
    with pytest.raises(ValueError, match=r"a\.joblib: needs more than 1000000 bytes of memory: .* larger max_bytes"):
        load_untrusted(path, max_bytes=10**6)
    assert load_untrusted(path)["zeros"].shape == (10**6,)


def test_memory_stays_bounded(tmp_path):
    """Bombs are refused, and none takes what it declares."""
    limit = 2**23
    unit = zlib.compressobj(1)
    zeros = b"".join([unit.compress(bytes(2**20)) for _ in range(32)] + [unit.flush()])
    array = wrapper({"shape": (2**28,), "order": "C", "dtype": np.dtype("u1")})
    head = program(array)[:-1]
    packed = zlib.compressobj(1)
    big = packed.compress(head) + b"".join(packed.compress(bytes(2**20)) for _ in range(32)) + packed.flush()
    ordered = b"ccollections\nOrderedDict\nq\x00"
    encode = b"c_codecs\nencode\nq\x00" + text("x" * 2**16) + b"q\x01" + text("latin1") + b"q\x020"
    directory = (b"PK\x01\x02" + bytes(24) + b"\x01" + bytes(17) + b"a") * 2**17  # a member takes 600 bytes of memory
    bombs = {
        "zlib of zeros": zeros,
        "zlib of an array": big,
        "xz": lzma.compress(head + bytes(2**25), preset=0),
        "bz2": bz2.compress(head + bytes(2**25)),
        "dicts": zlib.compress(program(b"}" * 2**18), 1),
        "marks": zlib.compress(program(b"(" * 2**18), 1),
        "objects": zlib.compress(program(ordered + b"h\x00)R" * 2**14), 1),
        "copies": zlib.compress(program(encode.removesuffix(b"0") + b"h\x00h\x01h\x02\x86R" * 2**12), 1),
        "memo": program(b"Nr\xff\xff\xff\xff"),
        "a directory": directory
        + b"PK\x05\x06"
        + struct.pack("<4H2IH", 0, 0, 2**16 - 1, 2**16 - 1, len(directory), 0, 0),
    }
    path = tmp_path / "a.pt"
    for name, content in bombs.items():
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with suppress(ValueError) if name == "memo" else pytest.raises(ValueError, match=r"a\.pt"):
                load_untrusted(path, max_bytes=limit)
            assert tracemalloc.get_traced_memory()[1] < 2 * limit, name
        finally:
            tracemalloc.stop()
