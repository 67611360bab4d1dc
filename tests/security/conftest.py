from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from splitnet.security import credentials
from splitnet.security.authority import Authority
from splitnet.security.roles import Role


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an authority with nodes a and b, and one of each other role."""
    made = Authority.init(tmp_path_factory.mktemp("certs") / "authority")
    for name in ("a", "b"):
        made.issue(name, Role.NODE, ["127.0.0.1"])
    for role in (Role.CLIENT, Role.OBSERVER, Role.GUEST):
        made.issue(str(role), role)
    return made.directory


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No credentials but those that a test gives."""
    monkeypatch.delenv(credentials.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield
    credentials.use_access(None)
