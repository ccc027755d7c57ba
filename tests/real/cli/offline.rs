//! Starts with an origin that is down, or that refuses: what is warm is listed, mounted and read;
//! who wants more waits until there is more.

use super::*;
use crate::{
    oci_models::{Model, layouts},
    proxy::Proxy,
    pushed::Registry,
};

/// How an origin fails.
#[derive(Debug, Clone, Copy)]
enum Failing {
    Down,
    Denied,
}

fn set(proxy: &Proxy, how: Failing, failing: bool) {
    match how {
        Failing::Down => proxy.set_down(failing),
        Failing::Denied => proxy.set_denied(failing),
    }
}

/// `warm` is brought before, `lazy` only begun; `begun` is in it, and so is `absent`.
fn starts_without(
    proxy: &Proxy,
    warm: (&str, &Path),
    lazy: &str,
    begun: &str,
    absent: (&str, &[u8]),
) {
    for how in [Failing::Down, Failing::Denied] {
        let bed = Bed::new();
        let config = bed.path("config.toml");
        let text = "[fetch]\npatience_seconds = 60\n[source]\nconnect_timeout_seconds = 3\n";
        fs::write(&config, text).unwrap();
        let hasty = bed.path("hasty.toml");
        fs::write(&hasty, text.replace("60", "1")).unwrap();
        let flags = format!("--config {}", config.display());
        let dir = bed.mount_dir("mnt");
        bed.ok(&format!("{flags} warm {}", warm.0));
        bed.ok(&format!("{flags} mount --no-fill {lazy} {dir}"));
        Done::of(&mut tool("cat", &[&format!("{dir}/{begun}")])).ok();
        bed.ok(&format!("umount {dir}"));

        set(proxy, how, true);
        let list = bed.json("list --json");
        let complete = |reference: &str| {
            let list = list.as_array().unwrap();
            let found = list.iter().find(|a| a["reference"] == reference);
            found.unwrap_or_else(|| panic!("{how:?}: {reference}: {list:?}"))["complete"].clone()
        };
        assert_eq!(complete(warm.0), true);
        assert_eq!(complete(lazy), false);
        bed.ok(&format!("{flags} warm {}", warm.0));
        bed.ok(&format!("{flags} mount {} {dir}", warm.0));
        assert_same(&dir, warm.1);
        bed.ok(&format!("umount {dir}"));
        // What was never here cannot be mounted, and the error says what the origin does.
        let error = bed.fails(&format!(
            "--config {} mount {lazy}never {dir}",
            hasty.display()
        ));
        assert!(
            error.contains("127.0.0.1") && error.contains("hint: "),
            "{error}"
        );

        bed.ok(&format!("{flags} mount {lazy} {dir}"));
        Done::of(&mut tool("ls", &["-lR", &dir])).ok();
        Done::of(&mut tool("cat", &[&format!("{dir}/{begun}")])).ok();
        let sum = [
            "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())",
        ];
        let mut reader = Running::of(&mut python(sum[0], &[&format!("{dir}/{}", absent.0)]));
        std::thread::sleep(Duration::from_secs(3));
        assert!(reader.runs(), "{how:?}: {:?}", reader.done());
        set(proxy, how, false);
        let out = reader.done().ok();
        assert_eq!(
            out.trim(),
            hearth::digest::Digest::of(absent.1).hex(),
            "{how:?}"
        );
        // And so does the fetch in the background.
        let status = bed.wait_complete(&dir);
        assert_eq!(status["mount"]["errors"], 0, "{how:?}: {status}");
        bed.ok(&format!("umount {dir}"));
        bed.ok("verify --all");
    }
}

#[test]
fn without_a_web_server() {
    let web = Web::new();
    web.model("warm", 4, 1);
    web.model("lazy", 4, 2);
    let proxy = Proxy::before(web.server.port);
    let reference = |name: &str| format!("http://127.0.0.1:{}/{name}/", proxy.port);
    let absent = "model-00002-of-00002.safetensors";
    let body = fs::read(web.path("lazy").join(absent)).unwrap();
    starts_without(
        &proxy,
        (&reference("warm"), &web.path("warm")),
        &reference("lazy"),
        "config.json",
        (absent, &body),
    );
}

#[test]
fn without_a_registry() {
    let (registry, model) = (Registry::start(), Model::new());
    let made = layouts(&registry, &model);
    let port: u16 = registry.host().rsplit_once(':').unwrap().1.parse().unwrap();
    let proxy = Proxy::before(port);
    let through =
        |reference: &str| reference.replace(&format!(":{port}/"), &format!(":{}/", proxy.port));
    // Of a store of its own each: the same files would be warm already.
    let other = Model::new();
    fs::remove_file(other.dir.path().join("model.safetensors")).unwrap();
    let mut push = crate::oci_models::Push::new(
        &registry,
        "warm/raw",
        "application/vnd.cncf.model.config.v1+json",
    );
    for (path, content) in other
        .files
        .iter()
        .filter(|(path, _)| **path == "tokenizer/vocab.txt")
    {
        let media_type = "application/vnd.cncf.model.weight.v1.raw";
        push.layer(media_type, content, &[("org.cncf.model.filepath", path)]);
    }
    let warm = through(&push.done());
    let shown = tempfile::tempdir().unwrap();
    fs::create_dir(shown.path().join("tokenizer")).unwrap();
    fs::write(
        shown.path().join("tokenizer/vocab.txt"),
        &other.files["tokenizer/vocab.txt"],
    )
    .unwrap();
    let absent = "nested/weights-2.safetensors";
    starts_without(
        &proxy,
        (&warm, shown.path()),
        &through(&made[0].1),
        "config.json",
        (absent, &model.files[absent]),
    );
}
