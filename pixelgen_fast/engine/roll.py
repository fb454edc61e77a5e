"""Who of a run's ranks is there, and where: what their beats say, and for how long they have said nothing new.

silent   no new beat: the process is dead or stopped, or its machine is
stuck    beats, but no rank gets on: named is the one furthest behind, for which the others wait
failed   a rank that ended with an error, and its last words

Seconds are those of the listener, so the clocks of machines do not matter.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

# a rank that has not been heard of yet may still be importing
START = 5


@dataclass(frozen=True)
class Beat:
    """A sign of life. `count` changes while the process runs, `moves` while it gets on.

    position: how many parts of the run it has gone through, comparable between ranks. allowed: seconds in which it
    should move. place: what it does, in words. ended: None while it works, "" when done, else its last words.
    """

    host: str
    process: int
    count: int = 0
    moves: int = 0
    position: int = 0
    allowed: float = 0.0
    place: str = "its start"
    ended: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Peer:
    """A rank's last beat; for how many seconds there was no other, and for how many it has not moved."""

    beat: Beat | None = None
    silent: float = 0.0
    still: float = 0.0


class Roll:
    """The ranks of a run, as one of them hears them. limit: seconds of silence after which a rank is lost."""

    def __init__(self, world: int, limit: float) -> None:
        self.limit = limit
        self.peers = [Peer() for _ in range(world)]

    def hear(self, rank: int, text: str | bytes | None, seconds: float) -> None:
        """A rank's last beat as JSON, None where there was none so far, `seconds` after the one before."""
        peer = self.peers[rank]
        beat = Beat(**json.loads(text)) if text else None
        new = beat is not None and (peer.beat is None or beat.count != peer.beat.count)
        moved = beat is not None and (peer.beat is None or beat.moves != peer.beat.moves)
        peer.silent = 0.0 if new else peer.silent + seconds
        peer.still = 0.0 if moved else peer.still + seconds
        peer.beat = beat

    def describe(self, rank: int) -> str:
        """The rank, its machine and its process."""
        beat = self.peers[rank].beat
        return f"rank {rank} ({beat.host}, process {beat.process})" if beat else f"rank {rank}"

    def silent(self, limit: float) -> str:
        """A line on the ranks that have given no sign of life for more than `limit` seconds; empty for none."""
        said = []
        for rank, peer in enumerate(self.peers):
            if peer.beat is None and peer.silent > START * limit:
                said.append(f"rank {rank} has not come within {peer.silent:.0f} s")
            elif peer.beat is not None and peer.beat.ended is None and peer.silent > limit:
                who = self.describe(rank)
                said.append(f"{who} has given no sign of life for {peer.silent:.0f} s, last in {peer.beat.place}")
        return "; ".join(said)

    def failed(self) -> str:
        """A line on the ranks that ended with an error."""
        return "; ".join(
            f"{self.describe(rank)} ended in {peer.beat.place}: {peer.beat.ended}"
            for rank, peer in enumerate(self.peers)
            if peer.beat and peer.beat.ended
        )

    def all_ended(self, but: int) -> bool:
        """Whether all ranks have ended and said so, this one aside."""
        return all(peer.beat and peer.beat.ended is not None for r, peer in enumerate(self.peers) if r != but)

    def stuck(self) -> str:
        """A line on the ranks that hold up the others, once nobody has moved for as long as they are allowed."""
        at_work = [(peer.beat.position, rank, peer) for rank, peer in enumerate(self.peers) if _works(peer)]
        if len(at_work) < len(self.peers) or any(peer.still <= self.limit for *_, peer in at_work):
            return ""
        behind = [(rank, peer) for position, rank, peer in at_work if position == min(at_work)[0]]
        if any(peer.still <= peer.beat.allowed for _, peer in behind):
            return ""
        return "no rank gets on; " + "; ".join(
            f"{self.describe(rank)} is behind, for {peer.still:.0f} s in {peer.beat.place}" for rank, peer in behind
        )


def _works(peer: Peer) -> bool:
    return peer.beat is not None and peer.beat.ended is None
