import json
import os
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightsft.errors import BackboneError
from lightsft.export.checkpoint_files import BITS, read_checkpoint, read_shard

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def entry(start=0, stop=4, **changed):
    """The header's entry of a tensor of bytes."""
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]} | changed


def without(key):
    return {name: value for name, value in entry().items() if name != key}


def write(path, header, data=b"", length=None):
    """A file with exactly this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal(read, path):
    """What an error says was found; every one also says what was expected and what to do."""
    with pytest.raises(BackboneError) as caught:
        read(path)
    assert caught.value.expected
    assert caught.value.todo
    return caught.value.found


def bytes_of(tensor):
    return Path(tensor.file).read_bytes()[tensor.start : tensor.stop]


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, tmp_path / ONE, metadata={"format": "pt"})
    save_file({"c": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / TWO)
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 50}, "weight_map": weight_map}))


def test_a_single_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {"b": torch.randn(3, 4), "a": torch.arange(6).reshape(1, 2, 3), "scalar": torch.tensor(2.0)}
    save_file(weights, path, metadata={"format": "pt", "note": "höher"})
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.index is None
    assert checkpoint.folder == tmp_path
    (shard,) = checkpoint.shards
    assert shard.path == path
    assert shard.metadata == {"format": "pt", "note": "höher"}
    assert checkpoint.size == shard.size == path.stat().st_size
    assert [tensor.start for tensor in shard.tensors] == sorted(tensor.start for tensor in shard.tensors)
    assert shard.tensors[0].start == shard.header
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    assert checkpoint.tensors["a"].size == 48


def test_a_sharded_folder_is_read(folder):
    checkpoint = read_checkpoint(folder)
    assert [shard.path.name for shard in checkpoint.shards] == [ONE, TWO]
    assert checkpoint.index["metadata"] == {"total_size": 50}
    assert checkpoint.size == sum((folder / name).stat().st_size for name in (ONE, TWO))
    assert {name: (tensor.file.name, tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()} == {
        "a": (ONE, "F32", (2, 3)),
        "b": (ONE, "F32", (4,)),
        "c": (TWO, "BF16", (5,)),
    }


def test_the_single_file_counts_where_both_are_there(folder):
    save_file({"z": torch.ones(1)}, folder / "model.safetensors")
    assert list(read_checkpoint(folder).tensors) == ["z"]


def test_a_hub_cache_of_links_is_read(folder):
    blobs = folder / "blobs"
    blobs.mkdir()
    for number, name in enumerate((ONE, TWO, INDEX)):
        (folder / name).rename(blobs / str(number))
        (folder / name).symlink_to(Path("blobs") / str(number))
    checkpoint = read_checkpoint(folder)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert checkpoint.shards[0].path == folder / ONE


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_that_is_saved_is_read_as_safetensors_reads_it(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (64,), dtype=torch.uint8)
    weights = {"x": raw.view(DTYPES[dtype]), "y": raw[:16].clone().view(DTYPES[dtype]), "other": torch.ones(3)}
    save_file(weights, path)
    shard = read_shard(path)
    with safe_open(path, "pt") as opened:
        assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors} == {
            name: (opened.get_slice(name).get_dtype(), tuple(opened.get_slice(name).get_shape()))
            for name in opened.keys()  # noqa: SIM118
        }
    for tensor in shard.tensors:
        assert bytes_of(tensor) == weights[tensor.name].view(torch.uint8).numpy().tobytes()
    assert {tensor.name: tensor.dtype for tensor in shard.tensors} == {"x": dtype, "y": dtype, "other": "F32"}


@pytest.mark.parametrize("dtype", BITS)
def test_safetensors_gives_every_dtype_the_same_size(tmp_path, dtype):
    size = BITS[dtype]  # bytes of eight values
    path = write(tmp_path / "x", {"t": entry(0, size, dtype=dtype, shape=[8])}, bytes(size))
    assert read_shard(path).tensors[0].size == size
    with safe_open(path, "pt") as opened:
        assert opened.get_slice("t").get_shape() == [8]
    wrong = write(tmp_path / "y", {"t": entry(0, size + 1, dtype=dtype, shape=[8])}, bytes(size + 1))
    assert f"takes {size} bytes, but has {size + 1}" in refusal(read_shard, wrong)


def test_empty_tensors_and_files_without_any_are_read(tmp_path):
    weights = {"a": torch.ones(3), "empty": torch.empty(2, 0), "b": torch.ones(4)}
    save_file(weights, tmp_path / "some")
    assert {t.name: t.shape for t in read_shard(tmp_path / "some").tensors} == {"a": (3,), "empty": (2, 0), "b": (4,)}
    save_file({}, tmp_path / "none")
    assert read_shard(tmp_path / "none").tensors == ()
    assert read_shard(tmp_path / "none").size == (tmp_path / "none").stat().st_size


def test_only_the_header_is_read(tmp_path):
    size = 2**32
    path = write(tmp_path / "model.safetensors", {"t": entry(0, size)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)  # a sparse file: no disk is taken
    tracemalloc.start()
    assert read_shard(path).tensors[0].shape == (size,)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


ENTRIES = {
    "not an object": ([1, 2], "tensor 't' is [1, 2], not an object"),
    "no dtype": (without("dtype"), "tensor 't' has no dtype"),
    "no shape": (without("shape"), "has no shape"),
    "no offsets": (without("data_offsets"), "has no data_offsets"),
    "nothing": ({}, "has no dtype and no shape and no data_offsets"),
    "dtype a number": (entry(dtype=3), "has the dtype 3"),
    "dtype a list": (entry(dtype=["U8"]), "has the dtype ['U8']"),
    "dtype unknown": (entry(dtype="Q4_K"), "has the dtype 'Q4_K', which safetensors does not have"),
    "shape a number": (entry(shape=4), "has the shape 4"),
    "shape of bool": (entry(0, 1, shape=[True]), "has the shape [True]"),
    "shape of float": (entry(shape=[4.0]), "has the shape [4.0]"),
    "shape of text": (entry(shape=["4"]), "has the shape ['4']"),
    "shape negative": (entry(shape=[-2, -2]), "has the shape [-2, -2]"),
    "shape huge": (entry(shape=[2**63]), "from 0 to 2^63 - 1"),
    "shape wraps around": (entry(0, 0, shape=[2**32, 2**32]), "of more than 2^63 - 1 values"),
    "shape empty but huge": (entry(0, 0, shape=[0, 2**62, 2**62]), "of more than 2^63 - 1 values"),
    "shape long": (entry(shape=[2] * 100_000), "of more than 2^63 - 1 values"),
    "offsets a number": (entry(data_offsets=4), "has the data_offsets 4, not two positions"),
    "offsets one": (entry(data_offsets=[4]), "has the data_offsets [4]"),
    "offsets three": (entry(data_offsets=[0, 4, 4]), "has the data_offsets [0, 4, 4]"),
    "offsets of bool": (entry(data_offsets=[False, 4]), "has the data_offsets [False, 4]"),
    "offsets negative": (entry(data_offsets=[-4, 0]), "has the data_offsets [-4, 0]"),
    "offsets reversed": (entry(data_offsets=[4, 0]), "has the data_offsets [4, 0]"),
    "offsets null": (entry(data_offsets=None), "has the data_offsets None"),
    "length": (entry(shape=[3]), "of U8 and shape [3] takes 3 bytes, but has 4"),
    "length of a scalar": (entry(shape=[]), "takes 1 bytes, but has 4"),
    "half a byte": (entry(0, 2, dtype="F4", shape=[3]), "takes 12 bits, which are no whole bytes"),
    "outside": (entry(10**15, 10**15 + 4, shape=[4]), "tensor 't' lies outside the data: bytes 1,000,000,000,0"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_that_describes_no_tensor_is_refused(tmp_path, case):
    bad, message = ENTRIES[case]
    found = refusal(read_shard, write(tmp_path / "x.safetensors", {"t": bad}, b"abcd"))
    assert message in found
    assert "x.safetensors: tensor 't'" in found


GOOD = json.dumps(entry()).encode()
HEADERS = {
    "empty": (b"", "its header is not JSON"),
    "latin": (b'{"\xe9":' + GOOD + b"}", "its header is not UTF-8"),
    "no json": (b"{t:1}", "its header is not JSON"),
    "half": (b'{"t":' + GOOD, "its header is not JSON"),
    "zeros behind": (b'{"t":' + GOOD + b"}\0\0", "its header is not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "its header is not JSON"),
    "not a number": (b'{"t":NaN}', "NaN is no number of JSON"),
    "digits": (b'{"t":' + b"9" * 5000 + b"}", "its header is not JSON"),
    "nested": (b'{"t":' + b"[" * 200_000, "its header is not JSON"),
    "a list": (b"[]", "its header is [], not an object"),
    "key twice": (b'{"t":' + GOOD + b',"t":' + GOOD + b"}", "its header has the key 't' twice"),
    "field twice": (b'{"t":' + GOOD[:-1] + b',"dtype":"I8"}}', "its header has the key 'dtype' twice"),
    "metadata a list": (b'{"__metadata__":["a"],"t":' + GOOD + b"}", "its __metadata__ is ['a'], not a map of texts"),
    "metadata null": (b'{"__metadata__":null,"t":' + GOOD + b"}", "its __metadata__ is None"),
    "metadata number": (b'{"__metadata__":{"a":1},"t":' + GOOD + b"}", "its __metadata__ is {'a': 1}"),
    "metadata half a character": (b'{"__metadata__":{"a":"\\ud800"},"t":' + GOOD + b"}", "not a map of texts"),
    "name half a character": (b'{"\\ud800":' + GOOD + b"}", "has a name that is not Unicode"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_not_safetensors_is_refused(tmp_path, case):
    header, message = HEADERS[case]
    found = refusal(read_shard, write(tmp_path / "x.safetensors", header, b"abcd"))
    assert message in found
    assert "x.safetensors" in found
    found.encode()  # a message that can be printed


LAYOUTS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "tensors 'a' and 'b' overlap"),
    "same place": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "tensors 'a' and 'b' overlap"),
    "within": ({"a": entry(0, 8), "b": entry(2, 3), "c": entry(4, 5)}, 8, "tensors 'a' and 'c' overlap"),
    "empty within": ({"a": entry(0, 4), "b": entry(2, 2)}, 4, "tensors 'a' and 'b' overlap"),
    "hole first": ({"a": entry(2, 4)}, 4, "a hole of 2 bytes before tensor 'a'"),
    "hole between": ({"a": entry(0, 4), "b": entry(5, 8)}, 8, "a hole of 1 bytes before tensor 'b'"),
    "bytes behind": ({"a": entry(0, 4)}, 7, "3 bytes after the last tensor"),
    "bytes without tensors": ({}, 7, "7 bytes after the last tensor"),
    "truncated": ({"a": entry(0, 4), "b": entry(4, 8), "c": entry(8, 9)}, 6, "is truncated: its tensors end at byte"),
    "cut": ({"a": entry(0, 4), "b": entry(4, 8), "c": entry(8, 9)}, 6, "2 of them lack bytes, the first is 'b'"),
    "outside": ({"a": entry(0, 4), "b": entry(9, 12)}, 6, "tensor 'b' lies outside the data"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_tensors_that_do_not_cover_the_data_once_are_refused(tmp_path, case):
    header, size, message = LAYOUTS[case]
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    found = refusal(read_shard, path)
    assert "x.safetensors: " in found
    assert message in found
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


def test_the_place_of_a_refused_tensor_is_not_called_a_hole(tmp_path):
    header = {"a": entry(0, 4, dtype="X"), "b": entry(4, 8)}
    assert "hole" not in refusal(read_shard, write(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_file_too_short_for_its_header_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for size in range(8):
        path.write_bytes(bytes(size))
        assert f"x.safetensors: has {size} bytes, too few" in refusal(read_shard, path)
    write(path, {"t": entry()}, b"abcd", length=5000)
    assert "x.safetensors: is truncated: its header claims 5,000 bytes" in refusal(read_shard, path)
    for length in (100_000_001, 2**63, 2**64 - 1):
        write(path, {"t": entry()}, b"abcd", length=length)
        assert f"its header claims {length:,} bytes, more than 100 MB" in refusal(read_shard, path)


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    whole = write(tmp_path / "x.safetensors", {"a": entry(0, 40), "b": entry(40, 50)}, bytes(50)).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        found = refusal(read_shard, tmp_path / "x.safetensors")
        assert "truncated" in found or size < 8


def test_what_is_no_readable_file_is_refused(tmp_path):
    assert "gone: is missing" in refusal(read_shard, tmp_path / "gone")
    assert "is not a regular file" in refusal(read_shard, tmp_path)
    (tmp_path / "loop").symlink_to("nowhere")
    assert "loop: is missing" in refusal(read_shard, tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert "pipe: is not a regular file" in refusal(read_shard, tmp_path / "pipe")
    assert "cannot be read: File name too long" in refusal(read_shard, tmp_path / ("x" * 300))


def test_all_problems_are_raised_at_once_and_long_lists_are_cut(tmp_path):
    header = {f"t{number}": entry(dtype="X") for number in range(1000)}
    found = refusal(read_shard, write(tmp_path / "x.safetensors", header))
    assert len(found.splitlines()) == 14
    assert found.endswith("and 988 more")
    name = "n" * 100_000
    found = refusal(read_shard, write(tmp_path / "x.safetensors", {name: entry(shape=[3] * 9), "b": {}}))
    assert len(found) < 600
    assert "tensor 'b' has no dtype" in found


def test_problems_of_all_shards_are_raised_at_once(folder):
    write(folder / ONE, {"a": entry(dtype="X"), "b": {}})
    (folder / TWO).write_bytes(b"")
    found = refusal(read_checkpoint, folder)
    assert str(folder) in found
    assert f"{ONE}: tensor 'a' has the dtype 'X'" in found
    assert f"{ONE}: tensor 'b' has no dtype" in found
    assert f"{TWO}: has 0 bytes" in found
    assert "lacks" not in found  # what a damaged shard holds is not known


INDICES = {
    "empty": (b"", f"{INDEX} is not JSON"),
    "damaged": (b'{"weight_map": {', f"{INDEX} is not JSON"),
    "latin": (b'{"\xe9": 1}', f"{INDEX} is not UTF-8"),
    "nested": (b"[" * 200_000, f"{INDEX} is not JSON"),
    "a list": (b"[1]", f"{INDEX} is [1], not an object"),
    "no map": (b'{"metadata": {}}', "its weight_map is None, not a map from tensors to files"),
    "map a list": (b'{"weight_map": ["a"]}', "its weight_map is ['a']"),
    "map empty": (b'{"weight_map": {}}', "its weight_map is {}"),
    "file a number": (b'{"weight_map": {"a": 1}}', "its weight_map is {'a': 1}"),
    "key twice": (b'{"weight_map": {"a": "x", "a": "y"}}', f"{INDEX} has the key 'a' twice"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_maps_nothing_is_refused(folder, case):
    content, message = INDICES[case]
    (folder / INDEX).write_bytes(content)
    assert message in refusal(read_checkpoint, folder)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "sub/x", "./x", "..", ".", "", "sub\\x", "C:x", "C:\\x", "\\\\host\\x", "a\0b", "a\nb"],
)
def test_an_index_that_leaves_the_folder_is_refused(folder, name):
    write_index(folder, {"a": ONE, "b": name})
    found = refusal(read_checkpoint, folder)
    assert f"its weight_map names {name!r}, not a file of this folder" in found


def test_an_index_that_the_shards_contradict_is_refused(folder):
    write_index(folder, {"a": TWO, "c": TWO, "ghost": ONE})
    found = refusal(read_checkpoint, folder)
    assert f"{ONE}: holds tensor 'a', which the index assigns to {TWO}" in found
    assert f"{ONE}: holds tensor 'b', which the index does not list" in found
    assert f"{ONE}: lacks tensor 'ghost', which the index assigns to it" in found
    assert len(found.splitlines()) == 4


def test_a_tensor_in_two_shards_is_refused(folder):
    save_file({"c": torch.ones(5), "a": torch.ones(1)}, folder / TWO)
    assert f"tensor 'a' lies in 2 shards: {ONE} and {TWO}" in refusal(read_checkpoint, folder)


def test_a_missing_shard_is_refused(folder):
    (folder / TWO).unlink()
    assert f"{TWO}: is missing" in refusal(read_checkpoint, folder)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "pytorch_model.bin.index.json", "tiny-Q4_0.gguf"])
def test_a_base_in_another_format_is_sent_to_the_merge_in_memory(tmp_path, other):
    (tmp_path / other).touch()
    with pytest.raises(BackboneError, match=other) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.todo == "load it with lightsft.merge(..., streaming=False)"
    assert "merged in memory" in caught.value.expected


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "training_args.bin").touch()
    assert refusal(read_checkpoint, tmp_path) == f"{tmp_path} holds no safetensors"
    assert "cannot list" in refusal(read_checkpoint, tmp_path / "gone")
    assert "cannot list" in refusal(read_checkpoint, tmp_path / "training_args.bin")
    for number in range(5):
        (tmp_path / f"model-{number}.safetensors").touch()
    found = refusal(read_checkpoint, tmp_path)
    assert "model-2.safetensors and 2 more, but no model.safetensors and no model.safetensors.index.json" in found
    (tmp_path / INDEX).symlink_to("gone")
    assert "a link to a file that is gone" in refusal(read_checkpoint, tmp_path)


def mutated(content, header, generator):
    """A file with some bytes of its length and header changed, or with pieces cut out or put in."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        place = generator.randrange(8, header) if generator.random() < 0.95 else generator.randrange(8)
        kind = generator.random()
        if kind < 0.4:
            changed[place] = generator.choice(b'0123456789"[]{},:-.eEtnf\\u ')
        elif kind < 0.6:
            changed[place] = generator.randrange(256)
        else:  # the header keeps its length, so that most of it stays JSON
            piece = bytes(generator.choices(b'0123456789",[]', k=generator.randint(1, 3)))
            changed[place : place + len(piece)] = piece
    return bytes(changed)


def test_a_damaged_header_is_refused_or_read_as_tensors_within_the_file(tmp_path):
    generator, path, accepted, messages = random.Random(0), tmp_path / "x.safetensors", 0, []
    weights = {"layers.0.weight": torch.ones(2, 3), "layers.0.codes": torch.ones(8, dtype=torch.int8)}
    save_file(weights | {"norm": torch.ones(1)}, path, {"format": "pt"})
    content, header = path.read_bytes(), read_shard(path).header
    for _ in range(600):
        path.write_bytes(mutated(content, header, generator))
        try:
            shard = read_shard(path)
        except BackboneError as error:
            messages.append(error.found)
            continue
        accepted += 1
        position = shard.header
        for tensor in shard.tensors:
            assert tensor.start == position
            position = tensor.stop
        assert position == shard.size == len(content)
        with safe_open(path, "pt") as opened:  # safetensors must read the same
            assert {t.name: (t.dtype, list(t.shape)) for t in shard.tensors} == {
                name: (opened.get_slice(name).get_dtype(), opened.get_slice(name).get_shape())
                for name in opened.keys()  # noqa: SIM118
            }
    assert accepted > 20
    assert len(messages) > 100
    for message in messages:
        assert "x.safetensors" in message
        message.encode()
