"""A website on a free port of 127.0.0.1: what a program does with TLS of its own beside its sessions."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from certs import Certs

GREETING = "this is the website"


class Website:
    """Serves over HTTPS with the certificate `server` of Certs, for use in a `with` statement."""

    def __init__(self, certs: Certs):
        self.certs = certs

    def __enter__(self) -> "Website":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certs.server.cert, self.certs.server.key)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_exception) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(GREETING.encode())

    def log_message(self, *_arguments) -> None:
        """Tests print what matters."""
