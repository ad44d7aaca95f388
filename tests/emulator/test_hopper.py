"""Hopper's instructions in the emulator against the PTX manual, and against kernels with a known mistake."""

import itertools

import pytest
import torch

from . import build

NONE, B128, B64, B32 = range(4)  # as a matrix descriptor numbers the swizzles
ROW_BYTES = {B128: 128, B64: 64, B32: 32}
IMAGE_ELEMENTS = 16384
DTYPES = {1: torch.float16, 2: torch.bfloat16}


def swizzled(swizzle, row, column):
    """Byte of element (row, column) of a tile as wide as its swizzle, from the manual's pictures of 16-byte chunks.

    128B: row i of 8 holds chunk j at place j xor i. 64B: two rows of four chunks share 128 bytes, and rows 2i and 2i+1
    hold chunk j at j xor i. 32B: four rows of two chunks share 128 bytes, and every second such four swap their chunks.
    """
    chunk, within = column // 8, column % 8 * 2
    place = {B128: chunk ^ row % 8, B64: chunk ^ row // 2 % 4, B32: chunk ^ row // 4 % 2}[swizzle]
    return row * ROW_BYTES[swizzle] + place * 16 + within


def copied(emulator, tensor, box, at, swizzle=NONE):
    """The shared memory that a bulk copy of `box` at `at` fills; dimensions run from the contiguous one on."""
    size = list(reversed(tensor.shape))
    strides = [2 * x for x in reversed(tensor.stride())][1:]
    out = torch.full((torch.tensor(box).prod(),), -7, dtype=torch.int16)
    spans = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    emulator.declare([(tensor.data_ptr(), 2 * spans, False, "tensor"), (out.data_ptr(), 2 * out.numel(), True, "out")])
    emulator.probe_copy_tensor(tensor.data_ptr(), size, box, strides, swizzle, at, out.data_ptr(), 0)
    return out


@pytest.mark.parametrize(
    ("shape", "box", "at"),
    [
        ((9, 40), [16, 4], [8, 3]),
        ((9, 40), [16, 8], [32, 5]),  # past the end of both
        ((9, 40), [16, 4], [-8, -2]),  # before the beginning
        ((9, 40), [16, 4], [40, 0]),  # outside altogether
        ((3, 5, 24), [8, 3, 2], [16, 3, 1]),
        ((2, 3, 5, 24), [8, 3, 2, 2], [16, 3, 2, -1]),
        ((2, 2, 3, 5, 24), [8, 3, 2, 1, 2], [0, -1, 1, 1, 1]),
    ],
)
def test_a_bulk_copy_brings_its_box_and_zeros_where_the_tensor_ends(emulator, shape, box, at):
    tensor = torch.arange(1, 1 + torch.tensor(shape).prod(), dtype=torch.int16).view(shape)
    out = copied(emulator, tensor, box, at)
    for place, index in enumerate(itertools.product(*(range(n) for n in reversed(box)))):
        where = [i + a for i, a in zip(index, reversed(at), strict=True)]
        inside = all(0 <= i < n for i, n in zip(where, shape, strict=True))
        assert out[place] == (tensor[tuple(where)] if inside else 0)


@pytest.mark.parametrize("swizzle", [B128, B64, B32])
def test_a_bulk_copy_swizzles_as_the_manual_draws_it(emulator, swizzle):
    columns = ROW_BYTES[swizzle] // 2
    tensor = torch.arange(1, 1 + 40 * columns, dtype=torch.int16).view(40, columns)
    out = copied(emulator, tensor, [columns, 32], [0, 3], swizzle)
    for row, column in itertools.product(range(32), range(columns)):
        assert out[swizzled(swizzle, row, column) // 2] == tensor[row + 3, column]


@pytest.mark.parametrize(
    ("tensor", "box", "swizzle", "message"),
    [
        (torch.zeros(4, 40, dtype=torch.int16), [12, 4], NONE, "multiple of 16 bytes"),
        (torch.zeros(4, 20, dtype=torch.int16)[:, :16], [8, 4], NONE, "strides that are multiples of 16"),
        (torch.zeros(40, dtype=torch.int16)[1:33].view(2, 16), [8, 2], NONE, "aligned to 16"),
        (torch.zeros(4, 256, dtype=torch.int16), [128, 4], B128, "as wide as the swizzle"),
    ],
)
def test_a_map_that_the_driver_would_refuse_is_refused(emulator, tensor, box, swizzle, message):
    with pytest.raises(RuntimeError, match=message):
        copied(emulator, tensor, box, [0, 0], swizzle)


def accumulator_table(thread, i):
    """Row and column of element i of a thread's accumulators (the manual's "wgmma.mma_async D Fragment")."""
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    return 16 * warp + group + (8 if i % 4 >= 2 else 0), 8 * (i // 4) + 2 * place + i % 2


def left_table(thread, i):
    """Row and column of element i of a thread's 8 elements of A in registers ("wgmma.mma_async A Fragment")."""
    warp, group, place = thread // 32, thread % 32 // 4, thread % 4
    return 16 * warp + group + (8 if i // 2 % 2 else 0), 2 * place + i % 2 + (8 if i >= 4 else 0)


def fragments(matrix, table, elements):
    index = torch.tensor([[table(t, i) for i in range(elements)] for t in range(128)])
    return matrix[index[..., 0], index[..., 1]]


def place_operand(image, start, matrix, swizzle, transposed, step=0):
    """Write a matrix [rows, 16] where a descriptor finds it; return that descriptor's fields.

    A swizzled matrix lies in a tile like those that bulk copies fill: `step` says which 16 of the tile's k it is where
    k is contiguous, and stands for 16 rows of the tile each otherwise.
    """
    rows = matrix.shape[0]
    if swizzle == NONE:  # core matrices of 8 rows of 16 bytes, one after another: those of k last
        leading, stride = 128 * (rows // 8), 128
        for row, k in itertools.product(range(rows), range(16)):
            one, other = (k, row) if transposed else (row, k)
            byte = row // 8 * stride + k // 8 * leading + one % 8 * 16 + other % 8 * 2
            image[(start + byte) // 2] = matrix[row, k]
        return start, leading, stride, swizzle, int(transposed)
    width = ROW_BYTES[swizzle] // 2
    if not transposed:
        first = step * 16 % width
        for row, k in itertools.product(range(rows), range(16)):
            image[(start + swizzled(swizzle, row, first + k)) // 2] = matrix[row, k]
        return start + 2 * first, 16, 8 * ROW_BYTES[swizzle], swizzle, 0
    slab = 64 * ROW_BYTES[swizzle]  # 64 k of `width` rows each
    for row, k in itertools.product(range(rows), range(16)):
        byte = row // width * slab + swizzled(swizzle, 16 * step + k, row % width)
        image[(start + byte) // 2] = matrix[row, k]
    return start + 16 * step * ROW_BYTES[swizzle], slab, 8 * ROW_BYTES[swizzle], swizzle, 1


def group_product(emulator, a, b, c, code, swizzles, transposed, step=0, registers=False):
    """a [64, 16] b [columns, 16]^T + c by one wgmma."""
    image = torch.zeros(IMAGE_ELEMENTS, dtype=DTYPES[code])
    left = (0, 0, 0, 0, 0)
    held = fragments(a, left_table, 8).to(DTYPES[code]) if registers else None
    if not registers:
        left = place_operand(image, 24576, a.to(DTYPES[code]), swizzles[0], transposed[0], step if swizzles[0] else 0)
    right = place_operand(image, 0, b.to(DTYPES[code]), swizzles[1], transposed[1], step if swizzles[1] else 0)
    columns = b.shape[0]
    d = fragments(c if c is not None else torch.full((64, columns), float("nan")), accumulator_table, columns // 2)
    d = d.contiguous()
    tensors = [(image, False), (d, True)] + ([] if held is None else [(held, False)])
    emulator.declare([(x.data_ptr(), x.numel() * x.element_size(), w, "probe") for x, w in tensors])
    address = 0 if held is None else held.data_ptr()
    emulator.probe_group_multiply(
        (image.data_ptr(), address, d.data_ptr(), left, right, columns, int(c is not None), code), 0
    )
    return d


def whole_numbers(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


# The whole space is columns x swizzles x majors; these go through every value, and the first are those the kernels use.
PRODUCTS = [
    (128, (B128, B128), (False, False), 1, False),
    (64, (B128, B128), (False, True), 2, True),
    (96, (B128, B128), (False, True), 1, True),
    (128, (NONE, NONE), (False, False), 0, False),
    (64, (NONE, NONE), (True, True), 0, False),
    (64, (B64, B64), (False, False), 1, False),
    (64, (B32, B32), (True, True), 0, False),
    (128, (B64, B64), (True, True), 1, False),
    (96, (NONE, B32), (False, True), 1, False),
    (64, (B32, B128), (False, False), 0, True),
    (256, (B128, B32), (True, True), 0, True),
]


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize(("columns", "swizzles", "transposed", "step", "registers"), PRODUCTS)
def test_wgmma_multiplies_the_matrices_that_descriptors_name(
    emulator, code, columns, swizzles, transposed, step, registers
):
    a, b, c = whole_numbers(64, 16), whole_numbers(columns, 16, seed=1), whole_numbers(64, columns, seed=2)
    out = group_product(emulator, a, b, c, code, swizzles, transposed, step, registers)
    assert torch.equal(out, fragments(a @ b.T + c, accumulator_table, columns // 2))


def test_wgmma_that_does_not_accumulate_ignores_what_was_there(emulator):
    a, b = whole_numbers(64, 16), whole_numbers(64, 16, seed=1)
    out = group_product(emulator, a, b, None, 2, (B128, B128), (False, False))
    assert torch.equal(out, fragments(a @ b.T, accumulator_table, 32))


MISTAKES = {
    "mbarrier: no wait": "in flight|nothing wrote",
    "mbarrier: the wrong parity": "in flight|nothing wrote",
    "mbarrier: no bytes expected": "in flight|ends with a bulk copy|one arrival too many",
    "mbarrier: too many bytes expected": "no thread can go on: thread 0 waits at .* .mbarrier",
    "mbarrier: one arrival too few": "no thread can go on: .*mbarrier",
    "mbarrier: one arrival too many": "one arrival too many",
    "mbarrier: used before it is there": "nothing wrote|race",
    "mbarrier: no proxy fence after it was made": "async proxy .* without a proxy fence",
    "copy: into what others still read": "race .* without a barrier after",
    "copy: over what a thread wrote, without a proxy fence": "async proxy .* without a proxy fence",
    "copy: misaligned": "misaligned",
    "copy: an end with one in flight": "ends with a bulk copy in flight",
    "copy: another rank than the map": "a copy of rank 3 with a map of rank 2",
    "wgmma: no wait": "wrong result|ends with a wgmma in flight",
    "wgmma: a wait that leaves it in flight": "wait leaves in flight|wrong result",
    "wgmma: no commit": "ends with a wgmma in flight|wait leaves in flight|wrong result",
    "wgmma: no fence": "wgmma without a fence",
    "wgmma: the accumulator is written in flight": "an accumulator was written while",
    "wgmma: registers of A are written in flight": "registers of A were written while",
    "wgmma: no proxy fence after the operands": "async proxy reads .* without a proxy fence",
    "wgmma: no barrier after the operands": "nothing wrote|race|without a proxy fence",
    "wgmma: operands written in flight": "race .* a product of warp . that is in flight",
    "wgmma: operands written without a barrier": "race",
    "wgmma: three warps of four": "issues fewer wgmma",
    "wgmma: warps at different products": "issues another wgmma",
    "wgmma: a descriptor inside the swizzle's pattern": "inside a pattern of the swizzle",
    "registers: more than there are": "warpgroups hold .* registers",
    "registers: no multiple of 8": "multiple of 8",
    "registers: growing to fewer": "which growing to 24 is not",
}
SOUND = ["correct copy", "correct product", "correct ring", "correct registers"]


@pytest.fixture(scope="module")
def misuse():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    return build.misuse("hopper")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_whatever_the_order(misuse, name, seed):
    with pytest.raises(RuntimeError, match=MISTAKES[name]):
        misuse.run(name, seed)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_is_left_alone(misuse, name, seed):
    misuse.run(name, seed)


def test_every_kernel_of_misuse_is_tried(misuse):
    assert set(misuse.NAMES) == {*MISTAKES, *SOUND}
