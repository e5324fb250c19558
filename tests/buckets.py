"""A bucket of Cloud Storage on loopback: gcp-storage-emulator, and the variables that lead all clients to it."""

import contextlib
import functools
import http
import http.server
import logging
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from k25_jax.runtime.paths import to_path, upload

NAME = "k25-tests"
OBJECT = re.compile(r"(?:/upload|/download)?(?:/storage/v1)?/b/([^/]+)/o(?:/(.+))?")


class _Server(http.server.ThreadingHTTPServer):
    """Many connections at once, as TensorStore opens them: the emulator's own server loses some, and with them requests."""

    request_queue_size = 256

    def handle_error(self, request, client_address):
        """A client that was killed is no error."""


class _Handler(RequestHandler):
    """One request at a time, as the emulator's storage knows no threads; and generations of objects, which it leaves out.

    TensorStore reads an object's generation with its bytes, and writes on condition of it.
    """

    _turn = threading.Lock()

    def __getattribute__(self, name: str):
        found = super().__getattribute__(name)
        return functools.partial(self._in_turn, found) if name.startswith("do_") else found

    def _in_turn(self, method):
        with self._turn:
            address = urllib.parse.urlsplit(self.path)
            query = {name: values[0] for name, values in urllib.parse.parse_qs(address.query).items()}
            self._held = self._generation(address.path, query)
            if self._held == query.get("ifGenerationNotMatch"):
                self._refuse(http.HTTPStatus.NOT_MODIFIED)
            elif query.get("ifGenerationMatch", self._held) != self._held:
                self._refuse(http.HTTPStatus.PRECONDITION_FAILED)
            else:
                method()

    def _generation(self, path: str, query: dict) -> str:
        """Of the object that is asked for, or is about to be written; "0" where there is none."""
        match = OBJECT.fullmatch(path)
        bucket, name = match.groups() if match else ("", "")
        try:
            return self.storage.get_file_obj(bucket, urllib.parse.unquote(name or query.get("name", "")))["generation"]
        except NotFound:
            return "0"

    def _refuse(self, status: http.HTTPStatus):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        super().end_headers()

    def end_headers(self):
        if self.command == "GET" and "alt=media" in self.path:
            self.send_header("X-Goog-Generation", self._held)
        super().end_headers()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of an empty bucket of this process's memory; this process and its children find it there meanwhile."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it logs what is asked for and not there
    storage = Storage(use_memory_fs=True)
    create_bucket(NAME, storage)
    server = _Server(("127.0.0.1", 0), functools.partial(_Handler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    variables = {"STORAGE_EMULATOR_HOST": host, "TENSORSTORE_GCS_HTTP_URL": host, "FSSPEC_GCS_TOKEN": "anon"}
    variables |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # as runtime/paths.py has it, before the first import
    variables |= {"GCE_METADATA_ROOT": "127.0.0.1:1"}  # where TensorStore looks for credentials: nobody listens
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _forget()
    try:
        yield f"gs://{NAME}"
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        _forget()


def copied(folder: pathlib.Path, address: str) -> str:
    """`address`, to which all files below a local folder were copied."""
    target = to_path(address)
    for file in folder.rglob("*"):
        if file.is_file():
            upload(file, target / str(file.relative_to(folder)))
    return address


def _forget():
    """Clients made from now on read the variables anew."""
    from etils.epath import backend
    from fsspec.config import conf, set_conf_env
    from gcsfs import GCSFileSystem

    conf.pop("gcs", None)
    set_conf_env(conf)
    GCSFileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
