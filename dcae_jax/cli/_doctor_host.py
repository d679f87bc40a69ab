"""Of `doctor`: packages and their versions, and the host.  Needs none of the packages."""

import importlib.metadata
import math
import os
import pathlib
import platform
import re
import resource
import shutil
import sys

from dcae_jax.cli._doctor_base import GIB, Finding, failed, warning

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = (3, 11)
_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PLUGINS = r"jax-(cuda|rocm)\d+-(plugin|pjrt)|libtpu"
_FEW_FILES, _TOO_FEW_FILES = 4096, 256
_SMALL_SHM = GIB
_LITTLE_MEMORY = 4 * GIB


def python() -> Finding:
    """The interpreter."""
    value = f"{platform.python_version()} ({sys.executable}), {platform.platform()}"
    if sys.version_info < PYTHON:
        least = ".".join(map(str, PYTHON))
        return failed("python", value, f"at least {least} is needed: make a new environment")
    return Finding("python", value)


def packages() -> list[Finding]:
    """What is required against what is installed, and against what was tested."""
    required, tested = _required(), _tested()
    there = {name: _version(name) for name in required}
    found = []
    for name, least in required.items():
        version = there[name]
        if version is None:
            value, verb = f"{name} is not installed", "install"
        elif _order(version) < _order(least):
            value, verb = f"{name} {version} is older than {least}", "upgrade"
        else:
            continue
        pin = f"{name}=={tested[name]}" if name in tested else f"{name}>={least}"
        found.append(failed("packages", value, f"{verb} it: pip install '{pin}'"))
    if not found:
        shown = ", ".join(f"{n} {_version(n)}" for n in _SHOWN)
        found = [Finding("packages", f"all {len(required)} required ones; {shown}")]
    return found + _untested(there, tested)


def _untested(there: dict[str, str | None], tested: dict[str, str]) -> list[Finding]:
    other = [
        f"{name} {version} (tested: {tested[name]})"
        for name, version in there.items() if version and tested.get(name, version) != version
    ]  # fmt: skip
    if not other:
        return []
    mend = f"if something odd happens: pip install -r requirements.txt -c {_constraints().name}"
    return [warning("tested versions", ", ".join(other), mend)]


def _required() -> dict[str, str]:
    """name -> least version, of the requirements file or of the installed package."""
    path = ROOT / "requirements.txt"
    if path.exists():
        lines = path.read_text().splitlines()
    else:
        lines = [r for r in importlib.metadata.requires("dcae_jax") or [] if "extra ==" not in r]
    matches = (re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", line) for line in lines)
    return {_plain(m[1]): m[2] for m in matches if m}


def _constraints() -> pathlib.Path:
    return ROOT / f"constraints-{sys.version_info[0]}.{sys.version_info[1]}.txt"


def _tested() -> dict[str, str]:
    """name -> version that the tests ran with; empty for another Python, or without a checkout."""
    path = _constraints()
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split("==") for line in lines if "==" in line)
    return {_plain(name): version for name, version in pairs}


def _plain(name: str) -> str:
    """A package's name as indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _order(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to be compared."""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def plugins() -> list[Finding]:
    """What connects jax with GPUs and TPUs; a CUDA plug-in of another jax is silently left out."""
    every = {
        _plain(d.metadata["Name"] or ""): d.version for d in importlib.metadata.distributions()
    }
    there = {name: v for name, v in sorted(every.items()) if re.fullmatch(_PLUGINS, name)}
    if not there:
        return [Finding("plug-ins", "none: jax runs on the CPU")]
    value = ", ".join(f"{name} {version}" for name, version in there.items())
    jaxlib = _version("jaxlib")
    wrong = [n for n, v in there.items() if n != "libtpu" and jaxlib and v != jaxlib]
    if wrong:
        mend = f"one version for all: pip install 'jax[cuda13]=={_version('jax')}'"
        return [failed("plug-ins", f"{value}, but jaxlib {jaxlib}", mend)]
    return [Finding("plug-ins", value)]


# ------------------------------------------------------------------------------------------- host


def host() -> list[Finding]:
    """Cores, memory, limits."""
    return [_cores(), _memory(), _files(), *_shm()]


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    value = f"{usable} usable of {os.cpu_count()}"
    quota = _text("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        usable = min(usable, math.ceil(int(quota[0]) / int(quota[1])))
        value += f", {int(quota[0]) / int(quota[1]):g} by the container's limit"
    return Finding("cores", value)


def _memory() -> Finding:
    """RAM of the machine and of the container, whichever is less."""
    numbers = dict(re.findall(r"(\w+):\s+(\d+) kB", _text("/proc/meminfo")))
    total, free = (int(numbers.get(k, 0)) * 1024 for k in ("MemTotal", "MemAvailable"))
    limit = _text("/sys/fs/cgroup/memory.max") or _text(
        "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    )
    value = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if limit.isdigit() and int(limit) < total:
        free = min(free, int(limit))
        value += f", the container may use {int(limit) / GIB:.1f}"
    if free < _LITTLE_MEMORY:
        mend = "close other programs, or lower data.workers, data.cache_mb, data.prefetch"
        return warning("memory", value, mend)
    return Finding("memory", value)


def _files() -> Finding:
    """How many files a process may have open: checkpoints and data loaders hold many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}"
    value = f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} (may be raised to {most})"
    mend = f"ulimit -n {most if most != 'unlimited' else 65536}  (before the program starts)"
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return Finding("open files", value)
    return (failed if soft < _TOO_FEW_FILES else warning)("open files", value, mend)


def _shm(folder: str = "/dev/shm") -> list[Finding]:
    """Loader processes (data.workers) hand batches over through it."""
    if not os.path.isdir(folder):
        return [warning("shared memory", f"no {folder}", "keep data.workers = 0 (threads serve)")]
    use = shutil.disk_usage(folder)
    value = f"{folder}: {use.free / GIB:.2f} GiB free of {use.total / GIB:.2f}"
    if use.free < _SMALL_SHM:
        mend = "in Docker: --shm-size=8g (or --ipc=host); else keep data.workers = 0"
        return [warning("shared memory", value, mend)]
    return [Finding("shared memory", value)]


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""
