"""Headers of GGUF files: what the package wrote is read, and nothing of a hostile one is believed."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from superweights.checkpoint.gguf_header import MetadataValue, read_gguf_header
from superweights.errors import MalformedFileError, MissingTensorError, SuperweightsError

gguf = pytest.importorskip("gguf")

STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def setting(key: bytes | str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: Sequence[int], kind: int = 0, place: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, place)


def header(tensors: Sequence[bytes], *settings: bytes, order: str = "<") -> bytes:
    known = [setting("general.architecture", STRING, text("llama")), *settings]
    counts = b"GGUF" + struct.pack(f"{order}IQQ", 3, len(tensors), len(known))
    raw = counts + b"".join(known) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + bytes(256)


HOSTILE = {
    "it says llama.x twice": header([tensor("a", [8])], *[setting("llama.x", UINT32, bytes(4))] * 2),
    "it holds a twice": header([tensor("a", [8]), tensor("a", [8], place=32)]),
    "it holds no tensor": header([]),
    "an element of llama.x is no UTF-8": header(
        [tensor("a", [8])], setting("llama.x", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))
    ),
    "the name of a setting is no UTF-8": header([tensor("a", [8])], setting(b"\xc3", UINT32, bytes(4))),
    "llama.x at byte .* takes 1099511627776 bytes": header(
        [tensor("a", [8])], setting("llama.x", ARRAY, struct.pack("<IQ", UINT8, 2**40))
    ),
    "llama.x has 1099511627776 elements": header(
        [tensor("a", [8])], setting("llama.x", ARRAY, struct.pack("<IQ", STRING, 2**40))
    ),
    "llama.x is a list of lists": header(
        [tensor("a", [8])], setting("llama.x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)
    ),
    "llama.x is of type 77": header([tensor("a", [8])], setting("llama.x", 77, bytes(4))),
    "general.alignment is 3": header([tensor("a", [8])], setting("general.alignment", UINT32, struct.pack("<I", 3))),
    "a has 9 lengths": header([tensor("a", [1] * 9)]),
    "a has 0 lengths": header([tensor("a", [])]),
    r"a has the shape \[0\]": header([tensor("a", [0])]),
    r"a has the shape \[33\], in which Q8_0": header([tensor("a", [33], kind=8)]),
    "a is of type 4711": header([tensor("a", [8], kind=4711)]),
    "a ends at byte": header([tensor("a", [8], place=1 << 40)]),
    "a ends at byte 7378": header([tensor("a", [2**62, 4])]),  # 64 bits would come out as nothing
    "a begins at byte .* no multiple of 32": header([tensor("a", [8], place=4)]),
    "a and b overlap": header([tensor("a", [16]), tensor("b", [8], place=32)]),
    "big-endian": header([tensor("a", [8])], order=">"),
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_hostile_header_is_refused(says: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(HOSTILE[says])
    with pytest.raises(MalformedFileError, match=rf"m\.gguf is no whole GGUF file of a model: .*{says}"):
        read_gguf_header(tmp_path / "m.gguf")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file of the package, with settings and tensors of several types."""
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_uint64("llama.big", 1 << 40)
    writer.add_float32("llama.rope.freq_base", 1e-5)
    writer.add_bool("llama.flag", True)
    writer.add_array("llama.heads", [1, 2, 3])
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "<s>"])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name, kind in (("one", "F32"), ("two", "Q4_0"), ("three", "Q6_K")):
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        blocks = rng.integers(0, 255, (3, 2 * 256 // size * nbytes), np.uint8)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "w.gguf"


def test_it_reads_what_the_packages_reader_reads(written: Path) -> None:
    found, theirs = read_gguf_header(written), gguf.GGUFReader(written)
    expected = {
        key: (each.contents(), [kind.name for kind in each.types])
        for key, each in theirs.fields.items()
        if not key.startswith("GGUF.")
    }
    assert expected == {
        key: (each.value, [each.kind] + [each.of] * (each.kind == "ARRAY")) for key, each in found.metadata.items()
    }
    for one, other in zip(found.tensors, theirs.tensors, strict=True):
        assert (one.name, one.kind, one.start) == (other.name, other.tensor_type.name, other.data_offset)
        assert one.shape == tuple(reversed(other.shape.tolist()))
        assert one.blocks().tobytes() == other.data.tobytes()
    assert found.settings["big"] == 1 << 40 and "heads" not in found.settings
    assert found.metadata["llama.flag"] == MetadataValue(True, "BOOL")


def test_flipped_bytes_give_an_error_or_a_header(written: Path, tmp_path: Path) -> None:
    raw, rng = written.read_bytes(), random.Random(0)
    end = read_gguf_header(written).tensors[0].start
    refused = 0
    for _ in range(500):
        changed = bytearray(raw)
        place = rng.randrange(end)
        changed[place : place + 4] = rng.choice((rng.randbytes(1), b"\xff" * 4, bytes(4), struct.pack("<I", 1 << 31)))
        (tmp_path / "f.gguf").write_bytes(changed)
        try:
            read_gguf_header(tmp_path / "f.gguf")
        except SuperweightsError as error:
            refused += 1
            assert str(tmp_path / "f.gguf") in str(error)
    assert refused > 250


# Files in parts.


def part(folder: Path, number: int, count: int, name: str) -> Path:
    path = folder / f"m-{number:05d}-of-{count:05d}.gguf"
    said = {"split.no": number - 1, "split.count": count}
    settings = [setting(key, UINT32, struct.pack("<I", value)) for key, value in said.items()]
    path.write_bytes(header([tensor(name, [8])], *settings))
    return path


def test_any_part_opens_the_model(tmp_path: Path) -> None:
    paths = (part(tmp_path, 1, 2, "a"), part(tmp_path, 2, 2, "b"))
    for path in paths:
        found = read_gguf_header(path)
        assert [(each.name, each.path) for each in found.tensors] == [("a", paths[0]), ("b", paths[1])]
        assert found.architecture == "llama" and found.paths == paths


def test_parts_that_are_not_of_one_model(tmp_path: Path) -> None:
    one, two = part(tmp_path, 1, 2, "a"), part(tmp_path, 2, 2, "a")
    with pytest.raises(MalformedFileError, match="it holds a twice"):
        read_gguf_header(one)
    two.write_bytes(one.read_bytes())
    with pytest.raises(MalformedFileError, match=r"part 2 of 2 by its name, and part 0, counted from 0, of 2"):
        read_gguf_header(one)
    renamed = one.rename(tmp_path / "m.gguf")
    with pytest.raises(MalformedFileError, match=r"m\.gguf is part 1 of 1 by its name"):
        read_gguf_header(renamed)
    with pytest.raises(MissingTensorError, match=r"m-00001-of-00002\.gguf is not beside it"):
        read_gguf_header(two)
