"""One process of a meeting, without jax: compares facts, prints "met", then does what it is told.

python meeting_process.py ADDRESS COUNT INDEX FACTS ACTION

ACTION: end, wait (to be killed), fail, round (compare once more)
"""

import json
import sys
import time

from dcae_jax import rendezvous
from dcae_jax.errors import UserError


def main(address: str, count: str, index: str, facts: str, action: str) -> int:
    meeting = None
    try:
        meeting = rendezvous.meet(rendezvous.Place(address, int(count), int(index)))
        meeting.compare(json.loads(facts), {"version": "Install the same packages."})
        print("met", meeting.token, flush=True)
        if action == "wait":
            time.sleep(100)
        if action == "fail":
            meeting.stop(7, "the disk is full")
        if action == "round":
            meeting.compare({}, {})
    except UserError as e:
        print(f"error: {e}")
        return 2
    except rendezvous.Gone as e:
        print(f"error: {e}", flush=True)
        if meeting:
            meeting.stop(rendezvous.EXIT_GONE, str(e))
        return rendezvous.EXIT_GONE
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
