"""Where the matrix and bulk-copy instructions put their elements, dumped from a GPU for the emulator to be held to.

    python -m bench.layouts OUT.json [--dry-run]      --dry-run dumps the emulator's

Each probe is one instruction on known operands; its result is recorded as a digest, and the first values as they are,
so that a difference can be read. Whoever misreads the manual misreads it in the emulator and in its tests alike: only
this shows it. tests/emulator/test_layouts.py compares what lies in bench/results/gpu/layouts.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

IMAGE = 16384  # elements of shared memory that a product may read
NONE, B128, B64, B32 = range(4)  # swizzles, as a matrix descriptor numbers them
WIDTH = {NONE: 8, B128: 64, B64: 32, B32: 16}  # elements of a row of a swizzled tile


class Probes:
    """The probes of a native module, on tensors of its device."""

    def __init__(self, native: ModuleType, device: str) -> None:
        self.native, self.device = native, device

    def call(self, name: str, arguments: tuple[Any, ...], reads: list[Tensor], out: Tensor) -> Tensor:
        """Run a probe; the emulator is told what it may touch."""
        if hasattr(self.native, "declare"):
            ranges = [(x.data_ptr(), x.numel() * x.element_size(), x is out, "probe") for x in (*reads, out)]
            self.native.declare(ranges)
        getattr(self.native, name)(*arguments, 0)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return out.cpu()

    def numbers(self, *shape: int) -> Tensor:
        """Whole numbers that a product adds exactly, every element its own pattern."""
        n = int(torch.tensor(shape).prod())
        return (torch.arange(n, device=self.device) * 7919 % 61 - 30).float().view(shape)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """ldmatrix and mma."""
        a = torch.arange(256, dtype=torch.int16, device=self.device)
        for transposed in (0, 1):
            out = torch.empty(256, dtype=torch.int16, device=self.device)
            where = (a.data_ptr(), 0, 0, out.data_ptr(), 1, transposed)
            yield f"ldmatrix, transposed {transposed}", self.call("probe_load_matrices", (where,), [a], out)
        for code, dtype in ((1, torch.float16), (2, torch.bfloat16)):
            left, right, added = self.numbers(32, 8).to(dtype), self.numbers(32, 4).to(dtype), self.numbers(32, 4)
            out = torch.empty(32, 4, device=self.device)
            where = (left.data_ptr(), right.data_ptr(), added.data_ptr(), out.data_ptr(), code, 0)
            yield f"mma {dtype}", self.call("probe_multiply_add", (where,), [left, right, added], out)

    def products(self) -> Iterator[tuple[str, Tensor]]:
        """wgmma: every swizzle, both majors, A from registers and from shared memory."""
        for columns, swizzle, transposed, step, registers in (
            (columns, swizzle, transposed, step, registers)
            for columns in (64, 96, 128, 256)
            for swizzle in (NONE, B128, B64, B32)
            for transposed in (0, 1)
            for step in (0, 1)
            for registers in (False, True)
        ):
            image = self.numbers(IMAGE).half()
            held = self.numbers(128, 8).half()
            d = self.numbers(128, columns // 2).contiguous()
            if swizzle == NONE:
                right = (2048 * step, 128, 256, NONE, transposed)
            elif transposed:
                right = (16 * step * 2 * WIDTH[swizzle], 32 * 2 * WIDTH[swizzle], 16 * WIDTH[swizzle], swizzle, 1)
            else:
                right = (32 * step if WIDTH[swizzle] > 16 else 0, 16, 16 * WIDTH[swizzle], swizzle, 0)
            left = (24576, 128, 256, NONE, 0)
            address = held.data_ptr() if registers else 0
            where = (image.data_ptr(), address, d.data_ptr(), left, right, columns, 1, 1)
            name = f"wgmma n{columns}, swizzle {swizzle}, transposed {transposed}, step {step}, registers {registers}"
            yield name, self.call("probe_group_multiply", (where,), [image, held], d)

    def copies(self) -> Iterator[tuple[str, Tensor]]:
        """Bulk copies: every rank and swizzle, boxes inside and across the edges."""
        for rank in (2, 3, 4, 5):
            sizes = (40, 9, 4, 3, 2)[:rank]
            for swizzle in (NONE, B128, B64, B32):
                box = [WIDTH[swizzle], 8, 2, 1, 1][:rank]
                for at in ([8, 1, 1, 1, 0], [24, 5, 3, 0, 1], [-8, -3, -1, 0, 0]):
                    source = torch.arange(1, 1 + int(torch.tensor(sizes).prod()), dtype=torch.int16)
                    source = source.to(self.device)
                    strides = [2 * int(torch.tensor(sizes[:i]).prod()) for i in range(1, rank)]
                    out = torch.empty(int(torch.tensor(box).prod()), dtype=torch.int16, device=self.device)
                    where = (source.data_ptr(), list(sizes), box, strides, swizzle, at[:rank], out.data_ptr())
                    name = f"copy {rank}d, swizzle {swizzle}, at {at[:rank]}"
                    yield name, self.call("probe_copy_tensor", where, [source], out)


def dump(native: ModuleType, device: str, hopper: bool) -> dict[str, dict[str, object]]:
    """Return digest and first values of every probe that the device has instructions for."""
    probes = Probes(native, device)
    found: dict[str, dict[str, object]] = {}
    for name, out in (*probes.matrices(), *(probes.products() if hopper else ()), *(probes.copies() if hopper else ())):
        digest = hashlib.sha256(out.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        found[name] = {"sha256": digest, "first": out.flatten()[:16].tolist()}
    return found


def emulator() -> ModuleType:
    """The kernels over csrc/emulator, as the tests build them."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from tests.emulator import build

    return build.module()


def main() -> int:
    """Dump to a file what the machine, or the emulator, does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--dry-run", action="store_true", help="the emulator's layouts")
    arguments = parser.parse_args()
    if arguments.dry_run:
        content: dict[str, object] = {"device": "emulator", "probes": dump(emulator(), "cpu", True)}
    else:
        from longrope_kernels.backends import cuda

        why = cuda.unavailable_reason()
        if why is not None or cuda._native is None:
            print(f"bench.layouts: {why}", file=sys.stderr)
            return 2
        hopper = cuda.runs_hopper_kernels(torch.device("cuda"))
        name = torch.cuda.get_device_properties(0).name
        content = {"device": name, "probes": dump(cuda._native, "cuda", hopper)}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(content['probes'])} layouts of {content['device']} in {arguments.out}")  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
