"""A bucket of Cloud Storage on loopback: gcp-storage-emulator, and the variables that lead all clients to it."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

from gcp_storage_emulator.server import create_server

from k25_jax.runtime.paths import to_path, upload

NAME = "k25-tests"


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of an empty bucket of this process's memory; this process and its children find it there meanwhile."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it logs what is asked for and not there
    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=NAME)
    emulator._api.daemon = True
    emulator.start()
    server = emulator._api._httpd
    server.handle_error = lambda *_: None  # a client that was killed
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
        emulator.stop()
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
