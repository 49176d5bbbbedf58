"""A Hugging Face hub on the loopback interface, for tests: the few routes that a streamed data set needs, over real
files, with the faults of real networks on demand.

    hub = Hub(folder); HF_ENDPOINT=hub.endpoint
    hub.faults = lambda path, number: "drop" | "503" | "short" | "noise" | None      # of the number-th request for a parquet file
"""
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(self, folder):
        """folder/ORG/NAME/... are the files of the data set ORG/NAME."""
        self.folder, self.faults, self.lock = str(folder), None, threading.Lock()
        self.requests, self.served, self.api_requests = 0, 0, 0       # for parquet files, in bytes, and for anything else
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, repository):
        root = os.path.join(self.folder, repository)
        paths = {}
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                paths[os.path.relpath(path, root)] = path
        return paths


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def missing(self, code):
        self.answer(404, b"", X_Error_Code=code)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        repository = "/".join(urlsplit(self.path).path.split("/")[3:5])
        files = self.hub.files(repository)
        self.json([entry(path, files[path]) for path in paths if path in files])

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        words = path.strip("/").split("/")
        if words[:2] == ["api", "datasets"]:
            repository, rest = "/".join(words[2:4]), words[4:]
            return self.api(repository, rest)
        if words[0] != "datasets" or words[3:4] != ["resolve"]:
            return self.missing("EntryNotFound")
        self.file("/".join(words[1:3]), "/".join(words[5:]))

    def api(self, repository, rest):
        self.hub.api_requests += 1
        files = self.hub.files(repository)
        if not files:
            return self.missing("RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return self.missing("RevisionNotFound")
        if not rest or rest[0] == "revision":
            return self.json({"id": repository, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": [],
                              "siblings": [{"rfilename": name} for name in sorted(files)]})
        if rest[0] == "tree":
            return self.tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower())
        self.missing("EntryNotFound")

    def tree(self, files, below, recursive):
        inside = {name for name in files if not below or name.startswith(below + "/")}
        if not inside:
            return self.missing("EntryNotFound")
        folders = {os.path.dirname(name) for name in inside} - {"", below}
        folders |= {os.path.dirname(f) for f in folders} - {"", below}
        entries = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
        entries += [entry(name, files[name]) for name in sorted(inside)]
        self.json([e for e in entries if recursive or os.path.dirname(e["path"]) == below])

    def file(self, repository, name):
        path = self.hub.files(repository).get(name)
        if path is None:
            return self.missing("EntryNotFound")
        size = os.path.getsize(path)
        facts = {"ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        first, last, status = 0, size - 1, 200
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if asked:
            begin, _, end = asked.partition("-")
            first, last, status = int(begin), min(int(end or last), last), 206
            facts["Content_Range"] = f"bytes {first}-{last}/{size}"
        with open(path, "rb") as f:
            f.seek(first)
            content = f.read(last + 1 - first)
        fault = None
        if name.endswith(".parquet") and self.command == "GET":
            with self.hub.lock:
                self.hub.requests += 1
                self.hub.served += len(content)
                fault = self.hub.faults and self.hub.faults(name, self.hub.requests)
        if fault == "503":
            return self.answer(503, b"")
        if fault == "drop":      # promise everything, send half, hang up
            self.send_response(status)
            for key, value in (facts | {"Content_Length": len(content)}).items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        if fault == "short":     # answer with half of what was asked for, as if it were all
            content = content[:len(content) // 2]
        if fault == "noise":     # as many bytes as asked for, but others
            content = bytes(byte ^ 0x5A for byte in content)
        self.answer(status, content, **facts)


def entry(name, path):
    return {"type": "file", "path": name, "size": os.path.getsize(path), "oid": hashlib.sha1(name.encode()).hexdigest()}
