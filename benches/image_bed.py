"""What the benchmark of images needs: registries whose bytes are counted, private containerds, the stargz peer, and looks at
what processes take."""
import functools, hashlib, json, os, re, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from bed import BED, HERE, free_port

def sh(*cmd, check=True, **kw):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kw)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, cmd))}: {done.returncode}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout

def busy():
    with open("/proc/stat") as f: v = list(map(int, f.readline().split()[1:]))
    return (sum(v[:3]) + sum(v[5:8])) / os.sysconf("SC_CLK_TCK")

def drop():
    sh("sync"); Path("/proc/sys/vm/drop_caches").write_text("3")

class Step:
    """Seconds, and CPU seconds of the whole machine."""
    def __init__(self, row, name): self.row, self.name = row, name
    def __enter__(self): self.t, self.b = time.monotonic(), busy()
    def __exit__(self, *_):
        self.row[self.name] = time.monotonic() - self.t
        self.row[self.name + " cpu"] = busy() - self.b

class Peak(threading.Thread):
    """MiB: the most that one process whose command line has `part` in it took (VmHWM), looked at every 200 ms."""
    def __init__(self, part):
        super().__init__(daemon=True)
        self.part, self.mib, self.done = str(part).encode(), 0.0, threading.Event(); self.start()
    def run(self):
        own = os.getpid()
        while not self.done.wait(.2):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    if int(pid) == own or self.part not in Path(f"/proc/{pid}/cmdline").read_bytes(): continue
                    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                except OSError: continue
                if found: self.mib = max(self.mib, int(found[1]) / 1024)
    def __enter__(self): return self
    def __exit__(self, *_): self.done.set(); self.join()

class Registry:
    """A docker-registry on a directory; in the network namespace of a link, if there is one."""
    def __init__(self, data, at, link=None, port=None):
        ns = ["ip", "netns", "exec", link.NS] if link else []
        name, port = "10.77.0.2" if link else "127.0.0.1", port or free_port()
        self.host, self.log = f"{name}:{port}", at / f"registry-{port}.log"
        config = at / f"registry-{port}.yml"
        config.write_text(f"version: 0.1\nlog: {{level: warn, accesslog: {{disabled: false}}}}\n"
            f"storage: {{filesystem: {{rootdirectory: {data}, maxthreads: 100}}}}\nhttp: {{addr: '{self.host}'}}\n")
        self.log.write_text(""); self.command, self.address = [*ns, "docker-registry", "serve", config], (name, port); self.start()
    def start(self):
        with open(self.log, "a") as log: self.proc = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(200):
            try: socket.create_connection(self.address, 1).close(); return
            except OSError: time.sleep(.05)
        raise RuntimeError(f"docker-registry did not come up, see {self.log}")
    def mark(self): return self.log.stat().st_size
    def sent(self, mark, layers=None):
        """MB of blobs that ended requests took since `mark`; of these blobs only, where they are said."""
        with open(self.log) as f:
            f.seek(mark)
            rows = re.findall(r'"GET \S+/blobs/(\S+) HTTP/1.1" 20\d (\d+)', f.read())
        return sum(int(n) for blob, n in rows if layers is None or blob in layers) / 1e6
    def about(self, image):
        """Digests of the layers of repository:tag, and the chain id of them all."""
        repository, tag = image.rsplit(":", 1)
        def get(what): return json.loads(sh("curl", "-sS", "-H", "Accept: application/vnd.oci.image.manifest.v1+json", f"http://{self.host}/v2/{repository}/{what}"))
        manifest = get(f"manifests/{tag}")
        diff_ids = get(f"blobs/{manifest['config']['digest']}")["rootfs"]["diff_ids"]
        chain = functools.reduce(lambda below, d: "sha256:" + hashlib.sha256(f"{below} {d}".encode()).hexdigest(), diff_ids)
        return {layer["digest"] for layer in manifest["layers"]}, chain
    def close(self): self.proc.terminate(); self.proc.wait()

def wait_for(what, ready, proc):
    for _ in range(400):
        if ready(): return
        if proc.poll() is not None: break
        time.sleep(.05)
    raise RuntimeError(f"{what} did not come up")

class Containerd:
    """A private one, with all it has below one directory. `plugin`: a proxy snapshotter of that name, at `<at>/s.sock`;
    `certs`: a directory of hosts.toml files, for the CRI; `named`: it tells the snapshotter which image it is about."""
    def __init__(self, at, plugin=None, cri=False, certs=None, named=False):
        self.at, self.plugin = at, plugin; at.mkdir(parents=True, exist_ok=True)
        off = ["io.containerd.internal.v1.opt"] + ([] if cri else ["io.containerd.grpc.v1.cri"])
        config = f"""version = 2
root = "{at}/root"
state = "{at}/state"
disabled_plugins = {json.dumps(off)}
[grpc]
address = "{at}/c.sock"
[ttrpc]
address = "{at}/t.sock"
"""
        if plugin: config += f'[proxy_plugins.{plugin}]\ntype = "snapshot"\naddress = "{at}/s.sock"\n'
        if cri: config += f'[plugins."io.containerd.grpc.v1.cri"]\ndisable_apparmor = true\n[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "{plugin or "overlayfs"}"\ndisable_snapshot_annotations = {json.dumps(not named)}\n'
        if certs: config += f'[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{certs}"\n'
        (at / "config.toml").write_text(config)
        with open(at / "log", "w") as log: self.proc = subprocess.Popen(["containerd", "-c", at / "config.toml"], stdout=log, stderr=log)
        wait_for(f"containerd, see {at}/log,", lambda: subprocess.run(self.ctr("version"), capture_output=True).returncode == 0, self.proc)
    def ctr(self, *args, tool="ctr"): return [tool, "--address", f"{self.at}/c.sock", *map(str, args)]
    def mount(self, chain, dir, *namespace, snapshotter=None):
        """Mounts the tree of a chain id, read-only. (`ctr images mount` heeds no --snapshotter.)"""
        snapshots = [*namespace, "snapshots", "--snapshotter", snapshotter or self.plugin or "overlayfs"]
        sh(*self.ctr(*snapshots, "view", dir, chain)); dir.mkdir(exist_ok=True)
        sh(*self.ctr(*snapshots, "label", dir, "containerd.io/gc.root=1"))
        sh("sh", "-c", sh(*self.ctr(*snapshots, "mounts", dir, dir)))
    def cri(self, method, message=b""):
        """A call of the CRI's image service, as the kubelet makes it. gRPC by hand: curl is here anyway."""
        done = subprocess.run(["curl", "-sS", "--http2-prior-knowledge", "--unix-socket", f"{self.at}/c.sock", "-H", "content-type: application/grpc",
            "-H", "te: trailers", "--data-binary", "@-", "-D", "-", f"http://cri/runtime.v1.ImageService/{method}"],
            input=b"\0" + len(message).to_bytes(4, "big") + message, capture_output=True)
        if b"grpc-status: 0" not in done.stdout.lower(): raise RuntimeError(f"{method}: {done.stdout} {done.stderr}")
    def cri_pull(self, image):
        def field(data): return b"\x0a" + bytes([len(data)]) + data  # number 1, and short
        self.cri("PullImage", field(field(image.encode())))
    def wait_cri(self):
        """containerd answers before this part of it is ready."""
        def ready():
            try: self.cri("ListImages"); return True
            except RuntimeError: return False
        wait_for("the CRI", ready, self.proc)
    def close(self):
        self.proc.send_signal(signal.SIGTERM); self.proc.wait()
        unmount(self.at)

def unmount(below):
    for line in reversed(open("/proc/mounts").read().splitlines()):
        if line.split()[1].startswith(f"{below}/"): sh("umount", "-l", line.split()[1], check=False)

class Served:
    """A snapshotter at `<at>/s.sock`: hearth's on a store, or stargz's."""
    def __init__(self, at, command):
        at.mkdir(parents=True, exist_ok=True)
        with open(at / "snapshotter.log", "w") as log: self.proc = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
        wait_for(f"the snapshotter, see {at}/snapshotter.log,", (at / "s.sock").exists, self.proc)
    def close(self): self.proc.send_signal(signal.SIGTERM); self.proc.wait()

# ---- stargz --------------------------------------------------------------------------------------------------------

STARGZ, ESTARGZ = BED / "bin/stargz-grpc", BED / "data/registry-estargz"

def stargz(at):
    return Served(at, [STARGZ, "-address", at / "s.sock", "-root", at / "stargz"])

def prepare_stargz(registry, image, at):
    """Builds the peer, and converts the image to its format, into a registry of its own: the first time 10 minutes."""
    source = HERE / "stargz.go"
    if not STARGZ.exists() or STARGZ.stat().st_mtime < source.stat().st_mtime or not shutil.which("ctr-remote"):
        print("installing stargz-snapshotter from Debian", file=sys.stderr)
        sh("apt-get", "install", "-y", "-qq", "--no-install-recommends", "stargz-snapshotter", "golang-go", "gcc", "libc6-dev",
           "golang-github-containerd-stargz-snapshotter-dev", env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        STARGZ.parent.mkdir(parents=True, exist_ok=True)
        sh("go", "build", "-o", STARGZ, source, env={**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": BED / "gocache", "GOFLAGS": ""})
    stamp = ESTARGZ / ("of-" + image.replace("/", "-").replace(":", "-"))
    if stamp.exists(): return
    print("converting the image to eStargz, once", file=sys.stderr)
    ESTARGZ.mkdir(parents=True, exist_ok=True)
    own, c = Registry(ESTARGZ, at), Containerd(at / "convert")
    try:
        source, target = f"{registry.host}/{image}", f"{own.host}/{image}"
        sh(*c.ctr("images", "pull", "--plain-http", source))
        sh(*c.ctr("images", "convert", "--estargz", "--oci", source, target, tool="ctr-remote"))
        sh(*c.ctr("images", "push", "--plain-http", target))
        stamp.touch()
    finally:
        own.close(); c.close(); shutil.rmtree(at / "convert", ignore_errors=True)
