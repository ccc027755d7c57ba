use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::stream;
use parking_lot::Mutex;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    image::{EntryKind, ImageErrorKind, LayerSource, Limits, Sink, Unpacker, samples},
    reference::Reference,
    source::ByteStream,
    tree::Artifact,
};

/// A tar header (POSIX ustar).
fn header(name: &str, kind: u8, mode: u32, size: usize, target: &str) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put =
        |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, &format!("{mode:07o}"));
    put(108, &format!("{:07o}", 10));
    put(116, &format!("{:07o}", 20));
    put(124, &format!("{size:011o}"));
    put(136, &format!("{:011o}", 1_566_297_043));
    put(148, "        ");
    put(156, std::str::from_utf8(&[kind]).unwrap());
    put(157, target);
    put(257, "ustar\x0000");
    if matches!(kind, b'3' | b'4') {
        put(329, "0000001");
        put(337, "0000003");
    }
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A layer with a table, made as its format says.
struct Layer {
    blob: Vec<u8>,
    annotations: BTreeMap<String, String>,
}

struct Writer {
    compression: Compression,
    blob: Vec<u8>,
    /// What is in the member or frame that is being written.
    open: Vec<u8>,
    rows: Vec<Value>,
    chunk: usize,
}

impl Writer {
    fn new(compression: Compression) -> Self {
        Self {
            compression,
            blob: Vec::new(),
            open: Vec::new(),
            rows: Vec::new(),
            chunk: 4000,
        }
    }

    fn compress(&self, data: &[u8]) -> Vec<u8> {
        match self.compression {
            Compression::Gzip => samples::gzip(data, 6),
            _ => zstd::encode_all(data, 3).unwrap(),
        }
    }

    fn flush(&mut self) {
        let open = std::mem::take(&mut self.open);
        let member = self.compress(&open);
        self.blob.extend(member);
    }

    fn row(&mut self, name: &str, kind: &str, more: Value) {
        let mut row = json!({
            "name": name, "type": kind, "uid": 10, "gid": 20, "modtime": "2019-08-20T10:30:43Z",
        });
        for (key, value) in more.as_object().unwrap() {
            row[key] = value.clone();
        }
        self.rows.push(row);
    }

    fn file(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.open.extend(header(name, b'0', mode, data.len(), ""));
        let digest = Digest::of(data).to_string();
        let chunks: Vec<_> = data.chunks(self.chunk).collect();
        let mut offset = 0;
        for (at, chunk) in chunks.iter().enumerate() {
            self.flush();
            let of_chunk = Digest::of(chunk).to_string();
            let last = at + 1 == chunks.len();
            let mut more = json!({
                "offset": self.blob.len(),
                "chunkOffset": offset,
                "chunkSize": if last { 0 } else { chunk.len() },
                "chunkDigest": of_chunk,
            });
            let zstd = self.compression == Compression::Zstd;
            if zstd && chunks.len() == 1 {
                more.as_object_mut().unwrap().remove("chunkDigest");
            }
            if zstd && chunk.iter().all(|byte| *byte == 0) {
                more["chunkType"] = "zeros".into();
            }
            if at == 0 {
                more["size"] = data.len().into();
                more["mode"] = mode.into();
                more["digest"] = digest.clone().into();
                self.row(name, "reg", more);
            } else {
                more["name"] = name.into();
                more["type"] = "chunk".into();
                self.rows.push(more);
            }
            self.open.extend_from_slice(chunk);
            offset += chunk.len();
        }
        if data.is_empty() {
            self.row(name, "reg", json!({ "mode": mode }));
        }
        let padding = data.len().next_multiple_of(512) - data.len();
        self.open.extend(vec![0; padding]);
    }

    fn other(&mut self, name: &str, kind: u8, row: &str, mode: u32, target: &str) {
        self.open.extend(header(name, kind, mode, 0, target));
        let mut more = json!({ "mode": mode });
        if !target.is_empty() {
            more["linkName"] = target.into();
        }
        if kind == b'3' {
            (more["devMajor"], more["devMinor"]) = (1.into(), 3.into());
        }
        self.row(name, row, more);
    }

    fn finish(mut self) -> Layer {
        let table = json!({ "version": 1, "entries": self.rows }).to_string();
        let mut annotations = BTreeMap::new();
        if self.compression == Compression::Gzip {
            self.flush();
            let start = self.blob.len();
            self.open = header("stargz.index.json", b'0', 0, table.len(), "");
            self.open.extend(table.as_bytes());
            let padding = table.len().next_multiple_of(512) - table.len();
            self.open.extend(vec![0; padding + 1024]);
            self.flush();
            self.blob
                .extend([31, 139, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, b'S', b'G', 22, 0]);
            self.blob.extend(format!("{start:016x}STARGZ").as_bytes());
            self.blob
                .extend([1, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
            let digest = Digest::of(table.as_bytes()).to_string();
            annotations.insert(STARGZ_DIGEST.to_owned(), digest);
        } else {
            self.open.extend(vec![0; 1024]);
            self.flush();
            let compressed = self.compress(table.as_bytes());
            self.blob.extend(b"\x50\x2a\x4d\x18");
            self.blob.extend((compressed.len() as u32).to_le_bytes());
            let position = format!("{}:{}:{}:1", self.blob.len(), compressed.len(), table.len());
            self.blob.extend(&compressed);
            let digest = Digest::of(&compressed).to_string();
            annotations.insert(CHUNKED_DIGEST[0].to_owned(), digest);
            annotations.insert(CHUNKED_POSITION[0].to_owned(), position);
        }
        Layer {
            blob: self.blob,
            annotations,
        }
    }
}

fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let mut holey = samples::noise(4000, 9);
    holey.extend(vec![0; 4000]);
    holey.extend(samples::text(1000));
    vec![
        ("first", samples::text(700)),
        ("usr/large", samples::text(100_001)),
        ("usr/holey", holey),
        ("usr/zeros", vec![0; 8000]),
        ("usr/noise", samples::noise(20_000, 4)),
        ("last", b"x".to_vec()),
    ]
}

fn layer(compression: Compression) -> Layer {
    let mut writer = Writer::new(compression);
    let contents = contents();
    writer.file(contents[0].0, 0o644, &contents[0].1);
    writer.file(".prefetch.landmark", 0o644, b"\x0f");
    writer.other("usr/", b'5', "dir", 0o40755 & 0o7777, "");
    for (name, data) in &contents[1..] {
        writer.file(name, 0o4755, data);
    }
    writer.file("empty", 0o600, b"");
    writer.file("usr/.wh.gone", 0o600, b"");
    writer.file("usr/.wh..wh..opq", 0o600, b"");
    writer.other("link", b'2', "symlink", 0o777, "usr/large");
    writer.other("hard", b'1', "hardlink", 0o4755, "./usr/large");
    writer.other("null", b'3', "char", 0o666, "");
    writer.other("pipe", b'6', "fifo", 0o600, "");
    writer.finish()
}

#[derive(Debug)]
struct Origin {
    blob: Bytes,
    requests: Mutex<Vec<Range<u64>>>,
}

#[async_trait::async_trait]
impl Source for Origin {
    async fn resolve(&self, reference: &Reference) -> Result<Artifact, SourceError> {
        let what = reference.to_string();
        Err(SourceError::new(
            SourceErrorKind::NotFound,
            what,
            "not here",
        ))
    }

    fn origin(&self) -> String {
        "oci://registry/a".into()
    }

    async fn read(&self, at: &Location, range: Range<u64>) -> Result<ByteStream, SourceError> {
        assert_eq!(at.path, Digest::of(&self.blob).to_string());
        self.requests.lock().push(range.clone());
        let body = self.blob.slice(range.start as usize..range.end as usize);
        Ok(stream::iter([Ok(body)]).boxed())
    }
}

impl Layer {
    fn describe(&self) -> TocLayer<'_> {
        TocLayer {
            blob: Digest::of(&self.blob),
            size: self.blob.len() as u64,
            diff_id: Digest::of(b"decoded"),
            annotations: &self.annotations,
        }
    }

    fn origin(&self) -> Arc<Origin> {
        Arc::new(Origin {
            blob: self.blob.clone().into(),
            requests: Mutex::default(),
        })
    }

    async fn toc(&self) -> Option<Toc> {
        self.describe().fetch(&*self.origin()).await.unwrap()
    }
}

/// What decoding the whole layer gives.
#[derive(Default)]
struct Digests(Vec<u8>, Vec<Digest>);

impl Sink for Digests {
    type Error = ImageError;

    fn begin(&mut self, _: u64) -> Result<(), ImageError> {
        self.0.clear();
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), ImageError> {
        self.0.extend_from_slice(data);
        Ok(())
    }

    fn hole(&mut self, len: u64) -> Result<(), ImageError> {
        self.0.extend(vec![0; len as usize]);
        Ok(())
    }

    fn end(&mut self) -> Result<(), ImageError> {
        self.1.push(Digest::of(&self.0));
        Ok(())
    }

    fn digests(&mut self) -> Result<Vec<Digest>, ImageError> {
        Ok(std::mem::take(&mut self.1))
    }
}

fn unpacked(compression: Compression, blob: &[u8]) -> Vec<LayerEntry> {
    let mut decoder = Decoder::new(compression, 1 << 30).unwrap();
    let mut unpacker = Unpacker::new(Digest::of(blob), Limits::default());
    let mut sink = Digests::default();
    let mut out = |data: Bytes| unpacker.feed(&data, &mut sink);
    decoder.feed(blob, &mut out).unwrap();
    decoder.finish().unwrap();
    unpacker.finish(&mut sink).unwrap()
}

/// Entries without where their content is.
fn plain(entries: &[LayerEntry]) -> Vec<LayerEntry> {
    let mut entries = entries.to_vec();
    entries.retain(|entry| !matches!(&*entry.path, b"stargz.index.json" | b".prefetch.landmark"));
    for entry in &mut entries {
        if let EntryKind::File(content) = &mut entry.kind {
            content.offset = 0;
            content.pieces.clear();
        }
    }
    entries
}

#[tokio::test]
async fn a_table_says_what_decoding_says_and_any_file_is_read_by_it() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        let layer = layer(compression);
        let origin = layer.origin();
        let toc = layer.describe().fetch(&*origin).await.unwrap().unwrap();
        assert_eq!(origin.requests.lock().len(), 1);
        let whole = unpacked(compression, &layer.blob);
        assert_eq!(plain(&toc.index.entries), plain(&whole));
        assert!(whole.len() > 12);
        let unpacked = LayerIndex {
            entries: whole,
            ..toc.index.clone()
        };
        assert_eq!(difference(&toc.index, &unpacked), None);
        // What is before the landmark comes first.
        assert_eq!(toc.prefetch, 1);
        let index = Arc::new(toc.index);
        assert_eq!(
            LayerIndex::decode(&index.encode().unwrap()).as_ref(),
            Ok(&*index)
        );
        let source = LayerSource::new(
            Arc::clone(&origin) as Arc<dyn Source>,
            crate::image::Memory::new(1 << 20),
        );
        source.add(Arc::clone(&index)).unwrap();
        origin.requests.lock().clear();
        let contents: HashMap<_, _> = contents().into_iter().collect();
        let mut read = 0;
        for (at, entry) in index.entries.iter().enumerate() {
            let EntryKind::File(content) = &entry.kind else {
                continue;
            };
            let Some(data) = contents.get(std::str::from_utf8(&entry.path).unwrap()) else {
                assert_eq!(content.size, 0);
                continue;
            };
            let location = index.location(at, content);
            let range = location.offset..location.offset + content.size;
            let mut body = source.read(&location, range).await.unwrap();
            let mut found = Vec::new();
            while let Some(more) = body.next().await {
                found.extend_from_slice(&more.unwrap());
            }
            assert!(found == *data);
            read += 1;
        }
        assert_eq!(read, contents.len());
        // The table was not read again with the last file.
        let farthest = origin.requests.lock().iter().map(|range| range.end).max();
        assert!(farthest.unwrap() <= index.spans.last().unwrap().blob_start);
    }
}

#[tokio::test]
async fn what_a_table_says_otherwise_is_found() {
    type Change = fn(&mut Vec<LayerEntry>);
    fn entry<'e>(entries: &'e mut [LayerEntry], path: &str) -> &'e mut LayerEntry {
        let found = entries.iter_mut().find(|e| *e.path == *path.as_bytes());
        found.unwrap_or_else(|| panic!("no {path}"))
    }
    let changes: &[(&str, Change)] = &[
        ("it has \"evil\" where the layer has \"first\"", |x| {
            entry(x, "first").path = b"evil"[..].into();
        }),
        ("\"usr/large\" has another mode", |x| {
            entry(x, "usr/large").meta.mode = 0o6755;
        }),
        ("\"hard\" has another mode", |x| {
            entry(x, "hard").meta.mode = 0o6755;
        }),
        ("\"last\" has another owner", |x| {
            entry(x, "last").meta.gid = 0
        }),
        ("\"last\" has another time", |x| {
            entry(x, "last").meta.mtime.0 -= 1;
        }),
        ("\"last\" has another extended attribute", |x| {
            let xattr = (b"security.capability"[..].into(), b"\x01"[..].into());
            entry(x, "last").meta.xattrs.push(xattr);
        }),
        ("\"last\" has another kind, content or target", |x| {
            if let EntryKind::File(content) = &mut entry(x, "last").kind {
                content.digest = Digest::of(b"evil");
            }
        }),
        ("\"link\" has another kind, content or target", |x| {
            let target = b"last"[..].into();
            entry(x, "link").kind = EntryKind::Symlink { target };
        }),
        ("\"null\" has another kind, content or target", |x| {
            entry(x, "null").kind = EntryKind::Fifo;
        }),
        ("it does not have \"pipe\"", |x| _ = x.pop()),
        ("it has \"more\", the layer does not", |x| {
            let mut more = x[0].clone();
            more.path = b"more"[..].into();
            x.push(more);
        }),
        ("where the layer has", |x| {
            let at = x.iter().position(|e| matches!(e.kind, EntryKind::Whiteout));
            x.remove(at.unwrap());
        }),
    ];
    for compression in [Compression::Gzip, Compression::Zstd] {
        let layer = layer(compression);
        let table = layer.toc().await.unwrap().index;
        let unpacked = LayerIndex {
            entries: unpacked(compression, &layer.blob),
            ..table.clone()
        };
        for (why, change) in changes {
            let mut forged = table.clone();
            change(&mut forged.entries);
            let found = difference(&forged, &unpacked).unwrap_or_else(|| panic!("{why}"));
            assert!(found.contains(why), "{found} is not {why}");
        }
        // Seconds, cut off or rounded, are all that some tables have.
        let mut precise = unpacked.clone();
        entry(&mut precise.entries, "last").meta.mtime.1 = 500_000_000;
        let mut rounded = table.clone();
        for seconds in [0, 1] {
            entry(&mut rounded.entries, "last").meta.mtime.0 += seconds;
            assert_eq!(difference(&rounded, &precise), None);
        }
        assert!(difference(&rounded, &unpacked).is_some());
    }
}

#[tokio::test]
async fn a_table_that_cannot_be_trusted_is_none() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        let good = layer(compression);
        assert!(good.toc().await.is_some());
        let mut layer = layer(compression);
        layer.annotations.clear();
        assert_eq!(layer.toc().await, None);
        for key in good.annotations.keys() {
            for value in [
                "",
                "sha256:00",
                "1:2:3:4",
                "99999999:1:1:1",
                &Digest::of(b"").to_string(),
            ] {
                layer.annotations = good.annotations.clone();
                layer.annotations.insert(key.clone(), value.to_owned());
                assert_eq!(layer.toc().await, None, "{key} {value}");
            }
        }
        layer.annotations = good.annotations.clone();
        // Whatever bit of the table or the footer is wrong. (Not all bits of gzip mean something.)
        let index = good.toc().await.unwrap().index;
        let start = index.spans.last().unwrap().blob_start as usize;
        let mut refused = 0;
        for at in (start..good.blob.len()).step_by(7) {
            layer.blob[at] ^= 4;
            let bad = layer.toc().await;
            layer.blob[at] ^= 4;
            match bad {
                None => refused += 1,
                Some(toc) => assert_eq!(plain(&toc.index.entries), plain(&index.entries)),
            }
        }
        assert!(refused > 100);
    }
}

/// The error of a zstd:chunked layer with this table.
fn error_of(table: &Value) -> ImageError {
    let table = zstd::encode_all(table.to_string().as_bytes(), 1).unwrap();
    parse_chunked(&table).unwrap_err()
}

fn parse_chunked(table: &[u8]) -> Result<Toc, ImageError> {
    let annotations = BTreeMap::from([
        (CHUNKED_DIGEST[0].to_owned(), Digest::of(table).to_string()),
        (
            CHUNKED_POSITION[0].to_owned(),
            format!("1000:{}:9999:1", table.len()),
        ),
    ]);
    let layer = TocLayer {
        blob: Digest::of(b"blob"),
        size: 100_000,
        diff_id: Digest::of(b"diff"),
        annotations: &annotations,
    };
    layer.from_zstd_chunked(table)
}

#[test]
fn tables_that_make_no_sense_are_refused() {
    let digest = Digest::of(b"x").to_string();
    let file = |more: Value| {
        let mut row =
            json!({ "name": "f", "type": "reg", "size": 9, "offset": 5, "digest": digest });
        for (key, value) in more.as_object().unwrap() {
            row[key] = value.clone();
        }
        row
    };
    let cases = [
        ("version", json!({ "version": 2, "entries": [] })),
        ("no JSON of its kind", json!({ "version": 1 })),
        ("unknown type", json!([{ "name": "a", "type": "door" }])),
        (
            "out of the image",
            json!([{ "name": "../a", "type": "dir" }]),
        ),
        ("SHA-256", json!([file(json!({ "digest": "sha512:00" }))])),
        ("no digest", json!([file(json!({ "digest": "" }))])),
        ("no time", json!([file(json!({ "modtime": "yesterday" }))])),
        (
            "base64",
            json!([file(json!({ "xattrs": { "user.a": "?" } }))]),
        ),
        ("below zero", json!([file(json!({ "uid": -1 }))])),
        ("not in order", json!([file(json!({ "chunkSize": 5 }))])),
        ("not in order", json!([file(json!({ "chunkSize": 10 }))])),
        (
            "another order",
            json!([file(json!({})), file(json!({ "offset": 5 }))]),
        ),
        ("behind it", json!([file(json!({ "offset": 992 }))])),
        ("several chunks", json!([file(json!({ "innerOffset": 3 }))])),
        ("too large", json!([file(json!({ "size": 1u64 << 30 }))])),
        ("larger than", json!([file(json!({ "size": 1u64 << 40 }))])),
        ("chunk type", json!([file(json!({ "chunkType": "odd" }))])),
        (
            "no digest",
            json!([
                file(json!({ "chunkSize": 4 })),
                { "name": "f", "type": "chunk", "chunkOffset": 4, "offset": 9 },
            ]),
        ),
    ];
    for (why, rows) in cases {
        let table = match rows.is_array() {
            true => json!({ "version": 1, "entries": rows }),
            false => rows,
        };
        let error = error_of(&table);
        assert!(error.to_string().contains(why), "{why}: {error}");
        assert_ne!(error.kind(), ImageErrorKind::Corrupt);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Tables that whoever made the layer signed, and that no tool wrote.
    #[test]
    fn no_table_makes_a_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut writer = Writer::new(Compression::Zstd);
        writer.file("a", 0o644, &samples::text(9000));
        writer.other("b", b'2', "symlink", 0o777, "a");
        let mut text = json!({ "version": 1, "entries": writer.rows }).to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(text.len());
            // Digits for digits, so that most are still tables.
            text[at] = match text[at] {
                b'0'..=b'9' => b'0' + byte % 10,
                _ => byte,
            };
        }
        let table = zstd::encode_all(&text[..], 1).unwrap();
        if let Ok(toc) = parse_chunked(&table) {
            prop_assert_eq!(LayerIndex::decode(&toc.index.encode().unwrap()), Ok(toc.index));
        }
    }
}

#[test]
fn the_corpus() {
    let annotations = BTreeMap::new();
    let layer = TocLayer {
        blob: Digest::of(b"blob"),
        size: 100_000,
        diff_id: Digest::of(b"diff"),
        annotations: &annotations,
    };
    let check = |toc: Result<Toc, ImageError>| {
        if let Ok(toc) = toc {
            assert_eq!(
                LayerIndex::decode(&toc.index.encode().unwrap()),
                Ok(toc.index)
            );
        }
    };
    crate::corpus::replay("corpus/toc", |input| {
        check(parse_chunked(&zstd::encode_all(input, 1).unwrap()));
        check(parse_chunked(input));
        check(layer.build(Compression::Gzip, 90_000, input));
        let _ = stargz_text(input);
        let _ = stargz_offset(input, 100_000);
    });
}

#[test]
fn footers() {
    let layer = layer(Compression::Gzip);
    let size = layer.blob.len() as u64;
    let footer = &layer.blob[layer.blob.len() - FOOTER..];
    let start = stargz_offset(footer, size).unwrap();
    assert_eq!(layer.blob[start as usize..start as usize + 2], [31, 139]);
    assert!(stargz_offset(footer, start).is_err());
    assert!(stargz_offset(footer, 0).is_err());
    assert!(stargz_offset(&footer[1..], size).is_err());
    for at in (0..4).chain(10..16).chain(32..38) {
        let mut bad = footer.to_vec();
        bad[at] ^= 1;
        assert!(stargz_offset(&bad, size).is_err());
    }
}
