"""Tests with a real vLLM. `make test-vllm` runs them where it is installed; elsewhere they are not collected."""

from collections.abc import Iterator
from typing import Any

import pytest

from trl.import_utils import is_installed

collect_ignore_glob = [] if is_installed("vllm") else ["*"]
_started: list[Any] = []


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two servers: of a model with a head of its own, and of one whose head is its embeddings, which takes adapters."""
    from servers import Server, save, tiny_llama

    place = tmp_path_factory.mktemp("served")
    try:
        for name, tied in (("untied", False), ("tied", True)):
            folder = save(tiny_llama(tied), place / name)
            _started.append(Server(folder, place / f"{name}.log", adapters=tied).start())
        yield {server.folder.name: server.wait() for server in _started}
    finally:
        for server in _started:
            server.close()


@pytest.fixture
def server(servers: dict[str, Any]) -> Any:
    """The one whose model has a head of its own, with its first weights."""
    servers["untied"].begin_anew()
    return servers["untied"]


@pytest.fixture
def tied(servers: dict[str, Any]) -> Any:
    """The one whose model's head is its embeddings, with its first weights; started again where a test killed it."""
    server = servers["tied"]
    if server.process.poll() is not None:
        server.start().wait()
    server.begin_anew()
    return server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """The end of the servers' logs stands below a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {server.folder.name}", server.tail()) for server in _started]
    return report
