#!/usr/bin/env python3
"""Makes the large image of tests/real, as an OCI layout: Debian and Python packages in gzip layers, with what a real
image does in them (whiteouts, opaque directories, hard links, file capabilities, files replaced).

usage: image.py DIR    DIR holds it if DIR/recipe is this file's digest; else it is made (some minutes, network)

As root on Debian 12 with mmdebstrap, pip (of the Python this runs in), pigz, igzip, setcap, setfattr. Its program is
/app/main.py: it imports TensorFlow, computes, and prints a digest of every Python source that it has loaded."""
import concurrent.futures, hashlib, json, os, platform, shutil, subprocess, sys
from pathlib import Path

TENSORFLOW = {"x86_64": "tensorflow-cpu"}.get(platform.machine(), "tensorflow")
PACKAGES = {  # a layer each; versions are all here, so that the image is what it was
    "basics": "absl-py==2.5.1 astunparse==1.6.3 certifi==2026.10.18 charset-normalizer==3.5.2 flatbuffers==25.12.19 "
        "gast==0.7.0 google-pasta==0.2.0 idna==3.20 namex==0.1.0 opt-einsum==3.4.0 packaging==26.3 requests==2.34.2 "
        "setuptools==84.2.1 six==1.17.0 termcolor==3.3.0 typing-extensions==4.16.0 urllib3==2.8.0 wheel==0.48.0 wrapt==2.5.2",
    "numpy": "numpy==2.4.6 ml-dtypes==0.6.0 h5py==3.14.0",
    "grpc": "grpcio==1.85.1 protobuf==7.36.2",
    "pandas": "pandas==3.1.1 python-dateutil==4.0.0 tzdata==2026.6",
    "clang": "libclang==18.1.1",
    "keras": "keras==3.15.1 optree==0.20.0 rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 pygments==2.21.0",
    "tensorflow": f"{TENSORFLOW}==2.21.0",
}
SITE = "usr/local/lib/python3.11/dist-packages"
MAIN = '''import hashlib, sys
import tensorflow as tf
print("tensorflow", tf.__version__, int(tf.reduce_sum(tf.constant([1, 2, 3]) ** 2)))
files = sorted(f for f in (getattr(m, "__file__", None) for m in list(sys.modules.values())) if f and f.endswith(".py"))
seen = hashlib.sha256()
for name in files:
    with open(name, "rb") as file:
        seen.update(name.encode() + b"\\0" + hashlib.sha256(file.read()).digest())
print(len(files), "sources", seen.hexdigest())
'''
SYSTEM = r'''
mkdir -p usr/share/doc usr/local/bin usr/local/share var/cache/apt etc
touch usr/share/doc/.wh..wh..opq var/cache/apt/.wh..wh..opq usr/share/.wh.man usr/share/.wh.locale
printf 'documentation is elsewhere\n' > usr/share/doc/README
install -m 4755 /bin/true usr/local/bin/root-true; ln usr/local/bin/root-true usr/local/bin/root-true-too
install -m 0755 /bin/true usr/local/bin/net-true; setcap cap_net_raw,cap_net_bind_service+ep usr/local/bin/net-true
printf 'hello' > usr/local/share/attributes; setfattr -n user.hearth -v layer usr/local/share/attributes
truncate -s 40M usr/local/share/sparse; printf end | dd of=usr/local/share/sparse bs=1 seek=41943037 conv=notrunc status=none
mkfifo usr/local/share/fifo; ln -s ../share/sparse usr/local/bin/to-sparse
install -d -m 1777 -o 65534 -g 65534 srv/scratch; touch -d '2001-02-03 04:05:06.123456789Z' usr/local/share/attributes
'''
# A tidy-up as Dockerfiles do it: headers and tests go, files are changed and linked that lie in layers below.
TIDY = r'''
mkdir -p $S/tensorflow/include $S/pandas $S/numpy $S/clang
touch $S/tensorflow/include/.wh..wh..opq $S/pandas/.wh.tests $S/numpy/.wh.f2py $S/clang/.wh.enumerations.py
printf 'no headers here\n' > $S/tensorflow/include/README
printf 'python3 /app/main.py\n' > $S/start; ln $S/start $S/start-too; chown 1000:1000 $S/start
'''

def sh(*cmd, **kw):
    done = subprocess.run([str(c) for c in cmd], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    if done.returncode: sys.exit(f"image.py: {' '.join(map(str, cmd))[:300]}: {done.returncode}\n{done.stdout[-3000:]}")

def base(work):
    sh("mmdebstrap", "--quiet", "--variant=minbase", "--include=python3", "bookworm", work / "base.tar")

def packages(work, name):
    site = work / name / SITE; site.mkdir(parents=True)
    sh(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir", "--no-deps", "--no-compile",
       "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--target", site, *PACKAGES[name].split())
    sh(sys.executable, "-m", "compileall", "-q", "-j", os.cpu_count(), "-s", work / name, "-p", "/", "--invalidation-mode", "unchecked-hash", site)

def script(work, name, text):
    (work / name).mkdir()
    sh("bash", "-euc", text, cwd=work / name, env={**os.environ, "S": SITE})

def compress(name, file):
    """Commands from a tar on stdin to gzip on `file`, of more than one kind."""
    if name == "keras": return f"igzip -1 -T 2 -c > {file}"
    if name == "numpy":  # several members
        return f"split -b 20M --filter 'pigz -1 -n -c >> {file}'"
    return f"pigz -{6 if name == 'basics' else 1} -n -c > {file}"

class Layout:
    def __init__(self, dir):
        self.blobs = dir / "blobs/sha256"; self.blobs.mkdir(parents=True)
        self.dir, self.layers, self.diff_ids, self.size = dir, [], [], 0
    def put(self, kind, data):
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}
    def add(self, name, tar):
        """Adds a layer from a command that writes its tar."""
        file, seen = self.dir / "layer", hashlib.sha256()
        source = subprocess.Popen([str(t) for t in tar], stdout=subprocess.PIPE)
        packed = subprocess.Popen(compress(name, file), shell=True, stdin=subprocess.PIPE)
        while piece := source.stdout.read(1 << 20):
            seen.update(piece); packed.stdin.write(piece); self.size += len(piece)
        packed.stdin.close()
        if source.wait() or packed.wait(): sys.exit(f"image.py: layer {name} could not be made")
        blob = hashlib.sha256()
        with open(file, "rb") as f:
            while piece := f.read(1 << 20): blob.update(piece)
        size = file.stat().st_size
        file.rename(self.blobs / blob.hexdigest())
        self.diff_ids.append("sha256:" + seen.hexdigest())
        self.layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "sha256:" + blob.hexdigest(), "size": size})
    def finish(self):
        config = {"architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()], "os": "linux",
            "config": {"Entrypoint": ["python3", "/app/main.py"], "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "PYTHONDONTWRITEBYTECODE=1", "TF_CPP_MIN_LOG_LEVEL=3"]},
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids}}
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.put("config.v1+json", json.dumps(config).encode()), "layers": self.layers}
        top = self.put("manifest.v1+json", json.dumps(manifest).encode())
        top["annotations"] = {"org.opencontainers.image.ref.name": "large"}
        (self.dir / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
        (self.dir / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))

def make(dir, recipe):
    work = dir.with_name(dir.name + ".making")
    for old in (work, dir): shutil.rmtree(old, ignore_errors=True)
    work.mkdir(parents=True)
    os.umask(0o022)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = [pool.submit(packages, work, "tensorflow"), pool.submit(base, work)]
        first += [pool.submit(packages, work, name) for name in PACKAGES if name != "tensorflow"]
        for made in first: made.result()
    script(work, "system", SYSTEM); script(work, "tidy", TIDY)
    (work / "app/app").mkdir(parents=True); (work / "app/app/main.py").write_text(MAIN)
    layout = Layout(work / "layout")
    layout.add("base", ["cat", work / "base.tar"])
    for name in ["system", *PACKAGES, "tidy", "app"]:
        layout.add(name, ["tar", "-C", work / name, "--sort=name", "--numeric-owner", "--format=pax", "--xattrs", "--xattrs-include=*",
            "--sparse", "-cf", "-", "."])
    layout.finish()
    (layout.dir / "recipe").write_text(recipe)
    layout.dir.rename(dir); shutil.rmtree(work)
    packed = sum(layer["size"] for layer in layout.layers)
    print(f"made an image of {len(layout.layers)} layers, {packed >> 20} MiB, {layout.size >> 20} MiB unpacked")

def main():
    if len(sys.argv) != 2: sys.exit(__doc__)
    dir, recipe = Path(sys.argv[1]).resolve(), hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if not (dir / "recipe").exists() or (dir / "recipe").read_text() != recipe: make(dir, recipe)

main()
