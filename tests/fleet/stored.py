"""An object store of a test's own: moto's S3, in this process."""

from __future__ import annotations

import threading

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "models"


class ObjectStore:
    """Between being made and `close` it answers. Its bucket is empty at first."""

    def __init__(self) -> None:
        self._http = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
        )
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def settings(self) -> dict[str, object]:
        """The section `blobs` of fleet.yaml."""
        options = {"endpoint": self.url, "region": "us-east-1", "access_key_id": "key", "secret_access_key": "secret"}
        return {"store": f"s3://{BUCKET}/fleet", "options": options, "allow_http": True}

    def close(self) -> None:
        self.client.close()
        self._http.shutdown()
        self._http.server_close()
