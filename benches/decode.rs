//! How fast layers are decoded, and how large their indexes are: `cargo bench --bench decode -- BLOB...`,
//! side by side with `pigz -dc` and `igzip -dc`, which neither hash nor index.
#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::{
    fs::File,
    io::Read as _,
    process::{Command, Stdio},
    time::Instant,
};

use bytes::Bytes;
use hearth::{
    digest::Digest,
    image::{Compression, Decoder, ImageError, LayerIndex},
};

fn main() {
    let blobs = std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    for path in blobs {
        let mut blob = Vec::new();
        File::open(&path).unwrap().read_to_end(&mut blob).unwrap();
        let start = Instant::now();
        let index = decode(&blob);
        let seconds = start.elapsed().as_secs_f64();
        let rate = |seconds: f64| index.size as f64 / seconds / 1e6;
        let encoded = index.encode().unwrap();
        println!("{path}: {} bytes, decoded {}", blob.len(), index.size);
        println!(
            "  hearth           {:6.0} MB/s, hashed and indexed",
            rate(seconds)
        );
        for tool in ["pigz", "igzip"] {
            if index.compression == Compression::Gzip {
                let start = Instant::now();
                let mut command = Command::new(tool);
                command.args(["-dc", &path]).stdout(Stdio::null());
                if command.status().is_ok_and(|status| status.success()) {
                    println!(
                        "  {tool:<16} {:6.0} MB/s",
                        rate(start.elapsed().as_secs_f64())
                    );
                }
            }
        }
        let start = Instant::now();
        for at in 0..index.spans.len() {
            let range = index.span_blob_bytes(at);
            let bytes = &blob[range.start as usize..range.end as usize];
            index.decode_span(at, bytes).unwrap();
        }
        let seconds = start.elapsed().as_secs_f64();
        println!("  span after span  {:6.0} MB/s, verified", rate(seconds));
        let start = Instant::now();
        assert_eq!(LayerIndex::decode(&encoded).as_ref(), Ok(&index));
        println!(
            "  index            {} bytes ({:.2} % of the layer, without its entries), {} spans, read in {:.1} ms",
            encoded.len(),
            encoded.len() as f64 * 100.0 / blob.len() as f64,
            index.spans.len(),
            start.elapsed().as_secs_f64() * 1e3,
        );
    }
}

fn decode(blob: &[u8]) -> LayerIndex {
    let compression = match blob {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, ..] => Compression::Zstd,
        _ => Compression::None,
    };
    let mut decoder = Decoder::new(compression, u64::MAX).unwrap().hashing_blob();
    for piece in blob.chunks(1 << 20) {
        let fed = decoder.feed(piece, &mut |_: Bytes| Ok::<_, ImageError>(()));
        fed.unwrap();
    }
    let decoded = decoder.finish().unwrap();
    let digest = decoded.blob.unwrap_or(Digest::of(b""));
    decoded.into_index(digest, Vec::new())
}
