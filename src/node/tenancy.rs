//! Who may see what: namespaces that share a node.
//!
//! Content is here once, whoever asked for it. What came by the node's own credentials, or without any, is the node's, and
//! shown to every namespace that the policy lets use them, also while the origin cannot be reached. What came by
//! credentials that somebody brought is *guarded*: it is shown only to who brings credentials that the origin has accepted
//! for it. The origin's answer is remembered for a while, in memory: never a "no", at most [`MAX_ACCEPTED`] of them, and
//! for the same credentials and the same artifact only. Quotas count the bytes of the distinct artifacts that a namespace keeps on the node.
//!
//! Called by the faces that know namespaces. What is guarded is on the disk before anything of it is; after a crash origins
//! are asked again, and who is still there is counted again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{Meaning, Node, NodeError, Resolved};
use crate::{
    digest::Digest,
    reference::Reference,
    source::Keys,
    store::{ByteSize, Store, StoreError},
};

/// Answers of origins that are remembered.
const MAX_ACCEPTED: usize = 4096;
/// All namespaces.
const ALL: &str = "*";

/// Settings: `[tenancy]` in the configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TenancyConfig {
    /// Namespaces that may use the node's own credentials (environment, files, credential plugins) where they bring none;
    /// `"*"` is all of them.
    pub node_credentials: Vec<String>,
    /// How long an origin's "yes" to a namespace is remembered, in seconds.
    pub remember_seconds: u64,
    /// The bytes that each namespace may keep on the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<ByteSize>,
    /// The same for single namespaces, instead of `quota`.
    pub quotas: BTreeMap<String, ByteSize>,
}

impl Default for TenancyConfig {
    fn default() -> Self {
        Self {
            node_credentials: vec![ALL.to_owned()],
            remember_seconds: 600,
            quota: None,
            quotas: BTreeMap::new(),
        }
    }
}

/// More than a namespace may keep.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "namespace {namespace} may keep {quota} bytes on this node, and has {used}: {reference} would be {bytes} more"
)]
pub struct OverQuota {
    pub namespace: String,
    pub reference: String,
    pub quota: u64,
    pub used: u64,
    pub bytes: u64,
}

/// Decisions about namespaces; one per process.
#[derive(Debug, Default)]
pub struct Tenancy {
    config: TenancyConfig,
    accepted: Mutex<HashMap<Proof, Instant>>,
    /// By namespace.
    kept: Mutex<HashMap<String, Kept>>,
}

/// Counted as kept while it is brought, and not after.
#[derive(Debug)]
pub struct Passing<'a> {
    tenancy: &'a Tenancy,
    user: String,
    reference: String,
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        let other = |kept: &str| kept != self.reference;
        self.tenancy.release(&self.user, other);
    }
}

/// By user and reference: which artifact, and its bytes.
type Kept = HashMap<(String, String), (Digest, u64)>;

/// What an origin said yes to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Proof {
    reference: String,
    /// What it was then.
    artifact: Digest,
    /// Of the credentials; they are not kept.
    keys: Option<Digest>,
}

impl Proof {
    fn new(reference: &Reference, artifact: Digest, keys: Option<&Keys>) -> Self {
        Self {
            reference: reference.to_string(),
            artifact,
            keys: keys.map(Keys::fingerprint),
        }
    }
}

impl Tenancy {
    /// Decides as `config` says.
    pub fn new(config: TenancyConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Whether whoever is not known to be of a namespace may use the credentials of the node.
    pub(super) fn node_is_for_all(&self) -> bool {
        self.config.node_credentials.iter().any(|n| n == ALL)
    }

    /// How long an origin's "yes" is remembered.
    pub(super) fn life(&self) -> Duration {
        Duration::from_secs(self.config.remember_seconds)
    }

    /// What `namespace` opens origins with, where it brings `keys`.
    pub fn keys(&self, namespace: &str, keys: Option<Keys>) -> Option<Keys> {
        let allowed = &self.config.node_credentials;
        match allowed.iter().any(|n| n == ALL || n == namespace) {
            true => keys,
            false => Some(keys.unwrap_or_default().alone()),
        }
    }

    /// Whether the origin has said yes to these keys for this artifact, not long ago.
    pub fn has_accepted(&self, reference: &Reference, artifact: Digest, keys: &Keys) -> bool {
        self.knows(&Proof::new(reference, artifact, Some(keys)), Instant::now())
    }

    /// The origin says yes to these keys.
    pub fn accept(&self, reference: &Reference, artifact: Digest, keys: &Keys) {
        self.note(Proof::new(reference, artifact, Some(keys)), Instant::now());
    }

    fn knows(&self, proof: &Proof, now: Instant) -> bool {
        let life = self.life();
        let accepted = self.accepted.lock();
        let at = accepted.get(proof);
        at.is_some_and(|at| now.saturating_duration_since(*at) < life)
    }

    fn note(&self, proof: Proof, now: Instant) {
        let life = self.life();
        let mut accepted = self.accepted.lock();
        if accepted.len() >= MAX_ACCEPTED && !accepted.contains_key(&proof) {
            accepted.retain(|_, at| now.saturating_duration_since(*at) < life);
            if accepted.len() >= MAX_ACCEPTED
                && let Some(oldest) = accepted.iter().min_by_key(|(_, at)| **at)
            {
                let oldest = oldest.0.clone();
                accepted.remove(&oldest);
            }
        }
        accepted.insert(proof, now);
    }

    /// Counts an artifact that `user` keeps for `namespace`; whether that is new. `known`: it was counted by an earlier
    /// process, and is not refused any more.
    ///
    /// # Errors
    /// It is more than the namespace may have; then nothing is counted.
    pub fn charge(
        &self,
        namespace: &str,
        user: &str,
        (reference, digest, bytes): (&str, Digest, u64),
        known: bool,
    ) -> Result<bool, OverQuota> {
        let mut kept = self.kept.lock();
        let of = kept.entry(namespace.to_owned()).or_default();
        let key = (user.to_owned(), reference.to_owned());
        let distinct: HashMap<Digest, u64> = of
            .iter()
            .filter(|(other, _)| **other != key)
            .map(|(_, (digest, bytes))| (*digest, *bytes))
            .collect();
        let used: u64 = distinct.values().sum();
        let quota = self
            .config
            .quotas
            .get(namespace)
            .or(self.config.quota.as_ref());
        if let Some(quota) = quota
            && !known
            && !distinct.contains_key(&digest)
            && used.saturating_add(bytes) > quota.0
        {
            return Err(OverQuota {
                namespace: namespace.to_owned(),
                reference: reference.to_owned(),
                quota: quota.0,
                used,
                bytes,
            });
        }
        Ok(of.insert(key, (digest, bytes)).is_none())
    }

    /// As [`Tenancy::charge`], of what `user` has brought without keeping it: it counts until the guard is dropped.
    ///
    /// # Errors
    /// It is more than the namespace may have.
    pub fn charge_passing(
        &self,
        namespace: &str,
        user: &str,
        what: (&str, Digest, u64),
    ) -> Result<Passing<'_>, OverQuota> {
        // What it keeps besides is another matter.
        let user = format!("{user} in passing");
        self.charge(namespace, &user, what, false)?;
        Ok(Passing {
            tenancy: self,
            user,
            reference: what.0.to_owned(),
        })
    }

    /// `user` keeps nothing any more but the references that `keep` holds for.
    pub fn release(&self, user: &str, keep: impl Fn(&str) -> bool) {
        let mut kept = self.kept.lock();
        for of in kept.values_mut() {
            of.retain(|(other, reference), _| other != user || keep(reference));
        }
        kept.retain(|_, of| !of.is_empty());
    }

    /// Bytes of the distinct artifacts that a namespace keeps.
    pub fn used(&self, namespace: &str) -> u64 {
        let kept = self.kept.lock();
        let of = kept.get(namespace).into_iter().flatten();
        let distinct: HashMap<Digest, u64> =
            of.map(|(_, (digest, bytes))| (*digest, *bytes)).collect();
        distinct.values().sum()
    }
}

impl Node {
    /// To be called before `reference` is resolved with `keys`: what comes by them is not the node's to show. It says so
    /// on the disk, and which generation, if any, the node had of its own by then: that one stays everybody's. Blocks
    /// nobody who has no keys of their own.
    ///
    /// # Errors
    /// What the disk says.
    pub async fn guard(&self, reference: &Reference, keys: Option<&Keys>) -> Result<(), NodeError> {
        if !keys.is_some_and(Keys::has_own) || !self.store().writable() {
            return Ok(());
        }
        let (store, name) = (Arc::clone(self.store()), reference.to_string());
        Ok(super::blocking(move || {
            store.guard(&name, || {
                let own = store.artifact(&name)?.map(|(_, own)| own.digest());
                Ok(own.map_or_else(String::new, |own| own.to_string()))
            })
        })
        .await?)
    }

    /// Makes sure that a namespace may see `resolved`, which this node resolved with `keys` ([`Tenancy::keys`]): where it
    /// came by the credentials of others, or the namespace may not use the node's, the origin is asked, unless its answer
    /// is known.
    ///
    /// # Errors
    /// The origin's refusal; that it cannot be asked.
    pub async fn prove(
        &self,
        reference: &Reference,
        keys: Option<&Keys>,
        resolved: &Resolved,
    ) -> Result<(), NodeError> {
        let artifact = &resolved.artifact;
        let proof = Proof::new(reference, artifact.digest(), keys);
        let now = Instant::now();
        let is_node = keys.is_none_or(|keys| !keys.alone && !keys.has_own());
        let own = self.guarded(reference).await?;
        let is_own = |own: &String| *own == artifact.digest().to_string();
        let mut is_said = resolved.fresh;
        if !resolved.fresh {
            let may_use_node = keys.is_none_or(|keys| !keys.alone);
            if (own.as_ref().is_none_or(is_own) && may_use_node)
                || self.tenancy().knows(&proof, now)
            {
                return Ok(());
            }
            // Of an image nothing but its manifest is asked for.
            is_said = match self.inspect(reference).await? {
                Meaning::Layers(layered) => layered.manifest.to_string() == artifact.revision,
                Meaning::Files(found) => found.digest() == artifact.digest(),
            };
        }
        self.tenancy().note(proof, now);
        if own.is_some() && is_node && is_said {
            let (store, name) = (Arc::clone(self.store()), reference.to_string());
            super::blocking(move || {
                if let Err(error) = store.unguard(&name) {
                    tracing::debug!(reference = name, %error, "it stays guarded");
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// The generation of `reference` that the node had of its own when it was guarded, empty for none; `None` where it is
    /// not guarded.
    async fn guarded(&self, reference: &Reference) -> Result<Option<String>, NodeError> {
        let (store, name) = (Arc::clone(self.store()), reference.to_string());
        Ok(super::blocking(move || store.guarded(&name)).await?)
    }
}

/// Whether what a reference is recorded as may be shown to all who may use the node's credentials.
pub(super) fn is_the_nodes(store: &Store, reference: &str) -> Result<bool, StoreError> {
    let Some(own) = store.guarded(reference)? else {
        return Ok(true);
    };
    let now = store.artifact(reference)?;
    Ok(now.is_some_and(|(record, _)| record.digest.to_string() == own))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::Secret;

    fn reference(name: &str) -> Reference {
        format!("hf://o/{name}").parse().unwrap()
    }

    fn token(text: &str) -> Keys {
        Keys {
            hub_token: Some(Secret::new(text)),
            ..Keys::default()
        }
    }

    #[test]
    fn a_yes_is_for_one_credential_and_expires() {
        let tenancy = Tenancy::new(TenancyConfig {
            remember_seconds: 60,
            ..TenancyConfig::default()
        });
        let now = Instant::now();
        let key = token("a");
        let (now_it_is, was) = (Digest::of(b"new"), Digest::of(b"old"));
        let proof = Proof::new(&reference("m"), now_it_is, Some(&key));
        tenancy.note(proof.clone(), now);
        assert!(tenancy.knows(&proof, now));
        for other in [
            Proof::new(&reference("m"), was, Some(&key)),
            Proof::new(&reference("m"), now_it_is, None),
            Proof::new(&reference("m"), now_it_is, Some(&token("b"))),
            Proof::new(&reference("m"), now_it_is, Some(&key.clone().alone())),
            Proof::new(&reference("n"), now_it_is, Some(&key)),
        ] {
            assert!(!tenancy.knows(&other, now));
        }
        assert!(!tenancy.knows(&proof, now + Duration::from_secs(61)));
        for n in 0..2 * MAX_ACCEPTED {
            let proof = Proof::new(&reference(&format!("n{n}")), was, None);
            tenancy.note(proof, now + Duration::from_millis(n as u64));
        }
        assert_eq!(tenancy.accepted.lock().len(), MAX_ACCEPTED);
    }

    #[test]
    fn the_policy_says_who_uses_the_credentials_of_the_node() {
        let tenancy = Tenancy::new(TenancyConfig {
            node_credentials: vec!["ours".into()],
            ..TenancyConfig::default()
        });
        assert_eq!(tenancy.keys("ours", None), None);
        assert!(tenancy.keys("theirs", None).unwrap().alone);
        assert!(tenancy.keys("theirs", Some(token("t"))).unwrap().alone);
        assert!(!tenancy.keys("ours", Some(token("t"))).unwrap().alone);
        assert_eq!(Tenancy::default().keys("any", None), None);
    }

    #[test]
    fn quotas_count_what_is_distinct_and_refuse_with_the_arithmetic() {
        let tenancy = Tenancy::new(TenancyConfig {
            quota: Some(ByteSize(100)),
            quotas: BTreeMap::from([("big".to_owned(), ByteSize(1000))]),
            ..TenancyConfig::default()
        });
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        tenancy
            .charge("n", "p1", ("hf://o/a", a, 60), false)
            .unwrap();
        tenancy
            .charge("n", "p1", ("hf://o/a", a, 60), false)
            .unwrap();
        tenancy
            .charge("n", "p2", ("hf://o/a", a, 60), false)
            .unwrap();
        assert_eq!(tenancy.used("n"), 60);
        let error = tenancy
            .charge("n", "p2", ("hf://o/b", b, 41), false)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "namespace n may keep 100 bytes on this node, and has 60: hf://o/b would be 41 more"
        );
        tenancy
            .charge("big", "p3", ("hf://o/b", b, 900), false)
            .unwrap();
        tenancy
            .charge("n", "p2", ("hf://o/b", b, 41), true)
            .unwrap();
        assert_eq!(tenancy.used("n"), 101);
        tenancy.release("p2", |kept| kept == "hf://o/a");
        assert_eq!(tenancy.used("n"), 60);
        tenancy.release("p2", |_| false);
        tenancy.release("p1", |_| false);
        assert_eq!(tenancy.used("n"), 0);
        assert!(tenancy.charge("n", "p", ("x", b, u64::MAX), false).is_err());
    }
}
