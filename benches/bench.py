"""hearth beside its peers, interleaved, on one machine. Run by benches/run; README.md says what each row means."""
import argparse, contextlib, hashlib, json, os, statistics, subprocess, sys, time
from bed import CACHE, COPIES, DST, MNT, MODELS, OUT, RUN, STORE, VENV, Link, Origin, data, files, size
from measure import Mount, Probe, Table, drop, fresh, interleave, run

MIB, RTT_US, LINK_MBIT = 1 << 20, 20000, 1000
GOODPUT = 1448 / 1514  # payload of a full Ethernet frame (MSS with timestamps) by its length: what TCP can carry of a link

# ---- the command lines, in one place -------------------------------------------------------------------------------

HEARTH = os.environ.get("HEARTH")
def hearth(*args): return [HEARTH, "--store", str(STORE), *map(str, args)]
def hearth_env(o): return {"AWS_ENDPOINT_URL": o.s3}
def hearth_object(path):
    """The complete object file of this content in the store."""
    with open(path, "rb") as f: h = hashlib.file_digest(f, "sha256").hexdigest()
    return STORE / "objects/sha256" / h[:2] / h
def hearth_reads(at):
    """FUSE READ requests the mount has answered."""
    out = subprocess.run(hearth("status", at, "--json"), capture_output=True, timeout=30, check=True).stdout
    return json.loads(out)["mount"]["reads"]

def at_rest(at):
    """Waits until the background fetch of the mount is through."""
    for _ in range(240):
        out = subprocess.run(hearth("status", at, "--json"), capture_output=True, timeout=30, check=True).stdout
        if json.loads(out)["complete"]: return
        time.sleep(0.5)
    raise RuntimeError("the mount does not come to rest")

def remote(o, path): return f":s3,provider=Minio,env_auth=true,endpoint='{o.s3}',force_path_style=true,list_version=2:models{path}"
RCLONE = ["rclone", "copy", "--multi-thread-streams", "8", "--multi-thread-cutoff", "64M", "--transfers", "4", "--buffer-size", "16M", "--ignore-checksum"]

def copies(o, model):
    """Bulk download of one model into an empty directory: name -> command."""
    fs, web = [f.name for f in files(model)], f"{o.web}/models/{model}"
    (RUN / "aria.txt").write_text("".join(f"{web}/{f}\n" for f in fs))
    tools = {
        "s5cmd s3": [VENV / "s5cmd", "--log", "error", "--endpoint-url", o.s3, "cp", f"s3://models/{model}/*", f"{DST}/"],
        "rclone s3": [*RCLONE, remote(o, f"/{model}"), DST],
        "aria2c x16 http": ["aria2c", "-q", "-j4", "-x16", "-s16", "-k8M", "--file-allocation=none", "-d", DST, "-i", RUN / "aria.txt"],
        "curl x4 http": f"printf '%s\\n' {' '.join(fs)} | xargs -P4 -I@ curl -sf -o {DST}/@ {web}/@",
        "cp disk": f"cp {MODELS / model}/* {DST}/",
    }
    if HEARTH: tools = {"hearth s3": hearth("warm", f"s3://models/{model}/"), "hearth http": hearth("warm", web + "/"), **tools}
    return {k: v if isinstance(v, str) else [str(x) for x in v] for k, v in tools.items()}

def mounts(o, model, fill=True):
    """A lazy mount in the foreground: name -> (command, where the model's files are below the mount)."""
    (RUN / "s3fs.pw").write_text("test:testtest"); (RUN / "s3fs.pw").chmod(0o600)
    at = {t: MNT / t for t in ("hearth", "rclone", "s3fs")}
    tools = {
        "rclone": (["rclone", "mount", remote(o, ""), at["rclone"], "--vfs-cache-mode", "full", "--cache-dir", CACHE / "rclone", "--read-only"], at["rclone"] / model),
        "s3fs": (["s3fs", "models", at["s3fs"], "-f", "-o", f"url={o.s3},use_path_request_style,use_cache={CACHE}/s3fs,passwd_file={RUN}/s3fs.pw,ro"], at["s3fs"] / model),
    }
    if HEARTH: tools = {"hearth": (hearth("mount", f"s3://models/{model}/", at["hearth"], "--foreground", *([] if fill else ["--no-fill"])), at["hearth"]), **tools}
    return tools
def mount(o, tools, t):
    if t != "hearth": (CACHE / t).mkdir(parents=True, exist_ok=True)
    return Mount(tools[t][0], hearth_env(o), MNT / t)

# ---- sections ------------------------------------------------------------------------------------------------------

TARGETS = []
def target(what, value, op, limit):
    if value is None: return
    ok = value <= limit if op == "<=" else value >= limit
    TARGETS.append(f"{'met   ' if ok else 'MISSED'}  {what}: {value:.3g} (wanted {op} {limit:.3g})")
def best(table, names, col):
    v = [m for t in names if (m := table.med(t, col))]
    return min(v) if v else None
def over(a, b): return a / b if a is not None and b else None

def whole(tool, model):
    """Every byte count is there; for hearth, as complete objects."""
    if not tool.startswith("hearth"):
        for f in files(model): assert (DST / f.name).stat().st_size == f.stat().st_size, f"{f.name} is not whole"
        return
    have = sorted(p.stat().st_size for p in (STORE / "objects").rglob("*") if p.is_file())
    want = sorted(f.stat().st_size for f in files(model) if f.stat().st_size > MIB)
    assert [x for x in have if x > MIB] == want, f"complete objects {have}, wanted {want}"

def bulk(o, n, model, section, without=None):
    t, tools = Table(section), copies(o, model)
    tools.pop(without, None)
    def one(name):
        fresh(); drop(); time.sleep(0.3)
        row = run(tools[name], hearth_env(o))
        whole(name, model)
        t.add(name, **row, mbs=size(model) / row["wall"] / 1e6)
    interleave(n, tools, one, t)
    return t
BULK = {"wall": ".2f", "+sync": ".2f", "mbs": ".0f", "cpu": ".2f", "rss": ".0f", "machine": ".1f"}
PEERS = ["s5cmd s3", "rclone s3", "aria2c x16 http", "curl x4 http"]
OURS = ["hearth s3", "hearth http"]

def models(n):
    with Origin() as o:
        t = bulk(o, n, "m4g", "models")
    big = [str(f) for f in files("m4g")]
    subprocess.run(["cat", *big], stdout=subprocess.DEVNULL, check=True)
    for _ in range(n):  # from page cache: what one verification costs
        row = run(["openssl", "dgst", "-sha256", *big])
        t.add("sha256 (openssl, 1 core)", **{k: row[k] for k in ("wall", "cpu", "rss", "machine")}, mbs=size("m4g") / row["wall"] / 1e6)
    t.show("bulk: 4 GiB, 4 shards, cold, from loopback", BULK, [(h, [*PEERS, "cp disk"], c) for h in OURS for c in ("wall", "+sync", "cpu")])
    peer, sha = best(t, PEERS, "wall"), t.med("sha256 (openssl, 1 core)", "cpu")
    fastest = next((p for p in PEERS if peer and t.med(p, "wall") == peer), None)
    for h in OURS:
        target(f"bulk {h}, wall / fastest peer ({fastest})", over(t.med(h, "wall"), peer), "<=", 1.0)
        target(f"bulk {h}, CPU / (fastest peer + one sha256)", over(t.med(h, "cpu"), (t.med(fastest, "cpu") or 0) + (sha or 0) if fastest else None), "<=", 1.0)

def cold(n):
    t = Table("mount")
    with Origin() as o:
        def first(name, at):
            with fresh_mount(o, name, "m1g", "first", at) as (m, r): return {"mount ms": m.ms, "first ms" if at == 0 else "first@600M ms": r["ms"]}
        def one(name):
            if name == "hearth warm":
                fresh(); drop(); time.sleep(0.3)
                return t.add(name, **{"load s": run(hearth("warm", "s3://models/m4g/"), hearth_env(o))["wall"]})
            if name == "no mount":  # what the loader itself takes for files that are here
                fresh()
                probe = Probe("load", *(f for f in files("m4g") if f.stat().st_size > 16 * MIB))
                drop(); r = probe()
                return t.add(name, **{"load s": r["s"], "load MB/s": r["bytes"] / r["s"] / 1e6})
            row = first(name, 0) | first(name, 600 * MIB)
            with fresh_mount(o, name, "m1g", "seq") as (m, r): row |= {"seq MB/s": size("m1g") / r["s"] / 1e6}
            with fresh_mount(o, name, "m4g", "load") as (m, r): row |= {"load s": r["s"], "load MB/s": r["bytes"] / r["s"] / 1e6, "rss": m.rss()}
            row["load cpu s"] = m.cpu
            mark = o.mark()
            with fresh_mount(o, name, "m1g", "rand", 256) as (m, r): row |= {"4K IOPS": r["iops"], "4K p50 ms": r["p50"]}
            time.sleep(0.5)
            row |= {"fetched MiB": o.sent(mark, "m1g/model.safetensors")[0] / MIB, "touched MiB": r["mib_touched"]}
            t.add(name, **row)
        names = [*mounts(o, "m1g"), "no mount", *(["hearth warm"] if HEARTH else [])]
        interleave(n, names, one, t)
    t.show("cold mount: 1 GiB file (first byte, sequential, 256 random 4K), 4 GiB model (safetensors load_file)",
           {"mount ms": ".0f", "first ms": ".1f", "first@600M ms": ".1f", "seq MB/s": ".0f", "load s": ".2f", "load MB/s": ".0f", "load cpu s": ".1f", "rss": ".0f",
            "4K IOPS": ".0f", "4K p50 ms": ".2f", "fetched MiB": ".0f", "touched MiB": ".0f"},
           [("hearth", ["rclone", "s3fs"], c) for c in ("first ms", "seq MB/s", "load s", "4K IOPS", "fetched MiB")])
    target("cold mount, load_file of 4 GiB / bulk warm", over(t.med("hearth", "load s"), t.med("hearth warm", "load s")), "<=", 1.1)
    for p in ("rclone", "s3fs"): target(f"cold mount, load_file speed / {p}", over(t.med(p, "load s"), t.med("hearth", "load s")), ">=", 1.3)
    target("cold mount, random 4K, bytes fetched / bytes of 1 MiB blocks touched", over(t.med("hearth", "fetched MiB"), t.med("hearth", "touched MiB")), "<=", 2)

@contextlib.contextmanager
def fresh_mount(o, name, model, what, *args):
    """Empty caches, a probe that is ready, a new mount, one measurement at once."""
    fresh(); (CACHE / name).mkdir()
    tools = mounts(o, model, fill=what != "rand")  # what random reads fetch, not what the background fill does
    big = [tools[name][1] / f.name for f in files(model) if f.stat().st_size > 16 * MIB]
    probe = Probe(what, *(big if what == "load" else big[:1]), *args)
    drop()
    with mount(o, tools, name) as m: yield m, probe()

def native(n):
    t, src = Table("native"), files("m1g")
    big = next(f for f in src if f.stat().st_size > 16 * MIB)
    with Origin() as o, contextlib.ExitStack() as stack:
        fresh()
        paths, tools, direct = {}, mounts(o, "m1g"), big
        if HEARTH:
            run(hearth("warm", "s3://models/m1g/"), hearth_env(o))
            direct = hearth_object(big)
            assert direct.exists(), f"no {direct} after warm"
        paths["direct"] = direct
        for name in tools:
            stack.enter_context(mount(o, tools, name))
            paths[name] = tools[name][1] / big.name
            if name != "hearth": Probe("seq", paths[name])()  # into its disk cache
        before = hearth_reads(MNT / "hearth") if HEARTH else None
        def fio(p, hot):
            out = subprocess.run(["fio", "--name=x", f"--filename={p}", "--rw=randread", "--bs=4k", "--runtime=2", "--time_based", "--readonly", "--size=1g",
                                  f"--invalidate={int(not hot)}", "--output-format=json"], capture_output=True, timeout=60, check=True).stdout
            return json.loads(out[out.index(b"{"):])["jobs"][0]["read"]["iops"]
        def rate(name, what): return size("m1g") / Probe(what, paths[name])()["s"] / 1e6
        def hot(name, what): return statistics.median(rate(name, what) for _ in range(3))
        def cold(name, what):
            probe = Probe(what, paths[name]); drop()
            return size("m1g") / probe()["s"] / 1e6
        for i in range(n):  # tools side by side within each measure: a ratio of 0.97 needs the same minute
            k = i % len(paths)
            names = list(paths)[k:] + list(paths)[:k]
            rows = {x: {} for x in paths}
            for what in ("seq", "mmap"):
                for x in names: rows[x][f"{what} cold"] = cold(x, what)
                for x in names: rate(x, what); rows[x][f"{what} hot"] = hot(x, what)
            for x in names: rows[x]["4K hot"] = fio(paths[x], True)
            for x in names: drop(); rows[x]["4K cold"] = fio(paths[x], False)
            for x in paths: t.add(x, **rows[x])
        if HEARTH:
            after = hearth_reads(MNT / "hearth")
            print(f"FUSE READ requests of hearth's mount during all of this: {after - before}")
            target("complete, FUSE READ requests", after - before, "<=", 0)
    cols = {c: ".0f" for c in ("seq cold", "seq hot", "mmap cold", "mmap hot", "4K cold", "4K hot")}
    t.show("complete 1 GiB file: MB/s sequential and mmap, random 4K IOPS (peers: from their disk cache)", cols,
           [("hearth", ["direct", "rclone", "s3fs"], c) for c in cols])
    for c in cols: target(f"complete, {c}, mount / direct", over(t.med("hearth", c), t.med("direct", c)), ">=", 0.97)

def memory(n):
    t = Table("memory")
    with Origin() as o:
        (RUN / "s5.txt").write_text("".join(f"cp s3://models/{c}/* {DST}/{c}/\n" for c in COPIES))
        tools = {
            "s5cmd, 4 x 4 GiB": [str(VENV / "s5cmd"), "--log", "error", "--endpoint-url", o.s3, "run", str(RUN / "s5.txt")],
            "rclone, 4 x 4 GiB": [*RCLONE, "--include", "/m4g-?/**", remote(o, ""), str(DST)],
        }
        if HEARTH:
            tools = {"hearth, 4 x 4 GiB": hearth("warm", *(f"s3://models/{c}/" for c in COPIES))} | {
                f"hearth, {m}": hearth("warm", f"s3://models/{m}/") for m in ("m4g", "m1g", "m256")} | tools
        def pull(name):
            fresh(); drop(); time.sleep(0.3)
            t.add(name, **run(tools[name], hearth_env(o)))
        interleave(min(n, 3), tools, pull, t)
        fresh()
        def idle(name):
            fresh(); drop()
            with mount(o, mounts(o, "m4g"), name.split(",")[0]) as m:
                subprocess.run(["ls", "-lR", str(m.at)], stdout=subprocess.DEVNULL, timeout=60)
                if name.startswith("hearth"): at_rest(m.at)
                time.sleep(5)
                t.add(name, rss=m.rss("VmRSS"))
        interleave(min(n, 3), [f"{x}, idle mount" for x in mounts(o, "m4g")], idle, t)
        fresh()
    t.show("memory: peak RSS of pulls, RSS of an idle mount", {"rss": ".0f", "wall": ".1f", "cpu": ".1f"})
    target("memory, four concurrent 4 GiB pulls, MiB", t.med("hearth, 4 x 4 GiB", "rss"), "<=", 256)
    target("memory, idle mount, MiB", t.med("hearth, idle mount", "rss"), "<=", 40)

def link(n):
    rtt = RTT_US / 1000
    with Link(LINK_MBIT, RTT_US) as l, Origin("10.77.0.2", l.NS) as o:
        t = bulk(o, n, "m1g", "link", without="cp disk")
        for rows in t.rows.values():
            for r in rows: r["% of link"] = r["mbs"] * 8 / LINK_MBIT * 100; r["% of goodput"] = r["% of link"] / GOODPUT
        f = Table("link mount")
        def one(name):
            with fresh_mount(o, name, "m1g", "first", 0) as (m, r): f.add(name, **{"mount ms": m.ms, "first ms": r["ms"]})
        interleave(n, mounts(o, "m1g"), one, f)
    t.show(f"1 GiB over {LINK_MBIT} Mbit/s, {rtt:.0f} ms round trip", {**BULK, "% of link": ".1f", "% of goodput": ".1f"}, [(h, PEERS, "wall") for h in OURS])
    f.show("the same link, cold mount", {"mount ms": ".0f", "first ms": ".1f"}, [("hearth", ["rclone", "s3fs"], "first ms")])
    for h in OURS: target(f"link {h}, % of the raw link, of which TCP can carry {GOODPUT * 100:.1f}", t.med(h, "% of link"), ">=", 95)
    target("link, first byte of a cold mount, ms", f.med("hearth", "first ms"), "<=", 2 * rtt + 5)

SECTIONS = {"models": models, "mount": cold, "native": native, "memory": memory, "link": link}

def main():
    ap = argparse.ArgumentParser(prog="benches/run", description=__doc__)
    ap.add_argument("section", nargs="*", choices=[*SECTIONS, "all"], default="all")
    ap.add_argument("-n", type=int, default=5, help="rounds (5)")
    ap.add_argument("--peers", action="store_true", help="leave hearth out")
    a = ap.parse_args()
    global HEARTH
    if a.peers: HEARTH = None
    elif not (HEARTH and os.access(HEARTH, os.X_OK)): sys.exit(f"bench: no hearth at {HEARTH}; set HEARTH or give --peers")
    else: HEARTH = os.path.abspath(HEARTH)
    want = [a.section] if isinstance(a.section, str) else a.section
    data()
    print(f"{os.cpu_count()} cores, kernel {os.uname().release}, load before we began {os.getloadavg()[0]:.1f}, n = {a.n}")
    bad = []
    for s in SECTIONS if "all" in want else want:
        began = time.monotonic()
        try: SECTIONS[s](a.n)
        except Exception as e:  # the other sections still have something to say
            print(f"{s}: FAILED: {e!r}", flush=True); bad.append(s)
        print(f"({s}: {time.monotonic() - began:.0f} s)", flush=True)
    fresh()
    if TARGETS: print("\n## targets\n\n" + "\n".join(TARGETS))
    print(f"rows: {OUT}/results.jsonl")
    if bad: sys.exit(f"failed: {', '.join(bad)}")

main()
