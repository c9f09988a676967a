"""Checkpoints of PyTorch, built by hand from their two layouts: read bit for bit, or refused."""

import io
import pickle
import pickletools
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.io import load_safetensors, load_torch_checkpoint, save_safetensors
from odjax.io.torch_checkpoint import MAGIC, STORAGES


class Named:
    """Pickles as a name of a module that need not exist."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Called:
    """Pickles as a call of a name."""

    def __init__(self, module, name, *arguments):
        self.function, self.arguments = Named(module, name), arguments


class Storage:
    """Pickles as what stands for a storage."""

    def __init__(self, key, values, name=None, view=None, count=None):
        self.key, self.values = key, np.asarray(values)
        self.name = name or next(n for n, dtype in STORAGES.items() if dtype == self.values.dtype)
        self.view, self.count = view, self.values.size if count is None else count


class Writer(pickle._Pickler):
    """Python's pickler in Python, with the names and storages above."""

    def __init__(self, file, legacy):
        super().__init__(file, protocol=2)
        self.legacy, self.storages = legacy, {}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        self.storages[value.key] = value
        pid = ("storage", Named("torch", value.name), value.key, "cuda:0", value.count)
        return (*pid, value.view) if self.legacy else pid

    def save(self, value, *rest, **more):
        if isinstance(value, Named):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Called):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *rest, **more)


def pickled(value, legacy):
    file = io.BytesIO()
    writer = Writer(file, legacy)
    writer.dump(value)
    return file.getvalue(), writer.storages


def legacy_bytes(value, little=True, version=1001):
    objects, storages = pickled(value, True)
    facts = {"protocol_version": version, "little_endian": little, "type_sizes": {"int": 4}}
    parts = [pickle.dumps(part, 2) for part in (MAGIC, version, facts)]
    parts += [objects, pickle.dumps(sorted(storages), 2)]
    for key in sorted(storages):
        values = storages[key].values
        parts += [struct.pack("<q", values.size), values.tobytes()]
    return b"".join(parts)


def zip_bytes(value, *, root="archive", order=b"little", compression=zipfile.ZIP_STORED, more=()):
    objects, storages = pickled(value, False)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", objects)
        archive.writestr(f"{root}/byteorder", order)
        for key, storage in storages.items():
            archive.writestr(f"{root}/data/{key}", storage.values.tobytes())
        for name in more:
            archive.writestr(f"{root}/{name}", b"3\n")
    return file.getvalue()


LAYOUTS = {"legacy": legacy_bytes, "zip": zip_bytes}
both = pytest.mark.parametrize("layout", LAYOUTS)


def tensor(storage, shape, strides=None, begin=0, function="_rebuild_tensor_v2"):
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=int)) for i in range(len(shape)))
    flags = (False, OrderedDict()) if function == "_rebuild_tensor_v2" else ()
    return Called("torch._utils", function, storage, begin, shape, strides, *flags)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints") / "x.pt"


def read(path, content):
    path.write_bytes(content)
    return load_torch_checkpoint(path)


@both
@given(data=st.data())
def test_tensors_of_every_dtype_are_read_bit_for_bit(path, layout, data):
    tensors, expected = {}, {}
    for i, name in enumerate(data.draw(st.lists(st.sampled_from(sorted(STORAGES)), min_size=1, max_size=4))):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
        size = int(np.prod(shape)) * STORAGES[name].itemsize
        raw = data.draw(st.binary(min_size=size, max_size=size))
        raw = bytes(byte & 1 for byte in raw) if name == "BoolStorage" else raw
        expected[f"t{i}"] = np.frombuffer(raw, STORAGES[name]).reshape(shape)
        tensors[f"t{i}"] = tensor(Storage(str(i), expected[f"t{i}"].ravel(), name), shape)
    found = read(path, LAYOUTS[layout](OrderedDict(tensors)))
    assert type(found) is dict
    assert list(found) == list(tensors)
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert found[key].tobytes() == array.tobytes()


@both
@given(st.permutations([0, 1, 2]), st.integers(0, 3), st.sampled_from([1, 2]))
def test_views_are_read_by_their_strides(path, layout, axes, begin, step):
    values = np.arange(3 + 2 * 24, dtype=np.float32)
    whole = values[begin:][: 24 * step : step].reshape(2, 3, 4)
    view = whole.transpose(axes)
    strides = tuple(stride // 4 for stride in view.strides)
    value = {"view": tensor(Storage("7", values), view.shape, strides, begin)}
    found = read(path, LAYOUTS[layout](value))["view"]
    np.testing.assert_array_equal(found, view)
    assert not found.flags.writeable


@both
def test_what_is_shared_and_what_is_expanded_takes_its_memory_once(path, layout):
    storage = Storage("1", np.arange(6, dtype=np.int64))
    a = tensor(storage, (2, 3))
    value = {"a": a, "again": a, "row": tensor(storage, (3,), begin=3)}
    value["expanded"] = tensor(storage, (2**40, 3), (0, 1))
    found = read(path, LAYOUTS[layout](value))
    assert np.shares_memory(found["a"], found["row"])
    assert np.shares_memory(found["a"], found["again"])
    assert found["row"].tolist() == [3, 4, 5]
    assert found["expanded"].shape == (2**40, 3)
    assert found["expanded"][2**39].tolist() == [0, 1, 2]


@both
def test_numbers_texts_lists_and_parameters_come_along(path, layout):
    weight = tensor(Storage("5", np.ones(2, ml_dtypes.bfloat16)), (2,), function="_rebuild_tensor")
    value = {
        "best": 91.78,
        "epoch": 3,
        "arch": "résnet",
        "none": None,
        "nested": {"list": [1, (2.0, True)], "more": OrderedDict(w=weight)},
        "parameter": Called("torch._utils", "_rebuild_parameter", weight, True, OrderedDict()),
    }
    found = read(path, LAYOUTS[layout](value))
    assert found["nested"]["more"].pop("w").tolist() == [1, 1]
    assert found.pop("parameter").dtype == ml_dtypes.bfloat16
    assert found == {
        **{k: value[k] for k in ("best", "epoch", "arch", "none")},
        "nested": {"list": [1, (2.0, True)], "more": {}},
    }


def test_the_attributes_of_a_state_dict_are_passed_over(path):
    state = OrderedDict(w=tensor(Storage("0", np.arange(2.0)), (2,)))
    state._metadata = OrderedDict({"": {"version": 1}})
    assert read(path, zip_bytes(state))["w"].tolist() == [0, 1]


def test_in_the_oldest_files_a_storage_may_be_a_part_of_another(path):
    values = np.arange(10, dtype=np.float64)
    part = Storage("root", values, view=("part", 4, 3))
    assert read(path, legacy_bytes({"x": tensor(part, (2,), begin=1)}))["x"].tolist() == [5, 6]
    with pytest.raises(ValueError, match="leaves its storage of 3 elements"):
        read(path, legacy_bytes({"x": tensor(part, (3,), begin=1)}))


def test_storages_of_the_gpu_have_the_same_classes(path):
    content = legacy_bytes({"x": tensor(Storage("1", np.arange(2.0)), (2,))})
    content = content.replace(b"ctorch\nDoubleStorage", b"ctorch.cuda\nDoubleStorage")
    assert read(path, content)["x"].tolist() == [0, 1]


REFUSED = {
    "os.system": Called("os", "system", "true"),
    "builtins.eval": Called("builtins", "eval", "1"),
    "builtins.getattr": Called("builtins", "getattr", OrderedDict(), "clear"),
    "torch._utils._rebuild_qtensor": Called("torch._utils", "_rebuild_qtensor"),
    "torch.nn.modules.linear.Linear": Called("torch.nn.modules.linear", "Linear"),
    "torch.os.system": Called("torch", "os.system", "true"),
    "collections.Counter": Named("collections", "Counter"),
    "_codecs.encode": Called("_codecs", "encode", "x", "latin1"),
}


@both
@pytest.mark.parametrize("name", REFUSED)
def test_any_other_name_is_refused_and_said(path, layout, name):
    with pytest.raises(ValueError, match=f"names {name}, which is not called: .* save the state_dict alone"):
        read(path, LAYOUTS[layout]({"x": REFUSED[name]}))


@both
def test_nothing_of_a_file_is_run_or_even_imported(path, layout, monkeypatch):
    run = []
    module = types.ModuleType("trap")
    module.spring = lambda *given: run.append(given)
    monkeypatch.setitem(sys.modules, "trap", module)
    for value in (Called("trap", "spring", 1), Named("no_such_module_here", "x")):
        with pytest.raises(ValueError, match="which is not called"):
            read(path, LAYOUTS[layout]({"x": value}))
    assert run == []
    assert "no_such_module_here" not in sys.modules


def test_what_a_pickle_sets_on_a_known_name_does_not_outlive_it(path):
    good = {"x": tensor(Storage("0", np.arange(2.0)), (2,))}
    state = pickle.dumps((None, {"__defaults__": (1, 2, 3), "__kwdefaults__": {"storage": 0}}), 2)[2:-1]
    body = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n" + state + b"bs."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", body)
    pickletools.dis(body, io.StringIO())
    read(path, file.getvalue())
    assert read(path, zip_bytes(good))["x"].tolist() == [0, 1]


@both
def test_a_tensor_that_leaves_its_storage_is_an_error(path, layout):
    storage = Storage("0", np.arange(6.0))
    for bad in (tensor(storage, (2, 4)), tensor(storage, (6,), begin=1), tensor(storage, (2, 2), (5, 1))):
        with pytest.raises(ValueError, match="leaves its storage of 6 elements"):
            read(path, LAYOUTS[layout]({"x": bad}))
    for bad in (tensor(storage, (2,), (-1,)), tensor(storage, (-1,)), tensor(storage, (2,), (1, 1))):
        with pytest.raises(ValueError, match="a tensor begins at 0"):
            read(path, LAYOUTS[layout]({"x": bad}))
    lying = Storage("0", np.arange(6.0), count=60)
    with pytest.raises(ValueError, match="has 6 elements, needed are 60"):
        read(path, LAYOUTS[layout]({"x": tensor(lying, (60,))}))


@both
def test_a_storage_of_two_dtypes_is_an_error(path, layout):
    values = np.arange(4, dtype=np.float32)
    value = [tensor(Storage("0", values, name), (4,)) for name in ("FloatStorage", "IntStorage")]
    with pytest.raises(ValueError, match="storage '0' is both float32 and int32"):
        read(path, LAYOUTS[layout]({"x": value}))


@both
@given(cut=st.floats(0, 0.999))
def test_a_truncated_file_is_an_error_that_names_it(path, layout, cut):
    content = LAYOUTS[layout]({"x": tensor(Storage("0", np.arange(40.0)), (40,))})
    with pytest.raises(ValueError, match="x.pt"):
        read(path, content[: int(cut * len(content))])


@both
@pytest.mark.parametrize("flip", [1, 0x20, 0xFF])
def test_a_damaged_file_is_read_or_is_an_error_that_names_it(path, layout, flip):
    content = LAYOUTS[layout]({"x": tensor(Storage("0", np.arange(4.0)), (4,))})
    for place in range(len(content)):
        message = "x.pt"
        try:
            read(path, content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        except ValueError as error:
            message = str(error)
        assert "x.pt" in message


def test_other_files_are_no_checkpoints(path):
    plain = pickle.dumps({"x": 1}, 2)
    for content in (b"", b"not a checkpoint", plain, b"\x93NUMPY\x01\x00", pickle.dumps(MAGIC + 1, 2)):
        with pytest.raises(ValueError, match="is not a checkpoint of PyTorch: neither a zip archive nor"):
            read(path, content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", b"")
    with pytest.raises(
        ValueError, match="is not a checkpoint of PyTorch: a zip archive with 0 files data.pkl"
    ):
        read(path, file.getvalue())


def test_what_cannot_be_read_says_what_to_do_instead(path):
    value = {"x": tensor(Storage("0", np.arange(2.0)), (2,))}
    for content in (legacy_bytes(value, little=False), zip_bytes(value, order=b"big")):
        with pytest.raises(ValueError, match="big-endian machine: save it again as safetensors"):
            read(path, content)
    with pytest.raises(ValueError, match="has version 7 of the older layout, 1001 can be read"):
        read(path, legacy_bytes(value, version=7))
    with pytest.raises(ValueError, match="is a TorchScript program: save its state_dict instead"):
        read(path, zip_bytes(value, more=["constants.pkl"]))
    with pytest.raises(ValueError, match="archive/byteorder is compressed"):
        read(path, zip_bytes(value, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="holds a list, needed is a dictionary of tensors"):
        read(path, zip_bytes([value]))
    with pytest.raises(FileNotFoundError):
        load_torch_checkpoint(path.with_name("missing"))


def test_a_pickle_that_asks_for_memory_or_for_registered_functions_is_an_error(path):
    def archive(body):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", body)
        return file.getvalue()

    assert read(path, archive(b"\x80\x02}r\x00\x00\x00\x00.")) == {}
    with pytest.raises(ValueError, match="place 4294967295 of the memo after 2 operations"):
        read(path, archive(b"\x80\x02}r\xff\xff\xff\xff."))
    with pytest.raises(ValueError, match="damaged or truncated"):
        read(path, archive(b"\x80\x04B\xff\xff\xff\xffx."))
    with pytest.raises(ValueError, match="names the registered function 7, which is not called"):
        read(path, archive(b"\x80\x02\x82\x07."))


def test_objects_inside_themselves_are_an_error(path):
    loop = {}
    loop["x"] = loop
    with pytest.raises(ValueError, match="damaged"):
        read(path, zip_bytes(loop))
    # A thousand million references to one list are read as one list.
    many = [tensor(Storage("0", np.arange(2.0)), (2,))]
    for _ in range(30):
        many = [many, many]
    assert len(read(path, zip_bytes({"x": many}))["x"]) == 2


def test_a_checkpoint_becomes_a_safetensors_file(path):
    view = tensor(Storage("0", np.arange(6, dtype=np.float32)), (3, 2), (1, 3))
    save_safetensors(path.with_suffix(".safetensors"), read(path, legacy_bytes({"w": view})))
    found = load_safetensors(path.with_suffix(".safetensors"))["w"]
    np.testing.assert_array_equal(found, np.arange(6, dtype=np.float32).reshape(2, 3).T)


def test_the_weights_of_a_real_checkpoint_are_read(real_data):
    file = real_data / "resnet20_cifar10" / "resnet20.th"
    if not file.is_file():
        pytest.skip("no resnet20_cifar10/resnet20.th in the data folder")
    found = load_torch_checkpoint(file)
    assert round(found["best_prec1"], 2) == 91.78
    state = found["state_dict"]
    assert len(state) == 5 * 19 + 2  # 19 convolutions with four arrays of a norm each, and a linear layer
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in jax.tree.leaves(state))
    assert all(state[name].min() > 0 for name in state if name.endswith("running_var"))
