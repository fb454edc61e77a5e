"""A peer in plain PyTorch trains the same model on the same images: its losses are those of the trainer's step."""

import peers
import pytest
import torch
import training
from gpu.plan import TINY, B


def config():
    return training.load_config(B, 2, *TINY)


def losses(step, count):
    found = []
    for _ in range(count):
        step.step()
        found.append(float(step.loss.detach()))
    return found


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peers_losses_are_those_of_the_trainer(peer):
    torch.manual_seed(0)
    ours = training.Training(config(), "cpu", "native")
    torch.manual_seed(0)
    theirs = peers.Peer(config(), peer)
    expected = losses(ours, 3)
    assert expected[2] < expected[0]
    assert losses(theirs, 3) == pytest.approx(expected, rel=1e-4)


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="no such peer: 'jax'; there are eager, compiled"):
        peers.Peer(config(), "jax")
