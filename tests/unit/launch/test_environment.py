"""What Ray finds in the environment, for a cluster of one's own and for one that is joined."""

import os

import pytest

from launch.environment import secure_ray


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    return tmp_path


def test_a_cluster_of_ones_own_gets_a_token_of_its_own():
    secure_ray(None)
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_cluster_that_is_joined_is_shown_the_users_token_where_there_is_one(environment):
    secure_ray("10.0.0.1:6379")
    assert "RAY_AUTH_MODE" not in os.environ
    (environment / ".ray").mkdir()
    (environment / ".ray" / "auth_token").write_text("secret")
    secure_ray("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ


def test_the_users_own_choice_stays():
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}
    secure_ray(None)
    assert os.environ["RAY_AUTH_MODE"] == "disabled" and os.environ["RAY_AUTH_TOKEN"] == "x"
