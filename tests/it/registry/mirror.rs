//! The mirror before a registry that does not let everybody in.

use std::net::SocketAddr;

use hearth::{
    fetch::{self, Engine},
    mirror,
    node::{Node, TenancyConfig},
    store::{self, Store},
};

use super::*;

/// base64 of `user:geheim` and of `user:falsch`.
const GOOD: &str = "Basic dXNlcjpnZWhlaW0=";
const WRONG: &str = "Basic dXNlcjpmYWxzY2g=";

/// A registry, a mirror before it, and what they have: one image of one layer.
struct Bed {
    _dir: TempDir,
    registry: Scripted,
    mirror: SocketAddr,
    client: reqwest::Client,
    /// Paths below `/v2/team/app/`: the tag, the manifest, the configuration, the layer.
    all: [String; 4],
}

fn answer(held: &Held, seen: &Seen) -> Reply {
    let name = seen.path().strip_prefix("/v2/team/app/");
    match name.and_then(|name| held.0.get(name)) {
        Some((_, bytes)) if seen.method == "HEAD" => Reply::good(seen, bytes, "\"x\""),
        _ => held.answer(seen),
    }
}

/// Lets in who has a token, and gives one to who knows the password.
fn closed(held: Held) -> impl Fn(&Seen) -> Reply + Send + Sync + 'static {
    move |seen| {
        let (host, sent) = (seen.header("host").unwrap(), seen.header("authorization"));
        let token = format!("Bearer {SECRET}-token");
        match seen.path() {
            "/token" if sent == Some(GOOD) => {
                let body = json!({ "token": format!("{SECRET}-token"), "expires_in": 300 });
                Reply::new("200 OK\ncontent-type: application/json", body.to_string())
            }
            "/token" => Reply::new("401 Unauthorized", ""),
            _ if sent == Some(&token) => answer(&held, seen),
            _ => Reply::new(
                &format!(
                    "401 Unauthorized\nwww-authenticate: Bearer realm=\"http://{host}/token\",service=\"reg\""
                ),
                "",
            ),
        }
    }
}

impl Bed {
    /// `knows`: whether the node itself has the password.
    async fn new(is_closed: bool, knows: bool, tenancy: TenancyConfig) -> Self {
        let mut held = Held::default();
        let image = held.image("1", "amd64", &[data(3000)]);
        let document: Value = {
            let path = format!("manifests/{}", image["digest"].as_str().unwrap());
            serde_json::from_slice(&held.0[&path].1).unwrap()
        };
        let all = [
            "manifests/1".to_owned(),
            format!("manifests/{}", image["digest"].as_str().unwrap()),
            format!("blobs/{}", document["config"]["digest"].as_str().unwrap()),
            format!(
                "blobs/{}",
                document["layers"][0]["digest"].as_str().unwrap()
            ),
        ];
        let registry = match is_closed {
            true => Scripted::start(closed(held)).await,
            false => Scripted::start(move |seen| answer(&held, seen)).await,
        };
        let mut settings = Settings::new();
        if knows {
            let entry = json!({ "username": "user", "password": SECRET });
            settings = settings.login(&registry.address.to_string(), entry);
        }
        let store = Store::open(&settings.0.path().join("store"), &store::Config::default());
        let engine = Engine::new(store.unwrap(), fetch::Config::default());
        let node = Node::new(engine, Sources::new(settings.config())).with_tenancy(tenancy);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bed = Self {
            _dir: settings.0,
            registry,
            mirror: listener.local_addr().unwrap(),
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
            all,
        };
        tokio::spawn(async move {
            let config = mirror::Config::default();
            mirror::serve(listener, node, &config, std::future::pending()).await
        });
        bed
    }

    async fn get(&self, path: &str, sent: Option<&str>) -> (u16, reqwest::header::HeaderMap) {
        let url = format!(
            "http://{}/v2/team/app/{path}?ns={}",
            self.mirror, self.registry.address
        );
        let mut request = self.client.get(url);
        if let Some(sent) = sent {
            request = request.header("authorization", sent);
        }
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body = answer.bytes().await.unwrap();
        match path.rsplit_once("sha256:") {
            Some(_) if status == 200 => assert!(path.ends_with(&digest(&body))),
            _ => assert!(!String::from_utf8_lossy(&body).contains(SECRET)),
        }
        (status, headers)
    }

    async fn all(&self, sent: Option<&str>) -> Vec<u16> {
        let mut found = Vec::new();
        for path in &self.all {
            found.push(self.get(path, sent).await.0);
        }
        found
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_closed_is_shown_to_who_is_let_in() {
    let bed = Bed::new(true, false, TenancyConfig::default()).await;
    let (status, headers) = bed.get("manifests/1", None).await;
    assert_eq!(status, 401);
    let challenge = headers["www-authenticate"].to_str().unwrap();
    assert!(challenge.starts_with("Basic realm="), "{challenge}");
    assert_eq!(bed.all(Some(GOOD)).await, [200; 4]);

    // All of it is here, and that it is helps nobody else.
    assert_eq!(bed.all(None).await, [401; 4]);
    assert_eq!(bed.all(Some(WRONG)).await, [403; 4]);
    assert_eq!(bed.all(Some("Digest x")).await, [401; 4]);
    assert_eq!(bed.all(Some("Bearer falsch")).await, [403; 4]);
    // A token of the registry's own does as well as a password.
    let token = format!("Bearer {SECRET}-token");
    assert_eq!(bed.all(Some(&token)).await, [200; 4]);

    // What a manifest names needs no answer of the registry more.
    bed.registry.take_log();
    assert_eq!(bed.all(Some(GOOD)).await, [200; 4]);
    let asked = targets(&bed.registry);
    let for_tags = |target: &String| target.ends_with("/manifests/1");
    assert!(asked.iter().all(for_tags), "{asked:?}");
    bed.registry
        .now(|_| Reply::new("503 Service Unavailable", ""));
    assert_eq!(bed.all(Some(GOOD)).await[1..], [200; 3]);
    let others = bed.all(None).await;
    assert!(others.iter().all(|status| *status >= 400), "{others:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_may_read_is_for_all_if_the_policy_says_so() {
    let bed = Bed::new(true, true, TenancyConfig::default()).await;
    assert_eq!(bed.all(None).await, [200; 4]);
    bed.registry
        .now(|_| Reply::new("503 Service Unavailable", ""));
    assert_eq!(bed.all(None).await[1..], [200; 3]);

    let policy = TenancyConfig {
        node_credentials: vec!["ours".into()],
        ..TenancyConfig::default()
    };
    let bed = Bed::new(true, true, policy.clone()).await;
    assert_eq!(bed.all(None).await, [401; 4]);
    assert_eq!(bed.all(Some(GOOD)).await, [200; 4]);
    assert_eq!(bed.all(None).await, [401; 4]);
    let open = Bed::new(false, false, policy).await;
    assert_eq!(open.all(None).await, [200; 4]);
    open.registry
        .now(|_| Reply::new("503 Service Unavailable", ""));
    assert_eq!(open.all(None).await[1..], [200; 3]);
}

/// Of another repository it is not, whatever the store holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_repository_shows_what_is_its_own() {
    let bed = Bed::new(false, false, TenancyConfig::default()).await;
    assert_eq!(bed.all(None).await, [200; 4]);
    for path in &bed.all[1..] {
        let url = format!(
            "http://{}/v2/other/app/{path}?ns={}",
            bed.mirror, bed.registry.address
        );
        let answer = bed.client.get(url).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 404, "{path}");
    }
}
