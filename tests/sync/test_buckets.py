from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import ConfigError
from rlhf_ray.sync.buckets import BucketLayout, bucket_bytes, padded_bytes, read, write

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]


def test_layout_by_hand():
    layout = BucketLayout()
    # 3 floats = 12 bytes, rounded up to 64; 17 floats = 68 bytes, rounded up to 128
    assert layout.append("a", torch.zeros(3)) == 0
    assert layout.append("b", torch.zeros(17)) == 64
    assert layout.append("c", torch.zeros(())) == 192
    assert layout.nbytes == 256
    assert layout.message() == {
        "names": ["a", "b", "c"],
        "dtype_names": ["float32"] * 3,
        "shapes": [[3], [17], []],
        "offsets": [0, 64, 192],
        "nbytes": 256,
    }


def test_full_bucket_takes_no_more_and_an_empty_one_takes_anything():
    layout = BucketLayout()
    assert layout.takes(torch.zeros(1000), capacity=64)
    layout.append("big", torch.zeros(1000))
    # 4000 bytes are padded to 4032; one more float takes 64
    assert layout.takes(torch.zeros(1), capacity=4096)
    assert not layout.takes(torch.zeros(1), capacity=4095)


def test_bucket_size():
    assert bucket_bytes(1) == 1024 * 1024
    assert bucket_bytes(0.5) == 512 * 1024
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="bucket_mb"):
            bucket_bytes(wrong)


@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    capacity=st.integers(64, 1024),
)
@settings(max_examples=80, deadline=None)
def test_round_trip_keeps_bits_dtypes_and_shapes(specs, capacity):
    tensors = []
    for i, (dtype, shape, transposed) in enumerate(specs):
        raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(i))
        tensor = raw.to(dtype) if dtype == torch.bool else (raw * (i + 1)).to(dtype)
        tensors.append((f"t{i}", tensor.t() if transposed and tensor.dim() == 2 else tensor))

    out, layout, group = [], BucketLayout(), []
    for name, tensor in [*tensors, (None, None)]:
        if name is None or not layout.takes(tensor, capacity):
            assert layout.nbytes <= capacity or len(group) == 1
            flat = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
            for offset, (_, member) in zip(layout.offsets, group, strict=True):
                write(flat, offset, member)
            out += read(flat, layout.names, layout.dtype_names, layout.shapes, layout.offsets)
            layout, group = BucketLayout(), []
        if name is not None:
            layout.append(name, tensor)
            group.append((name, tensor))

    assert [name for name, _ in out] == [name for name, _ in tensors]
    for (_, sent), (_, got) in zip(tensors, out, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert torch.equal(got, sent)


def test_nan_payload_survives():
    bits = torch.tensor([0x7FC00001, 0x7FC0BEEF], dtype=torch.int32).view(torch.float32)
    flat = torch.zeros(padded_bytes(bits), dtype=torch.uint8)
    write(flat, 0, bits)
    ((_, got),) = read(flat, ["n"], ["float32"], [[2]], [0])
    assert torch.equal(got.view(torch.int32), bits.view(torch.int32))
