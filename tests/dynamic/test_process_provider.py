"""What is wrong with the options and the folders of ProcessProvider is said before a process is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from multiserver_schedule.servers import providers
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.exceptions import FleetError, ProviderError, ProviderRefused
from multiserver_schedule.servers.providers import launcher, process
from multiserver_schedule.servers.providers.process import ProcessProvider

from ..stores import ROOT


def a_provider(folder: Path, name: str = "processes", **options: Any) -> ProcessProvider:
    return ProcessProvider(name, {"command": ["true"], "directory": folder / "state", **options}, fleet="tests")


def info(key: str = "one", **configuration: Any) -> ServerInfo:
    return ServerInfo(f"name-of-{key}", key, "default", "processes", configuration)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"comand": ["true"]}, "has no option 'comand'. Did you mean 'command'?"),
        ({"COMMAND": ["true"]}, "has no option 'COMMAND'. Did you mean 'command'?"),
        ({"command": "sleep 5"}, "there is no shell"),
        ({"command": []}, "should be a list of the program and its arguments"),
        ({"command": ["sleep", 5]}, "should be a list of the program and its arguments"),
        ({"env": {"A": 1}}, "'env' should be a dict of the names of variables to texts"),
        ({"env": {"A=B": "1"}}, "'env' should be a dict"),
        ({"stop_timeout": 5}, "'stop_timeout' should be a timedelta, not 5"),
        ({"stop_timeout": timedelta(-1)}, "'stop_timeout' should be a timedelta"),
        ({"directory": "state"}, "'directory' should be an absolute path, not 'state'"),
        ({"cwd": 5}, "'cwd' should be a path, not 5"),
        ({"log": ""}, "'log' should be a path"),
        ({"host": "a@b"}, "'host' should be the name of a machine"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_write_instead(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FleetError) as raised:
        ProcessProvider("processes", options, fleet="tests")
    assert words in str(raised.value)
    assert "['PROVIDERS']['processes']['OPTIONS']" in str(raised.value)


def test_the_values_of_variables_are_in_no_error(tmp_path: Path) -> None:
    with pytest.raises(FleetError) as raised:
        ProcessProvider("processes", {"env": {"TOKEN": "hush\0"}}, fleet="tests")
    assert "hush" not in str(raised.value)
    with pytest.raises(ProviderRefused) as refused:
        a_provider(tmp_path).create_server(info(env={"TOKEN": "hush\0"}))
    assert "hush" not in str(refused.value)


def test_options_in_capitals_are_for_the_configurations_of_types(tmp_path: Path) -> None:
    assert a_provider(tmp_path, API_TOKEN="hush").options["API_TOKEN"] == "hush"


def test_a_provider_whose_name_cannot_be_that_of_a_folder_is_refused() -> None:
    with pytest.raises(FleetError, match="name it with letters"):
        ProcessProvider("../elsewhere", {}, fleet="tests")


def test_it_is_had_from_the_settings_with_the_command_alone(settings: Any) -> None:
    backend = "multiserver_schedule.servers.providers.process.ProcessProvider"
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "PROVIDERS": {"here": {"BACKEND": backend, "OPTIONS": {"command": ["true"]}}},
        "FLEET": "shop",
    }
    made = providers.make("here")
    assert isinstance(made, ProcessProvider)
    assert (made.local, made.idempotent, made.settles) == (True, True, timedelta(0))
    assert made.host == socket.gethostname()


def test_another_system_is_told_that_it_cannot_be_had_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "POSIX", False)
    with pytest.raises(FleetError, match="ProcessProvider needs a POSIX system"):
        ProcessProvider("processes", {"command": ["true"]}, fleet="tests")


def test_its_module_can_be_imported_where_there_is_no_posix() -> None:
    code = (
        "import django, signal, subprocess, sys\n"
        "from django.conf import settings; settings.configure(); django.setup()\n"
        "sys.modules['fcntl'] = sys.modules['pwd'] = None; del signal.SIGKILL\n"
        "import multiserver_schedule.servers.providers.process as it; print(it.pwd, it.launcher.fcntl)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "None None\n"


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        ({"comand": ["true"]}, "has no 'comand'. Did you mean 'command'?"),
        ({"command": "true"}, "there is no shell"),
        ({"env": []}, "'env' should be a dict"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_made(
    tmp_path: Path, configuration: dict[str, Any], words: str
) -> None:
    provider = a_provider(tmp_path)
    with pytest.raises(ProviderRefused) as raised:
        provider.create_server(info(**configuration))
    assert words in str(raised.value)
    assert "name-of-one" in str(raised.value)
    assert provider.list_servers() == []


def test_a_server_without_a_command_is_refused(tmp_path: Path) -> None:
    provider = ProcessProvider("processes", {"directory": tmp_path}, fleet="tests")
    with pytest.raises(ProviderRefused, match="no 'command', and nor have the OPTIONS"):
        provider.create_server(info())


def test_a_key_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    provider = a_provider(tmp_path)
    for key in ("../one", ".one", "", "a/b"):
        with pytest.raises(ProviderRefused, match="it names a folder"):
            provider.create_server(info(key))
        assert provider.find_by_tag(key) == []


# -- whose machines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", ["has_started", "stop_server", "has_stopped", "delete_server", "has_been_deleted", "reboot_server"]
)
def test_another_hosts_machine_is_never_taken_for_one_that_is_gone(tmp_path: Path, call: str) -> None:
    provider = a_provider(tmp_path, host="web1")
    with pytest.raises(ProviderError, match=r"one@web2 is on web2, and this is web1.*ONLY_ON"):
        getattr(provider, call)("one@web2")
    with pytest.raises(ProviderError, match="is not the id of a process's machine"):
        getattr(provider, call)("i-0123456789")


def test_a_changed_host_name_is_told_with_the_option_that_settles_it(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="write 'host': '0f3a' in the OPTIONS"):
        a_provider(tmp_path, host="9b1c").has_been_deleted("one@0f3a")


@pytest.mark.parametrize("sign", ["/.dockerenv", "/run/.containerenv", "KUBERNETES_SERVICE_HOST"])
def test_in_a_container_a_provider_is_told_to_name_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == sign)
    if not sign.startswith("/"):
        monkeypatch.setenv(sign, "10.0.0.1")
    [warning] = a_provider(tmp_path).check()
    assert warning.id == "multiserver_schedule_servers.W006"
    assert socket.gethostname() in warning.msg and "'host': 'processes'" in str(warning.hint)
    assert a_provider(tmp_path, host="web1").check() == []


def test_a_machine_that_is_no_container_may_be_called_by_its_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(process, "_OF_CONTAINERS", ())
    assert a_provider(tmp_path).check() == []


def test_two_hosts_that_share_a_disk_and_two_providers_of_a_fleet_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = {a_provider(tmp_path, name, host=host)._folder() for name in ("one", "two") for host in ("web1", "web2")}
    assert len(folders) == 4


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_others_can_write_to_is_refused_for_what_is_in_it_is_executed(tmp_path: Path) -> None:
    provider = a_provider(tmp_path)
    folder = Path(provider._folder(make=True))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert provider.list_servers() == []
    folder.chmod(0o770)
    for call in (provider.list_servers, provider.current_server_count, lambda: provider.create_server(info())):
        with pytest.raises(ProviderRefused, match="others should not be able to write to it"):
            call()
    folder.chmod(0o700)
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(ProviderRefused, match="others should not be able to write to it"):
        provider.create_server(info())
    (tmp_path / "state").chmod(0o1777)
    assert provider.list_servers() == []


def test_a_folder_that_is_somebody_elses_or_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    provider = a_provider(tmp_path)
    folder = Path(provider._folder(make=True))
    folder.rmdir()
    (tmp_path / "theirs").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(ProviderRefused, match="should belong to this user"):
        provider.list_servers()
    folder.unlink()
    if os.geteuid() == 0:
        folder.mkdir(mode=0o700)
        os.chown(folder, 12345, 12345)
        with pytest.raises(ProviderRefused, match="should belong to this user"):
            provider.list_servers()


def test_by_default_the_folder_is_in_the_home_that_the_system_knows_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=str(tmp_path)))
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    provider = ProcessProvider("processes", {"command": ["true"], "host": "web1"}, fleet="shop")
    assert provider.list_servers() == []
    assert provider._folder(make=True) == str(tmp_path / ".local/state/multiserver-schedule/shop.processes@web1")
    assert provider.check() == []


def test_a_user_without_a_home_is_told_to_name_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(process.pwd, "getpwuid", nobody)
    provider = ProcessProvider("processes", {"command": ["true"], "host": "web1"}, fleet="shop")
    with pytest.raises(ProviderRefused, match="give the provider 'processes' a 'directory' in its OPTIONS"):
        provider.list_servers()
    (warning,) = provider.check()
    assert "This user has no home" in warning.msg


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ProviderRefused, match=r"state/tests\.processes@.* cannot be used: .*'directory'"):
        a_provider(tmp_path).create_server(info())
