"""Is this machine fit?  Versions, devices, speed, host, workdir, room for checkpoints.

  python -m dcae_jax doctor [--workdir DIR] [--config FILE:ARG] [--expect-devices N]

One line for each check: ok, warning or FAILED, and for what is not ok what to do about it.  Exit
code 0: fit (warnings allowed), 1: something failed, 2: wrong usage.  Nothing stays in the workdir.
Start it on every host of a job as training is started, and it checks the network between them too.
"""

import contextlib
import os
from typing import TYPE_CHECKING, Any

from dcae_jax.cli import _doctor_host, _options
from dcae_jax.cli._doctor_base import Finding, Status, attempt, failed, patience, show

if TYPE_CHECKING:
    from etils import epath

    from dcae_jax.config import RunConfig

_PATIENCE = 300.0  # seconds for the first device, for each probe: compiling is part of it
_REINSTALL = "make setup, or: pip install -r requirements.txt"
_START = (
    "see whether another program holds the device (one process at a time has a TPU), and whether "
    "driver and plug-in fit; JAX_PLATFORMS=cpu runs without it"
)


def main(argv: list[str]) -> int:
    """Runs all checks in order; 1 if one failed."""
    args = _parser().parse_args(argv)
    report = _Report()
    report.add(attempt("python", lambda: [_doctor_host.python()], _REINSTALL))
    report.add(attempt("packages", _doctor_host.packages, _REINSTALL))
    report.add(attempt("plug-ins", _doctor_host.plugins, _REINSTALL))
    report.add(attempt("host", _doctor_host.host, "look at the limits of this container"))
    if report.failed and not _importable(report):
        return 1
    if joined := _start(report):
        _devices(report, args)
    _disk(report, args, joined)
    return report.end()


class _Report:
    """Prints findings as they come; processes other than the first print who they are as well."""

    def __init__(self) -> None:
        self.who, self.quiet, self.failed, self.warnings = "", False, 0, 0

    def add(self, findings: list[Finding]) -> None:
        """Shows them; of quiet processes those that are not ok."""
        for found in findings:
            self.failed += found.status is Status.failed
            self.warnings += found.status is Status.warning
            if not self.quiet or found.status is not Status.ok:
                show(found, self.who)

    def end(self) -> int:
        """The verdict, and the exit code."""
        if not self.quiet or self.failed:
            verdict = f"{self.failed} FAILED" if self.failed else "fit"
            print(f"{self.who}{verdict}, {self.warnings} warning(s)", flush=True)
        return 1 if self.failed else 0


def _importable(report: _Report) -> bool:
    """Whether jax and what the other checks need can be imported at all."""

    def load() -> list[Finding]:
        from dcae_jax.cli import _doctor_devices, _doctor_disk  # noqa: F401

        return []

    found = attempt("import", load, _REINSTALL)
    report.add(found)
    return not found


def _start(report: _Report) -> bool:
    """Joins the processes and starts the devices; whether that went well."""

    def start() -> list[Finding]:
        import jax

        from dcae_jax import distributed
        from dcae_jax.cli import _doctor_devices

        distributed.initialize()
        jax.devices()
        return _doctor_devices.processes()

    with patience("devices", _PATIENCE, _START):
        found = attempt("devices", start, _START)
    report.add(found)
    if any(f.status is Status.failed for f in found):
        return False
    import jax

    if index := jax.process_index():
        report.who, report.quiet = f"process {index}: ", True
    return True


def _devices(report: _Report, args: Any) -> None:
    """Devices, and the probes on them."""
    from dcae_jax.cli import _doctor_devices as on

    report.add(attempt("devices", lambda: on.devices(args.expect_devices), _START))
    for probe in on.probes():
        with patience(probe.name, _PATIENCE, _START):
            report.add(attempt(probe.name, lambda p=probe: on.compute(p), _START))
    mend = "the hosts must reach each other: firewall, NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO tells"
    with patience("all-reduce", _PATIENCE, mend):
        report.add(attempt("all-reduce", on.collective, mend))


def _disk(report: _Report, args: Any, joined: bool) -> None:
    """Compile cache, workdir, and its room; processes that have joined share the workdir."""
    from etils import epath

    from dcae_jax.cli import _doctor_disk

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        epath.Path("~/.cache/dcae_jax/xla").expanduser()
    )
    report.add([_doctor_disk.cache(folder)])
    if not args.workdir:
        report.add([Finding("workdir", "not checked: give --workdir")])
        return
    workdir = epath.Path(args.workdir).expanduser()
    mend = "give a --workdir that exists or can be made"
    with _doctor_disk.made(workdir) if joined else contextlib.nullcontext():
        report.add(attempt("workdir", lambda: _doctor_disk.workdir(workdir), mend))
        report.add(attempt("space", lambda: _space(workdir, args.config), mend))


def _space(workdir: "epath.Path", given: str | None) -> list[Finding]:
    """Room for the checkpoints of a config: that of --config, else of the workdir's run."""
    from dcae_jax import inspect
    from dcae_jax.cli import _doctor_disk
    from dcae_jax.errors import UserError

    try:
        cfg = _config(workdir, given)
    except UserError as e:
        return [failed("config", str(e), "correct the config, or leave --config out")]
    one = None if cfg is None else inspect.state_bytes(cfg)
    count = 0 if cfg is None else cfg.checkpoint.at_most(cfg.steps)
    steps = workdir / "checkpoints"
    there = len([p for p in steps.iterdir() if p.name.isdigit()]) if steps.exists() else 0
    return [_doctor_disk.space(workdir, one, count, there)]


def _config(workdir: "epath.Path", given: str | None) -> "RunConfig | None":
    """A config that was validated against the devices; None if there is none."""
    import jax

    from dcae_jax import config, flags, provenance

    if given:
        cfg = config.resolve(flags.load(given))
        config.validate(cfg, jax.device_count())
        return cfg
    record = provenance.read(workdir)
    return None if record is None else config.from_json(config.completed(record["config"]))


def _parser() -> Any:
    parser = _options.parser("doctor", __doc__)
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run; may be gs://")
    parser.add_argument(
        "--config", metavar="FILE:ARG", help="whose checkpoints need room; default: of the workdir"
    )
    parser.add_argument(
        "--expect-devices", type=_positive, metavar="N", help="of all processes; others fail"
    )
    return parser


def _positive(text: str) -> int:
    import argparse

    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices")
    return int(text)
