"""Before a job of several machines starts: is the workdir one folder, does process 0's port answer?

The Slurm script runs it once on each node (`srun --ntasks-per-node=1`): a minute here says what
would otherwise be a hang.  Exit code 2 and one sentence that names the host.
"""

import argparse
import os
import pathlib
import socket
import sys
import time
from collections.abc import Sequence

import common
from common import LaunchError

SECONDS = 60  # in which all nodes must have met
LOOKS = 15  # seconds in which a file of another node must be seen (NFS caches directories)


def options(argv: Sequence[str]) -> argparse.Namespace:
    """What the script gives."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--address", required=True, help="HOST:PORT of process 0")
    p.add_argument("--workdir", help="a folder that all nodes must see; left out for gs://")
    p.add_argument("--node", type=int, default=int(os.environ.get("SLURM_PROCID", "0")))
    p.add_argument("--nodes", type=int, default=int(os.environ.get("SLURM_NTASKS", "1")))
    p.add_argument("--seconds", type=float, default=SECONDS)
    return p.parse_args(argv)


def first(port: int, args: argparse.Namespace, token: pathlib.Path | None) -> None:
    """Node 0: leaves a file in the workdir, then waits for a word of each other node."""
    if token:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(socket.gethostname())
    try:
        server = socket.create_server(("", port), backlog=args.nodes)
    except OSError as e:
        raise LaunchError(
            f"port {port} of {socket.gethostname()} cannot be used ({e.strerror}): another program "
            "has it; choose another with --port"
        ) from e
    end = time.monotonic() + args.seconds
    with server:
        for met in range(1, args.nodes):
            server.settimeout(max(end - time.monotonic(), 0.1))
            try:
                server.accept()[0].close()
            except TimeoutError as e:
                raise LaunchError(
                    f"{met} of {args.nodes} nodes met at {args.address} within "
                    f"{args.seconds:.0f} s; the others say what is wrong, or did not start"
                ) from e


def other(host: str, port: int, args: argparse.Namespace, token: pathlib.Path | None) -> None:
    """The other nodes: reach the port of node 0, see its file."""
    end, here = time.monotonic() + args.seconds, socket.gethostname()
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as e:
            if time.monotonic() > end:
                raise LaunchError(
                    f"{here} cannot reach {host}:{port} ({e}): a firewall blocks the port, or the "
                    "name means another machine; open it between the nodes, or choose another "
                    "with --port"
                ) from e
        time.sleep(0.5)
    end = time.monotonic() + min(LOOKS, args.seconds)
    while token and not token.exists():
        if time.monotonic() > end:
            raise LaunchError(
                f"{here} does not see in {token.parent} what {host} wrote there: the workdir is "
                "not on storage that the nodes share; use a folder of NFS, Lustre or the like, "
                "or gs://"
            )
        time.sleep(0.5)


def main(argv: list[str]) -> int:
    """Checks; raises LaunchError."""
    args = options(argv)
    host, _, port = args.address.rpartition(":")
    job = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    token = pathlib.Path(args.workdir, f".launch-{'-'.join(job)}") if args.workdir else None
    if args.node:
        other(host, int(port), args, token)
    else:
        first(int(port), args, token)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    common.run(main)
