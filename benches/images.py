#!/usr/bin/env python3
"""Container images, side by side: containerd's own pull and start, hearth's, and stargz-snapshotter's.

usage: images.py IMAGE [-n 5] [--cmd 'python3 /app/main.py'] [--hearth PATH] [--data DIR] [--many 50] [case ...]

IMAGE is repository:tag in the files of a docker-registry below --data; this starts registries on them. As root; needs
containerd, runc, docker-registry, curl; for the link what `benches/run` installs; for stargz what Debian has of it, which
it installs (and converts the image, once: 10 minutes). Cases, in turns, each round beginning with another:
  containerd   empty containerd: `ctr images pull` (overlayfs), then `ctr run`; then once more, warm, and a third time
  hearth-pull  empty store: `hearth warm`, which downloads, unpacks and verifies; then a start from a mount of it; once more
  hearth-lazy  empty store, index and access profile beside the image (pushed first): `hearth mount`, an overlay on it, `ctr run --rootfs`;
               once more when all is there. rss: the largest process of hearth, MiB; sent: MB of blobs, in all
  hearth-cri   as hearth-lazy, as a node does it: PullImage of the CRI, and `ctr run` on hearth's snapshotter; once more
               when all is there, and a third time
  stargz       `ctr-remote images rpull` of the image in its own format, then `ctr run`; once more
  *-link       each of these over 1 Gbit/s with a round trip of 2 ms
  one, many    --many containers at once on one lazily mounted image, each running --many-cmd, and one alone; until all of it
               is there. sent: MB of blobs
  cri-containerd, cri-hearth
               PullImage of the CRI, then `ctr images mount`. Here hearth has warmed the image before. layers: MB of them
  root-containerd, root-hearth
               `tar` of the whole root of a complete image, and a start: page cache dropped (cold), and at once again (hot).
               Both roots are made once, by the first of these cases, and stay until the end
  full-containerd, full-hearth, full-stargz
               who reads all: pull (or lazy mount), then `tar` of the whole root
The page cache is dropped before each case; before a warm start what was written is synced, and the machine rests. Figures are medians
[min-max] of seconds; cpu is that of the whole machine, so with the registry's; every run is a line of images.jsonl in the working
directory."""
import argparse, contextlib, json, shlex, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from bed import BED, Link
from image_bed import ESTARGZ, Containerd, Peak, Registry, Served, Step, drop, prepare_stargz, sh, stargz, unmount

ENV = ["--env", "PATH=/usr/local/bin:/usr/bin:/bin", "--env", "PYTHONDONTWRITEBYTECODE=1", "--env", "TF_CPP_MIN_LOG_LEVEL=3"]

REST = 10  # seconds

def rest():
    """Before a warm start: all is on the disk, and each tool's last container ended as long ago. What that had of memory may be
    gone by then: a host takes back what is free, and who touches a page first waits for it."""
    sh("sync"); time.sleep(REST)

class Overlay:
    """What a snapshotter gives a container: an overlay on a tree, with a directory of its own for what is written."""
    def __init__(self, at, lower):
        self.dir = at / "root"
        for d in ("upper", "work", "root"): (at / d).mkdir(parents=True)
        sh("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={at}/upper,workdir={at}/work", self.dir)
    def __enter__(self): return self.dir
    def __exit__(self, *_): sh("umount", "-l", self.dir, check=False)

def start(c, at, name, lower, cmd):
    with Overlay(at / name, lower) as root: sh(*c.ctr("run", "--rm", *ENV, "--rootfs", root, name, *cmd.split()))

def tar(dir):
    """Reads all: tar itself would skip the files if it saw that it writes to /dev/null."""
    sh("bash", "-c", 'set -o pipefail; tar -C "$0" -cf - . | cat > /dev/null', dir)

@contextlib.contextmanager
def mounted(a, at, registry, row, *more):
    """`hearth mount`, timed as `pull`; gives the directory."""
    dir = at / "tree"; dir.mkdir()
    try:
        with Step(row, "pull"): sh(*a.run(at), "mount", *more, f"oci://{registry.host}/{a.image}", dir)
        yield dir
    finally: sh(*a.run(at), "umount", dir, "--lazy", check=False)

def wait_complete(a, at, dir):
    while not json.loads(sh(*a.run(at), "status", dir, "--json"))["complete"]: time.sleep(.2)

def push_index(a, at, registry):
    """As another node would: it pulls; then a first lazy start is recorded, and what that read is pushed, too."""
    c, reference = Containerd(at / "cd"), f"oci://{registry.host}/{a.image}"
    try:
        sh(*a.run(at), "index", "push", reference)
        shutil.rmtree(at / "store")
        with mounted(a, at, registry, {}, "--no-fill") as dir: start(c, at, "recorded", dir, a.cmd)
        sh(*a.run(at), "index", "push", reference)
    finally: c.close()
    shutil.rmtree(at)

# ---- pull and start ------------------------------------------------------------------------------------------------

def containerd(a, at, row, registry):
    c, name = Containerd(at / "cd"), f"{registry.host}/{a.image}"
    try:
        drop()
        with Step(row, "pull"): sh(*c.ctr("images", "pull", "--plain-http", name))
        with Step(row, "first"): sh(*c.ctr("run", "--rm", name, "c1", *a.cmd.split()))
        row["total"] = row["pull"] + row["first"]
        rest()
        with Step(row, "again"): sh(*c.ctr("run", "--rm", name, "c2", *a.cmd.split()))
        with Step(row, "third"): sh(*c.ctr("run", "--rm", name, "c3", *a.cmd.split()))
    finally: c.close()

def hearth(a, at, row, registry, lazy):
    c, mark = Containerd(at / "cd"), registry.mark()
    try:
        drop()
        with Peak(at / "store") as peak:
            warm = {}
            if not lazy:
                with Step(warm, "pull"): sh(*a.run(at), "warm", f"oci://{registry.host}/{a.image}")
            with mounted(a, at, registry, row) as dir:
                for key, value in warm.items(): row[key] += value
                with Step(row, "first"): start(c, at, "c1", dir, a.cmd)
                row["total"] = row["pull"] + row["first"]
                wait_complete(a, at, dir)
                rest()
                with Step(row, "again"): start(c, at, "c2", dir, a.cmd)
        row["rss"], row["sent"] = peak.mib, registry.sent(mark)
    finally: c.close()

def hearth_cri(a, at, row, registry):
    served = Served(at / "cd", [*a.run(at), "snapshotter", "--address", at / "cd/s.sock", "--root", at / "cd/snapshots"])
    c = Containerd(at / "cd", "hearth", cri=True, certs=a.base / "certs", named=True)
    name, mark = f"{registry.host}/{a.image}", registry.mark()
    def run(id, flag, *cmd): sh(*c.ctr("-n", "k8s.io", "run", flag, "--snapshotter", "hearth", *ENV, name, id, *cmd))
    try:
        c.wait_cri(); drop()
        with Peak(at / "store") as peak:
            with Step(row, "pull"): c.cri_pull(name)
            with Step(row, "first"): run("c1", "--rm", *a.cmd.split())
            row["total"] = row["pull"] + row["first"]
            while not json.loads(sh(*a.run(at), "list", "--json"))[0]["complete"]: time.sleep(.2)
            rest()
            with Step(row, "again"): run("c2", "--rm", *a.cmd.split())
            with Step(row, "third"): run("c3", "--rm", *a.cmd.split())
        row["rss"], row["sent"] = peak.mib, registry.sent(mark)
    finally:
        c.close(); served.close(); unmount(at)

def stargz_case(a, at, row, registry):
    s = stargz(at / "cd"); c, name = Containerd(at / "cd", "stargz"), f"{registry.host}/{a.image}"
    mark = registry.mark()
    try:
        drop()
        with Peak(at / "cd/stargz") as peak:
            with Step(row, "pull"): sh(*c.ctr("images", "rpull", "--plain-http", "--snapshotter", "stargz", name, tool="ctr-remote"))
            with Step(row, "first"): sh(*c.ctr("run", "--rm", "--snapshotter", "stargz", name, "c1", *a.cmd.split()))
            row["total"] = row["pull"] + row["first"]
            rest()
            with Step(row, "again"): sh(*c.ctr("run", "--rm", "--snapshotter", "stargz", name, "c2", *a.cmd.split()))
        row["rss"], row["sent"] = peak.mib, registry.sent(mark)
    finally: c.close(); s.close()

# ---- many at once --------------------------------------------------------------------------------------------------

def many(a, at, row, registry, count):
    c, mark = Containerd(at / "cd"), registry.mark()
    try:
        drop()
        with mounted(a, at, registry, row) as dir, contextlib.ExitStack() as roots:
            dirs = [roots.enter_context(Overlay(at / f"o{i}", dir)) for i in range(count)]
            with Step(row, "all"):
                runs = [subprocess.Popen(c.ctr("run", "--rm", *ENV, "--rootfs", d, f"m{i}", *a.many_cmd), stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE) for i, d in enumerate(dirs)]
                for run in runs:
                    _, error = run.communicate()
                    if run.returncode: raise RuntimeError(f"one of {count}: {error[-500:]}")
            wait_complete(a, at, dir)
            row["sent"] = registry.sent(mark)
    finally: c.close()

# ---- by way of the CRI ---------------------------------------------------------------------------------------------

def cri(a, at, row, registry, ours):
    name, served = f"{registry.host}/{a.image}", None
    if ours:
        sh(*a.run(at), "warm", f"oci://{name}")
        served = Served(at / "cd", [*a.run(at), "snapshotter", "--address", at / "cd/s.sock", "--root", at / "cd/snapshots"])
    c = Containerd(at / "cd", "hearth" if ours else None, cri=True)
    try:
        layers, chain = registry.about(a.image)
        c.wait_cri(); drop(); mark = registry.mark()
        with Step(row, "pull"): c.cri_pull(name)
        with Step(row, "mount"): c.mount(chain, at / "m", "-n", "k8s.io")
        row["total"] = row["pull"] + row["mount"]
        row["layers"] = registry.sent(mark, layers)
        sh("umount", at / "m")
    finally:
        c.close()
        if served: served.close()
        unmount(at)

# ---- complete roots ------------------------------------------------------------------------------------------------

class Roots:
    """A complete image twice: unpacked by containerd for overlayfs, and hearth's native root."""
    def __init__(self, a, at, registry):
        name = f"{registry.host}/{a.image}"
        at.mkdir(); sh(*a.run(at), "warm", f"oci://{name}")
        self.served = Served(at / "cd", [*a.run(at), "snapshotter", "--address", at / "cd/s.sock", "--root", at / "cd/snapshots"])
        self.c, self.starts = Containerd(at / "cd", "hearth", cri=True), 0
        self.c.wait_cri()
        sh(*self.c.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", name))
        self.c.cri_pull(name)  # of ctr the snapshotter is not asked whether it has the layers
        self.dirs = {snapshotter: at / f"m-{snapshotter}" for snapshotter in ROOTS}
        for snapshotter, dir in self.dirs.items():
            self.c.mount(registry.about(a.image)[1], dir, "-n", ROOTS[snapshotter], snapshotter=snapshotter)
        found = [line for line in open("/proc/mounts") if str(at) in line]
        assert any(" erofs " in line for line in found) and not any(" fuse" in line for line in found), f"hearth's root is not native: {found}"
        self.at, self.name = at, name
    def start(self, snapshotter, cmd):
        self.starts += 1
        sh(*self.c.ctr("-n", ROOTS[snapshotter], "run", "--rm", "--snapshotter", snapshotter, *ENV, self.name, f"r{self.starts}", *cmd))
    def close(self):
        for dir in self.dirs.values(): sh("umount", dir, check=False)
        self.c.close(); self.served.close(); unmount(self.at)

# Snapshotters, and the namespaces of their image.
ROOTS = {"overlayfs": "default", "hearth": "k8s.io"}

def root(a, at, row, registry, snapshotter):
    if a.roots is None:
        a.roots = Roots(a, a.base / "roots", registry)
    r = a.roots
    for name, act in [("tar", lambda: tar(r.dirs[snapshotter])), ("start", lambda: r.start(snapshotter, a.cmd.split()))]:
        drop()
        for heat in ("cold", "hot"):
            with Step(row, f"{name} {heat}"): act()

# ---- who reads all -------------------------------------------------------------------------------------------------

def full(a, at, row, registry, plugin):
    """containerd and a snapshotter of it."""
    served = stargz(at / "cd") if plugin else None
    c, name, chain = Containerd(at / "cd", plugin), f"{registry.host}/{a.image}", registry.about(a.image)[1]
    try:
        drop()
        with Step(row, "pull"):
            if plugin: sh(*c.ctr("images", "rpull", "--plain-http", "--snapshotter", plugin, name, tool="ctr-remote"))
            else: sh(*c.ctr("images", "pull", "--plain-http", name))
            c.mount(chain, at / "m")
        with Step(row, "tar"): tar(at / "m")
        row["total"] = row["pull"] + row["tar"]
        sh("umount", at / "m", check=False)
    finally:
        c.close()
        if served: served.close()

def full_hearth(a, at, row, registry):
    drop()
    with Peak(at / "store") as peak, mounted(a, at, registry, row) as dir:
        with Step(row, "tar"): tar(dir)
        row["total"] = row["pull"] + row["tar"]
    row["rss"] = peak.mib

STARTS = {
    "containerd": containerd,
    "hearth-pull": lambda *args: hearth(*args, False),
    "hearth-lazy": lambda *args: hearth(*args, True),
    "hearth-cri": hearth_cri,
    "stargz": stargz_case,
}
CASES = {
    **STARTS, **{f"{name}-link": case for name, case in STARTS.items()},
    "one": lambda *args: many(*args, 1), "many": lambda a, *args: many(a, *args, a.many),
    "cri-containerd": lambda *args: cri(*args, False), "cri-hearth": lambda *args: cri(*args, True),
    "root-containerd": lambda *args: root(*args, "overlayfs"), "root-hearth": lambda *args: root(*args, "hearth"),
    "full-containerd": lambda *args: full(*args, None), "full-hearth": full_hearth, "full-stargz": lambda *args: full(*args, "stargz"),
}

def show(rows):
    """A table for those that have the same columns."""
    groups = {}
    for name, found in rows.items():
        if found: groups.setdefault(tuple(k for k in found[0] if not k.endswith("cpu") or k in ("pull cpu", "first cpu")), []).append(name)
    for cols, names in groups.items():
        print("\n| case | " + " | ".join(cols) + " |\n|" + "---|" * (len(cols) + 1))
        for name in names:
            cells = []
            for col in cols:
                v = [row[col] for row in rows[name]]
                cells.append(f"{statistics.median(v):.2f} [{min(v):.2f}-{max(v):.2f}]")
            print(f"| {name} (n = {len(rows[name])}) | " + " | ".join(cells) + " |")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("image"); p.add_argument("cases", nargs="*", metavar="case"); p.add_argument("-n", type=int, default=5)
    p.add_argument("--cmd", default="python3 /app/main.py"); p.add_argument("--hearth", default="target/release/hearth")
    p.add_argument("--data", default=BED / "data/registry", help="the registry's files"); p.add_argument("--many", type=int, default=50)
    p.add_argument("--many-cmd", default="python3 -c 'import numpy, json, decimal'")
    p.add_argument("--dir", default=None, help="where everything is put (a disk, not tmpfs)")
    p.add_argument("--keep-index", action="store_true", help="do not push the index of the image anew before the first case")
    a = p.parse_intermixed_args(); names = a.cases or list(CASES)
    if wrong := [name for name in names if name not in CASES]: p.error(f"no case {', '.join(wrong)}; there are {', '.join(CASES)}")
    base = a.base = Path(tempfile.mkdtemp(prefix="hearth-images-", dir=a.dir))
    program, config, certs = Path(a.hearth).resolve(), base / "hearth.toml", base / "certs/10.77.0.2:5000"
    certs.mkdir(parents=True); (certs / "hosts.toml").write_text('[host."http://10.77.0.2:5000"]\ncapabilities = ["pull", "resolve"]\n')
    config.write_text(f'[source]\nregistry_config_path = "{base}/certs"\n')
    a.run = lambda at: [program, "--config", config, "--store", at / "store"]
    a.many_cmd, a.roots, rows = shlex.split(a.many_cmd), None, {name: [] for name in names}
    with contextlib.ExitStack() as bed:
        bed.callback(shutil.rmtree, base, ignore_errors=True)
        def registry(data, link=None, port=None):
            made = Registry(data, base, link, port); bed.callback(made.close); return made
        near, link, registries = registry(a.data), None, {}
        if any(name.endswith("-link") for name in names): link = bed.enter_context(Link(1000, 2000))
        if not a.keep_index and any(name.startswith(("hearth-lazy", "hearth-cri", "one", "many", "full-hearth")) for name in names):
            push_index(a, base / "index", near)
        if any("stargz" in name for name in names): prepare_stargz(near, a.image, base)
        for name in names:
            own, far = key = ("stargz" in name, name.endswith("-link"))
            if key not in registries: registries[key] = registry(ESTARGZ if own else a.data, link if far else None, 5000 + own if far else None)
        bed.callback(lambda: a.roots and a.roots.close())
        for i in range(a.n):
            for name in names[i % len(names):] + names[:i % len(names)]:
                at, row = base / f"{name}{i}", {}
                at.mkdir(); CASES[name](a, at, row, registries["stargz" in name, name.endswith("-link")]); shutil.rmtree(at, ignore_errors=True)
                rows[name].append(row)
                with open("images.jsonl", "a") as out: out.write(json.dumps({"case": name, **row}) + "\n")
                print(name, {k: round(v, 2) for k, v in row.items()}, flush=True)
    show(rows)

main()
