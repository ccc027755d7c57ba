//! Digests and object ids: plain values.
//!
//! An [`ObjectId`] is a promise: `sha256:` names exactly those bytes; `located:` names whatever
//! one generation of one remote location holds, until it is complete and gets its `sha256:` name.

use std::{fmt, str::FromStr};

use sha2::{Digest as _, Sha256};

/// A SHA-256 digest, written `sha256:<64 lower-case hex digits>` (OCI image-spec, descriptor.md).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Text that is not a digest or object id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {expected}")]
pub struct ParseDigestError {
    text: String,
    expected: &'static str,
}

impl Digest {
    /// A digest from its raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The digest of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self(Sha256::digest(data).into())
    }

    /// The raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lower-case hex digits, without the algorithm.
    pub fn hex(&self) -> String {
        to_hex(&self.0)
    }

    /// Parses 64 lower-case hex digits, without the algorithm.
    pub fn from_hex(text: &str) -> Result<Self, ParseDigestError> {
        from_hex(text).map(Self).ok_or_else(|| ParseDigestError {
            text: shorten(text),
            expected: "64 lower-case hex digits",
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("sha256:")
            .and_then(from_hex)
            .map(Self)
            .ok_or_else(|| ParseDigestError {
                text: shorten(text),
                expected: "a digest of the form sha256:<64 lower-case hex digits>",
            })
    }
}

/// The name of an object in the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectId {
    /// Exactly the bytes with this SHA-256.
    Sha256(Digest),
    /// The bytes of one generation of one remote location; the digest is over
    /// (canonical location, generation, size).
    Located(Digest),
}

impl ObjectId {
    /// The id of `size` bytes at `location` as of `generation` (etag, version, commit).
    pub fn located(location: &str, generation: &str, size: u64) -> Self {
        let mut hasher = Sha256::new();
        for part in [location, generation] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.update(size.to_le_bytes());
        Self::Located(Digest(hasher.finalize().into()))
    }

    /// The content digest, where the id is one.
    pub const fn sha256(&self) -> Option<Digest> {
        match self {
            Self::Sha256(digest) => Some(*digest),
            Self::Located(_) => None,
        }
    }
}

/// The name of an object on its way. Until it was verified its digest is a mere claim: what one origin
/// says has a digest, and a size, is kept apart from what others say of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartialId {
    /// What it is to become.
    pub id: ObjectId,
    /// Tells apart who claims that; none where the id tells it.
    claim: Option<[u8; 16]>,
}

impl PartialId {
    /// The name of what `origin` says is `size` bytes with this id.
    pub fn claimed(id: ObjectId, size: u64, origin: &str) -> Self {
        let claim = id.sha256().map(|_| {
            let mut claim = [0; 16];
            let digest = Digest::of(format!("{size} {origin}").as_bytes());
            claim.copy_from_slice(&digest.0[..16]);
            claim
        });
        Self { id, claim }
    }

    /// Who claims it, as text; none where the id tells it.
    pub fn claim(&self) -> Option<String> {
        self.claim.map(|claim| to_hex(&claim))
    }
}

/// Of an object that nobody else can claim to have.
impl From<&ObjectId> for PartialId {
    fn from(id: &ObjectId) -> Self {
        Self {
            id: *id,
            claim: None,
        }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(digest) => write!(f, "sha256:{}", digest.hex()),
            Self::Located(digest) => write!(f, "located:{}", digest.hex()),
        }
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ObjectId {
    type Err = ParseDigestError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(hex) = text.strip_prefix("located:") {
            return Digest::from_hex(hex).map(Self::Located);
        }
        text.parse().map(Self::Sha256)
    }
}

/// Lower-case hex.
pub fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    text
}

/// Parses exactly `2 * N` lower-case hex digits.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != N * 2 {
        return None;
    }
    let nibble = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_nonsense_is_refused() {
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        for id in [
            ObjectId::Sha256(digest),
            ObjectId::located("s3://b/k", "\"etag\"", 7),
        ] {
            assert_eq!(id.to_string().parse::<ObjectId>(), Ok(id));
        }
        for bad in [
            "",
            "sha256:",
            "sha256:BA78",
            "md5:00",
            "located:zz",
            &"a".repeat(9999),
        ] {
            let error = bad.parse::<ObjectId>().unwrap_err();
            assert!(error.to_string().len() < 200);
        }
    }

    #[test]
    fn located_ids_do_not_collide_by_concatenation() {
        assert_ne!(
            ObjectId::located("ab", "c", 1),
            ObjectId::located("a", "bc", 1)
        );
        assert_ne!(
            ObjectId::located("a", "b", 1),
            ObjectId::located("a", "b", 2)
        );
    }
}
