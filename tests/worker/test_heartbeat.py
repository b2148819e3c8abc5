from opsentry.worker.worker import Worker


async def test_a_round_that_was_gone_through_is_shown(parts, tmp_path):
    heartbeat = tmp_path / "heartbeat"
    await Worker(parts.database, parts.commands, parts.projector, heartbeat=heartbeat).move_windows()
    assert heartbeat.exists()
