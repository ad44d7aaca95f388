"""The counter of instructions behind the figures of docs/cuda.md, on code short enough to count by hand."""

import re

import pytest

from bench.report_cuda import Code, cost, loop_of_accesses, loop_of_products


def sass(*lines):
    """Instructions 16 bytes apart; LABEL: before one names its address."""
    places = {}
    for i, line in enumerate(lines):
        label = re.match(r"(\w+): ", line)
        if label:
            places[label[1]] = hex(16 * i)
    found = []
    for i, line in enumerate(lines):
        text = re.sub(r"^\w+: ", "", line)
        for label, place in places.items():
            text = re.sub(rf"\b{label}\b", place, text)
        found.append(f"        /*{16 * i:04x}*/                   {text} ;")
    return "\n".join(found)


def busy(found):
    return {unit: x for unit, x in found.cycles.items() if x}


# A tile of 2 products, with a wait whose rest stands at the end, a mask and a cap that most tiles have no need of.
LOOP = sass(
    "MOV R1, RZ",
    "HMMA.16816.F32.BF16 R4, R8, R2, R4",
    "LOOP: LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
    "@!P0 BRA WAIT",
    "BACK: HMMA.16816.F32.BF16 R4, R8, R2, R4",
    "@P1 BRA UNCAPPED",
    "MUFU.EX2 R5, R5",
    "MUFU.RCP R5, R5",
    "UNCAPPED: @P2 BRA UNMASKED",
    "FSEL R5, R5, -INF , P3",
    "UNMASKED: MUFU.EX2 R5, R5",
    "LDSM.16.MT88.4 R8, [R1]",
    "@!PT LDS RZ, [RZ]",
    "HMMA.16816.F32.BF16 R4, R8, R2, R4",
    "@P4 BRA LOOP",
    "HMMA.16816.F32.BF16 R4, R8, R2, R4",
    "EXIT",
    "WAIT: YIELD",
    "@!P0 BRA WAIT",
    "BRA BACK",
)


def test_the_loop_of_a_tile_is_the_smallest_with_its_products():
    way = loop_of_products(LOOP, 2 * 2048)
    names = [re.sub(r"^@!?P\w+ ", "", x).split()[0] for x in way]
    assert names == [
        *("LDGSTS.E.BYPASS.128", "BRA", "HMMA.16816.F32.BF16", "BRA", "BRA", "MUFU.EX2", "LDSM.16.MT88.4", "LDS"),
        *("HMMA.16816.F32.BF16", "BRA"),
    ]


def test_a_loop_without_the_products_of_the_tile_is_refused():
    with pytest.raises(ValueError, match="no loop with 6144 multiply-adds"):
        loop_of_products(LOOP, 3 * 2048)


def test_code_put_at_the_end_for_a_wait_is_no_loop_of_its_own():
    code = Code(LOOP)
    assert [(code.texts[to], code.texts[i]) for to, i in code.loops()] == [
        ("YIELD", "@!P0 BRA 0x110"),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "@P4 BRA 0x20"),
    ]


def test_cycles_are_those_of_the_units():
    found = cost(loop_of_products(LOOP, 2 * 2048), "sm_80", 8)
    assert found.instructions == 10
    assert found.kinds == {"products": 2, "exp2": 1, "shared memory": 1, "copies": 1}
    assert busy(found) == pytest.approx(
        {
            "issue": 8 * 10 / 4,
            "tensor cores": 8 * 2 * 2048 / 1024,
            "exp2": 8 * 32 / 16,
            "shared memory": 8 * (512 + 512) / 128,  # what is copied and what is loaded; what is never done is not
            "L2": 8 * 512 / 47,
        }
    )
    assert found.bound == "L2"


@pytest.mark.parametrize(
    ("text", "tensor", "shared"),
    [
        ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88", 64, 32),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 64, 48),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", 32, 32),
    ],
)
def test_wgmma_reads_its_operands_from_shared_memory(text, tensor, shared):
    """A warpgroup's product: 64 x N x 16 multiply-adds at 2,048 a cycle, 128 bytes a cycle."""
    found = cost([text], "sm_90a", 4)
    assert (found.cycles["tensor cores"], found.cycles["shared memory"]) == (tensor, shared)


def test_a_division_past_32_bits_is_gone_round():
    code = sass(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P0 BRA SHORT",
        "CALL.REL.NOINC SHORT",
        "BRA DONE",
        *("SHORT: IMAD R1, R1, R1, R1", "IADD3 R1, R1, R1, R1", "IADD3 R1, R1, R1, R1"),
        "DONE: STG.E.128 desc[UR4][R2.64], R4",
        "EXIT",
    )
    way = loop_of_accesses(code, r"\b(LDG|STG)\b.*\.128\b")
    assert len(way) == 7
    found = cost(way, "sm_90", 1, r"\.128\b", lanes=0.5)
    assert busy(found) == pytest.approx({"issue": 7 / 4, "memory": 2 * 256 / 21})
