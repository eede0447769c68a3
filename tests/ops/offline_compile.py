"""Compiles the shipped tiles for a GPU that is not there and reads the machine code.

Must run outside Triton's interpreter; `test_offline_compile` starts it as a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qwen_fastdecode.ops.ring import kind_of, new_ring
from qwen_fastdecode.ops.step import Recipe, Step
from qwen_fastdecode.ops.triton import deferred_launch, tiles
from qwen_fastdecode.ops.triton import launch as triton_backend
from qwen_fastdecode.ops.triton.clusters import in_clusters
from qwen_fastdecode.ops.triton.deferred_launch import FLOAT32, DeferredTile
from qwen_fastdecode.ops.triton.tiles import Tile

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KINDS = {"NVIDIA H100 80GB HBM3": "sm_90"}  # GPUs with rows of their own in the table
D, HK, R = 128, 16, 2  # the real sizes


def shipped(arch: str, state: str) -> dict[str, Tile]:
    """The tiles that states of a dtype get on an architecture, and the one for several tokens a sequence.

    Where there is none for their dtype, bfloat16 states get those of float32.
    """
    gpus = [arch, *(gpu for gpu, built_as in KINDS.items() if built_as == arch)]
    tables = {gpu: tiles.shipped(state).get(gpu) or tiles.shipped().get(gpu, []) for gpu in gpus}
    found = {
        f"{gpu}, {row.tile.block_v} columns up to {row.max_work}": row.tile
        for gpu, rows in tables.items()
        for row in rows
    }
    return {**found, "several tokens": tiles.whole_head(D)}


def arguments(T: int, state: torch.dtype = torch.float32, R: int = R) -> tuple[torch.Tensor, ...]:
    """Views of qwen3_next's projections for B = 4, on the CPU: their strides and alignment are what matters."""
    B, dtype, C = 4, torch.bfloat16, 2 * HK * D + HK * R * D
    q, k, v, z = torch.empty(B * T, HK, 2 * D + 2 * R * D, dtype=dtype).split([D, D, R * D, R * D], dim=2)
    b, a = torch.empty(B * T, HK, 2 * R, dtype=dtype).split([R, R], dim=2)
    states = torch.empty(B, C, 4, dtype=dtype), torch.empty(B, HK * R, D, D, dtype=state)
    weights = [torch.empty(*shape, dtype=dtype) for shape in [(C, 4), (HK * R,), (HK * R,), (D,)]]
    return q, k, v.unflatten(2, (R, D)), z.unflatten(2, (R, D)), b, a, *states, *weights


def pretend(arch: str) -> None:
    """To Triton, that this is its device."""
    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)
    device = {"get_current_device": 0, "get_current_stream": 0, "get_current_target": target}
    driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in device.items()}))
    torch.version.hip = arch if hip else None


@cache  # several rows of the table may have one tile
def compile_for(arch: str, tile: Tile, T: int, state: torch.dtype = torch.float32, R: int = R) -> tuple[Any, int]:
    """The compiled kernel, specialised by Triton itself on the launcher's own arguments, and its programs a cluster."""
    pretend(arch)
    tensors = arguments(T, state, R)
    step, recipe = Step.from_tensors(tensors), Recipe((0, HK * R))
    found = triton_backend.describe(step, recipe, tile, max_programs=10**6)
    found.kernel.device_caches.clear()
    out = torch.empty(tensors[0].shape[0], HK * R * D, dtype=torch.bfloat16)
    squares = None if found.squares is None else torch.empty(found.squares)
    every = *tensors, None, out, *found.scratch(squares), *found.last
    compiled = found.kernel.warmup(*every, grid=(1,), **found.options)
    return compiled, found.cluster


def compile_deferred(arch: str, tile: DeferredTile) -> Any:
    """The kernel that writes float32 states every N-th step."""
    pretend(arch)
    tensors = arguments(1)
    step, recipe = Step.from_tensors(tensors), Recipe((0, HK * R))
    ring = new_ring(step.states.recurrent, HK, FLOAT32.N)
    _, rest, options, _ = deferred_launch.describe(step, recipe, kind_of(ring), tile, max_programs=10**6)
    deferred_launch.decode_deferred.device_caches.clear()
    out = torch.empty(tensors[0].shape[0], HK * R * D, dtype=torch.bfloat16)
    return deferred_launch.decode_deferred.warmup(*tensors, *ring, out, *rest, grid=(1,), **options)


@cache
def read_nvidia(compiled: Any) -> dict[str, int]:
    """Counts in the machine code, by Triton's own cuobjdump."""
    tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", code)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in instructions)

    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]) + count("LDL|STL"),
        "shared bytes": compiled.metadata.shared,
        "instructions": len(instructions) - count("NOP"),
        "barriers": count("BAR"),
        "shuffles": count("SHFL"),
        "128-bit loads": count(r"LDG\S*\.128"),
        "128-bit stores": count(r"STG\S*\.128"),
        **clusters(instructions),
    }


def clusters(instructions: list[str]) -> dict[str, int]:
    """Of a cluster's barrier: how often it is passed, and what is loaded and stored before and after.

    Volatile loads are those of what other programs leave.
    """
    arrive, wait = (
        [i for i, instruction in enumerate(instructions) if re.match(name, instruction)]
        for name in ("UCGABAR_ARV", "UCGABAR_WAIT")
    )
    if not arrive or not wait:
        return {"cluster barriers": len(arrive) + len(wait)}
    return {
        "cluster barriers": len(wait),
        "stores before arriving": sum(x.startswith("STG") for x in instructions[: arrive[0]]),
        "loads after arriving": sum(x.startswith("LDG") for x in instructions[arrive[0] :]),
        "volatile loads after waiting": len(re.findall(r"^LDG\S*\.STRONG", "\n".join(instructions[wait[0] :]), re.M)),
        "stores after waiting": sum(x.startswith("STG") for x in instructions[wait[0] :]),
    }


def read_amd(compiled: Any) -> dict[str, int]:
    """The same counts in AMD's assembly."""
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "shared bytes": compiled.metadata.shared,
        "instructions": len(re.findall(r"^\s+(?:[vs]|ds|global|buffer)_\w+", code, re.MULTILINE)),
        "barriers": code.count("s_barrier"),
        "shuffles": len(re.findall(r"ds_bpermute|ds_swizzle|_dpp|v_permlane", code)),
        "128-bit loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code)),
        "128-bit stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", code)),
    }


def ratios(tile: Tile) -> list[int]:
    """Value heads of a key head that a tile is compiled for: of a clustered one, also the most that it suits."""
    return sorted({R, tiles.CLUSTER // tiles.parts(tile, D)}) if tile.clustered else [R]


def told(compiled: Any, programs: int) -> tuple[int, ...]:
    """What Triton's launcher is told of a kernel in clusters: that it is loaded first needs a GPU, and is left out."""
    assert compiled.packed_metadata[1] == 1  # else `in_clusters` would lose what it was compiled for
    compiled._init_handles = lambda: None
    return in_clusters(compiled, programs).packed_metadata


def rows(arch: str) -> list[dict[str, Any]]:
    read = read_amd if arch.startswith("gfx") else read_nvidia
    found = []
    for state in ("float32", "bfloat16"):
        for work, tile in shipped(arch, state).items():
            of = {"arch": arch, "state": state, "work": work, **tile._asdict()}
            for value_heads in ratios(tile):
                compiled, cluster = compile_for(
                    arch, tile, 2 if "tokens" in work else 1, getattr(torch, state), value_heads
                )
                launcher = {"launcher": told(compiled, cluster)} if tile.clustered else {}
                found.append({**of, "value heads": value_heads, **read(compiled), **launcher})
    if arch in KINDS.values():  # the only ones that its tile was measured on
        for work, tile in {"deferred": FLOAT32.tile, "deferred, few": FLOAT32.few}.items():
            shape = Tile(D, tile.num_warps, 1, tile.max_registers, tile.clustered)
            compiled = compile_deferred(arch, tile)
            found.append({"arch": arch, "state": "float32", "work": work, **shape._asdict(), **read(compiled)})
    return found


def main() -> None:
    """Prints a table; with an architecture as argument, that one's rows as JSON."""
    if sys.argv[1:]:
        print(json.dumps(rows(sys.argv[1])))
        return
    found = [row for arch in ARCHITECTURES for row in rows(arch)]
    print("  ".join(found[0]))
    for row in found:
        print("  ".join(str(value).rjust(len(name)) for name, value in row.items()))


if __name__ == "__main__":
    main()
