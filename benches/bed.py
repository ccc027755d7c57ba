"""The bed: where the data lies, the origins that serve it, and the shaped link between them and us."""
import os, shutil, signal, socket, subprocess, sys, time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
BED = Path(os.environ.get("HEARTH_BENCH_BED") or Path.home() / ".cache/hearth-bench")
VENV, RUN, LOGS, OUT, S3 = BED / "venv/bin", BED / "run", BED / "logs", BED / "out", BED / "data/s3"
MODELS = S3 / "models"  # the bucket `models`
STORE, DST, MNT, CACHE = BED / "store", BED / "dst", BED / "mnt", BED / "cache"
COPIES = ["m4g-a", "m4g-b", "m4g-c", "m4g-d"]

# ---- data ----------------------------------------------------------------------------------------------------------

# A valid sharded safetensors model of incompressible bf16, in the layout `transformers` writes; same seed, same bytes.
MAKE = r'''
import json, os, sys
import numpy as np
out, shards, mib, seed = sys.argv[1], *map(int, sys.argv[2:5])
size, rng, weights, layer = 32 << 20, np.random.Generator(np.random.SFC64(seed)), {}, 0
for s in range(shards):
    name = f"model-{s + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
    head = {"__metadata__": {"format": "pt"}}
    for t in range(mib // 32):
        key = f"model.layers.{layer}.mlp.weight"
        head[key] = {"dtype": "BF16", "shape": [size // 4096, 2048], "data_offsets": [t * size, (t + 1) * size]}
        weights[key], layer = name, layer + 1
    h = json.dumps(head, separators=(",", ":")).encode()
    h += b" " * (-len(h) % 8)
    with open(f"{out}/{name}", "wb") as f:
        f.write(len(h).to_bytes(8, "little") + h)
        for _ in range(mib // 32):  # finite values only: clear the top bit of the exponent
            f.write((rng.integers(0, 1 << 64, size // 8, dtype=np.uint64) & np.uint64(0xBFFFBFFFBFFFBFFF)).data)
def put(name, v): json.dump(v, open(f"{out}/{name}", "w"))
if shards > 1: put("model.safetensors.index.json", {"metadata": {"total_size": layer * size}, "weight_map": weights})
put("config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layer})
put("tokenizer.json", {"version": "1.0", "model": {"type": "WordLevel", "vocab": {f"<t{i}>": i for i in range(32000)}, "unk_token": "<t0>"}})
put("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
'''

def data():
    """Makes what is missing; a model appears under its name only when whole."""
    for d in (RUN, LOGS, OUT, MODELS, MNT): d.mkdir(parents=True, exist_ok=True)
    for name, shards, mib, seed in (("m4g", 4, 1024, 1), ("m1g", 1, 1024, 3), ("m256", 1, 256, 2)):
        if (MODELS / name).exists(): continue
        print(f"making {name}", file=sys.stderr)
        tmp = S3 / f".{name}"
        shutil.rmtree(tmp, ignore_errors=True); tmp.mkdir()
        subprocess.run([VENV / "python", "-c", MAKE, tmp, str(shards), str(mib), str(seed)], check=True)
        tmp.rename(MODELS / name)
    for c in COPIES:  # other keys, so other objects; hard links, so no other disk blocks
        (MODELS / c).mkdir(exist_ok=True)
        for f in (MODELS / "m4g").iterdir():
            if not (MODELS / c / f.name).exists(): os.link(f, MODELS / c / f.name)

def files(model): return sorted((MODELS / model).iterdir())
def size(model): return sum(f.stat().st_size for f in files(model))

# ---- origins -------------------------------------------------------------------------------------------------------

def listings():
    """Static ListObjectsV2 answers for every prefix, and the nginx map that picks one by the query's arguments."""
    objs = sorted((str(p.relative_to(MODELS)), p.stat()) for p in MODELS.rglob("*") if p.is_file())
    out = BED / "data/s3list"
    shutil.rmtree(out, ignore_errors=True); out.mkdir(parents=True)
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    ns = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    def xml(prefix, delim):
        keys, dirs = "", set()
        for k, st in objs:
            if not k.startswith(prefix): continue
            rest = k[len(prefix):]
            if delim and "/" in rest:
                dirs.add(prefix + rest.split("/")[0] + "/"); continue
            t, n = int(st.st_mtime), st.st_size  # the etag is the one nginx gives
            keys += (f"<Contents><Key>{k}</Key><LastModified>{datetime.fromtimestamp(t, timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
                     f"<ETag>&quot;{t:x}-{n:x}&quot;</ETag><Size>{n}</Size><StorageClass>STANDARD</StorageClass></Contents>")
        ps = "".join(f"<CommonPrefixes><Prefix>{d}</Prefix></CommonPrefixes>" for d in sorted(dirs))
        return (f"{head}<ListBucketResult {ns}><Name>models</Name><Prefix>{prefix}</Prefix><KeyCount>{keys.count('<Key>') + len(dirs)}</KeyCount>"
                f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{keys}{ps}</ListBucketResult>")
    prefixes = {""} | {k[:i] for k, _ in objs for i in range(len(k) + 1) if k[i:i + 1] == "/" or k[i - 1:i] == "/" or i == len(k)} | {k + "/" for k, _ in objs}
    conf = ""
    for p in sorted(prefixes):
        for d in ("", "/"):
            name = "l_" + p.replace("/", "__") + ("_d" if d else "") + ".xml"
            (out / name).write_text(xml(p, d))
            for enc in {p, p.replace("/", "%2F")}:
                for de in {d, "%2F"} if d else {""}: conf += f'  "{de}|{enc}" "{name}";\n'
    (RUN / "s3map.conf").write_text(conf)
    (out / "loc.xml").write_text(f"{head}<LocationConstraint {ns}/>")
    (out / "empty.xml").write_text(f"{head}<ListBucketResult {ns}><Name>models</Name><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>")
    return out

NGINX = """
user root; worker_processes 2; daemon off; pid RUN/nginxTAG.master; error_log LOGS/nginxTAG.err;
events { worker_connections 1024; }
http {
  log_format b '$request_method $status $body_bytes_sent $uri $http_range';
  access_log LOGS/nginxTAG.access b;
  sendfile on; tcp_nopush on; keepalive_requests 100000; server_tokens off;
  client_body_temp_path RUN/nginxTAG-b; proxy_temp_path RUN/nginxTAG-p; fastcgi_temp_path RUN/nginxTAG-f;
  uwsgi_temp_path RUN/nginxTAG-u; scgi_temp_path RUN/nginxTAG-s;
  types {} default_type application/octet-stream; map_hash_bucket_size 256; map_hash_max_size 8192;
  map "$arg_delimiter|$arg_prefix" $list { default empty.xml; include RUN/s3map.conf; }
  map $args $answer { default $list; "~^location" loc.xml; }
  server { listen HOST:WEB; root S3ROOT; autoindex on; }
  # a read-only S3 endpoint: static listings, signatures ignored, GET, HEAD and ranges by sendfile
  server { listen HOST:S3PORT; root S3ROOT;
    location / { try_files $uri =404; }
    location = /models { default_type application/xml; root LIST; try_files /$answer =404; }
    location = /models/ { default_type application/xml; root LIST; try_files /$answer =404; }
  }
}
"""

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

class Origin:
    """nginx twice: plain HTTP with byte ranges and listings (`web`), and an S3 endpoint (`s3`)."""
    def __init__(self, host="127.0.0.1", netns=None):
        tag = f"-{netns}" if netns else ""
        web, s3 = (free_port(), free_port()) if not netns else (8080, 8081)
        self.web, self.s3, self.access = f"http://{host}:{web}", f"http://{host}:{s3}", LOGS / f"nginx{tag}.access"
        conf = NGINX
        for k, v in {"TAG": tag, "RUN": RUN, "LOGS": LOGS, "HOST": host, "S3PORT": s3, "WEB": web, "LIST": listings(), "S3ROOT": S3}.items():
            conf = conf.replace(k, str(v))
        (RUN / f"nginx{tag}.conf").write_text(conf)
        self.access.write_text("")
        ns = ["ip", "netns", "exec", netns] if netns else []
        self.proc = subprocess.Popen([*ns, "nginx", "-c", str(RUN / f"nginx{tag}.conf")], start_new_session=True, stderr=subprocess.DEVNULL)
        for _ in range(100):
            try: socket.create_connection((host, s3), 1).close(); break
            except OSError: time.sleep(0.05)
        else: raise RuntimeError(f"nginx did not come up, see {LOGS}/nginx{tag}.err")
    def mark(self): return self.access.stat().st_size
    def sent(self, mark, part=""):
        """Bytes of bodies sent since `mark` whose path contains `part`, and how many requests. Ended requests only."""
        with open(self.access) as f:
            f.seek(mark)
            rows = [l.split() for l in f]
        rows = [r for r in rows if r[0] == "GET" and part in r[3]]
        return sum(int(r[2]) for r in rows), len(rows)
    def __enter__(self): return self
    def __exit__(self, *_):
        self.proc.terminate()
        self.proc.wait(10)

class Link:
    """A network namespace behind a veth pair, 10.77.0.2: its egress shaped with tbf, the whole round-trip time added on
    the way to it (requests, acknowledgements) by delaytun, since not every kernel has netem."""
    NS = "hearth-bench"
    def __init__(self, mbit, rtt_us):
        self.mbit, self.rtt_us, self.proc = mbit, rtt_us, None
    def __enter__(self):
        def sh(c): subprocess.run(c.replace("NS", self.NS), shell=True, check=True)
        self.__exit__()
        sh("ip netns add NS && ip link add hb-host type veth peer name hb-orig netns NS")
        sh("ip addr add 10.77.0.1/24 dev hb-host && ip link set hb-host up")
        sh("ip -n NS link set lo up && ip -n NS addr add 10.77.0.2/24 dev hb-orig && ip -n NS link set hb-orig up")
        sh("ip netns exec NS sysctl -qw net.ipv4.conf.all.rp_filter=0; sysctl -qw net.ipv4.conf.hb-host.rp_filter=0")
        self.all = Path("/proc/sys/net/ipv4/conf/all/rp_filter"); self.was = self.all.read_text()
        self.all.write_text("0")
        sh(f"ip netns exec NS tc qdisc replace dev hb-orig root tbf rate {self.mbit}mbit burst 512k latency 30ms")
        self.proc = subprocess.Popen([BED / "bin/delaytun", "hb-d0", self.NS, "hb-d1", str(self.rtt_us)], start_new_session=True)
        time.sleep(0.5)
        sh("ip link set hb-d0 up && ip route replace 10.77.0.2/32 dev hb-d0 src 10.77.0.1")
        sh("ip -n NS link set hb-d1 up; ip netns exec NS sysctl -qw net.ipv4.conf.hb-d1.rp_filter=0")
        return self
    def __exit__(self, *_):
        if self.proc:
            self.proc.send_signal(signal.SIGTERM); self.proc.wait(5)
            self.all.write_text(self.was)
        if Path("/var/run/netns", self.NS).exists(): subprocess.run(["ip", "netns", "del", self.NS], check=True)
        for _ in range(20):  # the veth pair goes with the namespace, a moment later
            if not Path("/sys/class/net/hb-host").exists(): break
            time.sleep(0.1)
