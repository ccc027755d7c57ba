#!/usr/bin/env python3
"""How soon the agent starts for a pod: from the API server's event of a bound pod with `hearth.dev/prefetch` to the origin.

usage: pods.py [-n 100] [--at-once 8] [--hearth PATH] [--dir DIR]

An API server that lists no pods and then tells of n of them, one after the other, in a watch; each wants a file of its own from an
origin, both in this process. Then --at-once more are told in one go (of one namespace no more than 8 are brought at a
time: others wait for them). Figures are milliseconds from before the event is written until the origin has read a
request: the first of all (HEAD), and the first for content (GET). Needs no root and no packages."""
import argparse, http.server, json, os, shutil, signal, socketserver, statistics, subprocess, tempfile, threading, time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

BODY = os.urandom(1 << 20)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    def log_message(self, *_): pass
    def answer(self, code, body, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

class Origin(Handler):
    """Files of the same size, each at its own path; notes when each was first asked for, and for its content."""
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        now, name = time.perf_counter(), self.path.strip("/")
        note = self.server.seen.setdefault(name, {}); note.setdefault("any", now); note.setdefault(self.command, now)
        if self.command == "GET": self.server.asked[name].set()
        asked, known = self.headers.get("Range"), {"ETag": f'"{name}"', "Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
        if not asked: return self.answer(200, BODY, **known)
        first, _, last = asked.removeprefix("bytes=").partition("-"); first, last = int(first), min(int(last or len(BODY)), len(BODY) - 1)
        self.answer(206, BODY[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(BODY)}", **known)

class Api(Handler):
    """Lists nothing, and tells those who watch pods of what is in `queue`; takes whatever it is given."""
    def do_GET(self):
        url = urlsplit(self.path); query = parse_qs(url.query)
        if url.path != "/api/v1/pods":
            pod = self.server.pods.get(url.path.rpartition("/")[2])
            return self.json(200, pod) if pod else self.json(404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404})
        if "watch" not in query:
            return self.json(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []})
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.send_header("Connection", "close"); self.end_headers(); self.wfile.flush()
        self.close_connection = True; self.server.watched.set()
        while pods := self.server.queue.get():
            lines = b"".join(json.dumps({"type": "ADDED", "object": pod}).encode() + b"\n" for pod in pods)
            now = time.perf_counter()
            for pod in pods: self.server.told[pod["metadata"]["name"]] = now
            self.wfile.write(lines); self.wfile.flush()
    def do_POST(self): self.json(201, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
    do_PATCH = do_PUT = do_POST
    def json(self, code, value): self.answer(code, json.dumps(value).encode(), Content_Type="application/json")

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads, request_queue_size = True, 256
    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler); self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

def show(name, times):
    t = sorted(times); at = lambda q: t[min(len(t) - 1, int(q * len(t)))]
    print(f"| {name} | {len(t)} | {statistics.median(t):.1f} | {at(.99):.1f} | {t[-1]:.1f} |")

def main():
    import queue
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-n", type=int, default=100); p.add_argument("--at-once", type=int, default=8)
    p.add_argument("--hearth", default="target/release/hearth"); p.add_argument("--dir", default=None)
    a = p.parse_args()
    base, origin, api = Path(tempfile.mkdtemp(prefix="hearth-pods-", dir=a.dir)), Server(Origin), Server(Api)
    origin.seen, origin.asked, api.pods, api.told, api.queue, api.watched = {}, {}, {}, {}, queue.Queue(), threading.Event()
    (base / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "c", "user": {}}],
        "clusters": [{"name": "c", "cluster": {"server": api.url}}], "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]}))
    (base / "config.toml").write_text(f'[agent]\nsocket = "{base}/agent.sock"\n[admin]\nenabled = false\n[kube]\nenabled = true\n[kube.api]\nkubeconfig = "{base}/kubeconfig"\n')
    def pod(name):
        origin.asked[name] = threading.Event()
        api.pods[name] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "default", "name": name, "uid": name,
            "resourceVersion": str(len(api.pods) + 2), "annotations": {"hearth.dev/prefetch": f"{origin.url}/{name}"}},
            "spec": {"nodeName": "n", "containers": []}, "status": {"phase": "Pending"}}
        return api.pods[name]
    def rows(what, names):
        for kind, of in (("any", "any request"), ("GET", "a request for content")):
            show(f"{what}, {of}", [(origin.seen[n][kind] - api.told[n]) * 1000 for n in names])
    agent = subprocess.Popen([a.hearth, "--config", base / "config.toml", "--store", base / "store", "agent", "--node-name", "n"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert api.watched.wait(60), "the agent does not watch"
        one, all = [f"p{i}" for i in range(a.n)], [f"q{i}" for i in range(a.at_once)]
        for name in one:
            api.queue.put([pod(name)])
            assert origin.asked[name].wait(60), f"nothing was asked for {name}"
            time.sleep(.05)
        api.queue.put([pod(name) for name in all])
        for name in all: assert origin.asked[name].wait(60), f"nothing was asked for {name}"
        print("| from the event of the bound pod to | n | p50 ms | p99 ms | longest ms |\n|---|---|---|---|---|")
        rows("one after the other", one); rows(f"{a.at_once} at once", all)
    finally:
        api.queue.put(None); agent.send_signal(signal.SIGTERM); agent.wait()
        shutil.rmtree(base)

if __name__ == "__main__": main()
