#!/usr/bin/env python3
"""How long volumes take: NodePublishVolume and NodeUnpublishVolume of `hearth csi`, over its socket.

usage: csi.py [-n 1000] [--at-once 100] [--hearth PATH] [--dir DIR]

A model of small files in a directory of this machine, warm, so that its tree is known; `hearth csi` with a keeper. First
one volume (of a model nobody has mounted yet), then n volumes one after the other, then --at-once at the same time, each
with a target of its own; then all are unpublished. Figures are milliseconds. Needs root and FUSE; installs grpcio and
grpcio-tools from PyPI into its own directory."""
import argparse, concurrent.futures, json, os, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BED = Path(os.environ.get("HEARTH_BENCH_BED") or Path.home() / ".cache/hearth-bench") / "grpc"
WANT = ["grpcio==1.76.0", "grpcio-tools==1.76.0", "setuptools==80.9.0"]

def stubs():
    """The client that grpcio-tools makes of fixtures/proto/csi."""
    stamp = BED / "stamp"
    if not stamp.exists() or stamp.read_text() != repr(WANT):
        subprocess.run([sys.executable, "-m", "venv", BED], check=True)
        subprocess.run([BED / "bin/pip", "install", "-q", "--disable-pip-version-check", *WANT], check=True)
        stamp.write_text(repr(WANT))
    if not sys.executable.startswith(str(BED)): os.execv(BED / "bin/python", [BED / "bin/python", *sys.argv])
    out = BED / "gen"; out.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE.parent}/fixtures/proto/csi", f"--python_out={out}",
        f"--grpc_python_out={out}", "csi.proto"], check=True)
    sys.path.insert(0, str(out))

def show(name, times):
    t = sorted(times); at = lambda q: t[min(len(t) - 1, int(q * len(t)))]
    print(f"| {name} | {len(t)} | {statistics.median(t):.1f} | {at(.99):.1f} | {t[-1]:.1f} |")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-n", type=int, default=1000); p.add_argument("--at-once", type=int, default=100)
    p.add_argument("--hearth", default="target/release/hearth"); p.add_argument("--dir", default=None)
    a = p.parse_args(); stubs()
    import grpc, csi_pb2 as api, csi_pb2_grpc as csi
    base, hearth = Path(tempfile.mkdtemp(prefix="hearth-csi-", dir=a.dir)), Path(a.hearth).resolve()
    for m in ("warm", "other"):
        (base / m).mkdir()
        for i in range(200): (base / m / f"{i}.json").write_bytes(os.urandom(20000))
    (base / "config.toml").write_text("[csi]\nallow_files = true\n")
    run = [hearth, "--config", base / "config.toml", "--store", base / "store"]
    subprocess.run([*run, "warm", f"file://{base}/warm"], check=True, capture_output=True)
    started, pods = [], base / "pods"; pods.mkdir()
    try:
        started.append(subprocess.Popen([*run, "keeper", "--socket", base / "keeper.sock"]))
        while not (base / "keeper.sock").exists(): time.sleep(.01)
        started.append(subprocess.Popen([*run, "csi", "--endpoint", f"unix://{base}/csi.sock", "--node-id", "n", "--keeper", base / "keeper.sock"], stderr=subprocess.DEVNULL))
        channel = grpc.insecure_channel(f"unix://{base}/csi.sock"); grpc.channel_ready_future(channel).result(20)
        node, reader = csi.NodeStub(channel), api.VolumeCapability(mount={}, access_mode={"mode": "MULTI_NODE_READER_ONLY"})
        def timed(call):
            t = time.perf_counter(); call(); return (time.perf_counter() - t) * 1000
        def publish(v, model="warm"):
            (pods / v).mkdir()
            asked = api.NodePublishVolumeRequest(volume_id=v, target_path=f"{pods}/{v}/mount", volume_capability=reader, readonly=True,
                volume_context={"source": f"file://{base}/{model}"})
            return timed(lambda: node.NodePublishVolume(asked))
        def unpublish(v): return timed(lambda: node.NodeUnpublishVolume(api.NodeUnpublishVolumeRequest(volume_id=v, target_path=f"{pods}/{v}/mount")))
        print("| what | n | p50 ms | p99 ms | longest ms |\n|---|---|---|---|---|")
        show("publish, tree not known", [publish("o", "other")])
        show("publish, tree known, first of its model", [publish("f")])
        one, all = [f"v{i}" for i in range(a.n)], [f"w{i}" for i in range(a.at_once)]
        show("publish, one after the other", [publish(v) for v in one])
        with concurrent.futures.ThreadPoolExecutor(a.at_once) as pool:
            show(f"publish, {a.at_once} at once", pool.map(publish, all))
            show("unpublish, one after the other", [unpublish(v) for v in one])
            show(f"unpublish, {a.at_once} at once", pool.map(unpublish, all))
        unpublish("f"); unpublish("o")
        left = [l for l in open("/proc/self/mountinfo") if str(base) in l and "pods" in l]
        assert not left, left
        status = Path(f"/proc/{started[1].pid}/status").read_text()
        print("\nRSS of hearth csi, MiB:", {k: int(v.split()[0]) >> 10 for k, v in (l.split(":") for l in status.splitlines()) if k in ("VmHWM", "VmRSS")})
    finally:
        for one in reversed(started): one.send_signal(signal.SIGTERM); one.wait()
        subprocess.run(["rm", "-rf", "--one-file-system", base], check=True)

if __name__ == "__main__": main()
