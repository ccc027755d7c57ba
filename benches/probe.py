"""Read files and print how it went as one line of JSON. Waits for a line on stdin before the clock starts.
probe.py first PATH OFFSET | seq PATH | mmap PATH | rand PATH COUNT | load PATH..."""
import json, mmap, os, random, sys, time
what, paths = sys.argv[1], sys.argv[2:]
if what in ("load", "mmap"): import numpy as np
if what == "load":
    import ml_dtypes  # teaches numpy bf16
    from safetensors.numpy import load_file
print("ready", flush=True)
sys.stdin.readline()
out = {}
if what == "first":
    os.stat(paths[0])
    t = time.monotonic()
    fd = os.open(paths[0], os.O_RDONLY)
    assert len(os.pread(fd, 4096, int(paths[1]))) == 4096
    out["ms"] = (time.monotonic() - t) * 1e3
elif what == "seq":
    buf, n = bytearray(1 << 20), 0
    t = time.monotonic()
    fd = os.open(paths[0], os.O_RDONLY)
    while k := os.readv(fd, [buf]): n += k
    out["s"] = time.monotonic() - t
    assert n == os.fstat(fd).st_size
elif what == "mmap":  # every word, through the page tables
    t = time.monotonic()
    with open(paths[0], "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        a = np.frombuffer(m, np.uint64, len(m) // 8)
        int(a.sum())
        out["s"] = time.monotonic() - t
        del a
elif what == "rand":
    rng, count = random.Random(7), int(paths[1])
    t0 = time.monotonic()
    fd = os.open(paths[0], os.O_RDONLY)
    at = [rng.randrange(os.fstat(fd).st_size // 4096) * 4096 for _ in range(count)]
    ms = []
    for o in at:
        t = time.monotonic()
        assert len(os.pread(fd, 4096, o)) == 4096
        ms.append((time.monotonic() - t) * 1e3)
    ms.sort()
    out = {"iops": count / (time.monotonic() - t0), "p50": ms[count // 2], "p99": ms[count * 99 // 100], "mib_touched": len({o >> 20 for o in at})}
elif what == "load":
    n, t = 0, time.monotonic()
    for p in paths:
        tensors = load_file(p)
        n += sum(v.nbytes for v in tensors.values())
        del tensors
    out = {"s": time.monotonic() - t, "bytes": n}
print(json.dumps(out))
