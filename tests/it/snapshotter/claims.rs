//! Layers that the node serves.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::Duration,
};

use async_trait::async_trait;
use hearth::{
    digest::Digest,
    snapshotter::{Hints, Root, RootsError, RootsErrorKind, Usage},
};
use parking_lot::Mutex;

use super::*;

/// A node that knows some chains; it counts what is mounted.
#[derive(Default)]
struct Node {
    known: Mutex<HashSet<Digest>>,
    mounted: Mutex<BTreeMap<Digest, u32>>,
    hints: Mutex<Option<Hints>>,
    down: Mutex<bool>,
    forgotten: Mutex<Vec<Digest>>,
    /// What is to stay, as it was said at the start: claims, and mounts.
    swept: Mutex<Option<(BTreeSet<Digest>, BTreeSet<Digest>)>>,
    /// What [`Roots::knows`] was said of and [`Roots::forget`] not since; each takes a moment.
    pinned: Mutex<HashSet<Digest>>,
}

/// Lets others go on in between.
const MOMENT: Duration = Duration::from_millis(1);

impl Node {
    fn knowing(chains: &[Digest]) -> Arc<Self> {
        let node = Self::default();
        node.known.lock().extend(chains);
        Arc::new(node)
    }

    fn mounted(&self) -> Vec<Digest> {
        self.mounted.lock().keys().copied().collect()
    }

    /// Waits until exactly these are mounted.
    async fn wait_for(&self, chains: &[Digest]) {
        for _ in 0..6000 {
            if self.mounted() == chains {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("mounted: {:?}", self.mounted());
    }
}

#[async_trait]
impl Roots for Node {
    async fn knows(&self, chain: &Digest, hints: &Hints) -> Result<bool, RootsError> {
        *self.hints.lock() = Some(hints.clone());
        match *self.down.lock() {
            true => {
                return Err(RootsError::new(
                    RootsErrorKind::Unavailable,
                    "no route to registry",
                ));
            }
            false if self.known.lock().contains(chain) => {}
            false => return Ok(false),
        }
        self.pinned.lock().insert(*chain);
        tokio::time::sleep(MOMENT).await;
        Ok(true)
    }

    async fn root(&self, chain: &Digest, hints: &Hints) -> Result<Root, RootsError> {
        *self.hints.lock() = Some(hints.clone());
        if *self.down.lock() {
            return Err(RootsError::new(
                RootsErrorKind::Unavailable,
                "no route to registry",
            ));
        }
        *self.mounted.lock().entry(*chain).or_default() += 1;
        let dir = PathBuf::from(format!("/node/{}", &chain.hex()[..8]));
        Ok(Root {
            dir,
            contents: Vec::new(),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        })
    }

    async fn release(&self, chain: &Digest) {
        let before = self.mounted.lock().remove(chain);
        assert!(before.is_some(), "released what was not mounted");
    }

    async fn forget(&self, chain: &Digest) {
        self.forgotten.lock().push(*chain);
        tokio::time::sleep(MOMENT).await;
        self.pinned.lock().remove(chain);
    }

    async fn sweep(&self, claimed: &BTreeSet<Digest>, used: &BTreeSet<Digest>) {
        *self.swept.lock() = Some((claimed.clone(), used.clone()));
    }

    async fn usage(&self, _: &Digest) -> Result<Usage, RootsError> {
        Ok(Usage {
            bytes: 1234,
            inodes: 5,
        })
    }
}

fn chain(n: u8) -> Digest {
    Digest::of(&[n])
}

impl Bed {
    /// As containerd unpacks: what it would call the layer is in a label.
    async fn unpack(&self, key: &str, parent: &str, target: Digest) -> Code {
        let target = target.to_string();
        let with = [
            ("containerd.io/snapshot.ref", &*target),
            (
                "containerd.io/snapshot/cri.image-ref",
                "registry.example/app:1",
            ),
        ];
        match self.prepare_with(key, parent, &with).await {
            Ok(_) => Code::Ok,
            Err(status) => status.code(),
        }
    }

    /// What containerd looks for after ALREADY_EXISTS.
    async fn target(&self, target: Digest, parent: &str) -> Vec<String> {
        let filter = format!(r#"labels."containerd.io/snapshot.ref"=={target},parent=="{parent}""#);
        self.list(&[&filter]).await.unwrap()
    }
}

#[tokio::test]
async fn known_layers_are_claimed_and_give_one_lower_directory() {
    let node = Node::knowing(&[chain(1), chain(2)]);
    let mut bed = Bed::with(node.clone()).await;
    // Bottom up; the third one is not known and is unpacked the ordinary way.
    assert_eq!(
        bed.unpack("ns/1/x", "", chain(1)).await,
        Code::AlreadyExists
    );
    let one = bed.target(chain(1), "").await;
    assert_eq!(one, [chain(1).to_string()]);
    let info = bed.stat(&one[0]).await.unwrap();
    assert_eq!((info.kind(), &*info.parent), (api::Kind::Committed, ""));
    assert_eq!(
        info.labels["containerd.io/snapshot/remote"],
        "remote snapshot"
    );
    assert_eq!(
        bed.unpack("ns/2/x", &one[0], chain(2)).await,
        Code::AlreadyExists
    );
    let two = bed.target(chain(2), &one[0]).await;
    let hints = node.hints.lock().clone().unwrap();
    assert_eq!(hints.namespace.as_deref(), Some("testsuite"));
    assert_eq!(hints.image.as_deref(), Some("registry.example/app:1"));
    assert!(node.mounted().is_empty(), "nothing is mounted for a claim");
    assert_eq!(code(bed.stat("ns/1/x").await), Code::NotFound);
    assert_eq!(bed.dirs(), 0);

    assert_eq!(bed.unpack("ns/3/x", &two[0], chain(3)).await, Code::Ok);
    assert_eq!(node.mounted(), [chain(2)], "to unpack upon");
    bed.commit("ns/4/three", "ns/3/x").await.unwrap();
    assert!(node.mounted().is_empty());

    let mounts = bed.prepare("ns/5/container", "ns/4/three").await.unwrap();
    let lower = mounts[0].options.last().unwrap();
    let tree = format!("/node/{}", &chain(2).hex()[..8]);
    let own = bed.root().join("s/3/fs");
    assert_eq!(lower, &format!("lowerdir={}:{tree}", own.display()));
    let view = bed.view("ns/6/view", &two[0]).await.unwrap();
    assert_eq!(shown(&view), format!("bind {tree} ro,rbind"));
    assert_eq!(bed.usage(&two[0]).await.unwrap(), (1234, 5));
    assert_eq!(node.mounted(), [chain(2)]);
    bed.remove("ns/6/view").await.unwrap();
    assert_eq!(
        node.mounted(),
        [chain(2)],
        "the container still stands on it"
    );

    // A new process: the tree is asked for again.
    let after = Node::knowing(&[chain(1), chain(2)]);
    bed.restart(after.clone()).await;
    after.wait_for(&[chain(2)]).await;
    assert_eq!(bed.mounts("ns/5/container").await.unwrap(), mounts);
    bed.remove("ns/5/container").await.unwrap();
    assert!(after.mounted().is_empty());
    for name in ["ns/4/three", &two[0], &one[0]] {
        bed.remove(name).await.unwrap();
    }
    assert_eq!(*after.forgotten.lock(), [chain(2), chain(1)]);
    bed.cleanup().await;
    assert_eq!(bed.dirs(), 0);
}

#[tokio::test]
async fn namespaces_share_claims_and_parents_that_were_unpacked_do_not_clash() {
    let node = Node::knowing(&[chain(2)]);
    let bed = Bed::with(node.clone()).await;
    // In one namespace the first layer was unpacked before hearth knew the image.
    assert_eq!(bed.unpack("a/1/x", "", chain(1)).await, Code::Ok);
    bed.commit("a/2/one", "a/1/x").await.unwrap();
    assert_eq!(
        bed.unpack("a/3/x", "a/2/one", chain(2)).await,
        Code::AlreadyExists
    );
    let upon_own = bed.target(chain(2), "a/2/one").await;
    // In others it was not.
    node.known.lock().insert(chain(1));
    for namespace in ["b", "c"] {
        let key = |n: u32| format!("{namespace}/{n}/x");
        assert_eq!(bed.unpack(&key(1), "", chain(1)).await, Code::AlreadyExists);
        let one = bed.target(chain(1), "").await;
        assert_eq!(one.len(), 1);
        let code = bed.unpack(&key(2), &one[0], chain(2)).await;
        assert_eq!(code, Code::AlreadyExists);
        let two = bed.target(chain(2), &one[0]).await;
        assert!(two.len() == 1 && two != upon_own, "{two:?}");
        bed.prepare(&key(3), &two[0]).await.unwrap();
    }
    let mounts = bed.prepare("a/4/container", &upon_own[0]).await.unwrap();
    let lower = mounts[0].options.last().unwrap();
    assert!(!lower.contains(':'), "the tree has all layers: {lower}");
    assert_eq!(node.mounted(), [chain(2)]);
    for key in ["a/4/container", "b/3/x", "c/3/x"] {
        assert_eq!(node.mounted(), [chain(2)]);
        bed.remove(key).await.unwrap();
    }
    assert!(node.mounted().is_empty());

    // Claimed twice, upon two parents: it is given back with the last.
    let second = bed.target(chain(2), &chain(1).to_string()).await;
    bed.remove(&upon_own[0]).await.unwrap();
    assert_eq!(*node.forgotten.lock(), []);
    bed.remove(&second[0]).await.unwrap();
    assert_eq!(*node.forgotten.lock(), [chain(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_claimed_stays_pinned_whoever_gives_it_back_meanwhile() {
    let node = Node::knowing(&[chain(1)]);
    let bed = Bed::with(node.clone()).await;
    let name = chain(1).to_string();
    for round in 0..50 {
        let claim = bed.unpack("a/1/x", "", chain(1));
        if round == 0 {
            claim.await;
            continue;
        }
        let (claimed, _) = tokio::join!(claim, bed.remove(&name));
        assert_eq!(claimed, Code::AlreadyExists);
        let is_claimed = bed.list(&[]).await.unwrap() == [&*name];
        let is_pinned = node.pinned.lock().contains(&chain(1));
        assert!(is_pinned || !is_claimed, "round {round}");
    }
}

#[tokio::test]
async fn the_node_hears_what_is_to_stay_unless_that_is_not_known() {
    let mut bed = Bed::with(Node::knowing(&[chain(1), chain(2)])).await;
    bed.unpack("a/1/x", "", chain(1)).await;
    let (one, two) = (chain(1).to_string(), chain(2).to_string());
    bed.unpack("a/2/x", &one, chain(2)).await;
    bed.prepare("a/3/container", &two).await.unwrap();
    let after = Node::knowing(&[]);
    bed.restart(after.clone()).await;
    let (claimed, used) = after.swept.lock().take().unwrap();
    assert_eq!(claimed, [chain(1), chain(2)].into());
    assert_eq!(used, [chain(2)].into());
    bed.stop().await;
    // Whose record is damaged may need anything.
    let record = bed.root().join("m/1");
    std::fs::write(record, "damaged").unwrap();
    let (_, stop, serving) = start(bed.dir.path(), after.clone()).await;
    assert_eq!(*after.swept.lock(), None);
    drop(stop);
    serving.await.unwrap();
}

#[tokio::test]
async fn a_node_that_cannot_say_leaves_it_to_containerd_and_lost_roots_are_errors() {
    let node = Node::knowing(&[chain(1)]);
    let mut bed = Bed::with(node.clone()).await;
    *node.down.lock() = true;
    assert_eq!(bed.unpack("a/1/x", "", chain(1)).await, Code::Ok);
    bed.remove("a/1/x").await.unwrap();
    *node.down.lock() = false;
    assert_eq!(bed.unpack("a/2/x", "", chain(1)).await, Code::AlreadyExists);
    *node.down.lock() = true;
    let name = chain(1).to_string();
    let failed = bed.prepare("a/3/container", &name).await.unwrap_err();
    assert_eq!(failed.code(), Code::Unavailable);
    for part in ["a/3/container", "registry.example/app:1", &name, "no route"] {
        assert!(failed.message().contains(part), "{failed}");
    }
    assert_eq!(code(bed.stat("a/3/container").await), Code::NotFound);
    *node.down.lock() = false;
    bed.prepare("a/3/container", &name).await.unwrap();

    // An agent without that node: the container cannot be mounted, but can be removed.
    bed.restart(Arc::new(NoRoots)).await;
    let failed = bed.mounts("a/3/container").await.unwrap_err();
    assert_eq!(failed.code(), Code::FailedPrecondition);
    assert!(failed.message().contains("does not know"), "{failed}");
    bed.remove("a/3/container").await.unwrap();
    bed.remove(&name).await.unwrap();
}

/// What a process before had mounted may be taken over later than it is asked for.
#[tokio::test]
async fn a_root_that_is_not_back_at_once_has_its_user_all_the_same() {
    let mut bed = Bed::with(Node::knowing(&[chain(1)])).await;
    bed.unpack("a/1/x", "", chain(1)).await;
    let name = chain(1).to_string();
    bed.prepare("a/2/container", &name).await.unwrap();
    let after = Node::knowing(&[chain(1)]);
    *after.down.lock() = true;
    bed.restart(after.clone()).await;
    while after.hints.lock().is_none() {
        tokio::task::yield_now().await;
    }
    assert!(after.mounted().is_empty());
    *after.down.lock() = false;
    bed.prepare("a/3/container", &name).await.unwrap();
    bed.remove("a/3/container").await.unwrap();
    assert_eq!(after.mounted(), [chain(1)], "the first stands on it");
    bed.remove("a/2/container").await.unwrap();
    assert!(after.mounted().is_empty());
}

#[tokio::test]
async fn views_and_wrong_targets_are_never_claimed() {
    let bed = Bed::with(Node::knowing(&[chain(1)])).await;
    let target = chain(1).to_string();
    let with = [("containerd.io/snapshot.ref", &*target)];
    let request = api::ViewSnapshotRequest {
        key: "view".into(),
        labels: labels(&with),
        ..Default::default()
    };
    bed.client.clone().view(request).await.unwrap();
    let other = [("containerd.io/snapshot.ref", "sha512:00")];
    bed.prepare_with("x", "", &other).await.unwrap();
    let missing = bed.unpack("y", "no-parent", chain(1)).await;
    assert_eq!(missing, Code::NotFound);
    assert_eq!(bed.list(&["kind==committed"]).await.unwrap(), [""; 0]);
}

/// Many at once: one claim, one mount, and nothing left when all are gone.
#[tokio::test(flavor = "multi_thread")]
async fn containers_that_come_and_go_at_once_leave_nothing_mounted() {
    let node = Node::knowing(&[chain(1)]);
    let bed = Bed::with(node.clone()).await;
    let claims = (0..16).map(|n| {
        let bed = &bed;
        async move { bed.unpack(&format!("a/{n}/x"), "", chain(1)).await }
    });
    let codes = futures_util::future::join_all(claims).await;
    assert!(codes.iter().all(|c| *c == Code::AlreadyExists), "{codes:?}");
    let name = chain(1).to_string();
    assert_eq!(bed.list(&[]).await.unwrap(), [&*name]);
    let lives = (0..16).map(|n| {
        let (bed, name) = (&bed, &name);
        async move {
            let key = format!("a/{n}/container");
            for _ in 0..5 {
                bed.prepare(&key, name).await.unwrap();
                bed.mounts(&key).await.unwrap();
                bed.remove(&key).await.unwrap();
            }
        }
    });
    futures_util::future::join_all(lives).await;
    assert!(node.mounted().is_empty());
}
