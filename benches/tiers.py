#!/usr/bin/env python3
"""Baked disks, side by side with what they replace.

usage: tiers.py IMAGE [-n 5] [--cmd 'python3 /app/main.py'] [--hearth PATH] [--data DIR] [--model m4g] [--dir DIR] [case ...]

IMAGE is repository:tag in the files of a docker-registry below --data, the model is one that `benches/run` has made. As root;
needs containerd, runc, docker-registry, skopeo, umoci, erofs-utils, curl, nginx. Each is baked once, onto an erofs image, which
is attached as a loop device. Cases, in rounds, each in another order (who comes after a case that has just let go of much
memory, gets that more cheaply on many virtual machines):
  image-containerd  empty containerd: PullImage of the CRI, mount of a snapshot (`ready`), first start of --cmd (`start`)
  image-tier        empty containerd, empty store: `attach` of the disk, then the same, from the disk, through hearth's mirror
                    and snapshotter, with the registry stopped
  model-tier        empty store: attach, `hearth mount`, 4 KiB of a shard (`first`, in all so far), all shards read (`all`, in all)
  model-cp          attach, cp from the disk to another directory, then the same
  model-warm        empty store: `hearth warm` from S3 on this machine, then `hearth mount` and the same
  bake-hearth, bake-umoci
                    the image into an empty directory, unpacked, from a registry on this machine: `hearth bake`; `skopeo copy`
                    and `umoci unpack`. Both synced. mb: what it takes on the disk
  open-1k, open-100k, open-500k, open-none
                    `hearth list` on an empty store over a tier of so many objects, 1000 of them those of an artifact, and over
                    none: ms, and MiB of RSS (peak)
The page cache is dropped before each case. Figures are medians [min-max] of seconds; every run is a line of tiers.jsonl in the
working directory. --sizes bakes several images that have layers in common, and prints what they take together."""
import argparse, contextlib, functools, hashlib, json, os, random, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from bed import BED, Origin
from image_bed import Containerd, Registry, Served, Step, drop, sh, unmount
from measure import ENV

PIECE = 1 << 20

class Disk:
    """A disk image, attached as a loop device and mounted. With direct I/O: what is below a real disk is not in the page cache, either."""
    def __init__(self, image, at): self.image, self.at = image, at
    def __enter__(self):
        self.at.mkdir(parents=True)
        device = sh("losetup", "--show", "-f", "-r", "--direct-io=on", self.image).strip()
        try: sh("mount", "-o", "ro", device, self.at)
        finally: sh("losetup", "-d", device)  # when it is unmounted
        return self.at
    def __exit__(self, *_): sh("umount", "-l", self.at, check=False)

def config(a, at, tiers=(), more=""):
    at.mkdir(parents=True, exist_ok=True); path = at / "hearth.toml"
    path.write_text(more + "".join(f'[[tier]]\npath = "{tier}"\n' for tier in tiers))
    return [a.hearth, "--config", path, "--store", at / "store"]

def read_all(dir, row, begun):
    """4 KiB in the midst of a shard, then all of them; seconds since `begun`."""
    shards = sorted(p for p in dir.rglob("*") if p.is_file() and p.stat().st_size > 100 * PIECE)
    with open(shards[0], "rb", buffering=0) as f: os.pread(f.fileno(), 4096, f.seek(0, 2) // 2)
    row["first"] = time.monotonic() - begun
    buf = bytearray(PIECE)
    for shard in shards:
        with open(shard, "rb", buffering=0) as f:
            while f.readinto(buf): pass
    row["all"] = time.monotonic() - begun

# ---- images --------------------------------------------------------------------------------------------------------

def image(a, at, row, tier):
    name, (_, chain), served = f"{a.registry.host}/{a.image}", a.about, []
    with contextlib.ExitStack() as bed:
        if tier:
            drop(); begun = time.monotonic()
            disk = bed.enter_context(Disk(a.disk, at / "disk"))
            row["attach"] = time.monotonic() - begun
            run = config(a, at, [disk])
            bed.callback(unmount, at)
            served = [Served(at / "cd", [*run, "snapshotter", "--address", at / "cd/s.sock", "--root", at / "cd/snapshots"])]
            mirror = subprocess.Popen(list(map(str, [*run, "mirror"])), stderr=subprocess.DEVNULL)
            bed.callback(lambda: (mirror.terminate(), mirror.wait()))
        c = Containerd(at / "cd", "hearth" if tier else None, cri=True, certs=a.certs if tier else None)
        try:
            c.wait_cri(); drop()
            if tier: a.registry.close()
            with Step(row, "pull"): c.cri_pull(name)
            with Step(row, "mount"): c.mount(chain, at / "m", "-n", "k8s.io")
            row["ready"] = row["pull"] + row["mount"] + row.get("attach", 0)
            with Step(row, "start"):
                sh(*c.ctr("-n", "k8s.io", "run", "--rm", "--snapshotter", c.plugin or "overlayfs", name, "c1", *a.cmd.split()))
            sh("umount", at / "m")
        finally:
            if tier: a.registry.start()
            c.close()
            for s in served: s.close()

# ---- models --------------------------------------------------------------------------------------------------------

def model_tier(a, at, row):
    drop(); begun = time.monotonic()
    with Disk(a.model_disk, at / "disk") as disk:
        row["attach"] = time.monotonic() - begun
        run, dir = config(a, at, [disk]), at / "m"; dir.mkdir()
        try:
            sh(*run, "mount", a.reference, dir, env=a.env); read_all(dir, row, begun)
        finally: sh(*run, "umount", dir, "--lazy", check=False)

def model_cp(a, at, row):
    drop(); begun = time.monotonic()
    with Disk(a.model_disk, at / "disk") as disk:
        row["attach"] = time.monotonic() - begun
        sh("cp", "-r", disk / "objects", at / "copy"); read_all(at / "copy", row, begun)

def model_warm(a, at, row):
    drop(); begun, run, dir = time.monotonic(), config(a, at), at / "m"; dir.mkdir()
    sh(*run, "warm", a.reference, env=a.env)
    row["warm"] = time.monotonic() - begun
    try:
        sh(*run, "mount", a.reference, dir, env=a.env); read_all(dir, row, begun)
    finally: sh(*run, "umount", dir, "--lazy", check=False)

# ---- bake ----------------------------------------------------------------------------------------------------------

def mb(dir): return int(sh("du", "-s", "-B1", dir).split()[0]) / 1e6

def bake(a, at, row, ours):
    name = f"{a.registry.host}/{a.image}"; at.mkdir(parents=True, exist_ok=True); drop()
    if ours:
        with Step(row, "all"): sh(*config(a, at), "bake", f"oci://{name}", "--output", at / "out"); sh("sync", "-f", at)
        row["mb"] = mb(at / "out")
    else:
        with Step(row, "all"):
            sh("skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", f"docker://{name}", f"oci:{at}/oci:x")
            sh("umoci", "unpack", "--image", f"{at}/oci:x", at / "out"); sh("sync", "-f", at)
        row["mb"] = mb(at / "out/rootfs")

# ---- opening -------------------------------------------------------------------------------------------------------

def tier_of(a, at, count):
    """A tier of so many objects, as it is on the disk: those of an artifact, which is looked up, and others."""
    if at.exists(): return at
    making, files, known = at.with_suffix(".making"), at.with_suffix(".files"), min(count, 1000)
    for dir in (making, files): shutil.rmtree(dir, ignore_errors=True)
    files.mkdir()
    for n in range(known): (files / str(n)).write_text(str(n))
    sh(*config(a, at.with_suffix(".baker")), "bake", f"file://{files}", "--output", making)
    for shard in range(256): (making / f"objects/sha256/{shard:02x}").mkdir(parents=True, exist_ok=True)
    for n in range(known, count):
        name = hashlib.sha256(str(n).encode()).hexdigest()
        os.close(os.open(making / "objects/sha256" / name[:2] / name, os.O_CREAT | os.O_WRONLY, 0o444))
    making.rename(at)
    return at

def opening(a, at, row, count):
    run = config(a, at, [tier_of(a, a.base / f"tier-{count}", count)] if count else [])
    shown = sh(*run, "list"); drop()
    assert ("file://" in shown) == bool(count), shown
    for key in ("cold ms", "again ms"):
        begun = time.monotonic(); sh(*run, "list"); row[key] = (time.monotonic() - begun) * 1000
    # Of a child of a small process: exec leaves the peak of who was there before.
    sh("/usr/bin/time", "-f", "%M", "-o", at / "peak", *run, "list")
    row["rss"] = int((at / "peak").read_text()) / 1024

CASES = {
    "image-containerd": functools.partial(image, tier=False), "image-tier": functools.partial(image, tier=True),
    "model-tier": model_tier, "model-cp": model_cp, "model-warm": model_warm,
    "bake-hearth": functools.partial(bake, ours=True), "bake-umoci": functools.partial(bake, ours=False),
    "open-none": functools.partial(opening, count=0), "open-1k": functools.partial(opening, count=1000),
    "open-100k": functools.partial(opening, count=100_000), "open-500k": functools.partial(opening, count=500_000),
}

def sizes(a, images):
    """Several images together, beside the sum of what each unpacks to."""
    at, total = a.base / "sizes", 0
    references = [f"oci://{a.registry.host}/{image}" for image in images]
    sh(*config(a, at), "bake", *references, "--output", at / "out")
    for image in images:
        sh("skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", f"docker://{a.registry.host}/{image}", f"oci:{at}/oci:x")
        sh("umoci", "unpack", "--image", f"{at}/oci:x", at / "one"); total += mb(at / "one/rootfs")
        shutil.rmtree(at / "one"); shutil.rmtree(at / "oci")
    print(f"{len(images)} images: {mb(at / 'out'):.0f} MB baked, {total:.0f} MB unpacked")

def show(rows):
    for name, found in rows.items():
        if not found: continue
        cells = []
        for key in [key for key in found[0] if not key.endswith("cpu")]:
            v = [row[key] for row in found]
            cells.append(f"{key} {statistics.median(v):.3g} [{min(v):.3g}-{max(v):.3g}]")
        print(f"{name} (n = {len(found)}): " + ", ".join(cells))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("image"); p.add_argument("cases", nargs="*", metavar="case"); p.add_argument("-n", type=int, default=5)
    p.add_argument("--cmd", default="python3 /app/main.py"); p.add_argument("--hearth", default="target/release/hearth")
    p.add_argument("--data", default=BED / "data/registry", help="the registry's files"); p.add_argument("--model", default="m4g")
    p.add_argument("--dir", default=None, help="where everything is put (a disk, not tmpfs)")
    p.add_argument("--sizes", nargs="+", metavar="IMAGE", help="images to bake together, once, and nothing else")
    a = p.parse_intermixed_args(); names = a.cases or list(CASES)
    if wrong := [name for name in names if name not in CASES]: p.error(f"no case {', '.join(wrong)}; there are {', '.join(CASES)}")
    a.hearth, base = Path(a.hearth).resolve(), Path(tempfile.mkdtemp(prefix="hearth-tiers-", dir=a.dir))
    a.base, rows = base, {name: [] for name in names}
    with contextlib.ExitStack() as bed:
        bed.callback(shutil.rmtree, base, ignore_errors=True)
        a.registry = Registry(a.data, base); bed.callback(a.registry.close)
        if a.sizes: return sizes(a, a.sizes)
        a.certs = base / "certs"; hosts = a.certs / a.registry.host; hosts.mkdir(parents=True)
        hosts.joinpath("hosts.toml").write_text('[host."http://127.0.0.1:5700"]\ncapabilities = ["pull", "resolve"]\n')
        a.about, images = a.registry.about(a.image), any(name.startswith("image") for name in names)
        a.env, a.disk, a.model_disk = dict(ENV), base / "disk", base / "model"
        def make(disk, reference):
            print("baking", reference, file=sys.stderr)
            sh(*config(a, base / "baker"), "bake", reference, "--output", disk, "--format", "erofs", env=a.env)
        if images: make(a.disk, f"oci://{a.registry.host}/{a.image}")
        if any(name.startswith("model") for name in names):
            origin = bed.enter_context(Origin())
            a.env |= {"AWS_ENDPOINT_URL": origin.s3}; a.reference = f"s3://models/{a.model}/"
            make(a.model_disk, a.reference)
        for i in range(a.n):
            for name in random.Random(i).sample(names, len(names)):
                at, row = base / f"{name}{i}", {}
                at.mkdir(); CASES[name](a, at, row); shutil.rmtree(at, ignore_errors=True)
                rows[name].append(row)
                with open("tiers.jsonl", "a") as out: out.write(json.dumps({"case": name, **row}) + "\n")
                print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    show(rows)

main()
