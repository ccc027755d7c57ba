"""Run commands and mounts cold, look at what they cost, and print medians and ratios."""
import json, os, shutil, signal, statistics, subprocess, threading, time
from pathlib import Path
from bed import CACHE, DST, HERE, LOGS, MNT, OUT, STORE, VENV

ENV = dict(os.environ, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="testtest", AWS_REGION="us-east-1",
           AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true", AWS_ALLOW_HTTP="true", RCLONE_CONFIG="/dev/null")
for k in ("AWS_CA_BUNDLE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
    ENV.pop(k, None)  # rclone 1.60 dies on a CA bundle
STARTED, HZ = time.strftime("%FT%T"), os.sysconf("SC_CLK_TCK")

def drop():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")

def fresh(*dirs):
    for d in dirs or (DST, STORE, CACHE):
        shutil.rmtree(d, ignore_errors=True)
        d.mkdir(parents=True)

def machine_cpu():
    v = list(map(int, open("/proc/stat").readline().split()[1:9]))
    return (sum(v) - v[3] - v[4]) / HZ

def tree(pid):
    out, todo = [], [pid]
    while todo:
        p = todo.pop(); out.append(p)
        try: todo += [int(c) for t in os.listdir(f"/proc/{p}/task") for c in open(f"/proc/{p}/task/{t}/children").read().split()]
        except OSError: pass
    return out

def rss(pid, field="VmHWM"):
    """MiB, summed over the processes below `pid`. Not ru_maxrss: that one begins with the size of our own fork."""
    total = 0
    for p in tree(pid):
        try: total += next((int(l.split()[1]) for l in open(f"/proc/{p}/status") if l.startswith(field)), 0)
        except OSError: pass
    return total / 1024

def run(cmd, env=None, timeout=600):
    """wall s; the same with a final sync; CPU s and peak RSS MiB of the process tree; CPU s of the whole machine"""
    with open(LOGS / "last.err", "w+b") as err:
        cpu0, t = machine_cpu(), time.monotonic()
        p = subprocess.Popen(cmd, shell=isinstance(cmd, str), env={**ENV, **(env or {})}, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
        peak, done = [0.0], threading.Event()
        def watch():
            while not done.wait(0.05):
                peak[0] = max(peak[0], rss(p.pid))
                if time.monotonic() - t > timeout: os.killpg(p.pid, signal.SIGKILL)
        w = threading.Thread(target=watch); w.start()
        _, st, ru = os.wait4(p.pid, 0)
        wall = time.monotonic() - t
        done.set(); w.join()
        p.returncode = os.waitstatus_to_exitcode(st)
        if st:
            err.seek(0)
            raise RuntimeError(f"{cmd}: status {p.returncode}: {err.read()[-600:].decode(errors='replace')}")
        busy = machine_cpu() - cpu0
    os.sync()
    return {"wall": wall, "+sync": time.monotonic() - t, "cpu": ru.ru_utime + ru.ru_stime, "rss": peak[0], "machine": busy}

class Mount:
    """A FUSE mount by a foreground process of ours; on leaving it is unmounted, by force if need be."""
    def __init__(self, cmd, env=None, at=MNT): self.cmd, self.env, self.at = [str(c) for c in cmd], env, at
    def __enter__(self):
        self.at.mkdir(parents=True, exist_ok=True)
        self.log = open(LOGS / f"mount-{self.at.name}.log", "w")
        t = time.monotonic()
        self.proc = subprocess.Popen(self.cmd, env={**ENV, **(self.env or {})}, stdout=self.log, stderr=self.log, start_new_session=True)
        while not os.path.ismount(self.at):
            if self.proc.poll() is not None or time.monotonic() - t > 30:
                if self.proc.returncode is None: self.proc.kill(); self.proc.wait()
                raise RuntimeError(f"{self.cmd}: no mount: {Path(self.log.name).read_text()[-600:]}")
            time.sleep(0.002)
        self.ms = (time.monotonic() - t) * 1e3
        return self
    def rss(self, field="VmHWM"): return rss(self.proc.pid, field)
    def __exit__(self, *_):
        line = next((l for l in open("/proc/self/mountinfo") if l.split()[4] == str(self.at)), None)
        if subprocess.run(["umount", self.at], stderr=subprocess.DEVNULL).returncode:
            time.sleep(1)
            if subprocess.run(["umount", self.at]).returncode and line:
                try: Path(f"/sys/fs/fuse/connections/{line.split()[2].split(':')[1]}/abort").write_text("1")
                except OSError: pass
                subprocess.run(["umount", "-l", self.at])
        try: _, _, ru = wait4(self.proc, 20)
        except TimeoutError:
            self.proc.kill(); _, _, ru = os.wait4(self.proc.pid, 0)
        self.proc.returncode = 0
        self.cpu = ru.ru_utime + ru.ru_stime
        self.log.close()

def wait4(proc, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        r = os.wait4(proc.pid, os.WNOHANG)
        if r[0]: return r
        time.sleep(0.01)
    raise TimeoutError

class Probe:
    """probe.py in a child, started before the clock and the mount, so that no interpreter start is in any figure."""
    def __init__(self, *args):
        self.p = subprocess.Popen([VENV / "python", HERE / "probe.py", *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.p.stdout.readline() == "ready\n", "probe.py did not start"
    def __call__(self, timeout=300):
        try: out, _ = self.p.communicate("go\n", timeout)
        except subprocess.TimeoutExpired:
            self.p.kill()
            raise RuntimeError("a read through the mount took too long")
        if self.p.returncode: raise RuntimeError("a read through the mount failed")
        return json.loads(out)

class Table:
    """Rounds of rows; every row is also a line of $BED/out/results.jsonl."""
    def __init__(self, section):
        self.section, self.rows = section, {}
    def add(self, tool, **row):
        self.rows.setdefault(tool, []).append(row)
        with open(OUT / "results.jsonl", "a") as f:
            f.write(json.dumps({"run": STARTED, "section": self.section, "tool": tool, **row}) + "\n")
    def failed(self, tool, e):
        self.rows.setdefault(tool, [])
        print(f"  {tool}: FAILED: {e}", flush=True)
    def med(self, tool, col):
        v = [r[col] for r in self.rows.get(tool, []) if r.get(col) is not None]
        return statistics.median(v) if v else None
    def show(self, title, cols, ratios=()):
        """cols: column -> format. ratios: (hearth's row, peers' rows, column): printed as hearth / peer."""
        cells = [[""] + list(cols)]
        for tool, rows in self.rows.items():
            line = [f"{tool} (n={len(rows)})"]
            for c, f in cols.items():
                v = [r[c] for r in rows if r.get(c) is not None]
                spread = f" [{min(v):{f}}-{max(v):{f}}]" if len(v) > 1 else ""
                line.append(f"{statistics.median(v):{f}}{spread}" if v else "")
            cells.append(line)
        width = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
        print(f"\n## {title}\n")
        for i, r in enumerate(cells):
            print("| " + " | ".join(c.ljust(w) for c, w in zip(r, width)) + " |")
            if i == 0: print("|" + "|".join("-" * (w + 2) for w in width) + "|")
        print()
        for ours, peers, c in ratios:
            a = self.med(ours, c)
            parts = [f"{p} {a / b:.2f}" for p in peers if a is not None and (b := self.med(p, c))]
            if parts: print(f"{ours}, {c}, ratio to: " + ", ".join(parts))
        print(flush=True)

def interleave(n, tools, one, table):
    """n rounds over all tools, starting with another one each round; a tool that fails is left out from then on."""
    alive = list(tools)
    for i in range(n):
        k = i % max(1, len(alive))
        for t in alive[k:] + alive[:k]:
            try: one(t)
            except (RuntimeError, AssertionError, OSError) as e:
                table.failed(t, e); alive.remove(t)
