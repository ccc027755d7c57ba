//! No secret is ever shown, written, or on a command line that hearth makes.

use super::*;
use crate::hub::Stub;

const SIGNATURE: &str = "SECRETSECRETSECRET";
const PASSWORD: &str = "hunter2hunter2";

/// Runs with everything that can be said, and checks what was.
fn quiet(bed: &Bed, line: &str, secrets: &[&str]) -> Done {
    let done = bed.run(line);
    for secret in secrets {
        assert!(
            !done.out.contains(secret) && !done.err.contains(secret),
            "{line}: {done:?}"
        );
    }
    done
}

fn assert_not_kept(dir: &Path, secrets: &[&str]) {
    for file in files_below(dir) {
        // Sockets cannot be read.
        let Ok(body) = fs::read(&file) else { continue };
        for secret in secrets {
            let found = body.windows(secret.len()).any(|w| w == secret.as_bytes());
            assert!(!found, "{} holds {secret}", file.display());
        }
    }
}

#[test]
fn signatures_and_passwords_of_urls_stay_secret() {
    let bed = Bed::new();
    let web = Web::with(&format!(
        "location ~ safetensors$ {{ if ($args !~ {SIGNATURE}) {{ return 403; }} }}"
    ));
    web.model("m", 8, 1);
    let file = "m/model-00001-of-00001.safetensors";
    let port = web.server.port;
    let url = format!(
        "http://user:{PASSWORD}@127.0.0.1:{port}/{file}?X-Amz-Expires=900&X-Amz-Signature={SIGNATURE}"
    );
    let secrets = [SIGNATURE, PASSWORD];
    for line in [
        "inspect",
        "inspect --json",
        "-vv warm",
        "warm --json",
        "pin",
        "status",
        "verify",
        "-vv verify --repair",
        "unpin",
    ] {
        let done = quiet(&bed, &format!("{line} {url}"), &secrets);
        assert_eq!(done.code, Some(0), "{done:?}");
    }
    let log = fs::read_to_string(web.logs.path().join("access")).unwrap();
    assert!(log.contains(SIGNATURE), "it was used: {log}");
    // What is damaged is fetched again as it was given: without its signature it is refused.
    faults::flip(&bed.objects()[0]);
    let done = quiet(&bed, &format!("verify --repair {url}"), &secrets);
    assert!(done.out.contains("1 damaged, repaired"), "{done:?}");
    quiet(&bed, "list --json", &secrets);
    let done = quiet(
        &bed,
        &format!("-vv warm {}", url.replace("00001-of", "00009-of")),
        &secrets,
    );
    assert_eq!(done.code, Some(1));
    let bad = quiet(&bed, &format!("inspect {}&include=[", url), &secrets);
    assert_eq!(bad.code, Some(2), "{bad:?}");
    let list = bed.path("list");
    fs::write(&list, format!("{url}&include=[\n")).unwrap();
    let done = quiet(&bed, &format!("warm --from {}", list.display()), &secrets);
    assert_eq!(done.code, Some(1));

    let dir = bed.mount_dir("mnt");
    bed.ok(&format!("rm {url}"));
    web.forget();
    quiet(&bed, &format!("-vv mount --no-fill {url} {dir}"), &secrets);
    assert_same(
        &format!("{dir}/model-00001-of-00001.safetensors"),
        &web.path(file),
    );
    let log = fs::read_to_string(web.logs.path().join("access")).unwrap();
    assert!(log.contains(SIGNATURE), "it was used: {log}");
    let status = quiet(&bed, &format!("status {dir} --json"), &secrets);
    let status: Value = serde_json::from_str(&status.out).unwrap();
    let line = fs::read_to_string(format!("/proc/{}/cmdline", status["pid"])).unwrap();
    assert!(
        line.contains("mount") && secrets.iter().all(|s| !line.contains(s)),
        "{line}"
    );
    bed.ok(&format!("umount {dir}"));
    assert_not_kept(&bed.store(), &secrets);
}

#[test]
fn keys_and_tokens_stay_secret() {
    let bed = Bed::new();
    let moto = servers::moto(true);
    let stub = Stub::start(1000);
    stub.write("config.json", b"{}");
    stub.write("model.safetensors", &bytes(3, 2 << 20));
    stub.control("POST", "commit", "");
    let secrets = ["hf_SECRETTOKEN", "SECRETKEYOFAWS", "AKIDSECRETID"];
    crate::servers::set_env(&[
        ("HF_ENDPOINT", stub.server.url()),
        ("HF_TOKEN", secrets[0].into()),
        ("AWS_ENDPOINT_URL", moto.url()),
        ("AWS_SECRET_ACCESS_KEY", secrets[1].into()),
        ("AWS_ACCESS_KEY_ID", secrets[2].into()),
        ("AWS_REGION", "us-east-1".into()),
    ]);
    stub.set(&serde_json::json!({"token": secrets[0], "private": ["models/org/my-model"]}));
    let done = quiet(&bed, "-vv warm hf://org/my-model", &secrets);
    assert_eq!(done.code, Some(0), "{done:?}");
    stub.set(&serde_json::json!({"token": "another"}));
    for reference in ["hf://org/other", "s3://bucket/key", "s3://bucket/dir/"] {
        let done = quiet(&bed, &format!("-vv warm {reference}"), &secrets);
        assert_eq!(done.code, Some(1));
        assert!(
            done.err
                .contains(&format!("error: cannot resolve {reference}")),
            "{done:?}"
        );
        assert!(done.err.contains("\nhint: "), "{done:?}");
    }
    // Gated: the tree is public, the content is not, and it is said what to do.
    stub.set(&serde_json::json!({"token": null, "private": [], "gated": ["models/org/my-model"]}));
    bed.ok("rm hf://org/my-model");
    let mut warm = bed.command("-vv warm hf://org/my-model");
    let error = Done::of(warm.env_remove("HF_TOKEN")).failed(1);
    assert!(error.contains("\nhint: accept its terms"), "{error}");
    quiet(&bed, "config", &secrets);
    assert_not_kept(&bed.store(), &secrets);
}
