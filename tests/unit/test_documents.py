"""What the server says about itself."""

from importlib import metadata

from agent.serving.api import documents


def test_the_version_is_looked_up_once(monkeypatch):
    """The thread that polls answers with it, and the lookup reads files."""
    documents.agent_version.cache_clear()
    assert documents.agent_version() == metadata.version("edge-inference-agent")

    monkeypatch.setattr(documents, "version", lambda _: "looked up again")
    assert documents.server(shared_memory=False)["version"] == metadata.version("edge-inference-agent")
