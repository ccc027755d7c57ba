//! Bytes to decode, for the tests of this room.

pub(crate) use super::inflate::gzip;

/// `len` bytes that compress like source code does.
pub(crate) fn text(len: usize) -> Vec<u8> {
    const WORDS: [&str; 12] = [
        "let ", "self.", "fn ", "return ", "0x", "();\n", "    ", "import ", "None", "== ", "data",
        "\u{e9}",
    ];
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        out.extend_from_slice(WORDS[(seed % 12) as usize].as_bytes());
        if seed & 0x300 == 0 {
            out.extend_from_slice(format!("{:x}", seed >> 30).as_bytes());
        }
    }
    out.truncate(len);
    out
}

/// `len` bytes that do not compress.
pub(crate) fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    seed |= 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        out.extend_from_slice(&seed.to_le_bytes());
    }
    out.truncate(len);
    out
}
