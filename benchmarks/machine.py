"""What a figure was measured on; never a host name or a path."""

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as records show it. cores: that this process may use. gpu: None without one."""

    cpu: str
    cores: int
    memory_gib: int
    system: str
    python: str
    gpu: str | None

    @property
    def slug(self) -> str:
        """Give a name for files, such as "intel-xeon-platinum-8370c-2-cores"."""
        words = f"{self.gpu or self.cpu} {self.cores} cores".lower()
        words = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*?ghz", " ", words)
        return re.sub(r"[^a-z0-9.]+", "-", words).strip("-")

    def to_dict(self) -> dict[str, str | int | None]:
        """Give the fields as JSON values."""
        return asdict(self)


def describe_machine() -> Machine:
    """Describe the machine at hand."""
    return Machine(
        cpu=_cpu(),
        cores=count_cores(),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        gpu=_gpu(),
    )


def _cpu() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> int:
    """Give the memory in GiB, rounded; 0 where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
