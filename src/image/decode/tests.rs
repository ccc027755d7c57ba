use proptest::prelude::*;

use super::*;
use crate::image::{ImageErrorKind, samples};

/// Decodes in pieces of `piece` bytes.
fn decode(
    compression: Compression,
    blob: &[u8],
    piece: usize,
) -> Result<(Vec<u8>, LayerIndex), ImageError> {
    let mut decoder = Decoder::new(compression, 1 << 30)?.hashing_blob();
    let mut data = Vec::new();
    for piece in blob.chunks(piece.max(1)) {
        decoder.feed(piece, &mut |bytes: Bytes| {
            data.extend_from_slice(&bytes);
            Ok::<_, ImageError>(())
        })?;
    }
    let decoded = decoder.finish()?;
    assert_eq!(decoded.blob, Some(Digest::of(blob)));
    assert_eq!(decoded.blob_size, blob.len() as u64);
    Ok((data, decoded.into_index(Digest::of(blob), Vec::new())))
}

/// Decodes, and then each span by itself.
fn check(compression: Compression, blob: &[u8], data: &[u8], piece: usize) -> LayerIndex {
    let (found, index) = decode(compression, blob, piece).unwrap();
    assert!(found == data, "{compression:?}");
    assert_eq!(
        (index.diff_id, index.size),
        (Digest::of(data), data.len() as u64)
    );
    let mut next = 0;
    for at in 0..index.spans.len() {
        let bytes = index.span_bytes(at);
        assert_eq!(bytes.start, next);
        next = bytes.end;
        let of_blob = index.span_blob_bytes(at);
        let of_blob = &blob[of_blob.start as usize..of_blob.end as usize];
        let span = index.decode_span(at, of_blob).unwrap();
        assert!(span == data[bytes.start as usize..bytes.end as usize]);
    }
    assert_eq!(next, index.size);
    index
}

#[test]
fn every_span_of_a_member_is_decoded_by_itself() {
    let data = [samples::text(9 << 20), samples::noise(3 << 20, 7)].concat();
    for level in [3, 6, 9] {
        let blob = samples::gzip(&data, level);
        let index = check(Compression::Gzip, &blob, &data, 1 << 20);
        assert!(index.spans.len() >= 6, "{}", index.spans.len());
        assert!(index.spans.iter().any(|span| span.bits > 0));
        // Where the spans are does not depend on how the layer arrived.
        assert_eq!(decode(Compression::Gzip, &blob, 777).unwrap().1, index);
        let windows: usize = index.spans.iter().map(|span| span.window.len()).sum();
        assert!(windows * 50 < blob.len(), "{windows} of {}", blob.len());
    }
    // Stored blocks start at whole bytes; level 1 may make one block of it all.
    check(Compression::Gzip, &samples::gzip(&data, 0), &data, 100_000);
    check(Compression::Gzip, &samples::gzip(&data, 1), &data, 100_000);
}

#[test]
fn members_need_no_window_and_padding_is_no_content() {
    let data = samples::text(5 << 20);
    let parts = data.chunks(300_000).map(|part| samples::gzip(part, 6));
    let mut blob = parts.collect::<Vec<_>>().concat();
    blob.extend(samples::gzip(b"", 6));
    let plain = check(Compression::Gzip, &blob, &data, 4096);
    assert!(plain.spans.iter().all(|span| span.window.is_empty()));
    assert!(plain.spans.len() > 4);
    blob.extend([0; 1000]);
    let padded = check(Compression::Gzip, &blob, &data, 4096);
    assert_eq!(padded.spans, plain.spans);
    blob.push(1);
    let error = decode(Compression::Gzip, &blob, 4096).unwrap_err();
    assert!(error.to_string().contains("follow its last member"));
}

#[test]
fn frames_and_plain_tars_have_spans() {
    let data = samples::text(6 << 20);
    let parts = data
        .chunks(400_000)
        .map(|part| zstd::encode_all(part, 3).unwrap());
    let mut blob = parts.collect::<Vec<_>>().concat();
    // A skippable frame (RFC 8878, 3.1.2).
    blob.extend(b"\x50\x2a\x4d\x18\x05\0\0\0abcde");
    let index = check(Compression::Zstd, &blob, &data, 5000);
    assert!(index.spans.len() >= 4);
    let one = zstd::encode_all(&data[..], 3).unwrap();
    assert_eq!(check(Compression::Zstd, &one, &data, 5000).spans.len(), 1);
    assert_eq!(check(Compression::None, &data, &data, 1000).spans.len(), 6);
}

#[test]
fn small_layers() {
    for data in [&b""[..], b"x"] {
        let zstd = zstd::encode_all(data, 3).unwrap();
        for (compression, blob) in [
            (Compression::Gzip, samples::gzip(data, 6)),
            (Compression::Zstd, zstd),
            (Compression::None, data.to_vec()),
        ] {
            let index = check(compression, &blob, data, 1);
            assert_eq!(index.spans.len(), data.len());
            for cut in 0..blob.len() {
                let cut = decode(compression, &blob[..cut], 3);
                assert!(cut.is_err() || compression == Compression::None);
            }
        }
    }
}

#[test]
fn errors_of_the_sink_pass_through() {
    let data = samples::text(2 << 20);
    let blob = samples::gzip(&data, 6);
    let mut decoder = Decoder::new(Compression::Gzip, 1 << 30).unwrap();
    for _ in 0..3 {
        let refused = decoder.feed(&blob[..9000], &mut |_| Err(ImageError::corrupt("full")));
        assert!(refused.is_err());
    }
}

#[test]
fn no_more_than_allowed_is_decoded() {
    let bomb = samples::gzip(&vec![0; 64 << 20], 9);
    let mut decoder = Decoder::new(Compression::Gzip, 1 << 20).unwrap();
    let mut seen = 0;
    let error = decoder.feed(&bomb, &mut |bytes: Bytes| {
        seen += bytes.len();
        Ok::<_, ImageError>(())
    });
    assert_eq!(error.unwrap_err().kind(), ImageErrorKind::TooLarge);
    assert!(seen <= 1 << 20);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_broken_is_no_other_layer(
        at in any::<prop::sample::Index>(),
        bit in 0..8u8,
        compression in prop::sample::select(vec![Compression::Gzip, Compression::Zstd]),
    ) {
        let data = samples::text(1_300_000);
        let mut blob = match compression {
            Compression::Gzip => samples::gzip(&data, 6),
            _ => data.chunks(1 << 20).flat_map(|part| zstd::encode_all(part, 1).unwrap()).collect(),
        };
        let (_, index) = decode(compression, &blob, 1 << 20).unwrap();
        let at = at.index(blob.len());
        blob[at] ^= 1 << bit;
        if let Ok((_, other)) = decode(compression, &blob, 1 << 20) {
            // Zstd has no checksum here, and headers of gzip have bits without meaning.
            prop_assert!(other.diff_id != index.diff_id || at < 10 || compression == Compression::Zstd);
            prop_assert_ne!(other.blob, index.blob);
        }
        for span in 0..index.spans.len() {
            let range = index.span_blob_bytes(span);
            let range = range.start as usize..range.end as usize;
            if let Ok(found) = index.decode_span(span, &blob[range.clone()]) {
                let bytes = index.span_bytes(span);
                prop_assert!(found == data[bytes.start as usize..bytes.end as usize]);
            }
            let cut = index.decode_span(span, &blob[range.start..range.start + range.len() / 2]);
            prop_assert_eq!(cut.unwrap_err().kind(), ImageErrorKind::Corrupt);
        }
    }
}
