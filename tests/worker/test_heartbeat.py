from opsentry.worker.worker import Worker


async def test_a_round_touches_the_heartbeat(parts, tmp_path):
    heartbeat = tmp_path / "heartbeat"
    await Worker(parts.application, heartbeat=heartbeat).move_due_windows()
    assert heartbeat.exists()
