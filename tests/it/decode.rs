//! A corpus of compressed layers, good and bad: what each decodes to, or why not.

use std::{collections::BTreeMap, fs, path::PathBuf};

use bytes::Bytes;
use hearth::image::{Compression, Decoded, Decoder, ImageError};

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/layer")
}

fn decode(name: &str, blob: &[u8], piece: usize) -> Result<(Vec<u8>, Decoded), ImageError> {
    let compression = match name.rsplit_once('.') {
        Some((_, "gz")) => Compression::Gzip,
        _ => Compression::Zstd,
    };
    let mut decoder = Decoder::new(compression, 1 << 20)?;
    let mut data = Vec::new();
    for piece in blob.chunks(piece) {
        decoder.feed(piece, &mut |bytes: Bytes| {
            data.extend_from_slice(&bytes);
            Ok::<_, ImageError>(())
        })?;
    }
    Ok((data, decoder.finish()?))
}

/// `fixtures/layer/expected` has a line for each file: its name, and its diff id and decoded size, or
/// the error. A difference is to be looked at; then the new text goes into the file.
#[test]
fn each_layer_of_the_corpus_is_what_it_was() {
    let mut found = BTreeMap::new();
    for file in fs::read_dir(corpus()).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "expected" {
            continue;
        }
        let blob = fs::read(&path).unwrap();
        let whole = decode(&name, &blob, blob.len());
        // However it arrives.
        for piece in [1, 2, 3, 7, 100] {
            let again = decode(&name, &blob, piece);
            match (&whole, &again) {
                (Ok(whole), Ok(again)) => assert_eq!(whole, again, "{name}"),
                (Err(_), Err(_)) => {}
                _ => panic!("{name}: {whole:?} at once, {again:?} in pieces of {piece}"),
            }
        }
        assert_eq!(
            whole.is_err(),
            name.starts_with("bad-"),
            "{name}: {whole:?}"
        );
        let line = match whole {
            Ok((_, decoded)) => format!("{} {}", decoded.diff_id, decoded.size),
            Err(error) => error.to_string(),
        };
        found.insert(name, line);
    }
    assert!(found.len() > 30);
    let found: String = found
        .iter()
        .map(|(name, line)| format!("{name}: {line}\n"))
        .collect();
    let expected = fs::read_to_string(corpus().join("expected")).unwrap_or_default();
    assert!(found == expected, "found:\n{found}\nexpected:\n{expected}");
}
