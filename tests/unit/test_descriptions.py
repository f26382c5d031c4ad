"""What the server says about itself."""

from importlib import metadata

from agent.serving.api import descriptions


def test_the_version_is_looked_up_once(monkeypatch):
    """The thread that polls answers with it, and the lookup reads files."""
    descriptions.agent_version.cache_clear()
    assert descriptions.agent_version() == metadata.version("edge-inference-agent")

    monkeypatch.setattr(descriptions, "version", lambda _: "looked up again")
    assert descriptions.server(shared_memory=False)["version"] == metadata.version("edge-inference-agent")
