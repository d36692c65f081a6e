import pytest
from app import app, ballots, websockets


@pytest.fixture(autouse=True)
def nobody_has_voted():
    app.testing = True  # what a view raises is raised here
    ballots.clear()


def receive_until(ws, votes, watching):
    while ws.receive_json() != {"votes": votes, "watching": watching}:
        pass


def test_a_vote_reaches_everybody():
    client = websockets.test_client()
    with client.websocket_connect("/ws") as ann, client.websocket_connect("/ws") as bob:
        client.post("/vote", data={"choice": "Tea"})
        receive_until(ann, {"Tea": 1}, watching=2)
        receive_until(bob, {"Tea": 1}, watching=2)


def test_who_votes_again_has_changed_their_mind():
    ann, bob = websockets.test_client(), websockets.test_client()
    for client, choice in [(ann, "Tea"), (bob, "Tea"), (ann, "Water")]:
        client.post("/vote", data={"choice": choice})
    with ann.websocket_connect("/ws") as ws:
        assert ws.receive_json() == {"mine": "Water"}
        receive_until(ws, {"Tea": 1, "Water": 1}, watching=1)


def test_other_choices_are_refused():
    answer = websockets.test_client().post("/vote", data={"choice": "Soup"})
    assert answer.status_code == 400
    assert not ballots
