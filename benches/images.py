#!/usr/bin/env python3
"""Container images, side by side: containerd's own pull and start, and hearth's.

usage: images.py IMAGE [-n 5] [--cmd 'python3 /app/main.py'] [--hearth PATH] [case ...]

IMAGE is registry/repository:tag in a registry that is reached over plain HTTP (loopback). As root; needs containerd, runc.
Cases, in turns, each round beginning with another:
  containerd   empty containerd: `ctr images pull` (overlayfs), then `ctr run`; then once more, warm
  hearth-pull  empty store: `hearth warm`, which downloads, unpacks and verifies; then a start from a mount of it; once more
  hearth-lazy  empty store, index beside the image (pushed first): `hearth mount`, an overlay on it, `ctr run --rootfs`
The page cache is dropped before each case. Figures are medians [min-max]; cpu is that of the whole machine, so with the
registry's; every run is a line of images.jsonl in the working directory."""
import argparse, json, os, shutil, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path

def sh(*cmd, check=True, **kw):
    done = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kw)
    if check and done.returncode:
        sys.exit(f"{' '.join(map(str, cmd))}: {done.returncode}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout

def busy():
    with open("/proc/stat") as f: v = list(map(int, f.readline().split()[1:]))
    return (sum(v[:3]) + sum(v[5:8])) / os.sysconf("SC_CLK_TCK")

def drop():
    sh("sync"); Path("/proc/sys/vm/drop_caches").write_text("3")

class Step:
    def __init__(self, row, name): self.row, self.name = row, name
    def __enter__(self): self.t, self.b = time.monotonic(), busy()
    def __exit__(self, *_):
        self.row[self.name] = time.monotonic() - self.t
        self.row[self.name + " cpu"] = busy() - self.b

class Containerd:
    """A private one, with all it has below one directory."""
    def __init__(self, at):
        self.at = at; at.mkdir(parents=True)
        (at / "config.toml").write_text(f"""version = 2
root = "{at}/root"
state = "{at}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{at}/c.sock"
[ttrpc]
address = "{at}/t.sock"
""")
        self.log = open(at / "log", "w")
        self.proc = subprocess.Popen(["containerd", "-c", str(at / "config.toml")], stdout=self.log, stderr=self.log)
        for _ in range(200):
            if subprocess.run(self.ctr("version"), capture_output=True).returncode == 0: return
            time.sleep(.05)
        sys.exit(f"containerd did not come up, see {at}/log")
    def ctr(self, *args): return ["ctr", "--address", f"{self.at}/c.sock", *args]
    def close(self):
        self.proc.send_signal(signal.SIGTERM); self.proc.wait()
        for line in reversed(open("/proc/mounts").read().splitlines()):
            if line.split()[1].startswith(str(self.at) + "/"): sh("umount", "-l", line.split()[1], check=False)

def containerd(a, at, row):
    c = Containerd(at / "cd")
    try:
        drop()
        with Step(row, "pull"): sh(*c.ctr("images", "pull", "--plain-http", a.image))
        with Step(row, "first"): sh(*c.ctr("run", "--rm", a.image, "c1", *a.cmd.split()))
        row["total"] = row["pull"] + row["first"]
        with Step(row, "again"): sh(*c.ctr("run", "--rm", a.image, "c2", *a.cmd.split()))
    finally: c.close()

def start(c, at, name, lower, cmd):
    """What the snapshotter gives a container: an overlay on the mounted tree."""
    dirs = [at / name / d for d in ("upper", "work", "root")]
    for d in dirs: d.mkdir(parents=True)
    sh("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={dirs[0]},workdir={dirs[1]}", dirs[2])
    env = ["--env", "PATH=/usr/local/bin:/usr/bin:/bin", "--env", "PYTHONDONTWRITEBYTECODE=1"]
    try: sh(*c.ctr("run", "--rm", *env, "--rootfs", str(dirs[2]), name, *cmd.split()))
    finally: sh("umount", "-l", dirs[2], check=False)

def hearth(a, at, row, lazy):
    c = Containerd(at / "cd"); dir = at / "tree"; dir.mkdir()
    run = [a.hearth, "--store", str(at / "store")]; ref = "oci://" + a.image
    try:
        drop()
        with Step(row, "pull"):
            if not lazy: sh(*run, "warm", ref)
            sh(*run, "mount", ref, dir)
        with Step(row, "first"): start(c, at, "c1", dir, a.cmd)
        row["total"] = row["pull"] + row["first"]
        if lazy:
            while not json.loads(sh(*run, "status", dir, "--json"))["complete"]: time.sleep(.2)
        with Step(row, "again"): start(c, at, "c2", dir, a.cmd)
    finally:
        sh(*run, "umount", dir, "--lazy", check=False); c.close()

CASES = {
    "containerd": containerd,
    "hearth-pull": lambda a, at, row: hearth(a, at, row, False),
    "hearth-lazy": lambda a, at, row: hearth(a, at, row, True),
}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("image"); p.add_argument("cases", nargs="*"); p.add_argument("-n", type=int, default=5)
    p.add_argument("--cmd", default="python3 /app/main.py"); p.add_argument("--hearth", default="target/release/hearth")
    p.add_argument("--dir", default=None, help="where everything is put (a disk, not tmpfs)")
    a = p.parse_args(); a.hearth = str(Path(a.hearth).resolve())
    names = a.cases or list(CASES); rows = {name: [] for name in names}
    base = Path(tempfile.mkdtemp(prefix="hearth-images-", dir=a.dir))
    try:
        if "hearth-lazy" in names:
            sh(a.hearth, "--store", base / "index", "index", "push", "oci://" + a.image)
            shutil.rmtree(base / "index")
        for i in range(a.n):
            for name in names[i % len(names):] + names[:i % len(names)]:
                at, row = base / f"{name}{i}", {}
                at.mkdir(); CASES[name](a, at, row); shutil.rmtree(at, ignore_errors=True)
                rows[name].append(row)
                with open("images.jsonl", "a") as out: out.write(json.dumps({"case": name, **row}) + "\n")
                print(name, {k: round(v, 2) for k, v in row.items()}, flush=True)
    finally: shutil.rmtree(base, ignore_errors=True)
    cols = ["pull", "first", "total", "again", "pull cpu", "first cpu"]
    print("| case | " + " | ".join(cols) + " |\n|" + "---|" * (len(cols) + 1))
    for name, found in rows.items():
        cells = []
        for col in cols:
            v = [row[col] for row in found]
            cells.append(f"{statistics.median(v):.2f} [{min(v):.2f}-{max(v):.2f}]")
        print(f"| {name} (n = {len(found)}) | " + " | ".join(cells) + " |")

main()
