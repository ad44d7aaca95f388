"""The emulator against the PTX manual's tables, and against kernels with a known mistake."""

import pytest
import torch

from . import build

# From the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix": for every element of a
# lane's fragment, its row and column, in the manual's own terms (groupID = lane >> 2, threadID_in_group = lane % 4).


def a_table(lane, i):
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_table(lane, i):
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_table(lane, i):
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def fragment(matrix, table, elements):
    """The elements that each lane holds, [32, elements]."""
    return torch.stack([torch.stack([matrix[table(lane, i)] for i in range(elements)]) for lane in range(32)])


def run(emulator, name, a, b, c, out, dtype=1, transposed=0):
    tensors = [x for x in (a, b, c) if x is not None]
    declared = [(x.data_ptr(), x.numel() * x.element_size(), x is out, "probe") for x in (*tensors, out)]
    emulator.declare(declared)
    address = [0 if x is None else x.data_ptr() for x in (a, b, c, out)]
    getattr(emulator, name)((*address, dtype, transposed), 0)
    return out


@pytest.mark.parametrize(("dtype", "code"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_mma_multiplies_the_matrices_that_the_manuals_tables_describe(emulator, dtype, code):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.randint(-8, 9, shape, generator=generator, dtype=torch.float32) for shape in ((16, 16), (16, 8), (16, 8))
    )
    fragments = [fragment(a, a_table, 8).to(dtype), fragment(b, b_table, 4).to(dtype), fragment(c, c_table, 4)]
    out = run(emulator, "probe_multiply_add", *fragments, torch.empty(32, 4), code)
    assert torch.equal(out, fragment(a @ b + c, c_table, 4))


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_hands_out_rows_as_the_manual_says(emulator, transposed):
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out = torch.empty(32, 8, dtype=torch.int16)
    run(emulator, "probe_load_matrices", matrices, None, None, out, transposed=transposed)
    for lane in range(32):
        for i in range(4):
            for element in range(2):
                row, column = lane // 4, 2 * (lane % 4) + element
                wanted = matrices[i, column, row] if transposed else matrices[i, row, column]
                assert out[lane, 2 * i + element] == wanted


def test_a_loaded_tile_is_the_left_operand(emulator):
    """The four matrices of a 16 x 16 tile, in the order the kernels give them, are fragment A."""
    tile = torch.arange(256, dtype=torch.int16).view(16, 16)
    matrices = torch.stack([tile[:8, :8], tile[8:, :8], tile[:8, 8:], tile[8:, 8:]]).contiguous()
    out = run(emulator, "probe_load_matrices", matrices, None, None, torch.empty(32, 8, dtype=torch.int16))
    assert torch.equal(out, fragment(tile, a_table, 8))


@pytest.mark.parametrize("code", [1, 2])
def test_16_bit_operands_are_exact_in_every_value(emulator, code):
    """Each of the 65,536 bit patterns times 1, infinities and NaN among them."""
    dtype = {1: torch.float16, 2: torch.bfloat16}[code]
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    b = torch.zeros(32, 4, dtype=dtype)
    b[0, 0] = 1.0  # B[0, 0]
    for chunk in patterns.view(-1, 16).split(64):
        for values in chunk[:: 1 if code == 1 else 7]:
            a = torch.zeros(32, 8, dtype=dtype)
            for row in range(16):
                a[(row % 8) * 4, 2 * (row // 8)] = values[row]  # A[row, 0]
            out = run(emulator, "probe_multiply_add", a, b, torch.zeros(32, 4), torch.empty(32, 4), code)
            got = torch.stack([out[(row % 8) * 4, 2 * (row // 8)] for row in range(16)])
            assert torch.equal(got.nan_to_num(7.0), values.float().nan_to_num(7.0))


MISTAKES = {
    "no barrier between write and read": r"nothing wrote|race .* reads it without a barrier after the write",
    "no barrier between read and write": "race .* without a barrier after",
    "no wait for a copy": "while the copy of thread .* is in flight",
    "no barrier after the wait for a copy": "in flight|nothing wrote|race .* reads it without a barrier",
    "a wait that leaves the group in flight": "in flight",
    "a wait for a group that was not committed": "in flight",
    "a copy into what others still read": "race .* without a barrier after",
    "an end with a copy in flight": "ends with a copy in flight",
    "no warp barrier between lanes": "nothing wrote|race",
    "a read of memory that nothing wrote": "which nothing wrote",
    "a shared address past the end": r"shared address \d+ is out of bounds, the block has 4096 bytes",
    "a misaligned shared address": "misaligned",
    "a read one past the end": "read of 16 bytes out of bounds: byte 1024 of 'input', which has 1024",
    "a write one past the end": "write of 4 bytes out of bounds",
    "a write to an input": "'input' is read only",
    "a misaligned global address": "4 past a multiple",
    "a barrier that half of the block reaches": "no thread can go on: thread 0 waits at misuse.cu",
    "a named barrier with two counts": "barrier 1 of .* where others expect|no thread can go on",
    "a product that half of the warp reaches": "no thread can go on: .*mma",
    "lanes of a warp at different instructions": "warp . diverged: .*vote.* others are at shuffle_xor",
    "lanes of a warp at different products": "warp . diverged: .* at mma",
    "a write after the arrival": "nothing wrote|race",
}
SOUND = ["correct exchange", "correct copy", "an arrival that does not wait, and a reader that does"]


@pytest.fixture(scope="module")
def misuse():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    return build.misuse()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_whatever_the_order(misuse, name, seed):
    with pytest.raises(RuntimeError, match=MISTAKES[name]):
        misuse.run(name, seed)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_is_left_alone(misuse, name, seed):
    assert misuse.run(name, seed) == ""


def test_every_kernel_of_misuse_is_tried(misuse):
    assert set(misuse.NAMES) == {*MISTAKES, *SOUND}
