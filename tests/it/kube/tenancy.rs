//! Who is shown what: a node that keeps what some may have, and others may not.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use hearth::{
    daemon::{NodeWarmer, PodContent},
    fetch::{self, Engine},
    kube::{
        Content, ContentErrorKind, Wish,
        warmups::{Order, Warmer},
    },
    node::{Node, NodeError, Progress, TenancyConfig},
    reference::{Reference, Secret},
    source::{self, Credentials, Keys, SourceErrorKind, Sources},
    store::{self, ByteSize, Store},
};

use crate::scripted::{Reply, Scripted};

/// A node, and an origin that has `/open` for all and `/closed` for those who know the password.
struct Bed {
    _dir: tempfile::TempDir,
    store: Arc<Store>,
    origin: Scripted,
    node: Node,
}

impl Bed {
    async fn new(tenancy: TenancyConfig) -> Self {
        let origin = Scripted::start(|seen| {
            let closed = seen.path() == "/closed";
            // user:geheim
            let knows = seen.header("authorization") == Some("Basic dXNlcjpnZWhlaW0=");
            match closed && !knows {
                true => Reply::new("401 Unauthorized\nwww-authenticate: Basic realm=x", ""),
                false => Reply::good(seen, seen.path().as_bytes(), "\"1\""),
            }
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), &store::Config::default()).unwrap();
        let config = fetch::Config {
            patience: Duration::from_millis(100),
            ..fetch::Config::default()
        };
        let engine = Engine::new(Arc::clone(&store), config);
        let sources = Sources::new(source::Config::default());
        Self {
            node: Node::new(engine, sources).with_tenancy(tenancy),
            _dir: dir,
            store,
            origin,
        }
    }

    fn reference(&self, name: &str) -> Reference {
        self.origin.url(name).parse().unwrap()
    }

    /// What the CSI driver does before it shows something.
    async fn show(&self, namespace: &str, name: &str, keys: Option<Keys>) -> Result<(), NodeError> {
        let reference = self.reference(name);
        let keys = self.node.tenancy().keys(namespace, keys);
        let node = match &keys {
            Some(keys) => self.node.with_credentials(Credentials::new(keys.clone())),
            None => self.node.clone(),
        };
        node.guard(&reference, keys.as_ref()).await?;
        let resolved = node.resolve(&reference).await?;
        node.prove(&reference, keys.as_ref(), &resolved).await
    }

    fn wish(&self, pod: &str, namespace: &str, name: &str, keys: Option<Keys>) -> Wish {
        Wish {
            reference: self.reference(name),
            namespace: namespace.to_owned(),
            owner: hearth::kube::owner(pod),
            pin: true,
            priority: 0,
            keys,
        }
    }
}

/// What a `Warmup` asks for.
fn order(warmup: &str, wish: Wish) -> Order {
    Order {
        reference: wish.reference,
        namespace: wish.namespace,
        warmup: warmup.to_owned(),
        owner: Some(format!("warmup-{warmup}")),
        priority: 0,
        bandwidth: None,
        keys: wish.keys,
    }
}

fn password(password: &str) -> Option<Keys> {
    Some(Keys {
        basic: Some((Secret::new("user"), Secret::new(password))),
        ..Keys::default()
    })
}

fn is_denied(done: &Result<(), NodeError>) -> bool {
    matches!(done, Err(NodeError::Resolve { source, .. }) if source.kind() == SourceErrorKind::Denied)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_by_credentials_is_shown_to_who_has_some() {
    let bed = Bed::new(TenancyConfig::default()).await;
    let content = PodContent::new(bed.node.clone());
    let wish = bed.wish("p1", "ours", "/closed", password("geheim"));
    content.bring(&wish).await.unwrap();
    // It is all here, and even the record of it would do.
    assert!(is_denied(&bed.show("theirs", "/closed", None).await));
    assert!(is_denied(
        &bed.show("theirs", "/closed", password("falsch")).await
    ));
    bed.show("theirs", "/closed", password("geheim"))
        .await
        .unwrap();
    assert!(
        is_denied(&bed.show("ours", "/closed", None).await),
        "whoever has brought it"
    );
    // The next process knows that, too.
    let engine = Engine::new(Arc::clone(&bed.store), fetch::Config::default());
    let node = Node::new(engine, Sources::new(source::Config::default()));
    let bed = Bed { node, ..bed };
    assert!(is_denied(&bed.show("theirs", "/closed", None).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_brought_what_its_namespace_may_see() {
    let bed = Bed::new(TenancyConfig::default()).await;
    let content = PodContent::new(bed.node.clone());
    let ours = bed.wish("p1", "ours", "/closed", password("geheim"));
    content.bring(&ours).await.unwrap();
    for keys in [None, password("falsch")] {
        let theirs = bed.wish("p2", "theirs", "/closed", keys);
        let denied = content.bring(&theirs).await.unwrap_err();
        assert_eq!(denied.kind(), ContentErrorKind::Denied, "{denied}");
    }
    // Nor is it kept for them, or told how large it is.
    assert_eq!(content.owners().await, ["pod-p1".to_owned()].into());
    assert_eq!(bed.node.tenancy().used("theirs"), 0);
    let theirs = bed.wish("p2", "theirs", "/closed", password("geheim"));
    content.bring(&theirs).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_has_is_for_all_who_may_use_its_credentials() {
    let config = TenancyConfig {
        node_credentials: vec!["ours".to_owned()],
        ..TenancyConfig::default()
    };
    let bed = Bed::new(config).await;
    bed.show("ours", "/open", None).await.unwrap();
    bed.show("theirs", "/open", None).await.unwrap();
    bed.origin
        .now(|_| Reply::new("503 Service Unavailable", ""));
    // Nobody needs the network for it but those who have to be let in by the origin, and these have been.
    bed.show("ours", "/open", None).await.unwrap();
    bed.show("theirs", "/open", None).await.unwrap();
    let done = bed.show("theirs", "/open", password("x")).await;
    assert!(matches!(done, Err(NodeError::Resolve { .. })), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_are_per_namespace_and_given_back() {
    let config = TenancyConfig {
        quota: Some(ByteSize(8)),
        quotas: BTreeMap::from([("big".to_owned(), ByteSize(1000))]),
        ..TenancyConfig::default()
    };
    let bed = Bed::new(config).await;
    let content = PodContent::new(bed.node.clone());
    content
        .bring(&bed.wish("p1", "n", "/open", None))
        .await
        .unwrap();
    let fetched = content
        .bring(&bed.wish("p2", "n", "/open", None))
        .await
        .unwrap();
    assert_eq!((fetched.total, fetched.before), (5, 5));
    let error = content
        .bring(&bed.wish("p2", "n", "/other", None))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ContentErrorKind::NoSpace);
    assert!(
        error.to_string().contains("namespace n may keep 8 bytes"),
        "{error}"
    );
    // Nor without a pin; what fits counts while it is brought, and not after.
    let unpinned = |name: &str, namespace: &str| Wish {
        pin: false,
        ..bed.wish("p5", namespace, name, None)
    };
    let error = content.bring(&unpinned("/other", "n")).await.unwrap_err();
    assert_eq!(error.kind(), ContentErrorKind::NoSpace);
    content.bring(&unpinned("/open", "else")).await.unwrap();
    assert_eq!(bed.node.tenancy().used("else"), 0);
    content
        .bring(&bed.wish("p3", "big", "/other", None))
        .await
        .unwrap();
    let all: BTreeSet<String> = ["pod-p1", "pod-p2", "pod-p3"].map(String::from).into();
    assert_eq!(content.owners().await, all);
    for owner in ["pod-p1", "pod-p2"] {
        content.unpin(owner, &BTreeSet::new()).await;
    }
    content
        .bring(&bed.wish("p4", "n", "/other", None))
        .await
        .unwrap();
    assert_eq!(
        content.owners().await,
        ["pod-p3", "pod-p4"].map(String::from).into()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_warmup_brings_is_its_namespaces_own() {
    let config = TenancyConfig {
        quotas: BTreeMap::from([("small".to_owned(), ByteSize(4))]),
        ..TenancyConfig::default()
    };
    let bed = Bed::new(config).await;
    let warmer = NodeWarmer::new(bed.node.clone());
    let (progress, tenancy) = (Progress::default(), bed.node.tenancy());
    let warm = async |uid: &str, namespace: &str, name: &str, keys| {
        let order = order(uid, bed.wish("", namespace, name, keys));
        warmer.warm(&order, &progress).await
    };
    warm("u1", "ours", "/closed", password("geheim"))
        .await
        .unwrap();
    assert!(is_denied(&bed.show("theirs", "/closed", None).await));
    bed.show("ours", "/closed", password("geheim"))
        .await
        .unwrap();
    // It is all here, and is not shown as warm to who may not have it either.
    let denied = warm("u2", "theirs", "/closed", None).await.unwrap_err();
    assert_eq!(denied.reason, "Denied", "{denied}");

    assert_eq!(tenancy.used("ours"), 7);
    let refused = warm("u3", "small", "/open", None).await.unwrap_err();
    assert_eq!(refused.reason, "OverQuota", "{refused}");
    let once = Order {
        owner: None,
        ..order("u3", bed.wish("", "small", "/open", None))
    };
    let refused = warmer.warm(&once, &progress).await.unwrap_err();
    assert_eq!(refused.reason, "OverQuota", "{refused}");
    warm("u1", "ours", "/open", None).await.unwrap();
    assert_eq!(tenancy.used("ours"), 12);
    let keep = [bed.reference("/open")];
    warmer.release("warmup-u1", &keep).await.unwrap();
    assert_eq!(tenancy.used("ours"), 5);
    warmer.release("warmup-u1", &[]).await.unwrap();
    assert_eq!(tenancy.used("ours"), 0);
    // What was warm before this process is counted, and stays though it is too much by now.
    let kept = warmer.keep(&keep[0], "warmup-u4", "small").await;
    assert!(kept.unwrap());
    assert_eq!(tenancy.used("small"), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_public_is_not_what_came_by_credentials_later() {
    let bed = Bed::new(TenancyConfig::default()).await;
    bed.show("ours", "/open", None).await.unwrap();
    // The same generation by somebody's credentials: it stays everybody's, also without the origin.
    bed.show("ours", "/open", password("geheim")).await.unwrap();
    bed.origin
        .now(|_| Reply::new("503 Service Unavailable", ""));
    bed.show("theirs", "/open", None).await.unwrap();
    // It is closed, and changed.
    bed.origin.now(
        |seen| match seen.header("authorization") == Some("Basic dXNlcjpnZWhlaW0=") {
            true => Reply::good(seen, b"secret", "\"2\""),
            false => Reply::new("401 Unauthorized\nwww-authenticate: Basic realm=x", ""),
        },
    );
    let content = PodContent::new(bed.node.clone());
    let wish = bed.wish("p", "ours", "/open", password("geheim"));
    content.bring(&wish).await.unwrap();
    assert!(is_denied(&bed.show("theirs", "/open", None).await));
    bed.show("theirs", "/open", password("geheim"))
        .await
        .unwrap();
}
