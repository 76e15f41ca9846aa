"""What the simulation found in the daemon as a whole, made to happen."""

from __future__ import annotations

import asyncio
from unittest import mock

from hookd.postgres.connect import DatabaseUnavailable
from tests.simulation.process import Process, SimulatedDaemon, log_to
from tests.simulation.world import World


def test_a_daemon_ends_though_its_session_is_lost_in_the_moment_in_which_it_is_told_to() -> None:
    """The task group raised the loss, the cancellation was forgotten, and the daemon went on for ever."""

    async def tenure(self: SimulatedDaemon) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise DatabaseUnavailable("lost") from None

    world = World(1)
    before = log_to(world)
    try:
        with mock.patch.object(SimulatedDaemon, "_tenure", tenure):
            process = Process(world, "a1", world.config, 1)
            world.timeline.run(world.timeline.now + 1, lambda: False)
            process.stop()
            world.timeline.run(world.timeline.now + 60, lambda: process.exit_status is not None)
            assert process.exit_status == 0
    finally:
        world.kill(process)
        log_to(None, before)
