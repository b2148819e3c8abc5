async def test_an_incident_is_in_the_list_as_soon_as_it_is_answered(api):
    status, created, _ = await api.post("/incidents", {"title": "Deploy failed"})
    assert status == 201
    status, listed, _ = await api.get("/incidents")
    assert status == 200
    assert [i["id"] for i in listed["incidents"]] == [created["id"]]


async def test_ready(anonymous):
    status, body, _ = await anonymous.send("GET", "/health/ready")
    assert (status, body["status"]) == (200, "ready")
