//! Every public parser of what comes from outside, on a corpus of valid and hostile inputs. Those of
//! private parsers are replayed by unit tests where the parsers are: `grep -r corpus::replay src`.

mod replay;

use bytes::Bytes;
use hearth::{
    config::Config,
    digest::Digest,
    image::{
        Compression, Decoder, ImageError, LayerIndex, Limits, Sink, Unpacker,
        profile::AccessProfile,
    },
    reference::Reference,
    tree::Artifact,
};

use self::replay::replay;

fn text(input: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(input)
}

#[test]
fn references() {
    replay("corpus/reference", |input| {
        for line in text(input).lines() {
            if let Ok(reference) = line.parse::<Reference>() {
                let shown = reference.to_string();
                assert_eq!(shown.parse::<Reference>().unwrap(), reference, "{shown}");
            }
        }
    });
}

#[test]
fn configurations() {
    replay("corpus/config", |input| {
        let _ = Config::parse(&text(input));
    });
}

/// Counts what it is told, and that it is told in order.
#[derive(Default)]
struct Count {
    left: Option<u64>,
    files: usize,
}

impl Sink for Count {
    type Error = ImageError;

    fn begin(&mut self, size: u64) -> Result<(), ImageError> {
        assert_eq!(self.left.replace(size), None);
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), ImageError> {
        assert!(!data.is_empty());
        self.hole(data.len() as u64)
    }

    fn hole(&mut self, len: u64) -> Result<(), ImageError> {
        let left = self.left.as_mut().unwrap();
        *left = left.checked_sub(len).expect("more than the file has");
        Ok(())
    }

    fn end(&mut self) -> Result<(), ImageError> {
        assert_eq!(self.left.take(), Some(0));
        self.files += 1;
        Ok(())
    }

    fn digests(&mut self) -> Result<Vec<Digest>, ImageError> {
        let files = std::mem::take(&mut self.files);
        Ok((0..files).map(|n| Digest::of(&n.to_le_bytes())).collect())
    }
}

#[test]
fn tars() {
    let unpack = |input: &[u8], piece: usize| {
        let mut sink = Count::default();
        let mut unpacker = Unpacker::new(Digest::of(b"layer"), Limits::default());
        for piece in input.chunks(piece) {
            unpacker.feed(piece, &mut sink)?;
        }
        unpacker.finish(&mut sink)
    };
    replay("tar", |input| {
        let whole = unpack(input, input.len().max(1));
        assert_eq!(whole, unpack(input, 613), "however it arrives");
        for entry in whole.into_iter().flatten() {
            let mut names = entry.path.split(|&byte| byte == b'/');
            assert!(!names.any(|name| name == b".." || name == b"."));
            assert!(!entry.path.starts_with(b"/"));
        }
    });
}

#[test]
fn compressed_layers() {
    const LIMIT: u64 = 4 << 20;
    replay("layer", |input| {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let mut decoded = 0;
            let decode = |out: &mut u64| -> Result<_, ImageError> {
                let mut decoder = Decoder::new(compression, LIMIT)?;
                decoder.feed(input, &mut |bytes: Bytes| {
                    *out += bytes.len() as u64;
                    Ok::<_, ImageError>(())
                })?;
                decoder.finish()
            };
            if let Ok(done) = decode(&mut decoded) {
                assert_eq!(done.size, decoded);
            }
            assert!(decoded <= LIMIT, "{decoded} bytes");
        }
    });
}

#[test]
fn indexes_of_layers() {
    /// Magic and version, then the checksum of the rest.
    const CHECKSUM: std::ops::Range<usize> = 9..41;
    let check = |input: &[u8]| {
        if let Ok(index) = LayerIndex::decode(input) {
            let again = LayerIndex::decode(&index.encode().unwrap());
            assert_eq!(again.as_ref(), Ok(&index));
            assert!(index.belongs_to(&index.blob, index.blob_size).is_ok());
        }
    };
    replay("corpus/index", |input| {
        check(input);
        // Whoever forges one makes its checksum, too.
        if input.len() > CHECKSUM.end {
            let mut forged = input.to_vec();
            let sum = Digest::of(&forged[CHECKSUM.end..]);
            forged[CHECKSUM].copy_from_slice(sum.as_bytes());
            check(&forged);
        }
    });
}

#[test]
fn profiles() {
    let check = |input: &[u8]| {
        if let Ok(profile) = AccessProfile::decode(input) {
            let again = AccessProfile::decode(&profile.encode().unwrap());
            assert_eq!(again, Ok(profile));
        }
    };
    replay("corpus/profile", |input| {
        check(input);
        // And as what is compressed in one.
        let body = zstd::bulk::compress(input, 1).unwrap();
        let mut forged = b"hrthprof\x01".to_vec();
        let mut left = body.len();
        while left >= 0x80 {
            forged.push(left as u8 | 0x80);
            left >>= 7;
        }
        forged.push(left as u8);
        check(&[forged, body].concat());
    });
}

#[test]
fn artifacts() {
    replay("corpus/artifact", |input| {
        if let Ok(artifact) = Artifact::decode(input) {
            assert_eq!(artifact.encode(), input, "one encoding");
        }
    });
}
