"""GPUs by their vendors' figures: the room and the rates of each, for offline planning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from triton.backends.compiler import GPUTarget

from dinat_triton.kernels.configs import Architecture
from dinat_triton.work import Ceilings

KIB, GIGA, TERA = 1 << 10, 1e9, 1e12


@dataclass(frozen=True)
class Target:
    """One architecture, in the shape of its largest common GPU.

    Attributes:
        shared: Bytes of shared memory that one program may use.
        shared_total: Bytes that all programs of a multiprocessor share.
        threads: Threads that a multiprocessor holds.
        registers: 32-bit registers of a multiprocessor; a thread's share is counted in steps of eight.
        memory: Bytes per second that a copy reaches.
        cache: Bytes per second out of L2.
        products: 16-bit matrix FLOP/s.
        products32: The same in float32, without matrix units.
        exps_per_clock: Base-2 exponentials of a multiprocessor.
        issues_per_clock: Its instructions, of a warp each.
        device: The name of a GPU that is here.
    """

    name: str
    gpu: str
    multiprocessors: int
    shared: int
    shared_total: int
    threads: int
    clock: float
    memory: float
    cache: float
    products: float
    products32: float
    exps_per_clock: int = 16
    issues_per_clock: int = 4
    registers: int = 65536
    device: str = ""

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def warp(self) -> int:
        return 64 if self.name.startswith("gfx9") else 32

    @property
    def exps(self) -> float:
        return self.multiprocessors * self.exps_per_clock * self.clock

    @property
    def issues(self) -> float:
        return self.multiprocessors * self.issues_per_clock * self.clock

    @property
    def ceilings(self) -> Ceilings:
        products = {"float32": self.products32, "bfloat16": self.products}
        device = f"{self.gpu} ({self.name})"
        return Ceilings("vendor's figures, not measured", device, self.memory, products, self.exps)

    @property
    def triton(self) -> GPUTarget:
        if self.is_amd:
            return GPUTarget("hip", self.name, self.warp)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), self.warp)

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.name, self.shared, self.multiprocessors, self.device)


# Vendors' figures; memory at nine tenths of them, as copies reach; caches as microbenchmarks publish them.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100 80GB", 108, 163 * KIB, 164 * KIB, 2048, 1.41 * GIGA, 1.83 * TERA, 4.5 * TERA, 312 * TERA,
               19.5 * TERA),
        Target("sm_86", "RTX 3090", 82, 99 * KIB, 100 * KIB, 1536, 1.70 * GIGA, 0.84 * TERA, 2.0 * TERA, 71 * TERA,
               35.6 * TERA),
        Target("sm_89", "RTX 4090", 128, 99 * KIB, 100 * KIB, 1536, 2.52 * GIGA, 0.91 * TERA, 4.0 * TERA, 165 * TERA,
               82.6 * TERA),
        Target("sm_90", "H200", 132, 227 * KIB, 228 * KIB, 2048, 1.83 * GIGA, 4.3 * TERA, 6.0 * TERA, 800 * TERA,
               67 * TERA),
        Target("sm_100", "B200", 148, 227 * KIB, 228 * KIB, 2048, 1.85 * GIGA, 7.2 * TERA, 9.0 * TERA, 2250 * TERA,
               75 * TERA),
        Target("sm_120", "RTX 5090", 170, 99 * KIB, 100 * KIB, 1536, 2.41 * GIGA, 1.6 * TERA, 5.0 * TERA, 210 * TERA,
               105 * TERA),
        Target("gfx942", "MI300X", 304, 64 * KIB, 64 * KIB, 2048, 2.10 * GIGA, 4.3 * TERA, 9.0 * TERA, 1300 * TERA,
               163 * TERA, registers=131072),
        Target("gfx1100", "RX 7900 XTX", 96, 64 * KIB, 64 * KIB, 1536, 2.50 * GIGA, 0.86 * TERA, 3.0 * TERA, 122 * TERA,
               61 * TERA, issues_per_clock=2, registers=98304),
    )
}  # fmt: skip


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"arch must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def target_of(architecture: Architecture) -> Target:
    """The GPU that is here; one that is not in the table gets its nearest relative's rates."""
    family = sorted((t for t in TARGETS.values() if t.is_amd == architecture.is_amd), key=lambda t: _generation(t.name))
    older = [t for t in family if _generation(t.name) <= _generation(architecture.name)]
    nearest = older[-1] if older else family[0]
    return replace(
        nearest, name=architecture.name, shared=architecture.shared_memory,
        multiprocessors=architecture.multiprocessors, device=architecture.device,
    )  # fmt: skip


def _generation(name: str) -> int:
    return int(name.removeprefix("sm_").removeprefix("gfx"), 16)
