"""Serve the page of a playground on this machine, and nothing else: no telemetry, no share link, no other host."""

import errno
import importlib.util
import os
import socket
import threading
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.printable import say

HOST = "127.0.0.1"


def serve(target: Path, port: int, browser: bool) -> None:
    """Open a playground and show it at http://127.0.0.1:PORT until Ctrl-C.

    target: a run folder, or the configuration of a search.
    browser: whether to open the page in the user's browser.

    EvomergeError if Gradio is not installed, the port is in use, or the run or its models cannot be opened.
    """
    if importlib.util.find_spec("gradio") is None:
        raise EvomergeError('the playground needs Gradio: pip install "evomerge[play]"')
    refuse_used_port(port)
    say(f"opening the models of {target}")
    from evomerge.play.playground import open_playground

    play = open_playground(target)
    play.live.merge(play.presets.recipes[play.presets.found])
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    for name in ("no_proxy", "NO_PROXY"):  # Gradio looks whether its page is there, and a proxy cannot know
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from evomerge.play.page import build_page

    page, looks = build_page(play)
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            # A page of the internet whose name has been made to mean this machine is refused.
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]},
            # What an environment variable could turn on:
            share=False,
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            root_path="",
            **looks,
        )
    except OSError as error:  # taken since it was looked at
        raise EvomergeError(f"port {port} cannot be used; choose another one with --port") from error
    say(f"playground: http://{HOST}:{port} (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    finally:
        play.live.close()
        page.close(verbose=False)


def refuse_used_port(port: int) -> None:
    """EvomergeError if no server can listen on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise EvomergeError(f"port {port} {why}; choose another one with --port") from error
