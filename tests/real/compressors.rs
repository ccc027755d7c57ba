//! Layers as real tools compress them: what they decode to, and that every span can be entered.

use std::{
    io::{Read as _, Write as _},
    process::{Command, Stdio},
};

use bytes::Bytes;
use hearth::{
    digest::Digest,
    image::{Compression, Decoder, ImageError, LayerIndex},
};

/// What a tool makes of `data`.
fn compressed(tool: &str, args: &[&str], data: &[u8]) -> Vec<u8> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{tool}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let data = data.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&data).unwrap());
    let mut out = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    feeder.join().unwrap();
    assert!(child.wait().unwrap().success(), "{tool}");
    out
}

fn check(compression: Compression, blob: &[u8], data: &[u8]) -> LayerIndex {
    let mut decoder = Decoder::new(compression, 1 << 30).unwrap().hashing_blob();
    let mut at = 0;
    for piece in blob.chunks(70_001) {
        let fed = decoder.feed(piece, &mut |bytes: Bytes| {
            assert!(bytes == data[at..at + bytes.len()]);
            at += bytes.len();
            Ok::<_, ImageError>(())
        });
        fed.unwrap();
    }
    let decoded = decoder.finish().unwrap();
    assert_eq!((at, decoded.diff_id), (data.len(), Digest::of(data)));
    let index = decoded.into_index(Digest::of(blob), Vec::new());
    let index = LayerIndex::decode(&index.encode().unwrap()).unwrap();
    for at in 0..index.spans.len() {
        let (bytes, of_blob) = (index.span_bytes(at), index.span_blob_bytes(at));
        let of_blob = &blob[of_blob.start as usize..of_blob.end as usize];
        let span = index.decode_span(at, of_blob).unwrap();
        assert!(span == data[bytes.start as usize..bytes.end as usize]);
    }
    index
}

/// Real content: programs, libraries and text, 12 MiB of this test.
fn content() -> Vec<u8> {
    let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    let mut data = Vec::new();
    file.take(12 << 20).read_to_end(&mut data).unwrap();
    assert!(data.len() > 8 << 20);
    data
}

#[test]
fn gzip_by_every_tool() {
    let data = content();
    for (tool, args) in [
        ("gzip", &["-1"][..]),
        ("gzip", &["-6"]),
        ("gzip", &["-9"]),
        ("pigz", &["-6", "-p", "4"]),
        // Blocks that do not refer to each other, of odd sizes.
        ("pigz", &["-i", "-b", "333", "-9"]),
        ("pigz", &["--rsyncable", "-3"]),
        ("igzip", &["-3"]),
        (
            "python3",
            &[
                "-c",
                "import gzip, sys, shutil; shutil.copyfileobj(sys.stdin.buffer, gzip.GzipFile('layer', 'wb', 5, sys.stdout.buffer), 99999)",
            ],
        ),
    ] {
        let blob = compressed(tool, args, &data);
        let index = check(Compression::Gzip, &blob, &data);
        let spans = index.spans.len();
        let windows: usize = index.spans.iter().map(|span| span.window.len()).sum();
        eprintln!(
            "{tool} {args:?}: {} bytes, {spans} spans, windows {windows}",
            blob.len()
        );
        assert!(index.is_seekable());
        assert!(
            (6..=data.len() >> 19).contains(&spans),
            "{tool} {args:?}: {spans} spans"
        );
        assert!(
            windows * 50 < blob.len(),
            "{tool} {args:?}: windows of {windows} bytes"
        );
    }
}

#[test]
fn one_huge_block_is_one_span() {
    let data = content();
    let blob = compressed("igzip", &["-0"], &data);
    assert_eq!(check(Compression::Gzip, &blob, &data).spans.len(), 1);
}

#[test]
fn zstd_by_its_tool() {
    let data = content();
    let one = compressed("zstd", &["-q", "-3"], &data);
    assert_eq!(check(Compression::Zstd, &one, &data).spans.len(), 1);
    let frames = data.chunks(3 << 20);
    let frames = frames.flat_map(|part| compressed("zstd", &["-q", "-9", "--no-check"], part));
    let frames: Vec<u8> = frames.collect();
    assert_eq!(
        check(Compression::Zstd, &frames, &data).spans.len(),
        data.len().div_ceil(3 << 20)
    );
}
