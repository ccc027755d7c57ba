//! Which chunks of a partial object are here: the live words and the durable map.
//!
//! `.live`, mapped by all processes: 128 bytes of header, then one 32-bit word per chunk. A chunk is
//! present if its word is its tag, which depends on object, size, boot and chunk: zeros, flipped
//! bits and pages of another file read as absent. Header, in little endian:
//!
//! ```text
//!  0 "hrthlive"   8 format u32   12 chunk size u32   16 size u64   24 id kind u64   32 id [32]
//! 64 boot id [16]   80 state u32   84 generation u32   88 inode of the data u64   96 zero [32]
//! ```
//!
//! `.map`, replaced by rename: "hrth.map", format u32, id kind u32, id [32], size u64, chunk size
//! u64, one bit per chunk, SHA-256 of all that.

use std::sync::atomic::{AtomicU32, Ordering};

use sha2::{Digest as _, Sha256};

use crate::{
    chunk::{self, CHUNK_SIZE},
    digest::ObjectId,
    disk::SharedMap,
};

const FORMAT: u32 = 1;
const HEADER: usize = 128;
const STATE: usize = 80 / 4;
const GENERATION: usize = 84 / 4;
/// The state word of an object that has become complete; any other value means open.
const FINISHED: u32 = 0x6669_6e21;

/// What live words belong to; they count for nothing else.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope {
    pub(super) id: ObjectId,
    pub(super) size: u64,
    pub(super) boot: [u8; 16],
    pub(super) inode: u64,
}

impl Scope {
    /// The header with state and generation zero.
    fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let (kind, id) = kind_and_bytes(&self.id);
        header[..8].copy_from_slice(b"hrthlive");
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[12..16].copy_from_slice(&(CHUNK_SIZE as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.size.to_le_bytes());
        header[24..32].copy_from_slice(&u64::from(kind).to_le_bytes());
        header[32..64].copy_from_slice(id);
        header[64..80].copy_from_slice(&self.boot);
        header[88..96].copy_from_slice(&self.inode.to_le_bytes());
        header
    }

    fn key(&self) -> u64 {
        let digest: [u8; 32] = Sha256::digest(self.header()).into();
        let mut key = [0; 8];
        key.copy_from_slice(&digest[..8]);
        u64::from_le_bytes(key)
    }

    /// The length of the live file, in bytes.
    pub(super) fn live_len(&self) -> u64 {
        HEADER as u64 + 4 * chunk::count(self.size)
    }

    /// The content of a new live file in which the chunks of `bits` are present.
    pub(super) fn live_file(&self, bits: &Bits) -> Vec<u8> {
        let mut bytes = self.header().to_vec();
        let key = self.key();
        for index in 0..chunk::count(self.size) {
            let word = if bits.get(index) { tag(key, index) } else { 0 };
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// The live words of one object.
#[derive(Debug)]
pub(super) struct Live {
    map: SharedMap,
    key: u64,
}

impl Live {
    /// Takes the mapping of a live file, unless it belongs to something else.
    pub(super) fn new(map: SharedMap, scope: &Scope) -> Option<Self> {
        let header = scope.header();
        let words = map.words();
        if words.len() as u64 * 4 != scope.live_len() {
            return None;
        }
        for (at, expected) in header.chunks_exact(4).enumerate() {
            let found = words[at].load(Ordering::Acquire).to_ne_bytes();
            if at != STATE && at != GENERATION && found != expected {
                return None;
            }
        }
        let key = scope.key();
        Some(Self { map, key })
    }

    #[inline]
    fn chunk_words(&self) -> &[AtomicU32] {
        &self.map.words()[HEADER / 4..]
    }

    #[inline]
    pub(super) fn present(&self, index: u64) -> bool {
        let word = self.chunk_words().get(index as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) == tag(self.key, index))
    }

    /// Says that the data of a chunk is in its file.
    pub(super) fn set(&self, index: u64) {
        self.chunk_words()[index as usize].store(tag(self.key, index), Ordering::Release);
    }

    pub(super) fn clear(&self, index: u64) {
        self.chunk_words()[index as usize].store(0, Ordering::Release);
    }

    pub(super) fn count(&self) -> u64 {
        self.chunk_words().len() as u64
    }

    /// Changes when chunks are made absent; odd while they are.
    pub(super) fn generation(&self) -> u32 {
        self.map.words()[GENERATION].load(Ordering::Acquire)
    }

    pub(super) fn next_generation(&self) {
        self.map.words()[GENERATION].fetch_add(1, Ordering::AcqRel);
    }

    /// Whether some process has made the object complete.
    pub(super) fn finished(&self) -> bool {
        self.map.words()[STATE].load(Ordering::Acquire) == FINISHED
    }

    pub(super) fn set_finished(&self, finished: bool) {
        let state = if finished { FINISHED } else { 0 };
        self.map.words()[STATE].store(state, Ordering::Release);
    }

    /// The chunks present now.
    pub(super) fn snapshot(&self) -> Bits {
        let mut bits = Bits::new(self.count());
        for index in 0..self.count() {
            if self.present(index) {
                bits.set(index);
            }
        }
        bits
    }
}

/// The nonzero word that says chunk `index` is present (splitmix64's finalizer).
#[inline]
const fn tag(key: u64, index: u64) -> u32 {
    let mut x = key ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ x >> 31) as u32 | 1
}

/// A set of chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bits {
    bytes: Vec<u8>,
    count: u64,
}

impl Bits {
    pub(super) fn new(count: u64) -> Self {
        let bytes = vec![0; count.div_ceil(8) as usize];
        Self { bytes, count }
    }

    pub(super) fn get(&self, index: u64) -> bool {
        index < self.count && self.bytes[index as usize / 8] & 1 << (index % 8) != 0
    }

    pub(super) fn set(&mut self, index: u64) {
        self.bytes[index as usize / 8] |= 1 << (index % 8);
    }

    pub(super) fn clear(&mut self, index: u64) {
        self.bytes[index as usize / 8] &= !(1 << (index % 8));
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (byte, more) in self.bytes.iter_mut().zip(&other.bytes) {
            *byte |= more;
        }
    }

    pub(super) fn holds_all_of(&self, other: &Self) -> bool {
        let mut pairs = self.bytes.iter().zip(&other.bytes);
        self.count == other.count && pairs.all(|(ours, theirs)| theirs & !ours == 0)
    }

    /// The map file of these chunks.
    pub(super) fn map_file(&self, id: &ObjectId, size: u64) -> Vec<u8> {
        let mut bytes = map_header(id, size);
        bytes.extend_from_slice(&self.bytes);
        let checksum: [u8; 32] = Sha256::digest(&bytes).into();
        bytes.extend_from_slice(&checksum);
        bytes
    }

    /// The chunks in a map file; `None` where it is damaged or belongs to something else.
    pub(super) fn from_map_file(bytes: &[u8], id: &ObjectId, size: u64) -> Option<Self> {
        let (body, checksum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        let expected: [u8; 32] = Sha256::digest(body).into();
        let bits = body.strip_prefix(&map_header(id, size)[..])?;
        let mut found = Self::new(chunk::count(size));
        if checksum != expected || bits.len() != found.bytes.len() {
            return None;
        }
        found.bytes.copy_from_slice(bits);
        let spare = found.count..found.bytes.len() as u64 * 8;
        let clean = |at: u64| found.bytes[at as usize / 8] & 1 << (at % 8) == 0;
        spare.into_iter().all(clean).then_some(found)
    }
}

/// Longest map file of an object of `size` bytes.
pub(super) fn map_len(id: &ObjectId, size: u64) -> u64 {
    map_header(id, size).len() as u64 + chunk::count(size).div_ceil(8) + 32
}

fn map_header(id: &ObjectId, size: u64) -> Vec<u8> {
    let (kind, digest) = kind_and_bytes(id);
    let mut header = b"hrth.map".to_vec();
    header.extend_from_slice(&FORMAT.to_le_bytes());
    header.extend_from_slice(&u32::from(kind).to_le_bytes());
    header.extend_from_slice(digest);
    header.extend_from_slice(&size.to_le_bytes());
    header.extend_from_slice(&CHUNK_SIZE.to_le_bytes());
    header
}

fn kind_and_bytes(id: &ObjectId) -> (u8, &[u8; 32]) {
    match id {
        ObjectId::Sha256(digest) => (0, digest.as_bytes()),
        ObjectId::Located(digest) => (1, digest.as_bytes()),
    }
}
