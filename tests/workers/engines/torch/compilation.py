"""Compiles a Triton kernel for an architecture, without a GPU, and reads what it needs there."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Shared memory of a block, in KB (CUDA programming guide, "Technical Specifications per Compute Capability"). They
# are Ampere (A100), Ada (L4, RTX 40), Hopper (H100, H200) and Blackwell (B200).
SHARED_KB = {80: 163, 89: 99, 90: 227, 100: 227}


@dataclass(frozen=True)
class Compiled:
    """The PTX of a kernel, its shared memory in bytes, its registers a thread, and the bytes that it spills."""

    ptx: str
    shared: int
    registers: int
    spilled: int

    def count(self, instruction: str) -> int:
        """Returns how often PTX instructions that begin with this text occur."""
        return sum(line.split("%")[0].strip().startswith(instruction) for line in self.ptx.splitlines())


def compiled(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    arch: int,
    floats: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """Compiles `kernel` as the engine does; arguments that are not named are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = pointers | dict.fromkeys(constants, "constexpr") | dict.fromkeys(floats, "fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    numbered = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=numbered)
    options = {"enable_fp_fusion": False, **options}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resources(binary.asm["cubin"])
    return Compiled(binary.asm["ptx"], binary.metadata.shared, usage["REG"], usage["LOCAL"] + usage["STACK"])


def _resources(cubin: bytes) -> dict[str, int]:
    """Returns what cuobjdump, which comes with Triton, says of a kernel: REG, STACK, LOCAL and more."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    words = next(line for line in done.stdout.splitlines() if "REG:" in line).split()
    pairs = (word.split(":") for word in words)
    return {pair[0]: int(pair[1]) for pair in pairs}
