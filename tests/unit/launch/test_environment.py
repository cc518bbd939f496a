"""What Ray finds in the environment, for a cluster of one's own and for one that is joined."""

import os

import pytest

from launch.environment import check_temporary_directory, cluster_address, secure_ray
from rl.errors import ConfigError


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


def test_a_temporary_directory_that_ray_could_not_use_is_refused(environment):
    check_temporary_directory(None)
    long = "/tmp/" + "x" * 34
    os.environ["TMPDIR"] = long
    check_temporary_directory(None)
    os.environ["TMPDIR"] = f"{long}x"
    with pytest.raises(
        ConfigError, match=f"TMPDIR {long}x is too long.* 108 bytes.* RAY_TMPDIR to a folder of at most 39"
    ):
        check_temporary_directory(None)
    check_temporary_directory("10.0.0.1:6379")  # whose files are elsewhere
    os.environ["TMPDIR"] = f"{long[:-1]}/"
    check_temporary_directory("local")
    os.environ["RAY_TMPDIR"] = "/tmp"
    check_temporary_directory(None)


@pytest.mark.parametrize("folder", ["", "relative", "/etc/passwd", "/etc/passwd/below", "/proc/1", "LINK"])
def test_a_temporary_directory_must_be_a_folder_to_write_to(folder, environment, monkeypatch):
    (environment / "link").symlink_to(environment / "nowhere")
    folder = folder.replace("LINK", str(environment / "link"))
    os.environ["TMPDIR"] = folder
    monkeypatch.setattr("launch.environment._SOCKET_BYTES", 1000)
    with pytest.raises(ConfigError, match=f"TMPDIR '{folder}' is not a folder that Ray could write to"):
        check_temporary_directory(None)


def test_rays_word_for_a_cluster_of_ones_own_is_known():
    assert [cluster_address(address) for address in (None, "local", "auto")] == [None, None, "auto"]
    os.environ["RAY_ADDRESS"] = "local"
    assert cluster_address(None) is None
