//! The store on a real file system.

#![expect(clippy::unwrap_used, reason = "a panic fails the test")]

mod artifacts;
mod crash;
pub(crate) mod failing;
mod images;
mod import;
pub(crate) mod integrity;
mod model;
mod objects;
mod previous;
mod processes;
pub(crate) mod sim;
mod tiers;

use std::sync::Arc;

use hearth::{
    chunk::CHUNK_SIZE,
    digest::{Digest, ObjectId},
    store::{ByteSize, Config, Partial, Store, WriteMode},
    tree::{Artifact, Location, Meta, Object, Recipe, TreeBuilder},
};

/// Settings that leave nothing free, for small test disks.
fn config() -> Config {
    Config {
        min_free: ByteSize(0),
        ..Config::default()
    }
}

fn open(dir: &std::path::Path) -> Arc<Store> {
    Store::open(&dir.join("store"), &config()).unwrap()
}

/// `len` bytes that differ everywhere and by seed.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The bytes of one chunk of `content`.
fn chunk_of(content: &[u8], index: u64) -> &[u8] {
    let bytes = hearth::chunk::bytes(index, content.len() as u64);
    &content[bytes.start as usize..bytes.end as usize]
}

/// Fills what is absent and unclaimed.
fn fill(partial: &Arc<Partial>, content: &[u8], mode: WriteMode) {
    while let Some(lease) = partial.claim(0..partial.chunks()).unwrap() {
        for at in lease.chunks() {
            lease.commit(at, chunk_of(content, at), mode).unwrap();
        }
    }
}

/// An artifact with one file per content; `located` ids instead of digests where asked.
fn artifact(reference: &str, contents: &[&[u8]], located: bool) -> Artifact {
    let mut tree = TreeBuilder::new(Meta::dir(0));
    let mut objects = Vec::new();
    for (at, content) in contents.iter().enumerate() {
        let size = content.len() as u64;
        let path = format!("dir/file-{at}");
        let id = match located {
            true => ObjectId::located(&format!("{reference}/{path}"), "1", size),
            false => ObjectId::Sha256(Digest::of(content)),
        };
        tree.add_file(path.as_bytes(), at as u32, Meta::file(7))
            .unwrap();
        objects.push(Object {
            id,
            size,
            git_sha1: None,
            recipe: Recipe::Raw(Location {
                path,
                generation: None,
                offset: 0,
            }),
        });
    }
    Artifact {
        reference: reference.to_owned(),
        revision: "r1".to_owned(),
        tree: tree.build(),
        objects,
    }
}

const MIB: usize = CHUNK_SIZE as usize;
